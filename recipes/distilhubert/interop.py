"""DistilHuBERT's student in the files of other projects: s3prl's distiller checkpoint, and transformers' `HubertModel`.

Sources: s3prl/upstream/distiller/model.py, s3prl/pretrain/distiller/pretrain_expert.py; transformers models/hubert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pretrain.weights.interop import speech_encoder
from pretrain.weights.interop.fairseq_layout import huggingface_preprocessor
from pretrain.weights.interop.types import HuggingFaceModel, Imported, InteropError, TrainedMethod

HF_MODEL_TYPES = ("hubert",)
# What tells a DistilHuBERT from a HuBERT in transformers, which has one class for both.
HF_FIELDS = {"feat_proj_layer_norm": False}
# With these the class owns no mask embedding, which the student lacks.
_HF_NO_MASKS = {"mask_time_prob": 0.0, "mask_feature_prob": 0.0}

# Options of the encoder that s3prl calls as we do, with the values that it takes where a file leaves them out.
_OPTIONS: dict[str, Any] = {
    "extractor_mode": "default",
    "feature_grad_mult": 1.0,
    "conv_pos": 128,
    "conv_pos_groups": 16,
    "encoder_layers": 1,
    "encoder_embed_dim": 768,
    "encoder_ffn_embed_dim": 3072,
    "encoder_attention_heads": 12,
    "layer_norm_first": False,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.1,
    "encoder_layerdrop": 0.0,
}
_CONV_LAYERS, _DEFAULT_LAYERS = "extractor_conv_feature_layers", "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2"
# Options of s3prl's model that ours lacks, with the value that says what ours does; s3prl's defaults are the same.
_FIXED: dict[str, Any] = {
    "activation_fn": "gelu",
    "attention_type": "original",
    "out_layer_type": "expand-last",
    "task_emb_type": "expand-last",
    "extractor_dropout": 0.0,
}
# Options of ours that s3prl's model lacks, with the value that says what it does.
_ONLY_OURS: dict[str, Any] = {
    "conv_bias": False,
    "normalize": False,
    "frame_length_rule": "conv",
    "layer_type": "transformer",
    "pos_conv_depth": 1,
}


def from_pt(checkpoint: Mapping[str, Any]) -> Imported:
    """A checkpoint of s3prl's distiller as our student and heads; it holds no teacher.

    Raises InteropError for another checkpoint, and for options that our student or heads lack.
    """
    config, state = checkpoint.get("Config"), checkpoint.get("Distiller")
    if not isinstance(config, Mapping) or not isinstance(state, Mapping) or "distiller" not in config:
        raise InteropError(
            f"keys {', '.join(map(str, checkpoint))}: no checkpoint of s3prl's distiller, which has Config and "
            "Distiller; give one of these"
        )
    theirs = config["distiller"]
    width = theirs.get("encoder_embed_dim", _OPTIONS["encoder_embed_dim"])
    between = theirs.get("out_layer_inter_dim", -1)
    if between not in (-1, width):
        raise InteropError(f"Config.distiller.out_layer_inter_dim: {between} is not supported, only -1 and {width}")
    for name, value in _FIXED.items():
        if theirs.get(name, value) != value:
            raise InteropError(
                f"Config.distiller.{name}: {theirs[name]!r} is not supported, only {value!r}; this checkpoint cannot "
                "be imported"
            )
    options = {name: theirs.get(name, default) for name, default in _OPTIONS.items()}
    layers = {"conv_feature_layers": theirs.get(_CONV_LAYERS, _DEFAULT_LAYERS)}
    encoder = speech_encoder.config_from_fairseq(options | layers, {}) | {"frame_length_rule": "conv"}
    tensors = {key: value for key, value in state.items() if not key.startswith("output_layer.")}
    return Imported(encoder, speech_encoder.state_from_fairseq(tensors, encoder), _heads_from_s3prl(state))


def to_s3prl(trained: TrainedMethod) -> dict[str, Any]:
    """The checkpoint that s3prl's `distiller_local` loads strictly, heads included.

    Raises InteropError for a student that s3prl cannot build.
    """
    encoder, heads = trained.encoder_config(), trained.head_state()
    for name, value in _ONLY_OURS.items():
        if encoder.get(name, value) != value:
            raise InteropError(
                f"method.encoder.{name}: {encoder[name]!r} has no counterpart in s3prl's distiller, only {value!r}; "
                "export to native"
            )
    state = speech_encoder.state_to_fairseq(trained.encoder_state(), encoder) | _heads_to_s3prl(heads)
    distiller = distiller_config(trained.config, heads["heads.weight"].shape[2])
    return {"Config": {"distiller": distiller}, "Distiller": state}


def distiller_config(config: Mapping[str, Any], final_dim: int) -> dict[str, Any]:
    """Our method's block as s3prl's options; `final_dim` is the width of the teacher's hidden states."""
    options = speech_encoder.config_to_fairseq(config["encoder"])[0]
    return {
        **{name: options[name] for name in _OPTIONS},
        **_FIXED,
        _CONV_LAYERS: str([tuple(layer) for layer in config["encoder"]["conv_feature_layers"]]),
        "final_dim": final_dim,
        "n_tasks": len(config["pred_layer_id"]),
        "pred_layer_id": list(config["pred_layer_id"]),
        "loss_type": "l1",
        "feat_pen_loss": 0.0,
        **{name: config[name] for name in ("cosine_loss", "init_teacher_conv_layers", "init_teacher_encoder_layers")},
    }


def from_huggingface(model: HuggingFaceModel) -> Imported:
    """A `HubertModel` without a norm before its projection, or a model with a head on it, as our student.

    transformers keeps no prediction heads. Raises InteropError for a HuBERT.
    """
    for name, value in HF_FIELDS.items():
        if model.config.get(name) != value:
            raise InteropError(
                f"{name}: {model.config.get(name)!r} says that this is a HuBERT, in a DistilHuBERT it is {value}; read "
                "it as hubert, or give another folder"
            )
    # The shared reader knows the class with the norm alone, on which nothing else depends.
    config = speech_encoder.config_from_huggingface(model.config | {"feat_proj_layer_norm": True}, model.preprocessor)
    state = speech_encoder.state_from_huggingface(model.tensors, config, prefix="hubert")
    return Imported(config, {key: value for key, value in state.items() if key != "mask_emb"})


def to_huggingface(trained: TrainedMethod) -> HuggingFaceModel:
    """What `transformers.HubertModel.from_pretrained` and `AutoFeatureExtractor` load."""
    config = trained.encoder_config()
    hf_config = speech_encoder.config_to_huggingface(config) | HF_FIELDS | _HF_NO_MASKS
    hf_config |= {"architectures": ["HubertModel"], "model_type": "hubert"}
    tensors = speech_encoder.state_to_huggingface(trained.encoder_state(), config)
    return HuggingFaceModel(hf_config, tensors, huggingface_preprocessor(config))


def _heads_to_s3prl(heads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Ours under s3prl's names; its `SplitLinear` of a single head is a plain linear layer."""
    weight, bias = heads["heads.weight"], heads["heads.bias"]
    last = {"weight": weight, "bias": bias[None, None]}
    if len(weight) == 1:
        last = {"layer.weight": weight[0].t().contiguous(), "layer.bias": bias[0]}
    first = {f"output_layer.0.{name}": heads[f"heads.hidden.{name}"] for name in ("weight", "bias")}
    return first | {f"output_layer.2.{name}": value for name, value in last.items()}


def _heads_from_s3prl(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Theirs under our names; empty where the file has none."""
    if "output_layer.0.weight" not in state:
        return {}
    ours = {f"heads.hidden.{name}": state[f"output_layer.0.{name}"] for name in ("weight", "bias")}
    if "output_layer.2.layer.weight" in state:
        weight, bias = state["output_layer.2.layer.weight"].t()[None], state["output_layer.2.layer.bias"][None]
    else:
        weight, bias = state["output_layer.2.weight"], state["output_layer.2.bias"][0, 0]
    return ours | {"heads.weight": weight.contiguous(), "heads.bias": bias.contiguous()}
