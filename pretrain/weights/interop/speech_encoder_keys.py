"""Parameter names of the shared speech encoder in fairseq (and s3prl) and in transformers.

fairseq: fairseq/models/hubert/hubert.py, fairseq/models/wav2vec/wav2vec2.py, fairseq/modules/conformer_layer.py.
transformers: models/hubert/modeling_hubert.py, models/wav2vec2_conformer/modeling_wav2vec2_conformer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pretrain.models.positions import rotary_rates
from pretrain.weights.interop.tables import KeyTable

_LAYER = "encoder.layers.{j}."


def _layer(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(_LAYER + ours, _LAYER + theirs) for ours, theirs in pairs]


_POSITIONAL_CONV = ("encoder.pos_conv.weight_g", "encoder.pos_conv.weight_v", "encoder.pos_conv.bias")
_FAIRSEQ_POSITIONAL_CONV = ("encoder.pos_conv.0.weight_g", "encoder.pos_conv.0.weight_v", "encoder.pos_conv.0.bias")
_HUGGINGFACE_POSITIONAL_CONV = (
    "encoder.pos_conv_embed.conv.parametrizations.weight.original0",
    "encoder.pos_conv_embed.conv.parametrizations.weight.original1",
    "encoder.pos_conv_embed.conv.bias",
)

# Several convolutions, as in data2vec, and in transformers in its class alone.
_STACKED_CONVS = "encoder.pos_conv.convs.{k}.*"
_FAIRSEQ_STACKED_CONVS = "encoder.pos_conv.{k}.0.*"
_HUGGINGFACE_STACKED_CONVS = "encoder.pos_conv_embed.layers.{k}.conv.*"

# WavLM's table of position biases, which the other projects keep in the first layer, and the gates of every layer.
_POSITION_BIAS = "encoder.relative_attention_bias.weight"
_FAIRSEQ_POSITION_BIAS = "encoder.layers.0.self_attn.relative_attention_bias.weight"
_HUGGINGFACE_POSITION_BIAS = "encoder.layers.0.attention.rel_attn_embed.weight"

_FAIRSEQ_FRONT = [
    ("mask_emb", "mask_emb"),
    ("feature_extractor.conv_layers.{i}.conv.*", "feature_extractor.conv_layers.{i}.0.*"),
    ("layer_norm.*", "layer_norm.*"),
    ("post_extract_proj.*", "post_extract_proj.*"),
    ("encoder.layer_norm.*", "encoder.layer_norm.*"),
]
# fairseq wraps the per-layer norm between two transpositions, the group norm not.
_FAIRSEQ_NORM = {
    "default": ("feature_extractor.conv_layers.{i}.norm.*", "feature_extractor.conv_layers.{i}.2.*"),
    "layer_norm": ("feature_extractor.conv_layers.{i}.norm.*", "feature_extractor.conv_layers.{i}.2.1.*"),
}
_HUGGINGFACE_FRONT = [
    ("mask_emb", "masked_spec_embed"),
    ("feature_extractor.conv_layers.{i}.conv.*", "feature_extractor.conv_layers.{i}.conv.*"),
    ("feature_extractor.conv_layers.{i}.norm.*", "feature_extractor.conv_layers.{i}.layer_norm.*"),
    ("layer_norm.*", "feature_projection.layer_norm.*"),
    ("post_extract_proj.*", "feature_projection.projection.*"),
    ("encoder.layer_norm.*", "encoder.layer_norm.*"),
]

# What both projects call alike in a conformer layer.
_CONFORMER = [
    ("self_attn.q_proj.*", "self_attn.linear_q.*"),
    ("self_attn.k_proj.*", "self_attn.linear_k.*"),
    ("self_attn.v_proj.*", "self_attn.linear_v.*"),
    ("self_attn.out_proj.*", "self_attn.linear_out.*"),
    *(
        (name, name)
        for name in (
            "self_attn.linear_pos.*",
            "self_attn.pos_bias_u",
            "self_attn.pos_bias_v",
            "self_attn_layer_norm.*",
            "conv_module.layer_norm.*",
            "conv_module.pointwise_conv{n}.*",
            "conv_module.depthwise_conv.*",
            "conv_module.batch_norm.*",
            "conv_module.batch_norm.running_mean",
            "conv_module.batch_norm.running_var",
            "conv_module.batch_norm.num_batches_tracked",
            "final_layer_norm.*",
        )
    ),
]
_FAIRSEQ_LAYERS = {
    "transformer": [
        *zip(_POSITIONAL_CONV, _FAIRSEQ_POSITIONAL_CONV, strict=True),
        (_STACKED_CONVS, _FAIRSEQ_STACKED_CONVS),
        (_POSITION_BIAS, _FAIRSEQ_POSITION_BIAS),
        *_layer(
            [
                (name, name)
                for name in (
                    "self_attn.q_proj.*",
                    "self_attn.k_proj.*",
                    "self_attn.v_proj.*",
                    "self_attn.out_proj.*",
                    "self_attn.grep_linear.*",
                    "self_attn.grep_a",
                    "self_attn_layer_norm.*",
                    "fc1.*",
                    "fc2.*",
                    "final_layer_norm.*",
                )
            ]
        ),
    ],
    "conformer": _layer(
        [
            *_CONFORMER,
            ("ffn{n}.layer_norm.*", "ffn{n}.layer_norm.*"),
            ("ffn{n}.fc1.*", "ffn{n}.w_1.*"),
            ("ffn{n}.fc2.*", "ffn{n}.w_2.*"),
        ]
    ),
}
_HUGGINGFACE_LAYERS = {
    "transformer": [
        *zip(_POSITIONAL_CONV, _HUGGINGFACE_POSITIONAL_CONV, strict=True),
        (_STACKED_CONVS, _HUGGINGFACE_STACKED_CONVS),
        (_POSITION_BIAS, _HUGGINGFACE_POSITION_BIAS),
        *_layer(
            [
                ("self_attn.q_proj.*", "attention.q_proj.*"),
                ("self_attn.k_proj.*", "attention.k_proj.*"),
                ("self_attn.v_proj.*", "attention.v_proj.*"),
                ("self_attn.out_proj.*", "attention.out_proj.*"),
                ("self_attn.grep_linear.*", "attention.gru_rel_pos_linear.*"),
                ("self_attn.grep_a", "attention.gru_rel_pos_const"),
                ("self_attn_layer_norm.*", "layer_norm.*"),
                ("fc1.*", "feed_forward.intermediate_dense.*"),
                ("fc2.*", "feed_forward.output_dense.*"),
                ("final_layer_norm.*", "final_layer_norm.*"),
            ]
        ),
    ],
    "conformer": _layer(
        [
            *_CONFORMER,
            ("ffn{n}.layer_norm.*", "ffn{n}_layer_norm.*"),
            ("ffn{n}.fc1.*", "ffn{n}.intermediate_dense.*"),
            ("ffn{n}.fc2.*", "ffn{n}.output_dense.*"),
        ]
    ),
}

# By layer type, fairseq's also by extractor mode.
FAIRSEQ_KEYS = {
    (mode, layer_type): KeyTable([norm, *_FAIRSEQ_FRONT, *layers])
    for mode, norm in _FAIRSEQ_NORM.items()
    for layer_type, layers in _FAIRSEQ_LAYERS.items()
}
HUGGINGFACE_KEYS = {
    layer_type: KeyTable([*_HUGGINGFACE_FRONT, *layers]) for layer_type, layers in _HUGGINGFACE_LAYERS.items()
}


def fairseq_ballast(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of fairseq's conformer that ours lacks because nothing is learnt in them; empty for a Transformer.

    A positional convolution that no forward reaches, and the constant rates of rotary positions.
    """
    if config["layer_type"] != "conformer":
        return {}
    tensors = _silent_convolution(config, _FAIRSEQ_POSITIONAL_CONV)
    if config["pos_enc_type"] == "rope":
        for layer in range(config["encoder_layers"]):
            tensors[f"encoder.layers.{layer}.self_attn.rotary_emb.inv_freq"] = _rates(config)
    return tensors


def huggingface_ballast(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """`fairseq_ballast` under transformers' names."""
    if config["layer_type"] != "conformer":
        return {}
    tensors = _silent_convolution(config, _HUGGINGFACE_POSITIONAL_CONV)
    if config["pos_enc_type"] == "rope":
        tensors["encoder.embed_positions.inv_freq"] = _rates(config)
    return tensors


def _silent_convolution(config: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Tensor]:
    """A weight-normed convolution of gain zero: whoever did run it would add nothing."""
    dim, kernel = config["encoder_embed_dim"], config["conv_pos"]
    shapes = (1, 1, kernel), (dim, dim // config["conv_pos_groups"], kernel), (dim,)
    gain, direction, bias = (torch.full(shape, value) for shape, value in zip(shapes, (0.0, 1.0, 0.0), strict=True))
    return dict(zip(names, (gain, direction, bias), strict=True))


def _rates(config: Mapping[str, Any]) -> Tensor:
    return rotary_rates(config["encoder_embed_dim"] // config["encoder_attention_heads"])
