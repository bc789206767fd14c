"""HuBERT checkpoints of other projects: heads, dictionaries and file layouts around the shared encoder's tables.

Sources: fairseq/models/hubert/hubert.py; s3prl/upstream/hubert/convert.py; transformers models/hubert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pretrain.interop import speech_encoder
from pretrain.interop.types import HuggingFaceModel, Imported, InteropError, TrainedMethod

HF_MODEL_TYPES = ("hubert",)
HEAD_KEYS = ("final_proj.weight", "final_proj.bias", "label_embs_concat")
# Rows that fairseq's Dictionary puts before the clusters.
SPECIAL_SYMBOLS = ["<s>", "<pad>", "</s>", "<unk>"]


def from_huggingface(model: HuggingFaceModel) -> Imported:
    """A `HubertModel`, or a model with a head on it, as our encoder; transformers keeps no pre-training head."""
    config = speech_encoder.config_from_huggingface(model.config, model.preprocessor)
    return Imported(config, speech_encoder.state_from_huggingface(model.tensors, config, prefix="hubert"))


def from_pt(checkpoint: Mapping[str, Any]) -> Imported:
    """A fairseq checkpoint, or s3prl's `hubert_local` form of it, as our encoder and heads.

    Raises InteropError for another model's checkpoint, and for options that our encoder or heads lack.
    """
    model_config, task_config, state = _parts(checkpoint)
    if model_config.get("target_glu"):
        raise InteropError("model config: target_glu: True is not supported; this checkpoint cannot be imported")
    config = speech_encoder.config_from_fairseq(model_config, task_config)
    encoder = {key: value for key, value in state.items() if key not in HEAD_KEYS}
    head = {key: state[key] for key in HEAD_KEYS if key in state}
    return Imported(config, speech_encoder.state_from_fairseq(encoder, config), head)


def to_s3prl(trained: TrainedMethod) -> dict[str, Any]:
    """The dictionary that s3prl's `hubert_local` loads strictly."""
    config, encoder_config = trained.config, trained.encoder_config()
    head = trained.head_state()
    if missing := [key for key in HEAD_KEYS if key not in head]:
        raise InteropError(f"state dict: missing {', '.join(missing)}, which s3prl requires; give the run's folder")
    model, task = speech_encoder.config_to_fairseq(encoder_config)
    label_rate = float(config["label_rates_hz"][0])
    model |= {
        "label_rate": label_rate,
        "final_dim": config["final_dim"],
        "untie_final_proj": config["untie_final_proj"],
        "target_glu": False,
        "logit_temp": config["logit_temp"],
        "mask_prob": config["mask_prob"],
        "mask_length": config["mask_length"],
    }
    return {
        "task_cfg": task | {"label_rate": label_rate},
        "model_cfg": model,
        "model_weight": speech_encoder.state_to_fairseq(trained.encoder_state(), encoder_config)
        | {key: head[key] for key in HEAD_KEYS},
        "dictionaries_symbols": [
            SPECIAL_SYMBOLS + [str(cluster) for cluster in range(clusters)] for clusters in config["num_classes"]
        ],
    }


def to_huggingface(trained: TrainedMethod) -> HuggingFaceModel:
    """What `transformers.HubertModel.from_pretrained` and `AutoFeatureExtractor` load.

    Models with a group norm were published with `return_attention_mask` False, because padding enters their
    statistics with or without a mask.
    """
    config = trained.encoder_config()
    preprocessor = {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "sampling_rate": 16000,
        "padding_value": 0.0,
        "padding_side": "right",
        "do_normalize": config["normalize"],
        "return_attention_mask": config["extractor_mode"] == "layer_norm",
    }
    hf_config = {"architectures": ["HubertModel"], "model_type": "hubert"}
    tensors = speech_encoder.state_to_huggingface(trained.encoder_state())
    return HuggingFaceModel(hf_config | speech_encoder.config_to_huggingface(config), tensors, preprocessor)


def _parts(checkpoint: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]:
    """Model config, task config and state dict of either layout."""
    if "model_weight" in checkpoint:
        if "dictionaries_symbols" not in checkpoint:
            raise InteropError("dictionaries_symbols: missing, so this is no HuBERT checkpoint; give a HuBERT one")
        return checkpoint["model_cfg"], checkpoint["task_cfg"], checkpoint["model_weight"]
    config, state = checkpoint.get("cfg") or checkpoint.get("args"), checkpoint.get("model")
    if not isinstance(config, Mapping) or not isinstance(state, Mapping):
        raise InteropError(
            f"keys {', '.join(map(str, checkpoint))}: neither fairseq's (cfg, model) nor s3prl's (model_cfg, task_cfg, "
            "model_weight, dictionaries_symbols); give a checkpoint of one of these layouts"
        )
    # Checkpoints from before fairseq's cfg hold one flat `args`.
    model, task = config.get("model", config), config.get("task", config)
    name = model.get("_name") or model.get("arch") or "hubert"
    if not name.startswith("hubert"):
        raise InteropError(f"cfg.model._name: '{name}' is not a HuBERT model; give a HuBERT checkpoint")
    return model, task, state
