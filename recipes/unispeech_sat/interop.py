"""UniSpeech-SAT checkpoints of other projects: heads and file layouts around the shared encoder's tables.

Sources: `src/fairseq/models/unispeech_sat/unispeech_sat.py` of microsoft/UniSpeech; s3prl/upstream/unispeech_sat, which
loads with WavLM's class; transformers models/unispeech_sat.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pretrain.objectives.masked_prediction import DICTIONARY_SPECIALS
from pretrain.weights.interop import speech_encoder
from pretrain.weights.interop.fairseq_layout import fairseq_parts, huggingface_preprocessor
from pretrain.weights.interop.tables import KeyTable
from pretrain.weights.interop.types import HuggingFaceModel, Imported, InteropError, TrainedMethod

HF_MODEL_TYPES = ("unispeech-sat",)
NORM = "layer_norm_for_extract"
HF_HEAD_KEYS = KeyTable(
    [
        ("final_proj.*", "project_hid.*"),
        ("label_embs_concat", "label_embeddings_concat"),
        ("quantizer.vars", "quantizer.codevectors"),
        ("quantizer.weight_proj.*", "quantizer.weight_proj.*"),
        ("project_q.*", "project_q.*"),
        ("spk_proj.*", "speaker_proj.*"),
        (f"{NORM}.*", f"{NORM}.*"),
    ]
)
HEADS = ("final_proj", "label_embs_concat", "quantizer", "project_q", "spk_proj")
HF_HEADS = ("project_hid", "label_embeddings_concat", "quantizer", "project_q", "speaker_proj", NORM)


def from_huggingface(model: HuggingFaceModel) -> Imported:
    """A `UniSpeechSatForPreTraining` as our encoder and heads; other classes give the encoder."""
    config = speech_encoder.config_from_huggingface(model.config, model.preprocessor)
    heads = {key: value for key, value in model.tensors.items() if key.split(".")[0] in HF_HEADS}
    encoder = {key: value for key, value in model.tensors.items() if key not in heads}
    state = speech_encoder.state_from_huggingface(encoder, config, prefix="unispeech_sat")
    if not config["layer_norm_first"]:
        heads = {key: value for key, value in heads.items() if not key.startswith(NORM)}  # there, but not used
    return Imported(config, state, HF_HEAD_KEYS.to_ours(heads))


def from_pt(checkpoint: Mapping[str, Any]) -> Imported:
    """The layout that s3prl reads (flat `cfg`, `model`), without heads, or a checkpoint of the official training code.

    Raises InteropError for another model's checkpoint, and for options that our encoder or heads lack.
    """
    if "model_weight" in checkpoint:
        raise InteropError(
            "model_weight: s3prl's layout of another model; a UniSpeech-SAT checkpoint holds cfg and model"
        )
    model_config, task_config, state = fairseq_parts(checkpoint, "unispeech_sat", "UniSpeech-SAT")
    for name, value in (("target_glu", False), ("expand_attention_head_size", -1)):
        if (found := model_config.get(name, value)) != value:
            raise InteropError(f"cfg: {name}: {found} is not supported; this checkpoint cannot be imported")
    config = speech_encoder.config_from_fairseq(model_config, task_config)
    norm = f"encoder.{NORM}."
    head = {key: value for key, value in state.items() if key.split(".")[0] in HEADS}
    head |= {key.removeprefix("encoder."): value for key, value in state.items() if key.startswith(norm)}
    encoder = {key: v for key, v in state.items() if key not in head and not key.startswith(norm)}
    return Imported(config, speech_encoder.state_from_fairseq(encoder, config), head)


def to_s3prl(trained: TrainedMethod) -> dict[str, Any]:
    """The layout that s3prl's `unispeech_sat_local` loads strictly: without heads."""
    encoder_config = trained.encoder_config()
    has_bias = encoder_config.get("pos_enc_type", "abs") == "gated_bias"
    model, task = speech_encoder.config_to_fairseq(encoder_config, position_bias=has_bias)
    options = {name: trained.config[name] for name in ("mask_prob", "mask_length")}
    weight = speech_encoder.state_to_fairseq(trained.encoder_state(), encoder_config)
    return {"cfg": {**model, **options, "normalize": task["normalize"]}, "model": weight}


def to_huggingface(trained: TrainedMethod) -> HuggingFaceModel:
    """What `transformers.UniSpeechSatForPreTraining` and `AutoFeatureExtractor` load, heads included.

    The class has one label set and one width for codes and projections. Where a checkpoint has others, or no heads, the
    export is a `UniSpeechSatModel`, the encoder alone.
    """
    config, encoder_config, head = trained.config, trained.encoder_config(), trained.head_state()
    values = {"model_type": "unispeech-sat", **speech_encoder.config_to_huggingface(encoder_config)}
    tensors = speech_encoder.state_to_huggingface(trained.encoder_state(), encoder_config)
    preprocessor = huggingface_preprocessor(encoder_config)
    if not head or len(config["num_classes"]) != 1 or config["latent_dim"] != config["final_dim"]:
        return HuggingFaceModel(values | {"architectures": ["UniSpeechSatModel"]}, tensors, preprocessor)
    values |= {
        "architectures": ["UniSpeechSatForPreTraining"],
        "num_codevectors_per_group": config["latent_vars"],
        "num_codevector_groups": config["latent_groups"],
        "codevector_dim": config["latent_dim"],
        "proj_codevector_dim": config["final_dim"],
        "contrastive_logits_temperature": config["logit_temp"],
        "num_negatives": config["cross_sample_instances"],
        "diversity_loss_weight": config["diversity_weight"],
        "num_clusters": config["num_classes"][0] + DICTIONARY_SPECIALS,
    }
    tensors = {f"unispeech_sat.{key}": value for key, value in tensors.items()}
    tensors |= HF_HEAD_KEYS.to_theirs(_unused_norm(encoder_config) | head)
    return HuggingFaceModel(values, tensors, preprocessor)


def _unused_norm(encoder_config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The class has this norm in every model; one with its norms last does not use it, and starts it like this."""
    width = encoder_config["encoder_embed_dim"]
    return {f"{NORM}.weight": torch.ones(width), f"{NORM}.bias": torch.zeros(width)}
