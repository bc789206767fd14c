"""wav2vec 2.0 checkpoints of other projects: heads and file layouts around the shared encoder's tables.

Sources: fairseq/models/wav2vec/wav2vec2.py; s3prl/upstream/wav2vec2/convert.py; transformers models/wav2vec2 and
models/wav2vec2_conformer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pretrain.weights.interop import speech_encoder
from pretrain.weights.interop.fairseq_layout import fairseq_parts, huggingface_preprocessor
from pretrain.weights.interop.tables import KeyTable
from pretrain.weights.interop.types import HuggingFaceModel, Imported, InteropError, TrainedMethod

# transformers' model_type -> its pre-training class and the prefix of the encoder's tensors in it.
HF_CLASSES = {
    "wav2vec2": ("Wav2Vec2ForPreTraining", "wav2vec2"),
    "wav2vec2-conformer": ("Wav2Vec2ConformerForPreTraining", "wav2vec2_conformer"),
}
HF_MODEL_TYPES = tuple(HF_CLASSES)
HEADS = ("quantizer", "project_q", "final_proj")
HF_HEAD_KEYS = KeyTable(
    [
        ("quantizer.vars", "quantizer.codevectors"),
        ("quantizer.weight_proj.*", "quantizer.weight_proj.*"),
        ("project_q.*", "project_q.*"),
        ("final_proj.*", "project_hid.*"),
    ]
)
HF_HEADS = ("quantizer", "project_q", "project_hid")
# Options of the official heads that ours lack, with the value that leaves them out.
_FAIRSEQ_FIXED: dict[str, Any] = {
    "quantize_targets": True,
    "quantize_input": False,
    "same_quantizer": False,
    "target_glu": False,
    "quantizer_depth": 1,
}


def from_huggingface(model: HuggingFaceModel) -> Imported:
    """A `Wav2Vec2ForPreTraining` (or its conformer form) as our encoder and heads; other classes give the encoder."""
    config = speech_encoder.config_from_huggingface(model.config, model.preprocessor)
    prefix = HF_CLASSES[model.config["model_type"]][1]
    heads = {key: value for key, value in model.tensors.items() if _is_head(key, HF_HEADS)}
    encoder = {key: value for key, value in model.tensors.items() if key not in heads}
    state = speech_encoder.state_from_huggingface(encoder, config, prefix=prefix)
    return Imported(config, state, HF_HEAD_KEYS.to_ours(heads))


def from_pt(checkpoint: Mapping[str, Any]) -> Imported:
    """A fairseq checkpoint, or s3prl's `wav2vec2_local` form of it, as our encoder and heads.

    Raises InteropError for another model's checkpoint, and for options that our encoder or heads lack.
    """
    if "dictionaries_symbols" in checkpoint:
        raise InteropError("dictionaries_symbols: of a model that was trained on labels; give a wav2vec 2.0 checkpoint")
    model_config, task_config, state = fairseq_parts(checkpoint, "wav2vec2", "wav2vec 2.0")
    # fairseq counts the real frames of a padded row by the convolutions here, unlike in HuBERT.
    config = speech_encoder.config_from_fairseq(model_config, task_config) | {"frame_length_rule": "conv"}
    head = {key: value for key, value in state.items() if _is_head(key, HEADS)}
    if head:
        for name, value in _FAIRSEQ_FIXED.items():
            if model_config.get(name, value) != value:
                raise InteropError(
                    f"model config: {name}: {model_config[name]!r} is not supported, only {value!r}; "
                    "this checkpoint cannot be imported"
                )
    encoder = {key: value for key, value in state.items() if key not in head}
    return Imported(config, speech_encoder.state_from_fairseq(encoder, config), dict(head))


def to_s3prl(trained: TrainedMethod) -> dict[str, Any]:
    """The dictionary that s3prl's `wav2vec2_local` loads strictly."""
    encoder_config = trained.encoder_config()
    model, task = speech_encoder.config_to_fairseq(encoder_config)
    names = ("final_dim", "latent_vars", "latent_groups", "latent_dim", "latent_temp", "num_negatives", "logit_temp")
    model |= {name: trained.config[name] for name in (*names, "mask_prob", "mask_length", "dropout_features")}
    model |= _FAIRSEQ_FIXED
    return {
        "task_cfg": task,
        "model_cfg": model,
        "model_weight": speech_encoder.state_to_fairseq(trained.encoder_state(), encoder_config) | _heads(trained),
    }


def to_huggingface(trained: TrainedMethod) -> HuggingFaceModel:
    """What transformers' pre-training class and `AutoFeatureExtractor` load, heads included."""
    config, encoder_config = trained.config, trained.encoder_config()
    model_type = "wav2vec2-conformer" if encoder_config.get("layer_type") == "conformer" else "wav2vec2"
    class_name, prefix = HF_CLASSES[model_type]
    hf_config = {
        **speech_encoder.config_to_huggingface(encoder_config),
        "architectures": [class_name],
        "model_type": model_type,
        "num_codevectors_per_group": config["latent_vars"],
        "num_codevector_groups": config["latent_groups"],
        "codevector_dim": config["latent_dim"],
        "proj_codevector_dim": config["final_dim"],
        "contrastive_logits_temperature": config["logit_temp"],
        "num_negatives": config["num_negatives"],
        "diversity_loss_weight": config["diversity_weight"],
        "feat_quantizer_dropout": config["dropout_features"],
    }
    state = speech_encoder.state_to_huggingface(trained.encoder_state(), encoder_config)
    tensors = {f"{prefix}.{key}": value for key, value in state.items()} | HF_HEAD_KEYS.to_theirs(_heads(trained))
    return HuggingFaceModel(hf_config, tensors, huggingface_preprocessor(encoder_config))


def _is_head(key: str, heads: tuple[str, ...]) -> bool:
    return key.split(".")[0] in heads


def _heads(trained: TrainedMethod) -> dict[str, Tensor]:
    """Quantizer and projections; raises InteropError where the checkpoint holds only the encoder."""
    head = trained.head_state()
    if missing := [name for name in HEADS if not any(_is_head(key, (name,)) for key in head)]:
        raise InteropError(
            f"state dict: missing {', '.join(missing)}, which the format requires; give the run's folder"
        )
    return head
