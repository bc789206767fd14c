"""What surrounds the tensors of a speech encoder in the files of fairseq, s3prl and transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pretrain.weights.interop.types import InteropError

# Tensors outside the encoder in models that predict masked labels, as HuBERT does; ours have the same names.
MASKED_PREDICTION_HEAD = ("final_proj.weight", "final_proj.bias", "label_embs_concat")


def fairseq_parts(
    checkpoint: Mapping[str, Any], name: str, title: str
) -> tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]:
    """Model config, task config and state dict of a fairseq checkpoint, or of s3prl's `*_local` form of one.

    `name` begins the model's registered names in fairseq, `title` is what messages call it. Raises InteropError for
    another layout and another model.
    """
    if "model_weight" in checkpoint:
        return checkpoint["model_cfg"], checkpoint["task_cfg"], checkpoint["model_weight"]
    config, state = checkpoint.get("cfg") or checkpoint.get("args"), checkpoint.get("model")
    if not isinstance(config, Mapping) or not isinstance(state, Mapping):
        raise InteropError(
            f"keys {', '.join(map(str, checkpoint))}: neither fairseq's (cfg, model) nor s3prl's (model_cfg, task_cfg, "
            "model_weight); give a checkpoint of one of these layouts"
        )
    # Checkpoints from before fairseq's cfg hold one flat `args`.
    model, task = config.get("model", config), config.get("task", config)
    found = model.get("_name") or model.get("arch") or name
    if not found.startswith(name):
        raise InteropError(f"cfg.model._name: '{found}' is not a {title} model; give a {title} checkpoint")
    return model, task, state


def huggingface_preprocessor(encoder_config: Mapping[str, Any]) -> dict[str, Any]:
    """preprocessor_config.json, which `AutoFeatureExtractor` loads.

    Models with a group norm were published with `return_attention_mask` False, because padding enters their
    statistics with or without a mask.
    """
    return {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "sampling_rate": 16000,
        "padding_value": 0.0,
        "padding_side": "right",
        "do_normalize": encoder_config["normalize"],
        "return_attention_mask": encoder_config["extractor_mode"] == "layer_norm",
    }
