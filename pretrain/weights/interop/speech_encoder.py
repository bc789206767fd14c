"""The shared speech encoder's tensors and configuration to fairseq (and s3prl) and transformers, and back.

fairseq: fairseq/models/hubert/hubert.py, fairseq/models/wav2vec/wav2vec2.py. transformers: models/hubert/
configuration_hubert.py, models/wav2vec2_conformer/configuration_wav2vec2_conformer.py.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from pretrain.config import encoder_config
from pretrain.models.positions import position_kernel
from pretrain.models.speech_config import SpeechEncoderConfig
from pretrain.weights.interop import position_bias as bias
from pretrain.weights.interop.speech_encoder_keys import (
    FAIRSEQ_KEYS,
    HUGGINGFACE_KEYS,
    fairseq_ballast,
    huggingface_ballast,
)
from pretrain.weights.interop.types import InteropError

# Layers of a model that somebody writes by hand; a larger repeat count in a stranger's file is an attack or an error.
_MAX_CONV_LAYERS = 64

# transformers wrote these names before torch's weight norm became a parametrization; both occur in published files.
_OLD_WEIGHT_NORM = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}

# fairseq's own defaults (dataclasses HubertConfig, Wav2Vec2Config), for fields that a checkpoint leaves out.
_FAIRSEQ_FIELDS: dict[str, Any] = {
    "extractor_mode": "default",
    "conv_feature_layers": "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2",
    "conv_bias": False,
    "encoder_layers": 12,
    "encoder_embed_dim": 768,
    "encoder_ffn_embed_dim": 3072,
    "encoder_attention_heads": 12,
    "layer_norm_first": False,
    "conv_pos": 128,
    "conv_pos_groups": 16,
    "pos_conv_depth": 1,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.0,
    "dropout_input": 0.0,
    "encoder_layerdrop": 0.0,
    "feature_grad_mult": 1.0,
}
_FAIRSEQ_FIXED: dict[str, Any] = {"activation_fn": "gelu"}
# Written and read for conformers alone; a conformer of fairseq's with pos_enc_type "abs" is none that we build.
_FAIRSEQ_CONFORMER_FIELDS: dict[str, Any] = {"pos_enc_type": "abs", "depthwise_conv_kernel_size": 31}

# (ours, transformers', transformers' default)
_HUGGINGFACE_FIELDS: list[tuple[str, str, Any]] = [
    ("conv_bias", "conv_bias", False),
    ("encoder_layers", "num_hidden_layers", 12),
    ("encoder_embed_dim", "hidden_size", 768),
    ("encoder_ffn_embed_dim", "intermediate_size", 3072),
    ("encoder_attention_heads", "num_attention_heads", 12),
    ("conv_pos", "num_conv_pos_embeddings", 128),
    ("conv_pos_groups", "num_conv_pos_embedding_groups", 16),
    ("dropout", "hidden_dropout", 0.1),
    ("attention_dropout", "attention_dropout", 0.1),
    ("activation_dropout", "activation_dropout", 0.1),
    ("dropout_input", "feat_proj_dropout", 0.0),
    ("encoder_layerdrop", "layerdrop", 0.1),
]
_HUGGINGFACE_CONV = {
    "conv_dim": [512, 512, 512, 512, 512, 512, 512],
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
}
_HUGGINGFACE_FIXED: dict[str, Any] = {
    "feat_extract_activation": "gelu",
    "feat_proj_layer_norm": True,
    "conv_pos_batch_norm": False,
    "layer_norm_eps": 1e-5,
}
# (transformers' field, its value for our Transformer and for our conformer)
_HUGGINGFACE_ACTIVATION = {"transformer": "gelu", "conformer": "swish"}
_HUGGINGFACE_CONFORMER_TYPE = "wav2vec2-conformer"
_HUGGINGFACE_POSITIONS = {"rel_pos": "relative", "rope": "rotary"}
# fairseq's conformer has one dropout, transformers' has these beside hidden_dropout.
_HUGGINGFACE_CONFORMER_DROPOUTS = ("attention_dropout", "activation_dropout", "conformer_conv_dropout")
# The class with several positional convolutions, which counts them in the field where the others state the kernel.
_HUGGINGFACE_STACKED_TYPE = "data2vec-audio"
_HUGGINGFACE_STACK = {"num_conv_pos_embeddings": 5, "conv_pos_kernel_size": 19}
_EXTRACTOR_TO_NORM = {"default": "group", "layer_norm": "layer"}


def state_to_fairseq(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Our encoder's tensors under fairseq's names; `config` is ours.

    Raises InteropError where convolutions and Transformer are equally wide: fairseq then has no projection to take
    ours.
    """
    config = _complete(config)
    if _conv_dim(config) == config["encoder_embed_dim"]:
        raise InteropError(
            f"method.encoder.encoder_embed_dim: {config['encoder_embed_dim']} is also the width of the convolutions, "
            "where fairseq and s3prl have no post_extract_proj; export to native or huggingface"
        )
    table = FAIRSEQ_KEYS[config["extractor_mode"], config["layer_type"]]
    return table.to_theirs(split_qkv(state)) | fairseq_ballast(config)


def state_from_fairseq(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """fairseq's or s3prl's encoder tensors (heads removed) under our names; `config` is ours."""
    config = _complete(config)
    table, ballast = FAIRSEQ_KEYS[config["extractor_mode"], config["layer_type"]], fairseq_ballast(config)
    ours = fuse_qkv(table.to_ours({key: value for key, value in state.items() if key not in ballast}))
    if _conv_dim(config) == config["encoder_embed_dim"] and "post_extract_proj.weight" not in ours:
        ours["post_extract_proj.weight"] = torch.eye(config["encoder_embed_dim"])
        ours["post_extract_proj.bias"] = torch.zeros(config["encoder_embed_dim"])
    return ours


def state_to_huggingface(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Our encoder's tensors under the names of transformers' base model; `config` is ours."""
    config = _complete(config)
    return HUGGINGFACE_KEYS[config["layer_type"]].to_theirs(split_qkv(state)) | huggingface_ballast(config)


def state_from_huggingface(state: Mapping[str, Tensor], config: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    """The tensors of a transformers model under our names; `config` is ours.

    `prefix` is the class's `base_model_prefix`: files of models with a head hold the base model below it, and the head
    outside, which is left out. A model that was fine-tuned without masking has no mask embedding; a fresh one is drawn.
    """
    config = _complete(config)
    if any(key.startswith(f"{prefix}.") for key in state):
        state = {key.removeprefix(f"{prefix}."): v for key, v in state.items() if key.startswith(f"{prefix}.")}
    modern = {}
    for key, value in state.items():
        stem, _, last = key.rpartition(".")
        modern[f"{stem}.{_OLD_WEIGHT_NORM[last]}" if last in _OLD_WEIGHT_NORM else key] = value
    modern.setdefault("masked_spec_embed", torch.rand(config["encoder_embed_dim"]))
    ballast = huggingface_ballast(config)
    kept = {key: value for key, value in modern.items() if key not in ballast}
    return fuse_qkv(HUGGINGFACE_KEYS[config["layer_type"]].to_ours(kept))


def split_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace each `qkv_proj` (rows q, k, v) by `q_proj`, `k_proj` and `v_proj`."""
    split: dict[str, Tensor] = {}
    for key, value in state.items():
        if ".qkv_proj." not in key:
            split[key] = value
            continue
        for name, part in zip("qkv", value.chunk(3), strict=True):
            # Cloned, because torch.save writes the whole storage behind a view.
            split[key.replace(".qkv_proj.", f".{name}_proj.")] = part.clone()
    return split


def fuse_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace each `q_proj`, `k_proj`, `v_proj` by one `qkv_proj`; raises InteropError where one of them is missing."""
    fused: dict[str, Tensor] = {}
    for key, value in state.items():
        if ".q_proj." in key:
            names = [key.replace(".q_proj.", f".{letter}_proj.") for letter in "qkv"]
            if missing := [name for name in names if name not in state]:
                raise InteropError(f"state dict: missing {', '.join(missing)}; the file is incomplete")
            fused[key.replace(".q_proj.", ".qkv_proj.")] = torch.cat([state[name] for name in names])
        elif ".k_proj." not in key and ".v_proj." not in key:
            fused[key] = value
    return fused


def config_to_fairseq(config: Mapping[str, Any], position_bias: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our encoder's config as the encoder's share of fairseq's model config and of its task config.

    `position_bias` says whether fairseq's model has WavLM's position bias; raises InteropError where ours differs.
    """
    config = _complete(config)
    bias.require(config, position_bias, "fairseq")
    model = {name: config[name] for name in _FAIRSEQ_FIELDS}
    model["conv_feature_layers"] = repr([tuple(layer) for layer in config["conv_feature_layers"]])
    model |= {"activation_fn": "gelu", "layer_type": config["layer_type"], "required_seq_len_multiple": 2}
    model |= bias.to_fairseq(config)
    if config["layer_type"] == "conformer":
        model |= {"attn_type": "espnet", **{name: config[name] for name in _FAIRSEQ_CONFORMER_FIELDS}}
    return model, {"sample_rate": 16000, "normalize": config["normalize"]}


def config_from_fairseq(model: Mapping[str, Any], task: Mapping[str, Any]) -> dict[str, Any]:
    """fairseq's model and task config as our encoder's config; raises InteropError for what our encoder lacks."""
    _require(model, _FAIRSEQ_FIXED, "model config")
    config = {name: model.get(name, default) for name, default in _FAIRSEQ_FIELDS.items()}
    config["conv_feature_layers"] = parse_conv_layers(config["conv_feature_layers"])
    config |= {"normalize": bool(task.get("normalize", False)), "frame_length_rule": "fold"}
    if model.get("layer_type", "transformer") == "transformer":
        return _complete(config | bias.from_fairseq(model))
    config |= {name: model.get(name, default) for name, default in _FAIRSEQ_CONFORMER_FIELDS.items()}
    layers, attention = model["layer_type"], model.get("attn_type") or "fairseq"
    if layers != "conformer" or attention != "espnet" or config["pos_enc_type"] not in _HUGGINGFACE_POSITIONS:
        raise InteropError(
            f"model config: layer_type: {layers!r} with attn_type {attention!r} and pos_enc_type "
            f"{config['pos_enc_type']!r} is not supported, only a conformer with 'espnet' and 'rel_pos' or 'rope'; "
            "this checkpoint cannot be imported"
        )
    return _complete(config | {"layer_type": layers})


def config_to_huggingface(
    config: Mapping[str, Any], stacked_positions: bool = False, position_bias: bool = False
) -> dict[str, Any]:
    """Our encoder's config in transformers' fields, each of them explicit; a conformer's with its `model_type`.

    `stacked_positions` says whether the class has several positional convolutions, as data2vec's, or one, and
    `position_bias` whether it has WavLM's position bias.

    SpecAugment is on by default in transformers and would mask the input of whoever fine-tunes without knowing it; a
    `mask_time_prob` above 0 is still needed for the class to own `masked_spec_embed`. Raises InteropError for a
    conformer with its norms last, which transformers does not have, and for positions that the class does not have.
    """
    config = _complete(config)
    depth = config["pos_conv_depth"]
    if config["layer_type"] == "transformer" and stacked_positions != (depth > 1):
        raise InteropError(
            f"method.encoder.pos_conv_depth: {depth} has no counterpart in transformers' class of this model, which "
            f"has {'several positional convolutions' if stacked_positions else 'one positional convolution'}; export "
            "to native or s3prl"
        )
    bias.require(config, position_bias, "transformers")
    dims, kernels, strides = zip(*config["conv_feature_layers"], strict=True)
    kernel = position_kernel(config["conv_pos"], depth)
    return {
        **{theirs: config[ours] for ours, theirs, _ in _HUGGINGFACE_FIELDS},
        **_HUGGINGFACE_FIXED,
        **_layers_to_huggingface(config),
        **(dict(zip(_HUGGINGFACE_STACK, (depth, kernel), strict=True)) if stacked_positions else {}),
        **bias.to_huggingface(config),
        "conv_dim": list(dims),
        "conv_kernel": list(kernels),
        "conv_stride": list(strides),
        "num_feat_extract_layers": len(dims),
        "feat_extract_norm": _EXTRACTOR_TO_NORM[config["extractor_mode"]],
        "initializer_range": 0.02,
        "final_dropout": 0.0,
        "apply_spec_augment": False,
        "mask_time_prob": 0.05,
        "mask_time_length": 10,
        "mask_time_min_masks": 2,
        "mask_feature_prob": 0.0,
        "mask_feature_length": 10,
        "mask_feature_min_masks": 0,
        "dtype": "float32",
    }


def _layers_to_huggingface(config: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {"hidden_act": _HUGGINGFACE_ACTIVATION[config["layer_type"]]}
    if config["layer_type"] == "transformer":
        return fields | {"do_stable_layer_norm": config["layer_norm_first"]}
    if not config["layer_norm_first"]:
        raise InteropError(
            "method.encoder.layer_norm_first: false in a conformer has no counterpart in transformers, whose conformer "
            "always ends with the norm; export to native or s3prl"
        )
    return fields | {
        "model_type": _HUGGINGFACE_CONFORMER_TYPE,
        **dict.fromkeys(_HUGGINGFACE_CONFORMER_DROPOUTS, config["dropout"]),
        "position_embeddings_type": _HUGGINGFACE_POSITIONS[config["pos_enc_type"]],
        "rotary_embedding_base": 10000,
        "conv_depthwise_kernel_size": config["depthwise_conv_kernel_size"],
    }


def config_from_huggingface(config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' config as ours; raises InteropError for what our encoder lacks.

    Without preprocessor_config.json the waveform is normalised exactly where the extractor has layer norms, which is
    how the published models were trained. What transformers does not store takes its neutral value.
    """
    _require(config, _HUGGINGFACE_FIXED, "config.json")
    modes = {norm: mode for mode, norm in _EXTRACTOR_TO_NORM.items()}
    stacked = config.get("model_type") == _HUGGINGFACE_STACKED_TYPE
    norm = "layer" if stacked else config.get("feat_extract_norm", "group")
    if norm not in modes:
        raise InteropError(f"config.json: feat_extract_norm: {norm!r} is not supported, only {' and '.join(modes)}")
    mode = modes[norm]
    conv = [config.get(name, default) for name, default in _HUGGINGFACE_CONV.items()]
    if not all(isinstance(sizes, list) and len(sizes) == len(conv[0]) for sizes in conv):
        raise InteropError(f"config.json: {', '.join(_HUGGINGFACE_CONV)}: {conv}: give three lists of one length")
    return _complete(
        {
            "extractor_mode": mode,
            "conv_feature_layers": [list(layer) for layer in zip(*conv, strict=True)],
            **{ours: config.get(theirs, default) for ours, theirs, default in _HUGGINGFACE_FIELDS},
            **_layers_from_huggingface(config),
            **(_stack_from_huggingface(config) if stacked else {}),
            **bias.from_huggingface(config),
            "feature_grad_mult": 1.0,
            "normalize": bool(preprocessor.get("do_normalize", mode == "layer_norm")),
            "frame_length_rule": "conv",
        }
    )


def _layers_from_huggingface(config: Mapping[str, Any]) -> dict[str, Any]:
    layer_type = "conformer" if config.get("model_type") == _HUGGINGFACE_CONFORMER_TYPE else "transformer"
    activation = {"hidden_act": config.get("hidden_act", "gelu")}
    _require(activation, {"hidden_act": _HUGGINGFACE_ACTIVATION[layer_type]}, "config.json")
    if layer_type == "transformer":
        return {"layer_norm_first": config.get("do_stable_layer_norm", False)}
    positions = {theirs: ours for ours, theirs in _HUGGINGFACE_POSITIONS.items()}
    theirs = config.get("position_embeddings_type", "relative")
    if theirs not in positions:
        raise InteropError(
            f"config.json: position_embeddings_type: {theirs!r} is not supported, only {' and '.join(positions)}; "
            "this checkpoint cannot be imported"
        )
    _require(config, {"rotary_embedding_base": 10000}, "config.json")
    return {
        "layer_norm_first": True,
        "layer_type": layer_type,
        "pos_enc_type": positions[theirs],
        "depthwise_conv_kernel_size": config.get("conv_depthwise_kernel_size", 31),
    }


def _stack_from_huggingface(config: Mapping[str, Any]) -> dict[str, Any]:
    """Several positional convolutions; ours begin at two of three frames, as fairseq's."""
    depth, kernel = (config.get(name, default) for name, default in _HUGGINGFACE_STACK.items())
    if depth < 2 or kernel < 3:
        raise InteropError(
            f"config.json: {', '.join(_HUGGINGFACE_STACK)}: {depth} of {kernel} frames are not supported, only 2 or "
            "more of 3 or more; this checkpoint cannot be imported"
        )
    return {"pos_conv_depth": depth, "conv_pos": depth * kernel}


def parse_conv_layers(layers: str | list[Any], field: str = "conv_feature_layers") -> list[list[int]]:
    """`"[(512,10,5)] + [(512,3,2)] * 4"`, as fairseq writes it, or a plain list, to [[dim, kernel, stride], ...].

    Only lists, tuples, integers, + and * are understood, so nothing in a stranger's file is executed. Raises
    InteropError, naming the `field`, for anything else.
    """
    problem = InteropError(f"model config: {field}: cannot read {layers!r}; write a list of (dim, kernel, stride)")
    if isinstance(layers, str):
        try:
            layers = _evaluate(ast.parse(layers, mode="eval").body)
        except (SyntaxError, ValueError) as error:
            raise problem from error
    if not isinstance(layers, list) or not all(isinstance(layer, list | tuple) and len(layer) == 3 for layer in layers):
        raise problem
    return [[int(number) for number in layer] for layer in layers]


def _evaluate(node: ast.expr) -> Any:
    match node:
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_evaluate(item) for item in items]
        case ast.Constant(value=int() as number):
            return number
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            first, second = _evaluate(left), _evaluate(right)
            if isinstance(first, list) and isinstance(second, list):
                return first + second
        case ast.BinOp(left=left, op=ast.Mult(), right=ast.Constant(value=int() as times)) if times <= _MAX_CONV_LAYERS:
            repeated = _evaluate(left)
            if isinstance(repeated, list) and len(repeated) * times <= _MAX_CONV_LAYERS:
                return repeated * times
    raise ValueError("not a list of layers")


def _complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our config with every field: exports from before there were conformers lack the fields that name them."""
    return asdict(encoder_config(SpeechEncoderConfig, dict(config)))


def _conv_dim(config: Mapping[str, Any]) -> int:
    return config["conv_feature_layers"][-1][0]


def _require(config: Mapping[str, Any], fixed: Mapping[str, Any], origin: str) -> None:
    for name, expected in fixed.items():
        if config.get(name, expected) != expected:
            raise InteropError(
                f"{origin}: {name}: {config[name]!r} is not supported, only {expected!r}; "
                "this checkpoint cannot be imported"
            )
