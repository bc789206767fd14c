"""WavLM checkpoints of other projects: file layouts around the shared encoder's tables.

Sources: `WavLM/README.md`, `WavLM/WavLM.py` and `src/fairseq/models/wavlm/wavlm.py` of microsoft/UniSpeech;
s3prl/upstream/wavlm; transformers models/wavlm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pretrain.weights.interop import speech_encoder
from pretrain.weights.interop.fairseq_layout import MASKED_PREDICTION_HEAD as HEAD_KEYS
from pretrain.weights.interop.fairseq_layout import fairseq_parts, huggingface_preprocessor
from pretrain.weights.interop.types import HuggingFaceModel, Imported, InteropError, TrainedMethod

HF_MODEL_TYPES = ("wavlm",)


def from_huggingface(model: HuggingFaceModel) -> Imported:
    """A `WavLMModel`, or a model with a head on it, as our encoder; transformers keeps no pre-training head."""
    config = speech_encoder.config_from_huggingface(model.config, model.preprocessor)
    return Imported(config, speech_encoder.state_from_huggingface(model.tensors, config, prefix="wavlm"))


def from_pt(checkpoint: Mapping[str, Any]) -> Imported:
    """Microsoft's released layout (flat `cfg`, `model`), which s3prl reads too, or a checkpoint of their training code.

    The released files hold no heads. Raises InteropError for another model's checkpoint, and for options that our
    encoder or heads lack.
    """
    model_config, task_config, state = fairseq_parts(checkpoint, "wavlm", "WavLM")
    if not model_config.get("relative_position_embedding", False):
        raise InteropError(
            "cfg: relative_position_embedding: missing or False, so this is no WavLM checkpoint; give a WavLM one"
        )
    for name, value in (("target_glu", False), ("expand_attention_head_size", -1)):
        if (found := model_config.get(name, value)) != value:
            raise InteropError(f"cfg: {name}: {found} is not supported; this checkpoint cannot be imported")
    config = speech_encoder.config_from_fairseq(model_config, task_config)
    encoder = {key: value for key, value in state.items() if key not in HEAD_KEYS}
    head = {key: state[key] for key in HEAD_KEYS if key in state}
    return Imported(config, speech_encoder.state_from_fairseq(encoder, config), head)


def to_s3prl(trained: TrainedMethod) -> dict[str, Any]:
    """Microsoft's released layout, which s3prl's `wavlm_local` loads strictly: without heads."""
    encoder_config = trained.encoder_config()
    model, task = speech_encoder.config_to_fairseq(encoder_config, position_bias=True)
    options = {name: trained.config[name] for name in ("mask_prob", "mask_length")}
    weight = speech_encoder.state_to_fairseq(trained.encoder_state(), encoder_config)
    return {"cfg": {**model, **options, "normalize": task["normalize"]}, "model": weight}


def to_huggingface(trained: TrainedMethod) -> HuggingFaceModel:
    """What `transformers.WavLMModel.from_pretrained` and `AutoFeatureExtractor` load."""
    config = trained.encoder_config()
    hf_config = {"architectures": ["WavLMModel"], "model_type": "wavlm"}
    hf_config |= speech_encoder.config_to_huggingface(config, position_bias=True)
    tensors = speech_encoder.state_to_huggingface(trained.encoder_state(), config)
    return HuggingFaceModel(hf_config, tensors, huggingface_preprocessor(config))
