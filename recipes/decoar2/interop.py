"""DeCoAR 2.0 checkpoints as s3prl's `decoar2_local` reads them: {"model": state dict}, every size fixed in its code.

Source: `s3prl/upstream/decoar2/{expert,decoar2,audio}.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pretrain.weights.interop.fixed_size import require_size, state_of_size
from pretrain.weights.interop.speech_encoder import fuse_qkv, split_qkv
from pretrain.weights.interop.tables import KeyTable
from pretrain.weights.interop.types import Imported, TrainedMethod
from recipes.decoar2.encoder import Decoar2Encoder

_LAYER = "encoder.layers.{i}."
_SAME = (
    "post_extract_proj.*",
    "encoder.layer_norm.*",
    *(
        f"{_LAYER}{name}.*"
        for name in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.out_proj",
            "self_attn_layer_norm",
            "fc1",
            "fc2",
            "final_layer_norm",
        )
    ),
)
TABLE = KeyTable(
    [
        *((name, name) for name in _SAME),
        *((f"encoder.pos_conv.{name}", f"encoder.pos_conv.0.{name}") for name in ("weight_g", "weight_v", "bias")),
    ]
)
# s3prl's `args` and `create_transform`. The file says none of it; dropouts are those of the 2021 recipe.
ENCODER = {
    "front_end": {
        "kind": "fbank",
        "frame_step": 2,
        "normalization": {"kind": "utterance"},
        "bins": 80,
        "window": "hamming",
        "low_hz": 20.0,
        "deltas": 0,
    },
    "encoder_layers": 12,
    "encoder_embed_dim": 768,
    "encoder_ffn_embed_dim": 3072,
    "encoder_attention_heads": 12,
    "conv_pos": 128,
    "conv_pos_groups": 16,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.0,
    "dropout_input": 0.1,
    "encoder_layerdrop": 0.05,
}
_PARTS = ("post_extract_proj.", "encoder.")
_HEAD = ("mask_emb", "quantizer.", "reconstruction.")


def from_pt(checkpoint: Mapping[str, Any]) -> Imported:
    """A file that `decoar2_local` reads, as our encoder, and our head where one of our exports holds it.

    Heads of the authors' code, of which there were several kinds, stay behind. Raises InteropError for any other file.
    """
    state = state_of_size(checkpoint, "DeCoAR 2.0", "post_extract_proj.weight", (768, 80))
    encoder = fuse_qkv(TABLE.to_ours({key: value for key, value in state.items() if key.startswith(_PARTS)}))
    head = {key: value for key, value in state.items() if key.startswith(_HEAD)}
    complete = all(any(key.startswith(part) for key in head) for part in _HEAD)
    return Imported({**ENCODER}, encoder, head if complete else {})


def to_s3prl(trained: TrainedMethod) -> dict[str, Any]:
    """The dictionary that `decoar2_local` loads, the head with it; raises InteropError where sizes are not s3prl's."""
    require_size(trained.encoder_config(), ENCODER, "decoar2_local", Decoar2Encoder.weight_independent_fields)
    state: dict[str, Tensor] = TABLE.to_theirs(split_qkv(trained.encoder_state())) | trained.head_state()
    return {"model": state}
