"""Discrete BERT for s3prl's client: the two files that its `discretebert` reads. transformers has no such model.

Source: s3prl/upstream/roberta/{convert,roberta_model,hubconf}.py; fairseq/models/roberta/model.py. Nothing is read:
s3prl's BERT file holds no quantizer, without which there is no upstream.
"""

from __future__ import annotations

import argparse
import hashlib
from typing import Any

import torch
from torch import Tensor

from pretrain.labelling.tokens.dictionary import code_symbols
from pretrain.labelling.tokens.tokenizer import build_tokenizer
from pretrain.weights.interop.speech_encoder import split_qkv
from pretrain.weights.interop.tables import KeyTable
from pretrain.weights.interop.types import InteropError, NamedFiles, TrainedMethod
from pretrain.weights.read import interop_of
from recipes.discrete_bert.encoder import SPECIALS, UNK, TokenizerConfig

_LAYER = "layers.{i}."
FAIRSEQ_KEYS = KeyTable(
    [
        ("embed_tokens.weight", "encoder.sentence_encoder.embed_tokens.weight"),
        ("embed_positions.weight", "encoder.sentence_encoder.embed_positions.weight"),
        ("layernorm_embedding.*", "encoder.sentence_encoder.layernorm_embedding.*"),
        *(
            (_LAYER + name, f"encoder.sentence_encoder.{_LAYER}{name}")
            for name in (
                *(f"self_attn.{part}_proj.*" for part in ("q", "k", "v", "out")),
                "self_attn_layer_norm.*",
                "fc1.*",
                "fc2.*",
                "final_layer_norm.*",
            )
        ),
        ("lm_head.dense.*", "encoder.lm_head.dense.*"),
        ("lm_head.layer_norm.*", "encoder.lm_head.layer_norm.*"),
        ("lm_head.bias", "encoder.lm_head.bias"),
    ]
)
_CHECKPOINTS = "https://huggingface.co/s3prl/converted_ckpts/resolve/main/"
TOKENIZER_URL, BERT_URL = _CHECKPOINTS + "vq-wav2vec_kmeans.pt", _CHECKPOINTS + "vq_wav2vec_kmeans_roberta.pt"
USAGE = (
    "the files are named as s3prl names its downloads: call s3prl.util.download.set_dir(<this directory>), then "
    "S3PRLUpstream('discretebert')"
)
_MODEL_FIELDS = (
    "max_positions",
    "encoder_layers",
    "encoder_embed_dim",
    "encoder_ffn_embed_dim",
    "encoder_attention_heads",
    "dropout",
    "attention_dropout",
    "activation_dropout",
)
_TASK_FIELDS = ("mask_prob", "mask_multiple_length", "mask_stdev", "leave_unmasked_prob", "random_token_prob")
_PREFIX = "tokenizer."


def to_s3prl(trained: TrainedMethod) -> NamedFiles:
    """The quantizer and the BERT, under the names that s3prl's cache gives to their addresses.

    Raises InteropError for a quantizer that s3prl does not know, and for a run that has no dictionary yet.
    """
    files = {cache_name(TOKENIZER_URL): _tokenizer_file(trained), cache_name(BERT_URL): _bert_file(trained)}
    return NamedFiles(files, USAGE)


def cache_name(url: str) -> str:
    """The name under which s3prl keeps what it downloads from `url`."""
    return f"{hashlib.sha256(url.encode()).hexdigest()}.{url.rsplit('/', 1)[1]}"


def bert_state(trained: TrainedMethod) -> dict[str, Tensor]:
    """RoBERTa under fairseq's names; the embeddings are there twice, also as the head's last product."""
    encoder = {k: v for k, v in trained.encoder_state().items() if not k.startswith(_PREFIX) and k != "token_of_number"}
    state = FAIRSEQ_KEYS.to_theirs(split_qkv(encoder) | trained.head_state())
    embeddings = state["encoder.sentence_encoder.embed_tokens.weight"]
    # The version is a mark of fairseq's Transformer: 3 since its layer norms moved.
    return state | {"encoder.lm_head.weight": embeddings, "encoder.sentence_encoder.version": torch.tensor([3.0])}


def _bert_file(trained: TrainedMethod) -> dict[str, Any]:
    config, encoder = trained.config, trained.encoder_config()
    return {
        "task_cfg": {"data": "", "seed": 1} | {name: config[name] for name in _TASK_FIELDS},
        # The client insists on this class.
        "model_cfg": argparse.Namespace(arch="roberta_base", **{name: encoder[name] for name in _MODEL_FIELDS}),
        "model_weight": bert_state(trained),
        "text_dictionary": _dictionary_text(trained),
    }


def _dictionary_text(trained: TrainedMethod) -> str:
    """One "i-j count" a line, in the order of the tokens; a checkpoint keeps no counts, and the client uses none."""
    table, encoder = trained.encoder_state()["token_of_number"], trained.encoder_config()
    tokens, numbers = table[table != UNK].sort()[0], table.argsort()[int((table == UNK).sum()) :]
    if len(tokens) != encoder["vocab_size"] - SPECIALS - 1:
        raise InteropError(
            f"token_of_number: {len(tokens)} tokens for a vocabulary of {encoder['vocab_size']}; export a run that was "
            "trained on a token directory"
        )
    groups, entries = _tokenizer(encoder).code_shape
    return "".join(f"{symbol} 1\n" for symbol in code_symbols(numbers.numpy(), groups, entries))


def _tokenizer_file(trained: TrainedMethod) -> dict[str, Any]:
    """The quantizer as its own method exports it, with a prediction head of zeros.

    s3prl loads strictly and wants a head; tokens come without it, so a token directory keeps none.
    """
    config = TokenizerConfig(**trained.encoder_config()["tokenizer"])
    state = {key.removeprefix(_PREFIX): v for key, v in trained.encoder_state().items() if key.startswith(_PREFIX)}
    interop, encoder = interop_of(config.method), _tokenizer(trained.encoder_config())
    if not hasattr(interop, "to_s3prl"):
        raise InteropError(f"method.encoder.tokenizer.method: s3prl has no '{config.method}'; export to native")
    target_dim, context_dim = encoder.hidden_sizes[0], encoder.hidden_sizes[-1]
    head = {
        "wav2vec_predictions.project_to_steps.weight": torch.zeros(context_dim, target_dim, 1, 1),
        "wav2vec_predictions.project_to_steps.bias": torch.zeros(target_dim),
    }
    method_config = {"prediction_steps": 1, "num_negatives": 1, "quantizer_training": None}
    tensors = {f"encoder.{key}": value for key, value in state.items()} | head
    return interop.to_s3prl(TrainedMethod(config.method, method_config | {"encoder": encoder.to_config()}, tensors))


def _tokenizer(encoder: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return build_tokenizer(encoder["tokenizer"]["method"], encoder["tokenizer"]["encoder"])
