"""APC and VQ-APC checkpoints in s3prl's layout, which is that of the NPC repository too.

Sources: `s3prl/upstream/apc/{expert,apc,vq}.py`, `s3prl/pretrain/apc/pretrain_expert.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
SHAPE = ("hidden_size", "num_layers", "dropout", "residual")
# The client takes hidden states from the inputs of the second and the third layer, and the output of the last.
CLIENT_LAYERS = 3
GRU_KEYS = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
TABLE = KeyTable([*((f"rnn_layers.{{i}}.{name}",) * 2 for name in GRU_KEYS), *QUANTIZER_KEYS])


def from_pt(checkpoint: Mapping[str, Any]) -> Imported:
    """A checkpoint of s3prl's APC or VQ-APC pre-training, as our encoder and head; InteropError for any other."""
    paras, audio, state = parts_of(checkpoint, "apc")
    if unknown := sorted(set(paras) - {*SHAPE, "vq"}):
        raise InteropError(f"config.model.paras.{unknown[0]}: no option of APC; give a checkpoint of APC or VQ-APC")
    config = {
        "front_end": front_end_of(audio),
        **{name: paras[name] for name in SHAPE},
        "quantizer": quantizer_of(paras.get("vq")),
    }
    encoder = {key: value for key, value in state.items() if key not in HEAD_KEYS}
    head = {key: state[key] for key in HEAD_KEYS if key in state}
    return Imported(config, TABLE.to_ours(turn_codebooks(encoder)), head)


def to_s3prl(trained: TrainedMethod) -> dict[str, Any]:
    """The dictionary that s3prl's `apc_local` loads strictly; multi-target APC's second GRU stays behind."""
    config, head = trained.encoder_config(), trained.head_state()
    if config["num_layers"] < CLIENT_LAYERS:
        raise InteropError(
            f"encoder.num_layers: {config['num_layers']}, but s3prl's client reads {CLIENT_LAYERS} layers at least; "
            "export to the native format instead"
        )
    if missing := [key for key in HEAD_KEYS if key not in head]:
        raise InteropError(f"state dict: missing {', '.join(missing)}, which s3prl requires; give the run's folder")
    paras = {name: config[name] for name in SHAPE} | vq_of(config["quantizer"])
    state: dict[str, Tensor] = turn_codebooks(TABLE.to_theirs(trained.encoder_state()))
    state |= {key: head[key] for key in HEAD_KEYS}
    return checkpoint_of(paras, config["front_end"], {"n_future": trained.config["time_shift"]}, state)
