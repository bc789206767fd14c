"""Encoders that speechbrain's BEST-RQ recipe has trained: the file `model.ckpt` of its checkpoint folders.

Source: speechbrain `recipes/LibriSpeech/self-supervised-learning/BEST-RQ/hparams/BEST-RQ.yaml` (`checkpointer`). It
keeps quantizer and classifier in files of their own, and the configuration in none; what shapes do not tell is taken
from that recipe. Nothing is exported: neither s3prl nor transformers has this network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pretrain.weights.interop.tables import KeyTable
from pretrain.weights.interop.types import Imported, InteropError

LAYER, THEIRS = "layers.{i}.", "1.transformer.encoder.layers.{i}."
TABLE = KeyTable(
    [
        ("subsampling.convs.{i}.*", "0.convblock_{i}.convs.conv_0.conv.*"),
        ("subsampling.norms.{i}.*", "0.convblock_{i}.convs.norm_0.norm.*"),
        ("subsampling.proj.*", "1.transformer.custom_src_module.layers.0.w.*"),
        ("layer_norm.*", "1.transformer.encoder.norm.norm.*"),
        *(
            (f"{LAYER}{ours}", f"{THEIRS}{theirs}")
            for ours, theirs in (
                ("self_attn.qkv_proj.weight", "mha_layer.in_proj_weight"),
                ("self_attn.out_proj.*", "mha_layer.out_proj.*"),
                ("self_attn.linear_pos.weight", "mha_layer.linear_pos.weight"),
                ("self_attn.pos_bias_u", "mha_layer.pos_bias_u"),
                ("self_attn.pos_bias_v", "mha_layer.pos_bias_v"),
                ("self_attn_layer_norm.*", "norm1.norm.*"),
                ("conv_module.layer_norm.*", "convolution_module.layer_norm.*"),
                ("conv_module.pointwise_conv1.*", "convolution_module.bottleneck.0.*"),
                ("conv_module.depthwise_conv.*", "convolution_module.conv.*"),
                ("conv_module.conv_layer_norm.*", "convolution_module.after_conv.0.*"),
                ("conv_module.pointwise_conv2.*", "convolution_module.after_conv.2.*"),
                ("ffn1.layer_norm.*", "ffn_module1.0.*"),
                ("ffn1.fc1.*", "ffn_module1.1.ffn.0.*"),
                ("ffn1.fc2.*", "ffn_module1.1.ffn.3.*"),
                ("ffn2.layer_norm.*", "ffn_module2.0.*"),
                ("ffn2.fc1.*", "ffn_module2.1.ffn.0.*"),
                ("ffn2.fc2.*", "ffn_module2.1.ffn.3.*"),
                ("final_layer_norm.*", "norm2.norm.*"),
            )
        ),
    ]
)
COMPUTED = "1.transformer.positional_encoding"  # tables, of a decoder that is not there too


def from_pt(checkpoint: Mapping[str, Any]) -> Imported:
    """speechbrain's `model.ckpt` as our encoder, without heads; raises InteropError for any other file."""
    if not {"0.convblock_0.convs.conv_0.conv.weight", "1.transformer.encoder.norm.norm.weight"} <= checkpoint.keys():
        raise InteropError(
            f"keys {', '.join(list(map(str, checkpoint))[:4])}, ...: not the model.ckpt of speechbrain's BEST-RQ, "
            "which holds its convolutions (0.convblock_0) and its conformer (1.transformer); give that file"
        )
    state = TABLE.to_ours({key: value for key, value in checkpoint.items() if not key.startswith(COMPUTED)})
    heads = state["layers.0.self_attn.pos_bias_u"].shape[1]
    return Imported(_config(state, heads), {key: _tensor(key, value, heads) for key, value in state.items()})


def _config(state: Mapping[str, Tensor], heads: int) -> dict[str, Any]:
    bins, _ = state["subsampling.norms.0.weight"].shape
    ffn_dim, dim = state["layers.0.ffn1.fc1.weight"].shape
    return {
        "front_end": {
            "kind": "log_mel",
            "bins": 2 * bins,
            "level_db": -25.0,
            "frame_step": 1,
            "normalization": {"kind": "utterance"},
        },
        "conv_channels": [state[f"subsampling.convs.{i}.weight"].shape[0] for i in range(2)],
        "encoder_layers": 1 + max(int(key.split(".")[1]) for key in state if key.startswith("layers.")),
        "encoder_embed_dim": dim,
        "encoder_ffn_embed_dim": ffn_dim,
        "encoder_attention_heads": heads,
        "depthwise_conv_kernel_size": state["layers.0.conv_module.depthwise_conv.weight"].shape[2],
        "activation": "gelu",
        "dropout": 0.1,
        "left_context": None,
        "absolute_distances": True,
    }


def _tensor(key: str, value: Tensor, heads: int) -> Tensor:
    """One of theirs in our layout.

    Theirs divides scores by the root of the model's width, ours by that of a head's, so queries are divided by the root
    of the heads. Its rows of queries, keys and values lie side by side in each head, its convolutions go over bins
    before frames.
    """
    name = key.split(".")[-2] if key.endswith((".weight", ".bias")) else key.split(".")[-1]
    if name == "qkv_proj":
        parts = value.view(heads, 3, -1, value.shape[1]).transpose(0, 1).flatten(1, 2)
        return (parts * parts.new_tensor([heads**-0.5, 1.0, 1.0])[:, None, None]).flatten(0, 1)
    if name in ("pos_bias_u", "pos_bias_v"):
        return value.reshape(heads, -1) * heads**-0.5
    if name == "pointwise_conv1" and value.dim() == 3:
        return value.squeeze(2)
    if key.startswith("subsampling.convs.") and value.dim() == 4:
        return value.transpose(2, 3).contiguous()
    return value
