"""Waveforms to tokens, by a frozen quantizer and a dictionary, and tokens to hidden states, by RoBERTa.

Source: arXiv 1910.05453, section 4; `fairseq/models/roberta/model.py`; s3prl/upstream/roberta.
Letters: B rows, T samples, F frames, L tokens of a row with <s> and </s>, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.labelling.tokens.dictionary import code_numbers
from pretrain.labelling.tokens.tokenizer import Tokenizer, build_tokenizer
from pretrain.models.kernels import LayerNorm, dropout
from pretrain.models.layer_stack import LayerStack, StackEncoder
from pretrain.models.teacher import Teacher
from pretrain.models.transformer import TransformerLayer

# fairseq's Dictionary begins with these; the pairs of codes follow, and <mask> is last.
BOS, PAD, EOS, UNK = 0, 1, 2, 3
SPECIALS = 4
INIT_STD = 0.02


@dataclass
class TokenizerConfig:
    """What `tokenizer.build_tokenizer` takes: the quantizer's method, or "kmeans", and its encoder."""

    method: str
    encoder: dict[str, Any]


@dataclass
class DiscreteBertEncoderConfig:
    """Shape of the networks; the names are fairseq's. `vocab_size` counts <s>, <pad>, </s>, <unk>, pairs and <mask>;
    `max_positions` tokens are the longest string that is seen as one.
    """

    tokenizer: TokenizerConfig
    vocab_size: int
    max_positions: int
    encoder_layers: int
    encoder_embed_dim: int
    encoder_ffn_embed_dim: int
    encoder_attention_heads: int
    dropout: float
    attention_dropout: float
    activation_dropout: float


class DiscreteBertEncoder(StackEncoder):
    """Waveforms to RoBERTa's embedding output and layers; training feeds it tokens, through `context`.

    `tokenizer` is frozen, and always in evaluation mode, in which it draws no noise. `token_of_number` (V ** G,) maps
    the number of a combination of codes to its token; all are <unk> until the method's `begin` has read the dictionary.
    """

    Config = DiscreteBertEncoderConfig
    config: DiscreteBertEncoderConfig
    weight_independent_fields = ("dropout", "attention_dropout", "activation_dropout")
    token_of_number: Tensor

    def __init__(self, config: DiscreteBertEncoderConfig) -> None:
        super().__init__()
        self.config = config
        tokenizer = build_tokenizer(config.tokenizer.method, config.tokenizer.encoder)
        self.tokenizer = Teacher(tokenizer)
        groups, entries = tokenizer.code_shape
        self.register_buffer("token_of_number", torch.full((entries**groups,), UNK))
        dim = config.encoder_embed_dim
        self.embed_tokens = nn.Embedding(config.vocab_size, dim, padding_idx=PAD)
        # Positions count from PAD + 1, as fairseq's do; the row of PAD is the padding's.
        self.embed_positions = nn.Embedding(config.max_positions + PAD + 1, dim, padding_idx=PAD)
        self.layernorm_embedding = LayerNorm(dim)
        self.layers = LayerStack(
            TransformerLayer(
                dim,
                config.encoder_ffn_embed_dim,
                config.encoder_attention_heads,
                config.dropout,
                config.attention_dropout,
                config.activation_dropout,
                layer_norm_first=False,
            )
            for _ in range(config.encoder_layers)
        )
        for name, module in self.named_modules():
            if not name.startswith("tokenizer"):
                init_bert(module)
        self.hidden_sizes = [dim] * (config.encoder_layers + 1)
        self.downsample_rates = [tokenizer.stride_samples] * (config.encoder_layers + 1)

    def forward(self, waveforms: Tensor, lengths: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        """(B, T) float32 and (B,) samples, or None where nothing is padded, to hidden states and token counts.

        State j belongs to code j - 1, because <s> comes first. Strings longer than `max_positions` are seen in pieces
        of that many tokens. Both as in s3prl.
        """
        tokens, token_lengths = self.tokens(waveforms, lengths)
        pieces = tokens.split(self.config.max_positions, dim=1)
        states = zip(*(self.context(piece, padded=lengths is not None) for piece in pieces), strict=True)
        joined = [torch.cat(state, dim=1) for state in states]
        return joined, [token_lengths] * len(joined)

    @torch.no_grad()
    def tokens(self, waveforms: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, T) waveforms and (B,) samples to tokens (B, L), <s> first, </s> last, then <pad>, and counts (B,).

        s3prl's rule: the quantizer sees the batch with its padding, and a row keeps its n / stride codes, rounded to
        the nearest even, of which the last may be the padding's.
        """
        tokenizer = cast(Tokenizer, self.tokenizer.network)
        codes, _ = tokenizer.codes(waveforms, None)
        numbers = code_numbers(codes, tokenizer.code_shape[1])
        stride, frames = tokenizer.stride_samples, numbers.shape[1]
        frames = min(round(waveforms.shape[1] / stride), frames)
        if lengths is None:
            counts = torch.full((len(waveforms),), frames, device=waveforms.device)
        else:
            counts = (lengths.double() / stride).round().long().clamp(max=frames)
        inner = F.pad(F.embedding(numbers[:, :frames], self.token_of_number[:, None]).squeeze(2), (1, 1))
        place, counts_ = torch.arange(frames + 2, device=counts.device), counts[:, None]
        tokens = torch.where(place <= counts_, inner, PAD)
        tokens = torch.where(place == counts_ + 1, EOS, tokens)
        tokens[:, 0] = BOS
        return tokens, counts + 2

    def context(self, tokens: Tensor, padded: bool) -> list[Tensor]:
        """(B, L) tokens, at most `max_positions` of them, to the embedding output and the layers' (B, L, D).

        `padded` says that rows end in <pad>. Those places are zero in the embedding output; nobody attends to them.
        """
        places = torch.arange(PAD + 1, PAD + 1 + tokens.shape[1], device=tokens.device).expand_as(tokens)
        valid = keys = None
        if padded:
            valid = tokens != PAD
            places = torch.where(valid, places, PAD)
            # A row without a token, which a piece of a long batch can be, attends to anything rather than to nothing.
            keys = (valid | ~valid.any(1, keepdim=True))[:, None, None]
        x = self.embed_tokens(tokens) + self.embed_positions(places)
        x = dropout(self.layernorm_embedding(x), self.config.dropout, self.training)
        if valid is not None:
            x = x * valid.unsqueeze(2)
        return self.layers(x, keys)

    def training_flops(self, tokens: int) -> float:
        """Forward and backward of RoBERTa on one row of `tokens`; the tokenizer has no part in training."""
        config = self.config
        dim, ffn = config.encoder_embed_dim, config.encoder_ffn_embed_dim
        products = 4.0 * dim * dim + 2.0 * dim * ffn + 2.0 * tokens * dim
        return 3 * 2.0 * tokens * config.encoder_layers * products


def init_bert(module: nn.Module) -> None:
    """fairseq's `init_bert_params`: N(0, 0.02) for products and embeddings, zero for biases and the padding's row."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding):
        with torch.no_grad():
            module.weight[module.padding_idx].zero_()
