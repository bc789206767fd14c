"""DeCoAR checkpoints as s3prl's `decoar_local` and `decoar_layers_local` read them: {"model": state dict}.

Sources: `s3prl/upstream/{decoar,decoar_layers}/{expert,decoar}.py`; the heads are named as in lingss0918/fairseq
`examples/decoar/models/decoar.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pretrain.weights.interop.fixed_size import require_size, state_of_size
from pretrain.weights.interop.tables import KeyTable
from pretrain.weights.interop.types import Imported, TrainedMethod

LSTM_NAMES = ("weight_ih_l", "weight_hh_l", "bias_ih_l", "bias_hh_l")
TABLE = KeyTable(
    [
        ("post_extract_proj.*", "post_extract_proj.*"),
        *(
            (f"{way}_lstms.{{i}}.{name}0", f"{way}_lstm.{name}{{i}}")
            for way in ("forward", "backward")
            for name in LSTM_NAMES
        ),
    ]
)
# What the client has in its code, and the file does not say. Which layers are shown is up to its two entries.
ENCODER = {
    "front_end": {
        "kind": "fbank",
        "frame_step": 1,
        "normalization": {"kind": "utterance"},
        "bins": 80,
        "window": "hamming",
        "low_hz": 20.0,
        "deltas": 0,
    },
    "hidden_size": 1024,
    "num_layers": 4,
}
_PARTS = ("post_extract_proj.", "forward_lstm.", "backward_lstm.")


def from_pt(checkpoint: Mapping[str, Any]) -> Imported:
    """A file that `decoar_local` reads, with all layers as hidden states, and the heads where it has them.

    Raises InteropError for any other file.
    """
    state = state_of_size(checkpoint, "DeCoAR", "forward_lstm.weight_ih_l0", (4096, 1024))
    encoder = TABLE.to_ours({key: value for key, value in state.items() if key.startswith(_PARTS)})
    return Imported({**ENCODER, "layers": "all"}, encoder, _heads_from(state))


def to_s3prl(trained: TrainedMethod) -> dict[str, Any]:
    """The dictionary that both entries load, the heads with it; InteropError where sizes are not s3prl's."""
    require_size(trained.encoder_config(), ENCODER, "decoar_local")
    return {"model": TABLE.to_theirs(trained.encoder_state()) | _heads_to(trained.head_state())}


def _heads_to(head: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our batched heads, one by one; clones, because torch.save writes the whole storage behind a view."""
    if not head:
        return {}
    positions = len(head["head.bias2"])
    named: dict[str, Tensor] = {}
    first = zip(head["head.proj1.weight"].chunk(positions), head["head.proj1.bias"].chunk(positions), strict=True)
    for i, (weight, bias) in enumerate(first):
        named |= {f"proj1.{i}.weight": weight.clone(), f"proj1.{i}.bias": bias.clone()}
        named |= {
            f"proj2.{i}.weight": head["head.weight2"][i].T.clone(),
            f"proj2.{i}.bias": head["head.bias2"][i].clone(),
        }
    return named


def _heads_from(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Heads one by one, as our batched ones; none where the file has none."""
    positions = sum(key.startswith("proj2.") and key.endswith(".bias") for key in state)
    if not positions:
        return {}
    parts = {
        f"{name}.{kind}": [state[f"{name}.{i}.{kind}"] for i in range(positions)]
        for name in ("proj1", "proj2")
        for kind in ("weight", "bias")
    }
    return {
        "head.proj1.weight": torch.cat(parts["proj1.weight"]),
        "head.proj1.bias": torch.cat(parts["proj1.bias"]),
        "head.weight2": torch.stack([weight.T for weight in parts["proj2.weight"]]),
        "head.bias2": torch.stack(parts["proj2.bias"]),
    }
