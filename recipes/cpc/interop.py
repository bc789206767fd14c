"""CPC_audio checkpoints, as its trainer and s3prl's `cpc_local` hold them, and back into s3prl's form.

Sources: facebookresearch/CPC_audio `cpc/{model,transformers,feature_loader,cpc_default_config}.py`; s3prl 0.4.18
`s3prl/upstream/cpc/`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pretrain.weights.interop.types import Imported, InteropError, TrainedMethod

# (kernel, stride, padding) of CPCEncoder; s3prl builds no other stack.
CONV_SHAPES = [(10, 5, 3), (8, 4, 2), (4, 2, 1), (4, 2, 1), (4, 2, 1)]
NORM_MODES = {"layerNorm": "channel", "batchNorm": "batch"}
AR_MODES = {"LSTM": "lstm", "GRU": "gru", "transformer": "transformer"}
STRIDE_SAMPLES = 160
# Of cpc_default_config.py, for fields that a checkpoint's config leaves out.
DEFAULTS = {
    "hiddenEncoder": 256,
    "hiddenGar": 256,
    "encoder_type": "cpc",
    "normMode": "layerNorm",
    "arMode": "LSTM",
    "nLevelsGRU": 1,
    "cpc_mode": None,
    "abspos": False,
    "sizeWindow": 20480,
}
# What buildTransformerAR gives every layer.
TRANSFORMER_HEADS, TRANSFORMER_FFN, TRANSFORMER_DROPOUT = 8, 2048, 0.1
_MASKS = (".Att.z", ".Att.mask")  # constants that the official layer keeps as buffers
_BATCHES = "num_batches_tracked"


def from_pt(checkpoint: Mapping[str, Any]) -> Imported:
    """Our encoder, and our predictors where the file has them, from one of two layouts.

    s3prl's {"config", "weights"}, or what CPC_audio's trainer writes, {"gEncoder", "cpcCriterion", ...}, with the
    content of the `checkpoint_args.json` beside it put under "config". Raises InteropError for anything else and for
    options that our encoder lacks.
    """
    if "config" not in checkpoint or not {"weights", "gEncoder"} & set(checkpoint):
        raise InteropError(
            f"keys {', '.join(map(str, checkpoint))}: neither (config, weights) nor (config, gEncoder); to give a "
            "checkpoint of CPC_audio's trainer, put the content of its checkpoint_args.json under 'config' first"
        )
    values = DEFAULTS | dict(checkpoint["config"])
    state = {k: v for k, v in checkpoint.get("weights", checkpoint.get("gEncoder")).items() if not k.endswith(_MASKS)}
    config = _encoder_config(values)
    encoder = _encoder_state(state, config)
    return Imported(config, encoder, _head_state(checkpoint.get("cpcCriterion", {})))


def to_s3prl(trained: TrainedMethod) -> dict[str, Any]:
    """The dictionary that s3prl's `cpc_local` reads. Raises InteropError for a network that it cannot build."""
    config = trained.encoder_config()
    _check_for_s3prl(config)
    state = {}
    for key, value in trained.encoder_state().items():
        renamed = re.sub(r"conv_layers\.(\d)\.conv\.", r"gEncoder.conv\1.", key)
        renamed = re.sub(r"conv_layers\.(\d)\.norm\.", r"gEncoder.batchNorm\1.", renamed)
        if "batchNorm" in renamed and config["norm"] == "channel":
            value = value[None, :, None]
        state[renamed.replace("contexts.0.net.", "gAR.baseNet.")] = value
    theirs = {
        "hiddenEncoder": config["conv_layers"][-1][0],
        "hiddenGar": config["context_dim"],
        "encoder_type": "cpc",
        "normMode": {ours: theirs for theirs, ours in NORM_MODES.items()}[config["norm"]],
        "arMode": {ours: theirs for theirs, ours in AR_MODES.items()}[config["context"]],
        "nLevelsGRU": config["context_layers"],
        "cpc_mode": None,
        # "sequential" would carry the recurrent state from one call to the next.
        "samplingType": "samespeaker",
        "sizeWindow": DEFAULTS["sizeWindow"],
    }
    return {"config": theirs, "weights": state}


def _check_for_s3prl(config: Mapping[str, Any]) -> None:
    """Raise InteropError that names the first field with which s3prl has no network."""
    dim = config["conv_layers"][-1][0]
    expected = {
        "conv_layers": [[dim, kernel, stride, padding, padding] for kernel, stride, padding in CONV_SHAPES],
        "conv_bias": True,
        "relu_max": None,
        "input_scale": 1.0,
        "bidirectional": False,
    }
    for name, value in expected.items():
        if config[name] != value:
            raise InteropError(f"method.encoder.{name}: s3prl's cpc_local has only {value!r}; use a native export")
    if config["norm"] not in NORM_MODES.values():
        raise InteropError(f"method.encoder.norm: s3prl's cpc_local has no '{config['norm']}'; use a native export")
    if config["context"] == "transformer":
        raise InteropError("method.encoder.context: s3prl ships no transformer context network; use a native export")


def _encoder_config(values: Mapping[str, Any]) -> dict[str, Any]:
    for name, known in (("encoder_type", ("cpc",)), ("normMode", tuple(NORM_MODES)), ("arMode", tuple(AR_MODES))):
        if values[name] not in known:
            raise InteropError(f"config: {name}: {values[name]!r} is not supported, only {', '.join(known)}")
    if values["cpc_mode"] == "reverse":
        raise InteropError("config: cpc_mode: 'reverse' (a context that reads backwards alone) is not supported")
    if values["arMode"] == "transformer" and values["abspos"]:
        raise InteropError("config: abspos: True is not supported; our transformer has relative positions alone")
    dim = values["hiddenEncoder"]
    transformer = values["arMode"] == "transformer"
    return {
        "conv_layers": [[dim, kernel, stride, padding, padding] for kernel, stride, padding in CONV_SHAPES],
        "conv_bias": True,
        "norm": NORM_MODES[values["normMode"]],
        "norm_groups": None,
        "relu_max": None,
        "input_scale": 1.0,
        "context": AR_MODES[values["arMode"]],
        # CPC_audio builds one Transformer layer, whatever nLevelsGRU says.
        "context_layers": 1 if transformer else values["nLevelsGRU"],
        "context_dim": dim if transformer else values["hiddenGar"],
        "context_heads": TRANSFORMER_HEADS,
        "context_ffn_dim": TRANSFORMER_FFN,
        "context_frames": values["sizeWindow"] // STRIDE_SAMPLES,
        "dropout": TRANSFORMER_DROPOUT,
        "bidirectional": False,
    }


def _encoder_state(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    ours: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.startswith("gAR.") and config["context"] == "transformer":
            continue
        renamed = re.sub(r"gEncoder\.conv(\d)\.", r"conv_layers.\1.conv.", key)
        renamed = re.sub(r"gEncoder\.batchNorm(\d)\.", r"conv_layers.\1.norm.", renamed)
        renamed = renamed.replace("gAR.baseNet.", "contexts.0.net.")
        if renamed == key:
            raise InteropError(f"state dict: {key}: no part of CPC_audio's encoder; give a CPC checkpoint")
        ours[renamed] = value.flatten() if ".norm." in renamed and _BATCHES not in renamed else value
    if config["context"] == "transformer":
        for index in range(config["context_layers"]):
            layers = stack_layers(state, [f"gAR.{index}."])
            ours |= {f"contexts.0.layers.{index}.{name}": value for name, value in layers.items()}
    if config["norm"] == "batch":
        for index in range(len(CONV_SHAPES)):
            # Older torch did not count the batches; nothing is computed from the number.
            ours.setdefault(f"conv_layers.{index}.norm.{_BATCHES}", torch.tensor(0))
    return ours


def _head_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CPCUnsupersivedCriterion's linear or transformer predictors as ours; empty where the file has none."""
    prefix = "wPrediction.predictors."
    steps = len({key.split(".")[2] for key in state if key.startswith(prefix)})
    if not steps:
        return {}
    if f"{prefix}0.weight" in state:
        return {"predictors.0.weight": torch.stack([state[f"{prefix}{k}.weight"] for k in range(steps)])}
    if f"{prefix}0.0.multihead.Att.Krelpos" not in state:
        raise InteropError(
            f"cpcCriterion: {', '.join(list(state)[:3])}, ...: neither linear predictors nor transformers with "
            "relative positions; drop 'cpcCriterion' from the file and set init_head=reset"
        )
    layers = stack_layers(state, [f"{prefix}{k}.0." for k in range(steps)])
    return {f"predictors.0.{name}": value for name, value in layers.items()}


def stack_layers(state: Mapping[str, Tensor], prefixes: list[str]) -> dict[str, Tensor]:
    """The official TransformerLayers under `prefixes` as the tensors of one `CausalLayers`."""

    def stacked(name: str) -> Tensor:
        if missing := [f"{prefix}{name}" for prefix in prefixes if f"{prefix}{name}" not in state]:
            raise InteropError(f"state dict: missing {', '.join(missing)}; the file is incomplete")
        return torch.stack([state[f"{prefix}{name}"] for prefix in prefixes])

    layers = {"qkv_weight": torch.cat([stacked(f"multihead.W{letter}.weight") for letter in "qkv"], dim=1)}
    for ours, theirs in (
        ("out_weight", "multihead.Wo.weight"),
        ("positions", "multihead.Att.Krelpos"),
        ("attention_norm_weight", "ln_multihead.weight"),
        ("attention_norm_bias", "ln_multihead.bias"),
        ("fc1_weight", "ffnetwork.lin1.weight"),
        ("fc1_bias", "ffnetwork.lin1.bias"),
        ("fc2_weight", "ffnetwork.lin2.weight"),
        ("fc2_bias", "ffnetwork.lin2.bias"),
        ("final_norm_weight", "ln_ffnetwork.weight"),
        ("final_norm_bias", "ln_ffnetwork.bias"),
    ):
        layers[ours] = stacked(theirs)
    return layers
