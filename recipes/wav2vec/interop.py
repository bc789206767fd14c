"""wav2vec and vq-wav2vec checkpoints of fairseq and s3prl; transformers has neither.

Sources: fairseq/models/wav2vec/wav2vec.py; s3prl/upstream/wav2vec/convert.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pretrain.weights.interop.speech_encoder import parse_conv_layers
from pretrain.weights.interop.tables import KeyTable
from pretrain.weights.interop.types import Imported, InteropError, TrainedMethod

HEAD_KEYS = ("wav2vec_predictions.project_to_steps.weight", "wav2vec_predictions.project_to_steps.bias")
FAIRSEQ_KEYS = KeyTable(
    [
        ("feature_extractor.conv_layers.{i}.conv.*", "feature_extractor.conv_layers.{i}.0.*"),
        ("feature_extractor.conv_layers.{i}.norm.*", "feature_extractor.conv_layers.{i}.2.*"),
        ("feature_aggregator.{i}.conv.*", "feature_aggregator.conv_layers.{i}.1.*"),
        ("feature_aggregator.{i}.norm.*", "feature_aggregator.conv_layers.{i}.3.*"),
        ("feature_aggregator.{i}.residual_proj.*", "feature_aggregator.residual_proj.{i}.*"),
        ("vector_quantizer.vars", "vector_quantizer.vars"),
        ("vector_quantizer.weight_proj.{i}.0.*", "vector_quantizer.weight_proj.{i}.0.*"),
        ("vector_quantizer.weight_proj.{i}.*", "vector_quantizer.weight_proj.{i}.*"),
        ("vector_quantizer.weight_proj.*", "vector_quantizer.weight_proj.*"),
        ("vector_quantizer.embedding", "vector_quantizer.embedding"),
        ("vector_quantizer.projection.{i}.*", "vector_quantizer.projection.{i}.*"),
    ]
)

# fairseq's own defaults (dataclass Wav2VecConfig), for fields that a checkpoint leaves out.
_FIELDS: dict[str, Any] = {
    "activation": "relu",
    "log_compression": True,
    "skip_connections_agg": True,
    "residual_scale": 0.5,
}
_QUANTIZER_FIELDS: dict[str, Any] = {"vq_vars": 320, "vq_groups": 2, "vq_depth": 1, "combine_groups": False}
_LAYERS: dict[str, str] = {
    "conv_feature_layers": "[(512, 10, 5), (512, 8, 4)] + [(512, 4, 2)] * 3 + [(512, 1, 1)] * 3",
    "conv_aggregator_layers": repr([(512, kernel, 1) for kernel in range(2, 14)]),
}
_FIXED: dict[str, Any] = {
    "aggregator": "cnn",
    "agg_zero_pad": False,
    "no_conv_bias": False,
    "non_affine_group_norm": False,
    "skip_connections_feat": False,
    "project_features": "none",
}


def from_pt(checkpoint: Mapping[str, Any]) -> Imported:
    """A fairseq checkpoint, or s3prl's form of it, as our encoder and prediction head.

    Raises InteropError for another model's checkpoint, and for options that our encoder lacks.
    """
    model, state = _parts(checkpoint)
    encoder = {key: value for key, value in state.items() if key not in HEAD_KEYS}
    head = {key: state[key] for key in HEAD_KEYS if key in state}
    return Imported(_config_from_fairseq(model), FAIRSEQ_KEYS.to_ours(encoder), head)


def to_s3prl(trained: TrainedMethod) -> dict[str, Any]:
    """The dictionary that s3prl's `wav2vec_local`, `wav2vec_custom` and `vq_wav2vec_custom` load strictly."""
    head = trained.head_state()
    if missing := [key for key in HEAD_KEYS if key not in head]:
        raise InteropError(f"state dict: missing {', '.join(missing)}, which s3prl requires; give the run's folder")
    return {
        "task_cfg": {"sample_rate": 16000, "normalize": False},
        "model_cfg": config_to_fairseq(trained.config),
        "model_weight": FAIRSEQ_KEYS.to_theirs(trained.encoder_state()) | {key: head[key] for key in HEAD_KEYS},
    }


def config_to_fairseq(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our `method` block as fairseq's model config."""
    encoder = config["encoder"]
    training = config["quantizer_training"] or {}
    aggregator = [(dim, kernel, 1) for dim, kernel in encoder["conv_aggregator_layers"]]
    return {
        **{name: encoder[name] for name in _FIELDS},
        **_FIXED,
        **_quantizer_to_fairseq(encoder["quantizer"]),
        **{name: training[name] for name in ("vq_temp", "vq_gamma") if name in training},
        "conv_feature_layers": repr([tuple(layer) for layer in encoder["conv_feature_layers"]]),
        "conv_aggregator_layers": repr(aggregator),
        "prediction_steps": config["prediction_steps"],
        "num_negatives": config["num_negatives"],
        "infonce": False,
        "offset": "auto",
    }


def _quantizer_to_fairseq(quantizer: Mapping[str, Any] | None) -> dict[str, Any]:
    if quantizer is None:
        return {"vq_type": "none"}
    # k-means has one projection; the depth is Gumbel's, and fairseq ignores it for k-means.
    return {"vq_type": quantizer["kind"], "vq_depth": 1} | {k: v for k, v in quantizer.items() if k != "kind"}


def _config_from_fairseq(model: Mapping[str, Any]) -> dict[str, Any]:
    """fairseq's model config as our encoder's; dropout is left out, as no published model has any."""
    for name, expected in _FIXED.items():
        if model.get(name, expected) != expected:
            raise InteropError(
                f"model config: {name}: {model[name]!r} is not supported, only {expected!r}; "
                "this checkpoint cannot be imported"
            )
    layers = {name: parse_conv_layers(model.get(name, default), name) for name, default in _LAYERS.items()}
    if any(stride != 1 for _, _, stride in layers["conv_aggregator_layers"]):
        raise InteropError("model config: conv_aggregator_layers: a stride other than 1; it cannot be imported")
    layers["conv_aggregator_layers"] = [[dim, kernel] for dim, kernel, _ in layers["conv_aggregator_layers"]]
    config = layers | {name: model.get(name, default) for name, default in _FIELDS.items()}
    vq_type = model.get("vq_type") or "none"
    if vq_type == "none":
        return config | {"quantizer": None}
    dim = layers["conv_feature_layers"][-1][0]
    if model.get("vq_dim", 0) not in (0, dim):
        raise InteropError(f"model config: vq_dim: {model['vq_dim']} is not the {dim} of the features; only that works")
    quantizer = {"kind": vq_type} | {name: model.get(name, default) for name, default in _QUANTIZER_FIELDS.items()}
    if vq_type == "kmeans":
        del quantizer["vq_depth"]  # Gumbel's; fairseq ignores it here
    return config | {"quantizer": quantizer}


def _parts(checkpoint: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Model config and state dict of either layout."""
    if "model_weight" in checkpoint:
        model, state = checkpoint.get("model_cfg"), checkpoint["model_weight"]
    else:
        config, state = checkpoint.get("cfg") or checkpoint.get("args"), checkpoint.get("model")
        # Checkpoints from before fairseq's cfg hold one flat `args`.
        model = config.get("model", config) if isinstance(config, Mapping) else None
    if not isinstance(model, Mapping) or not isinstance(state, Mapping):
        raise InteropError(
            f"keys {', '.join(map(str, checkpoint))}: neither fairseq's (cfg, model) nor s3prl's (model_cfg, task_cfg, "
            "model_weight); give a checkpoint of one of these layouts"
        )
    name = model.get("_name") or model.get("arch") or "wav2vec"
    if name != "wav2vec" or not any(key.startswith("feature_aggregator.") for key in state):
        raise InteropError(f"cfg.model: '{name}' without wav2vec's aggregator; give a wav2vec or vq-wav2vec checkpoint")
    return model, state
