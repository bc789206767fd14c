"""HuBERT checkpoints of other projects, for all methods that are HuBERT to them: heads, dictionaries, file layouts.

Sources: fairseq/models/hubert/hubert.py; s3prl/upstream/hubert/convert.py; transformers models/hubert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pretrain.weights.interop import speech_encoder
from pretrain.weights.interop.fairseq_layout import MASKED_PREDICTION_HEAD as HEAD_KEYS
from pretrain.weights.interop.fairseq_layout import fairseq_parts, huggingface_preprocessor
from pretrain.weights.interop.types import HuggingFaceModel, Imported, InteropError, TrainedMethod

HF_MODEL_TYPES = ("hubert",)
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
    if "model_weight" in checkpoint and "dictionaries_symbols" not in checkpoint:
        raise InteropError("dictionaries_symbols: missing, so this is no HuBERT checkpoint; give a HuBERT one")
    model_config, task_config, state = fairseq_parts(checkpoint, "hubert", "HuBERT")
    if model_config.get("target_glu"):
        raise InteropError("model config: target_glu: True is not supported; this checkpoint cannot be imported")
    config = speech_encoder.config_from_fairseq(model_config, task_config)
    encoder = {key: value for key, value in state.items() if key not in HEAD_KEYS}
    head = {key: state[key] for key in HEAD_KEYS if key in state}
    return Imported(config, speech_encoder.state_from_fairseq(encoder, config), head)


def to_s3prl(trained: TrainedMethod) -> dict[str, Any]:
    """The dictionary that s3prl's `hubert_local` loads strictly."""
    config, encoder_config = trained.config, _transformer_config(trained)
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
    """What `transformers.HubertModel.from_pretrained` and `AutoFeatureExtractor` load."""
    config = _transformer_config(trained)
    hf_config = {"architectures": ["HubertModel"], "model_type": "hubert"}
    tensors = speech_encoder.state_to_huggingface(trained.encoder_state(), config)
    return HuggingFaceModel(
        hf_config | speech_encoder.config_to_huggingface(config), tensors, huggingface_preprocessor(config)
    )


def _transformer_config(trained: TrainedMethod) -> dict[str, Any]:
    """The encoder's config; raises InteropError for conformer layers, with which nobody else has a HuBERT."""
    config = trained.encoder_config()
    if config.get("layer_type", "transformer") != "transformer":
        raise InteropError(
            f"method.encoder.layer_type: no other project has a HuBERT of type {config['layer_type']}; export to native"
        )
    return config
