"""The options of WavLM's gated relative position bias in microsoft's and fairseq's configurations and in transformers.

Sources: `WavLM/WavLM.py` of microsoft/UniSpeech; transformers models/wavlm/configuration_wavlm.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pretrain.weights.interop.types import InteropError

HUGGINGFACE_TYPE = "wavlm"
_GATED = "gated_bias"
# (ours, which is fairseq's too, transformers'), each with the default of the other project.
_FAIRSEQ_FIELDS = {"num_buckets": 320, "max_distance": 1280}
_HUGGINGFACE_FIELDS = {"num_buckets": ("num_buckets", 320), "max_distance": ("max_bucket_distance", 800)}


def require(config: Mapping[str, Any], wanted: bool, client: str) -> None:
    """Raise InteropError where our encoder has a position bias and `client`'s class of it none, or the other way."""
    if (config["pos_enc_type"] == _GATED) != wanted:
        raise InteropError(
            f"method.encoder.pos_enc_type: {config['pos_enc_type']} has no counterpart in {client}'s class of this "
            f"model, which has {'a' if wanted else 'no'} gated relative position bias; export to native"
        )


def to_fairseq(config: Mapping[str, Any]) -> dict[str, Any]:
    """The bias' share of fairseq's model config; empty for an encoder without it."""
    if config["pos_enc_type"] != _GATED:
        return {}
    own = {name: config[name] for name in _FAIRSEQ_FIELDS}
    return {"relative_position_embedding": True, "gru_rel_pos": True, **own}


def from_fairseq(model: Mapping[str, Any]) -> dict[str, Any]:
    """The bias' share of our config; raises InteropError for a bias without gates, which no published model has."""
    if not model.get("relative_position_embedding", False):
        return {}
    if not model.get("gru_rel_pos", False):
        raise InteropError(
            "model config: gru_rel_pos: False with relative_position_embedding is not supported, only a bias with "
            "gates; this checkpoint cannot be imported"
        )
    return {"pos_enc_type": _GATED, **{name: model.get(name, default) for name, default in _FAIRSEQ_FIELDS.items()}}


def to_huggingface(config: Mapping[str, Any]) -> dict[str, Any]:
    """The bias' share of transformers' config; empty for an encoder without it."""
    if config["pos_enc_type"] != _GATED:
        return {}
    return {theirs: config[ours] for ours, (theirs, _) in _HUGGINGFACE_FIELDS.items()}


def from_huggingface(config: Mapping[str, Any]) -> dict[str, Any]:
    """The bias' share of our config; empty for any other class than WavLM's, which always has it."""
    if config.get("model_type") != HUGGINGFACE_TYPE:
        return {}
    fields = {ours: config.get(theirs, default) for ours, (theirs, default) in _HUGGINGFACE_FIELDS.items()}
    return {"pos_enc_type": _GATED, **fields}
