"""Transformer layers of speech encoders."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.kernels import LayerNorm, Linear, attention, dropout


class SelfAttention(nn.Module):
    """Multi-head self-attention; the rows of `qkv_proj` are queries, keys, values."""

    projection = Linear

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv_proj = self.projection(dim, 3 * dim)
        self.out_proj = Linear(dim, dim)

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """(B, F, D) to (B, F, D); keys where `valid` (B, 1, 1, F) is False are hidden."""
        q, k, v = self.split(self.qkv_proj(x))
        return self.merge(attention(q, k, v, valid, self.dropout if self.training else 0.0))

    def split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """(B, F, 3 D) to queries, keys and values (B, H, F, D / H)."""
        batch, frames, _ = qkv.shape
        return qkv.view(batch, frames, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    def merge(self, out: Tensor) -> Tensor:
        """(B, H, F, D / H) to (B, F, D)."""
        return self.out_proj(out.transpose(1, 2).flatten(2))


class TransformerLayer(nn.Module):
    """Self-attention and feed-forward (GELU) with residuals; layer norms before them or after the sums.

    Dropout as in fairseq's `TransformerSentenceEncoderLayer`: `dropout` on both branches, `activation_dropout` after
    the GELU, `attention_dropout` on the attention weights. `attention_type` is the class of the self-attention.
    """

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        heads: int,
        dropout: float,
        attention_dropout: float,
        activation_dropout: float,
        layer_norm_first: bool,
        layer_norm_eps: float = 1e-5,
        attention_type: type[SelfAttention] = SelfAttention,
    ) -> None:
        super().__init__()
        self.dropout, self.activation_dropout, self.layer_norm_first = dropout, activation_dropout, layer_norm_first
        self.self_attn = attention_type(dim, heads, attention_dropout)
        self.self_attn_layer_norm = LayerNorm(dim, layer_norm_eps)
        self.fc1 = Linear(dim, ffn_dim)
        self.fc2 = Linear(ffn_dim, dim)
        self.final_layer_norm = LayerNorm(dim, layer_norm_eps)

    def forward(self, x: Tensor, valid: Tensor | None, *positions: Tensor) -> Tensor:
        """(B, F, D) to (B, F, D); `valid` and `positions` as the attention takes them."""
        return self.with_feed_forward(x, valid, *positions)[0]

    def with_feed_forward(self, x: Tensor, valid: Tensor | None, *positions: Tensor) -> tuple[Tensor, Tensor]:
        """What `forward` gives, and the output (B, F, D) of the feed-forward, before dropout, residual and norm."""
        if self.layer_norm_first:
            x = x + self._drop(self.self_attn(self.self_attn_layer_norm(x), valid, *positions))
            out = self._feed_forward(self.final_layer_norm(x))
            return x + self._drop(out), out
        x = self.self_attn_layer_norm(x + self._drop(self.self_attn(x, valid, *positions)))
        out = self._feed_forward(x)
        return self.final_layer_norm(x + self._drop(out)), out

    def _feed_forward(self, x: Tensor) -> Tensor:
        x = dropout(F.gelu(self.fc1(x)), self.activation_dropout, self.training)
        return self.fc2(x)

    def _drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.dropout, self.training)
