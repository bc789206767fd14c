"""Small models for the tests, and the same RoBERTa in transformers."""

from __future__ import annotations

import torch
from recipe_checks import build, perturb
from transformers import RobertaConfig, RobertaForMaskedLM

from pretrain.weights.interop.speech_encoder import split_qkv
from recipes.discrete_bert.encoder import PAD, UNK
from recipes.discrete_bert.method import DiscreteBertMethod

PAIRS = 50


def small(quantizer: str = "kmeans", max_positions: int = 256, known: int = PAIRS) -> DiscreteBertMethod:
    """A method on a vq-wav2vec of 64 pairs, `known` of which are tokens; every parameter off its initial value."""
    method = build(
        "discrete_bert_tiny",
        f"method.encoder.tokenizer.encoder.quantizer.kind={quantizer}",
        *(["method.encoder.tokenizer.encoder.quantizer={vq_depth:1}"] if quantizer == "gumbel" else []),
        f"method.encoder.vocab_size={known + 5}",
        f"method.encoder.max_positions={max_positions}",
    )
    perturb(method)
    table = method.encoder.token_of_number
    table.fill_(UNK)
    table[torch.randperm(len(table))[:known]] = UNK + 1 + torch.arange(known)
    return method


def transformers_roberta(method: DiscreteBertMethod) -> RobertaForMaskedLM:
    """transformers' model with the method's weights, in the names that both have."""
    config = method.config.encoder
    theirs = RobertaForMaskedLM(
        RobertaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.encoder_embed_dim,
            num_hidden_layers=config.encoder_layers,
            num_attention_heads=config.encoder_attention_heads,
            intermediate_size=config.encoder_ffn_embed_dim,
            max_position_embeddings=config.max_positions + PAD + 1,
            type_vocab_size=1,
            layer_norm_eps=1e-5,
            pad_token_id=PAD,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    state = split_qkv(dict(method.encoder.state_dict()))
    embeddings = {
        "word_embeddings.weight": state["embed_tokens.weight"],
        "position_embeddings.weight": state["embed_positions.weight"],
        "LayerNorm.weight": state["layernorm_embedding.weight"],
        "LayerNorm.bias": state["layernorm_embedding.bias"],
        # fairseq has no segments.
        "token_type_embeddings.weight": torch.zeros(1, config.encoder_embed_dim),
    }
    renamed = {f"roberta.embeddings.{key}": value for key, value in embeddings.items()}
    for index in range(config.encoder_layers):
        for ours, name in LAYER_NAMES.items():
            for kind in ("weight", "bias"):
                renamed[f"roberta.encoder.layer.{index}.{name}.{kind}"] = state[f"layers.{index}.{ours}.{kind}"]
    renamed |= {f"lm_head.{key}": value for key, value in method.lm_head.state_dict().items()}
    missing, surplus = theirs.load_state_dict(renamed, strict=False)
    # The last product: tied.
    assert set(missing) <= {"lm_head.decoder.weight", "lm_head.decoder.bias"}, missing
    assert not surplus
    theirs.tie_weights()
    return theirs


LAYER_NAMES = {
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense",
    "self_attn_layer_norm": "attention.output.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "final_layer_norm": "output.LayerNorm",
}
