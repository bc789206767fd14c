"""UniSpeech checkpoints of other projects, around the shared encoder's tables.

Sources: microsoft/UniSpeech src/fairseq/models/unispeech/unispeech.py; transformers models/unispeech. s3prl has no
entry for UniSpeech; its `wav2vec2_local` takes the encoder, which is wav2vec 2.0's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pretrain.weights.interop import speech_encoder
from pretrain.weights.interop.fairseq_layout import fairseq_parts, huggingface_preprocessor
from pretrain.weights.interop.tables import KeyTable
from pretrain.weights.interop.types import HuggingFaceModel, Imported, InteropError, TrainedMethod

HF_MODEL_TYPES = ("unispeech",)
HF_HEAD_KEYS = KeyTable(
    [
        ("quantizer.vars", "quantizer.codevectors"),
        ("quantizer.weight_proj.*", "quantizer.weight_proj.*"),
        ("project_q.*", "project_q.*"),
        ("final_proj.*", "project_hid.*"),
        ("ctc_proj.*", "ctc_proj.*"),
    ]
)
HEADS = ("quantizer", "project_q", "final_proj", "ctc_proj")
HF_HEADS = ("quantizer", "project_q", "project_hid", "ctc_proj")
MODEL_PREFIX, CTC_HEAD = "w2v_encoder.w2v_model.", "w2v_encoder.proj."


def from_huggingface(model: HuggingFaceModel) -> Imported:
    """A `UniSpeechForPreTraining` as our encoder and heads; other classes give the encoder."""
    config = speech_encoder.config_from_huggingface(model.config, model.preprocessor)
    heads = {key: value for key, value in model.tensors.items() if key.split(".")[0] in HF_HEADS}
    encoder = {key: value for key, value in model.tensors.items() if key not in heads}
    state = speech_encoder.state_from_huggingface(encoder, config, prefix="unispeech")
    return Imported(config, state, HF_HEAD_KEYS.to_ours(heads))


def from_pt(checkpoint: Mapping[str, Any]) -> Imported:
    """A checkpoint of the official code as our encoder and heads.

    Raises InteropError for another model's checkpoint, and where the projection is not on the quantized side.
    """
    model_config, task_config, state = fairseq_parts(checkpoint, "unispeech", "UniSpeech")
    if not model_config.get("transpose", True):
        raise InteropError("model config: transpose: False is not supported; this checkpoint cannot be imported")
    config = speech_encoder.config_from_fairseq(model_config, task_config)
    names = {}
    for key, value in state.items():
        if key.startswith(CTC_HEAD):
            names[f"ctc_proj.{key.removeprefix(CTC_HEAD)}"] = value
        else:
            names[key.removeprefix(MODEL_PREFIX)] = value
    head = {key: value for key, value in names.items() if key.split(".")[0] in HEADS}
    encoder = {key: value for key, value in names.items() if key not in head}
    return Imported(config, speech_encoder.state_from_fairseq(encoder, config), head)


def to_s3prl(trained: TrainedMethod) -> dict[str, Any]:
    """The dictionary that s3prl's `wav2vec2_local` loads strictly.

    It asks for the two projections of wav2vec 2.0, which its upstream never uses and which have other shapes here:
    they are zeros.
    """
    encoder_config = trained.encoder_config()
    model, task = speech_encoder.config_to_fairseq(encoder_config)
    final_dim, width = trained.config["final_dim"], encoder_config["encoder_embed_dim"]
    conv_dim = encoder_config["conv_feature_layers"][-1][0]
    model |= {"final_dim": final_dim, "quantize_targets": False}
    unused = {"project_q": (final_dim, conv_dim), "final_proj": (final_dim, width)}
    zeros = {f"{name}.weight": torch.zeros(shape) for name, shape in unused.items()}
    zeros |= {f"{name}.bias": torch.zeros(final_dim) for name in unused}
    weights = speech_encoder.state_to_fairseq(trained.encoder_state(), encoder_config)
    return {"task_cfg": task, "model_cfg": model, "model_weight": weights | zeros}


def to_huggingface(trained: TrainedMethod) -> HuggingFaceModel:
    """What `transformers.UniSpeechForPreTraining` and `AutoFeatureExtractor` load, heads included.

    A checkpoint without CTC (`ctc_weight` 0) has no such head; transformers then draws one.
    """
    config, encoder_config, head = trained.config, trained.encoder_config(), trained.head_state()
    if missing := [name for name in HEADS[:3] if not any(key.startswith(f"{name}.") for key in head)]:
        raise InteropError(
            f"state dict: missing {', '.join(missing)}, which the format requires; give the run's folder"
        )
    hf_config = {
        **speech_encoder.config_to_huggingface(encoder_config),
        "architectures": ["UniSpeechForPreTraining"],
        "model_type": "unispeech",
        "num_codevectors_per_group": config["latent_vars"],
        "num_codevector_groups": config["latent_groups"],
        "codevector_dim": config["latent_dim"],
        "proj_codevector_dim": config["final_dim"],
        "contrastive_logits_temperature": config["logit_temp"],
        "num_negatives": config["num_negatives"],
        "diversity_loss_weight": config["diversity_weight"],
        "feat_quantizer_dropout": config["dropout_features"],
        "replace_prob": config["replace_prob"],
        "final_dropout": config["final_dropout"],
        "num_ctc_classes": _classes(head),
    }
    state = speech_encoder.state_to_huggingface(trained.encoder_state(), encoder_config)
    tensors = {f"unispeech.{key}": value for key, value in state.items()} | HF_HEAD_KEYS.to_theirs(head)
    return HuggingFaceModel(hf_config, tensors, huggingface_preprocessor(encoder_config))


def _classes(head: Mapping[str, Tensor]) -> int:
    """Rows of the CTC head, or transformers' default where there is none."""
    return len(head["ctc_proj.bias"]) if "ctc_proj.bias" in head else 80
