"""Conformer layers of speech encoders, as fairseq trained them for wav2vec 2.0.

Source: arXiv 2005.08100; fairseq `modules/conformer_layer.py` and `modules/espnet_multihead_attention.py`. Padded
frames are handled as there and in transformers: they are zero at the first layer's input and hidden as attention keys,
but the depthwise convolution and the statistics of the batch norm see whatever the layers made of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.batch_norm import BatchNorm
from pretrain.models.kernels import LayerNorm, Linear, attention, dropout, grouped_conv1d, linear
from pretrain.models.positions import rotate
from pretrain.models.transformer import SelfAttention


def shifted(scores: Tensor) -> Tensor:
    """(B, H, F, 2 F) scores of query i with distances F - 1, ..., -F to (B, H, F, F) scores with keys j; no copy.

    Distance i - j is in column j - i + F - 1, so each row begins one column further left than the row above it.
    """
    batch, heads, frames, width = scores.shape
    scores = scores.contiguous()
    strides = (heads * frames * width, frames * width, width - 1, 1)
    offset = scores.storage_offset() + frames - 1
    return scores.as_strided((batch, heads, frames, frames), strides, offset)


class RelativeSelfAttention(SelfAttention):
    """Self-attention whose scores depend on content and on the distance of query and key: arXiv 1901.02860, 3.3."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__(dim, heads, dropout)
        self.linear_pos = Linear(dim, dim, bias=False)
        self.pos_bias_u = nn.Parameter(torch.empty(heads, dim // heads))
        self.pos_bias_v = nn.Parameter(torch.empty(heads, dim // heads))
        nn.init.xavier_uniform_(self.pos_bias_u)
        nn.init.xavier_uniform_(self.pos_bias_v)

    def forward(self, x: Tensor, valid: Tensor | None, positions: Tensor) -> Tensor:  # type: ignore[override]  # see ATTENTION
        """(B, F, D) to (B, F, D); `valid` as in SelfAttention, `positions` (2 F, D) from `relative_positions`."""
        q, k, v = self.split(self.qkv_proj(x))
        distances = self.linear_pos(positions).unflatten(1, (self.heads, -1)).permute(1, 2, 0)
        content, position = (q + bias.to(q.dtype).unsqueeze(1) for bias in (self.pos_bias_u, self.pos_bias_v))
        bias = shifted((position * q.shape[-1] ** -0.5) @ distances)
        return self.merge(attention(content, k, v, valid, self.dropout if self.training else 0.0, bias))


class RotaryProjection(Linear):
    """Queries and keys from turned frames, values from frames as they are, with one matrix (rows q, k, v)."""

    def forward(self, turned: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]  # RotarySelfAttention alone calls
        """Two (B, F, D) to (B, F, 3 D)."""
        dim = x.shape[-1]
        queries_and_keys = linear(turned, self.weight[: 2 * dim], self.bias[: 2 * dim])
        return torch.cat([queries_and_keys, linear(x, self.weight[2 * dim :], self.bias[2 * dim :])], dim=2)


class RotarySelfAttention(SelfAttention):
    """Self-attention with rotary positions, turned BEFORE the projections as in fairseq, not after them."""

    projection = RotaryProjection

    def forward(self, x: Tensor, valid: Tensor | None, positions: Tensor) -> Tensor:  # type: ignore[override]  # see ATTENTION
        """(B, F, D) to (B, F, D); `valid` as in SelfAttention, `positions` (2, F, D_head) from `rotary_positions`."""
        q, k, v = self.split(self.qkv_proj(rotate(x, positions, self.heads), x))
        return self.merge(attention(q, k, v, valid, self.dropout if self.training else 0.0))


# Called by `ConformerLayer` alone, with positions that their base class does not take.
ATTENTION: dict[str, type[SelfAttention]] = {"rel_pos": RelativeSelfAttention, "rope": RotarySelfAttention}


class PointwiseConv(nn.Conv1d):
    """Convolution of kernel 1 without bias over (B, F, C_in), channels last, as a matrix product."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__(in_dim, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.squeeze(2))


class DepthwiseConv(nn.Conv1d):
    """Convolution of every channel by itself, without bias, over (B, F, D), channels last; keeps the frames."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__(dim, dim, kernel, padding=kernel // 2, groups=dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = grouped_conv1d(x.transpose(1, 2), self.weight, None, self.kernel_size[0] // 2, self.groups)
        return out.transpose(1, 2)


class ConvolutionModule(nn.Module):
    """Norm, pointwise convolution and GLU, depthwise convolution, batch norm, swish, pointwise convolution."""

    def __init__(self, dim: int, kernel: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.layer_norm = LayerNorm(dim)
        self.pointwise_conv1 = PointwiseConv(dim, 2 * dim)
        self.depthwise_conv = DepthwiseConv(dim, kernel)
        self.batch_norm = BatchNorm(dim)
        self.pointwise_conv2 = PointwiseConv(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, D) to (B, F, D)."""
        x = F.glu(self.pointwise_conv1(self.layer_norm(x)), dim=2)
        x = F.silu(self.batch_norm(self.depthwise_conv(x)))
        return dropout(self.pointwise_conv2(x), self.dropout, self.training)


class FeedForward(nn.Module):
    """Norm, two linear layers with `activation` (swish) between them, `dropout` after each."""

    def __init__(self, dim: int, ffn_dim: int, dropout: float, activation: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__()
        self.dropout, self.activation = dropout, activation
        self.layer_norm = LayerNorm(dim)
        self.fc1 = Linear(dim, ffn_dim)
        self.fc2 = Linear(ffn_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, D) to (B, F, D)."""
        x = dropout(self.activation(self.fc1(self.layer_norm(x))), self.dropout, self.training)
        return dropout(self.fc2(x), self.dropout, self.training)


class ConformerLayer(nn.Module):
    """Half a feed-forward, self-attention, convolution, half a feed-forward, with residuals; a norm at the end."""

    def __init__(self, dim: int, ffn_dim: int, heads: int, dropout: float, conv_kernel: int, pos_enc_type: str) -> None:
        super().__init__()
        self.dropout = dropout
        self.ffn1 = FeedForward(dim, ffn_dim, dropout)
        self.self_attn_layer_norm = LayerNorm(dim)
        self.self_attn = ATTENTION[pos_enc_type](dim, heads, dropout)
        self.conv_module = ConvolutionModule(dim, conv_kernel, dropout)
        self.ffn2 = FeedForward(dim, ffn_dim, dropout)
        self.final_layer_norm = LayerNorm(dim)

    def forward(self, x: Tensor, valid: Tensor | None, positions: Tensor) -> Tensor:
        """(B, F, D) to (B, F, D); `valid` and `positions` as the attention takes them."""
        x = x + 0.5 * self.ffn1(x)
        attended = self.self_attn(self.self_attn_layer_norm(x), valid, positions)
        x = x + dropout(attended, self.dropout, self.training)
        x = x + self.conv_module(x)
        return self.final_layer_norm(x + 0.5 * self.ffn2(x))
