"""NPC checkpoints in s3prl's layout, which is that of the NPC repository too.

Sources: `s3prl/upstream/npc/{expert,npc,vq}.py`, `s3prl/pretrain/npc/pretrain_expert.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pretrain.weights.interop.s3prl_fbank import (
    QUANTIZER_KEYS,
    checkpoint_of,
    front_end_of,
    parts_of,
    quantizer_of,
    turn_codebooks,
    vq_of,
)
from pretrain.weights.interop.tables import KeyTable
from pretrain.weights.interop.types import Imported, InteropError, TrainedMethod

HEAD_KEYS = ("postnet.weight", "postnet.bias")
SHAPE = ("hidden_size", "n_blocks", "kernel_size", "mask_size", "dropout", "residual")
# Options of the official code that our network has in one form only, and their defaults there.
FIXED = {"batch_norm": True, "activate": "relu", "disable_cross_layer": False, "dim_bottleneck": None}
MASK = ".conv_mask"
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
TABLE = KeyTable(
    [
        *((f"blocks.{{i}}.{layer}.*",) * 2 for layer in ("conv", "linear", "bn1", "bn2")),
        *((f"blocks.{{i}}.{norm}.{name}",) * 2 for norm in ("bn1", "bn2") for name in STATISTICS),
        ("masked_convs.{i}.conv.*",) * 2,
        *QUANTIZER_KEYS,
    ]
)


def from_pt(checkpoint: Mapping[str, Any]) -> Imported:
    """A checkpoint of s3prl's NPC pre-training, as our encoder and head; InteropError for any other."""
    paras, audio, state = parts_of(checkpoint, "npc")
    for name, value in paras.items():
        if name not in {*SHAPE, *FIXED, "vq"} or (name in FIXED and value != FIXED[name]):
            raise InteropError(f"config.model.paras.{name}: {value!r} is not supported; this file cannot be imported")
    config = {
        "front_end": front_end_of(audio),
        **{name: paras[name] for name in SHAPE},
        "quantizer": quantizer_of(paras.get("vq")),
    }
    head = {key: state[key] for key in HEAD_KEYS if key in state}
    encoder = {key: value for key, value in state.items() if key not in HEAD_KEYS and not key.endswith(MASK)}
    ours = TABLE.to_ours(turn_codebooks(encoder))
    ours = {key: value.squeeze(2) if key.endswith("linear.weight") else value for key, value in ours.items()}
    return Imported(config, ours, head)


def to_s3prl(trained: TrainedMethod) -> dict[str, Any]:
    """The dictionary that s3prl's `npc_local` loads strictly."""
    config, head = trained.encoder_config(), trained.head_state()
    if missing := [key for key in HEAD_KEYS if key not in head]:
        raise InteropError(f"state dict: missing {', '.join(missing)}, which s3prl requires; give the run's folder")
    state = to_theirs(trained.encoder_state()) | {key: head[key] for key in HEAD_KEYS}
    for block in range(config["n_blocks"]):
        prefix = f"masked_convs.{block}"
        state[prefix + MASK] = _conv_mask(state[f"{prefix}.conv.weight"], config["mask_size"] + 2 * (block + 1))
    paras = {name: config[name] for name in SHAPE} | FIXED | vq_of(config["quantizer"])
    return checkpoint_of(paras, config["front_end"], {}, state)


def to_theirs(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our encoder's tensors under s3prl's names and in its shapes: the linear layers are convolutions of one frame."""
    shaped = {key: value.unsqueeze(2) if key.endswith("linear.weight") else value for key, value in state.items()}
    return turn_codebooks(TABLE.to_theirs(shaped))


def _conv_mask(weight: Tensor, hidden: int) -> Tensor:
    """Ones of the shape of `weight`, zero at the `hidden` middle taps: the buffer that s3prl multiplies with."""
    mask = torch.ones_like(weight)
    first = (weight.shape[2] - hidden) // 2
    mask[:, :, first : first + hidden] = 0
    return mask
