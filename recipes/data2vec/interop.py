"""data2vec checkpoints of other projects: head, teacher and file layouts around the shared encoder's tables.

Sources: fairseq examples/data2vec/models/data2vec_audio.py; s3prl/upstream/data2vec/convert.py; transformers
models/data2vec/modeling_data2vec_audio.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pretrain.weights.interop import speech_encoder
from pretrain.weights.interop.fairseq_layout import fairseq_parts, huggingface_preprocessor
from pretrain.weights.interop.types import HuggingFaceModel, Imported, InteropError, TrainedMethod

HF_MODEL_TYPES = ("data2vec-audio",)
HEAD_KEYS = ("final_proj.weight", "final_proj.bias")
# fairseq's key for the teacher, whose tensors it names as the student's, without the student's prefix.
TEACHER, CONTEXT = "_ema", "encoder."
# Options that the checkpoint's model and ours share beside the encoder's.
OPTIONS = (
    *("mask_prob", "mask_length", "average_top_k_layers", "loss_beta", "loss_scale", "ema_decay", "ema_end_decay"),
    *("ema_anneal_end_step", "ema_layers_only", "min_target_var", "min_pred_var"),
)
# Options of the official model that ours lacks, with the value that says what ours does.
FIXED_OPTIONS: dict[str, Any] = {
    "instance_norm_target_layer": True,
    "layer_norm_target_layer": False,
    "batch_norm_target_layer": False,
    "group_norm_target_layer": False,
    "instance_norm_targets": False,
    "layer_norm_targets": False,
    "ema_transformer_only": True,
}


def from_huggingface(model: HuggingFaceModel) -> Imported:
    """A `Data2VecAudioModel`, or a model with a head on it, as our encoder; transformers keeps head and teacher not."""
    config = speech_encoder.config_from_huggingface(model.config, model.preprocessor)
    return Imported(config, speech_encoder.state_from_huggingface(model.tensors, config, prefix="data2vec_audio"))


def from_pt(checkpoint: Mapping[str, Any]) -> Imported:
    """A fairseq checkpoint, or s3prl's `data2vec_local` form of it, as our encoder, head and teacher.

    A teacher of the whole model (`ema_transformer_only: false`) is left out. Raises InteropError for another model's
    checkpoint, and for options that our encoder lacks.
    """
    model_config, task_config, state = fairseq_parts(checkpoint, "data2vec_audio", "data2vec")
    if "model_weight" in checkpoint and TEACHER not in state:
        raise InteropError(f"{TEACHER}: missing, so this is no data2vec checkpoint; give a data2vec one")
    # fairseq counts the real frames of a padded row by the convolutions here, unlike in HuBERT.
    config = speech_encoder.config_from_fairseq(model_config, task_config) | {"frame_length_rule": "conv"}
    encoder = {key: value for key, value in state.items() if key not in (*HEAD_KEYS, TEACHER)}
    head = {key: state[key] for key in HEAD_KEYS if key in state}
    return Imported(config, speech_encoder.state_from_fairseq(encoder, config), head | _teacher(state, config))


def to_s3prl(trained: TrainedMethod) -> dict[str, Any]:
    """The dictionary that s3prl's `data2vec_local` loads; it wants the teacher's key, and leaves teacher and head out.

    fairseq's own model loads head and teacher too.
    """
    encoder_config, head = trained.encoder_config(), trained.head_state()
    model, task = speech_encoder.config_to_fairseq(encoder_config)
    model |= {"_name": "data2vec_audio"} | {name: trained.config[name] for name in OPTIONS} | FIXED_OPTIONS
    weight: dict[str, Any] = speech_encoder.state_to_fairseq(trained.encoder_state(), encoder_config)
    weight |= {key: head[key] for key in HEAD_KEYS if key in head}
    teacher = {f"{CONTEXT}{key.removeprefix('teacher.')}": v for key, v in head.items() if key.startswith("teacher.")}
    theirs = speech_encoder.state_to_fairseq(teacher, encoder_config)
    weight[TEACHER] = {key.removeprefix(CONTEXT): value for key, value in theirs.items()}
    return {"task_cfg": task, "model_cfg": model, "model_weight": weight}


def to_huggingface(trained: TrainedMethod) -> HuggingFaceModel:
    """What `transformers.Data2VecAudioModel.from_pretrained` and `AutoFeatureExtractor` load.

    Raises InteropError for an encoder with layer norms elsewhere than in Base, which transformers does not have.
    """
    encoder_config = trained.encoder_config()
    for name, value in (("extractor_mode", "layer_norm"), ("layer_norm_first", False), ("layer_type", "transformer")):
        if encoder_config.get(name, value) != value:
            raise InteropError(
                f"method.encoder.{name}: {encoder_config[name]!r} has no counterpart in transformers' data2vec, only "
                f"{value!r}; export to native or s3prl"
            )
    hf_config = {
        **speech_encoder.config_to_huggingface(encoder_config, stacked_positions=True),
        "architectures": ["Data2VecAudioModel"],
        "model_type": "data2vec-audio",
    }
    state = speech_encoder.state_to_huggingface(trained.encoder_state(), encoder_config)
    return HuggingFaceModel(hf_config, state, huggingface_preprocessor(encoder_config))


def _teacher(state: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The teacher in fairseq's state dict under our names; empty where there is none, or one of the whole model."""
    theirs = state.get(TEACHER) or {}
    if not theirs or any(key.startswith(CONTEXT) for key in theirs):
        return {}
    ours = speech_encoder.state_from_fairseq({f"{CONTEXT}{key}": value for key, value in theirs.items()}, config)
    return {f"teacher.{key.removeprefix(CONTEXT)}": v for key, v in ours.items() if key.startswith(CONTEXT)}
