"""The layout that s3prl's `apc` and `npc` entries share: {"config": {"model": {"paras"}, "data": {"audio"}}, "model"}.

Sources: `s3prl/upstream/{apc,npc}/{expert,audio,vq}.py`, `s3prl/pretrain/{apc,npc}/pretrain_expert.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pretrain.weights.interop.types import InteropError

# Extraction options that name what our front end does anyway; any other value cannot be expressed.
FIXED_AUDIO = {"feat_type": "fbank", "frame_length": 25, "frame_shift": 10, "decode_wav": False}
CODEBOOK = "codebook_CxE.weight"


def parts_of(checkpoint: Mapping[str, Any], method: str) -> tuple[dict[str, Any], Mapping[str, Any], dict[str, Tensor]]:
    """`paras`, `audio` and the state dict; raises InteropError, naming `method`, for another layout."""
    try:
        config, state = checkpoint["config"], checkpoint["model"]
        return dict(config["model"]["paras"]), config["data"]["audio"], dict(state)
    except (KeyError, TypeError):
        raise InteropError(
            f"keys {', '.join(map(str, checkpoint))}: not s3prl's {method} layout (config.model.paras, "
            f"config.data.audio, model); give a checkpoint of s3prl's {method} pre-training or of its {method}_local"
        ) from None


def checkpoint_of(
    paras: Mapping[str, Any], front_end: Mapping[str, Any], task: Mapping[str, Any], state: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The dictionary that s3prl loads; `task` is what its own pre-training would read when it goes on from the file."""
    config = {"model": {"paras": dict(paras)}, "task": dict(task), "data": {"audio": audio_of(front_end)}}
    return {"config": config, "Upstream_Config": config, "model": dict(state)}


def front_end_of(audio: Mapping[str, Any]) -> dict[str, Any]:
    """Our front end's configuration for an `audio` block; raises InteropError for what it cannot compute."""
    for name, value in audio.items():
        if name in ("feat_dim", "cmvn"):
            continue
        if name not in FIXED_AUDIO or value != FIXED_AUDIO[name]:
            raise InteropError(
                f"config.data.audio.{name}: {value!r} is not supported; only Kaldi filter banks of 25 ms windows "
                "every 10 ms can be imported"
            )
    return {
        "kind": "fbank",
        "frame_step": 1,
        "normalization": normalization_of(audio.get("cmvn", True)),
        "bins": audio["feat_dim"],
        "window": "hamming",
        "low_hz": 20.0,
        "deltas": 0,
    }


def normalization_of(cmvn: bool) -> dict[str, Any]:
    """Our front end's `normalization` for s3prl's `cmvn`, over the utterance."""
    return {"kind": "utterance" if cmvn else "none"}


def audio_of(front_end: Mapping[str, Any]) -> dict[str, Any]:
    """s3prl's `audio` block; raises InteropError for a front end that its entry does not have."""
    audio = {**FIXED_AUDIO, "feat_dim": front_end["bins"], "cmvn": front_end["normalization"]["kind"] == "utterance"}
    if different := [name for name, value in front_end_of(audio).items() if front_end[name] != value]:
        raise InteropError(
            f"encoder.front_end.{different[0]}: {front_end[different[0]]!r} has no counterpart in s3prl, whose entry "
            "computes Kaldi filter banks with a Hamming window every 10 ms; export to the native format instead"
        )
    return audio


def quantizer_of(vq: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Our quantizer's configuration for a `paras.vq` block."""
    if vq is None:
        return None
    return {
        "codebook_sizes": list(vq["codebook_size"]),
        "code_dims": list(vq["code_dim"]),
        "temperature": vq["gumbel_temperature"],
    }


def vq_of(quantizer: Mapping[str, Any] | None) -> dict[str, Any]:
    """The `vq` entry of `paras`; nothing without a quantizer."""
    if quantizer is None:
        return {}
    return {
        "vq": {
            "codebook_size": list(quantizer["codebook_sizes"]),
            "code_dim": list(quantizer["code_dims"]),
            "gumbel_temperature": quantizer["temperature"],
        }
    }


# s3prl's codebooks are linear layers over one-hot vectors: (dim, codes), ours (codes, dim).
QUANTIZER_KEYS = (
    ("quantizer.groups.{i}.logits.*", "vq_layers.{i}.vq_logits.*"),
    ("quantizer.groups.{i}.codebook", f"vq_layers.{{i}}.{CODEBOOK}"),
)


def turn_codebooks(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under s3prl's names with every codebook transposed, from either side to the other."""
    return {key: value.T.contiguous() if key.endswith(CODEBOOK) else value for key, value in state.items()}
