"""Checkpoints of s3prl's pre-training, which its mockingjay_local, tera_local and audio_albert_local load.

Sources: `s3prl/upstream/mockingjay/builder.py`, `s3prl/run_pretrain.py`, `s3prl/upstream/baseline/*.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pretrain.weights.interop.s3prl_fbank import normalization_of
from pretrain.weights.interop.speech_encoder import fuse_qkv, split_qkv
from pretrain.weights.interop.tables import KeyTable
from pretrain.weights.interop.types import Imported, InteropError, TrainedMethod
from recipes.mockingjay.encoder import LAYER_NORM_EPS

_LAYER, _THEIRS = "layers.{i}.", "encoder.layer.{i}."
ENCODER_KEYS = KeyTable(
    [
        ("spec_transform.*", "input_representations.spec_transform.*"),
        ("layer_norm.*", "input_representations.LayerNorm.*"),
        (f"{_LAYER}self_attn.q_proj.*", f"{_THEIRS}attention.self.query.*"),
        (f"{_LAYER}self_attn.k_proj.*", f"{_THEIRS}attention.self.key.*"),
        (f"{_LAYER}self_attn.v_proj.*", f"{_THEIRS}attention.self.value.*"),
        (f"{_LAYER}self_attn.out_proj.*", f"{_THEIRS}attention.output.dense.*"),
        (f"{_LAYER}self_attn_layer_norm.*", f"{_THEIRS}attention.output.LayerNorm.*"),
        (f"{_LAYER}fc1.*", f"{_THEIRS}intermediate.dense.*"),
        (f"{_LAYER}fc2.*", f"{_THEIRS}output.dense.*"),
        (f"{_LAYER}final_layer_norm.*", f"{_THEIRS}output.LayerNorm.*"),
    ]
)
HEAD_KEYS = KeyTable(
    [
        ("spec_head.dense.*", "dense.*"),
        ("spec_head.layer_norm.*", "LayerNorm.*"),
        ("spec_head.output.*", "output.*"),
    ]
)
# (ours, s3prl's)
_FIELDS = [
    ("encoder_layers", "num_hidden_layers"),
    ("encoder_embed_dim", "hidden_size"),
    ("encoder_ffn_embed_dim", "intermediate_size"),
    ("encoder_attention_heads", "num_attention_heads"),
    ("share_layer", "share_layer"),
    ("dropout", "hidden_dropout_prob"),
    ("attention_dropout", "attention_probs_dropout_prob"),
    ("initializer_range", "initializer_range"),
]
_FIXED = {"hidden_act": "gelu", "layer_norm_eps": LAYER_NORM_EPS, "pre_layer_norm": False}
_STFT = {"win_ms": 25, "hop_ms": 10, "n_freq": 201}
_FEATURE = {"channel": 0, "log": True, "delta": 0, "cmvn": True}
_KINDS = {"log_mel": "mel", "log_linear": "linear"}
_FBANK = {"frame_length": 25.0, "frame_shift": 10.0, "use_log_fbank": True}
# Alteration fields that s3prl's own training reads again from a checkpoint; 80/10/10 and the noise are in its code.
_TASK = (
    "mask_proportion",
    "mask_consecutive_min",
    "mask_consecutive_max",
    "mask_allow_overlap",
    "mask_bucket_ratio",
    "mask_frequency",
    "noise_proportion",
)


def from_pt(checkpoint: Mapping[str, Any]) -> Imported:
    """A checkpoint of s3prl's run_pretrain, of today or from when `Config` held the model's configuration.

    Raises InteropError for another layout, and for options that our encoder lacks.
    """
    config = _model_config(checkpoint)
    encoder_config = _encoder_from(config)
    state = {_modern(key): value for key, value in checkpoint["Transformer"].items()}
    if encoder_config["share_layer"]:
        state = _without_copies(state)
    encoder = fuse_qkv(ENCODER_KEYS.to_ours(state))
    head = {_modern(key): value for key, value in checkpoint.get("SpecHead", {}).items()}
    return Imported(encoder_config, encoder, HEAD_KEYS.to_ours(head))


def to_s3prl(trained: TrainedMethod) -> dict[str, Any]:
    """The dictionary that s3prl loads, and that its own pre-training goes on from.

    `sequence_length` 0 lets s3prl see whole utterances, as our encoder does. A shared layer is written once per pass.
    """
    config = trained.encoder_config()
    layers = config["encoder_layers"]
    state = ENCODER_KEYS.to_theirs(split_qkv(trained.encoder_state()))
    if config["share_layer"]:
        first = "encoder.layer.0."
        shared = {key.removeprefix(first): value for key, value in state.items() if key.startswith(first)}
        state |= {f"encoder.layer.{i}.{key}": value for i in range(1, layers) for key, value in shared.items()}
    return {
        "Transformer": state,
        "SpecHead": HEAD_KEYS.to_theirs(trained.head_state()),
        "Config": {},
        "Upstream_Config": {
            "transformer": transformer_config(config),
            "task": {"sequence_length": 0} | task_config(trained.config),
            "audio": audio_config(config["front_end"], trained.config["target"]),
        },
    }


def transformer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """s3prl's `transformer` block for our encoder's configuration."""
    return {theirs: config[ours] for ours, theirs in _FIELDS} | _FIXED


def task_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """s3prl's `task` block for our method's configuration, without `sequence_length`."""
    fixed = {"loss": "L1", "position_encoding_size": config["encoder"]["encoder_embed_dim"]}
    return fixed | {name: config["alteration"][name] for name in _TASK}


def audio_config(front_end: Mapping[str, Any], target: Mapping[str, Any] | None) -> dict[str, Any]:
    """s3prl's `audio` block; raises InteropError for what its pre-processors cannot compute."""
    if front_end["frame_step"] != 1:
        raise InteropError("method.encoder.front_end.frame_step: s3prl keeps every frame; export to native")
    if front_end["kind"] == "fbank":
        options = {"num_mel_bins": front_end["bins"], "low_freq": front_end["low_hz"]}
        return {
            "kaldi": {"feat_type": "fbank", "fbank": options | _FBANK | {"window_type": front_end["window"]}},
            "delta": {"order": front_end["deltas"], "win_length": 5},
            "cmvn": {"use_cmvn": _cmvn(front_end)},
        }
    heard, wanted = (
        _FEATURE | {"feat_type": _KINDS[block["kind"]], "cmvn": _cmvn(block)}
        for block in (front_end, target or front_end)
    )
    mels = next((block["bins"] for block in (front_end, target) if block and block["kind"] == "log_mel"), 80)
    sizes = {**_STFT, "n_mels": mels, "n_mfcc": 13, "target_level": front_end["level_db"]}
    return {**sizes, "input": heard, "target": wanted}


def _model_config(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """The block with `transformer`, `task` and `audio`."""
    if isinstance(checkpoint.get("Transformer"), Mapping):
        for name in ("Config", "Upstream_Config"):
            config = checkpoint.get(name)
            if isinstance(config, Mapping) and "transformer" in config:
                if "audio" not in config:
                    raise InteropError(f"{name}.audio: missing: the model was trained on feature files; retrain it")
                return config
    raise InteropError(
        f"keys {', '.join(map(str, checkpoint))}: not the layout of s3prl's pre-training (Transformer, SpecHead, "
        "Upstream_Config); give a checkpoint of Mockingjay, TERA or Audio ALBERT"
    )


def _encoder_from(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our encoder's configuration."""
    transformer = config["transformer"]
    _require(transformer, _FIXED, "transformer")
    if missing := [theirs for _, theirs in _FIELDS if theirs not in transformer and theirs != "share_layer"]:
        raise InteropError(f"transformer.{missing[0]}: missing; give a complete checkpoint")
    # Checkpoints from before Audio ALBERT have no share_layer.
    values = {ours: transformer.get(theirs, False) for ours, theirs in _FIELDS}
    return {"front_end": _front_end_of(config["audio"]), **values}


def _front_end_of(audio: Mapping[str, Any]) -> dict[str, Any]:
    if "kaldi" in audio:
        kaldi = audio["kaldi"]
        _require(kaldi, {"feat_type": "fbank"}, "audio.kaldi")
        options = dict(kaldi["fbank"])
        bins, low_hz = options.pop("num_mel_bins", 23), options.pop("low_freq", 20.0)
        window = options.pop("window_type", "povey")
        if unknown := [name for name, value in options.items() if _FBANK.get(name) != value]:
            raise InteropError(
                f"audio.kaldi.fbank.{unknown[0]}: {options[unknown[0]]!r} is not supported; this checkpoint cannot be "
                "imported"
            )
        _require(audio["delta"], {"win_length": 5}, "audio.delta")
        normalization = normalization_of(audio["cmvn"]["use_cmvn"])
        fields = {"bins": bins, "window": window, "low_hz": low_hz, "deltas": audio["delta"].get("order", 2)}
        return {"kind": "fbank", "frame_step": 1, "normalization": normalization, **fields}
    heard = audio["input"]
    _require(audio, _STFT, "audio")
    _require(heard, {"log": True, "delta": 0}, "audio.input")
    kind = {theirs: ours for ours, theirs in _KINDS.items()}.get(heard["feat_type"])
    if kind is None:
        raise InteropError(f"audio.input.feat_type: '{heard['feat_type']}' is not supported; mel and linear are")
    bins = {"bins": audio["n_mels"]} if kind == "log_mel" else {}
    fields = {"kind": kind, "frame_step": 1, "normalization": normalization_of(heard["cmvn"]), **bins}
    return fields | {"level_db": float(audio["target_level"])}


def _cmvn(front_end: Mapping[str, Any]) -> bool:
    """Whether s3prl's pre-processor normalises; raises InteropError for what it cannot do."""
    kind = front_end["normalization"]["kind"]
    if kind not in ("none", "utterance"):
        raise InteropError(f"method.encoder.front_end.normalization: s3prl has no '{kind}'; export to native")
    return kind == "utterance"


def _without_copies(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The shared layer under index 0 alone; s3prl stores it once per pass, and accepts it stored once."""
    return {key: value for key, value in state.items() if key.split(".")[:2] != ["encoder", "layer"] or ".0." in key}


def _modern(key: str) -> str:
    """Names of the first BERT ports, as s3prl's loader reads them."""
    return key.replace("gamma", "weight").replace("beta", "bias")


def _require(block: Mapping[str, Any], fixed: Mapping[str, Any], where: str) -> None:
    for name, expected in fixed.items():
        if block.get(name, expected) != expected:
            raise InteropError(
                f"{where}.{name}: {block[name]!r} is not supported, only {expected!r}; this checkpoint cannot be "
                "imported"
            )
