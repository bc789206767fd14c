"""BEST-RQ's conformer layers: layer norm behind the convolution, and layers that hear no later position.

Source: arXiv 2005.08100; speechbrain `speechbrain/lobes/models/transformer/Conformer.py`, whose network and
initialisation these are. The layers of `pretrain.models.conformer` are fairseq's: batch norm, biases elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.conformer import FeedForward, RelativeSelfAttention
from pretrain.models.kernels import LayerNorm, Linear, dropout, grouped_conv1d

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "swish": F.silu}


class UnbiasedLinear(Linear):
    """A linear layer without bias."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__(in_dim, dim, bias=False)


class Attention(RelativeSelfAttention):
    """Relative self-attention whose queries, keys and values have no bias."""

    projection = UnbiasedLinear  # type: ignore[assignment]  # called with the two widths alone


class DepthwiseConv(nn.Conv1d):
    """Convolution of every channel by itself over (B, P, D); `causal` pads on the left alone, else on both sides."""

    def __init__(self, dim: int, kernel: int, causal: bool) -> None:
        super().__init__(dim, dim, kernel, groups=dim)
        self.sides = (kernel - 1, 0) if causal else (kernel // 2, kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, P, D) to (B, P, D)."""
        padded = F.pad(x.transpose(1, 2), self.sides)
        return grouped_conv1d(padded, self.weight, self.bias, 0, self.groups).transpose(1, 2)


class Convolution(nn.Module):
    """Norm, linear layer and GLU, depthwise convolution, norm, activation, linear layer."""

    def __init__(
        self, dim: int, kernel: int, dropout: float, causal: bool, activation: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.dropout, self.activation = dropout, activation
        self.layer_norm = LayerNorm(dim)
        self.pointwise_conv1 = Linear(dim, 2 * dim)
        self.depthwise_conv = DepthwiseConv(dim, kernel, causal)
        self.conv_layer_norm = LayerNorm(dim)
        self.pointwise_conv2 = Linear(dim, dim)

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """(B, P, D) to (B, P, D); positions that `valid` (B, P) says are padding count as zeros in the convolution."""
        x = F.glu(self.pointwise_conv1(self.layer_norm(x)), dim=2)
        if valid is not None:
            x = torch.where(valid.unsqueeze(2), x, 0.0)
        x = self.activation(self.conv_layer_norm(self.depthwise_conv(x)))
        return dropout(self.pointwise_conv2(x), self.dropout, self.training)


class BestRqLayer(nn.Module):
    """Half a feed-forward, self-attention, convolution, half a feed-forward, with residuals; a norm at the end."""

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        heads: int,
        dropout: float,
        conv_kernel: int,
        causal: bool,
        activation: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.ffn1 = FeedForward(dim, ffn_dim, dropout, activation)
        self.self_attn_layer_norm = LayerNorm(dim)
        self.self_attn = Attention(dim, heads, dropout)
        self.conv_module = Convolution(dim, conv_kernel, dropout, causal, activation)
        self.ffn2 = FeedForward(dim, ffn_dim, dropout, activation)
        self.final_layer_norm = LayerNorm(dim)

    def forward(self, x: Tensor, valid: Tensor | None, heard: Tensor | None, positions: Tensor) -> Tensor:
        """(B, P, D) to (B, P, D).

        `valid` (B, P) says which positions are no padding, `heard` (B or 1, 1, P or 1, P) which keys each query
        attends to, `positions` (2 P, D) are those of `relative_positions`.
        """
        x = x + 0.5 * self.ffn1(x)
        x = x + self.self_attn(self.self_attn_layer_norm(x), heard, positions)
        x = x + self.conv_module(x, valid)
        return self.final_layer_norm(x + 0.5 * self.ffn2(x))


def past_mask(positions: int, left_context: int, device: torch.device) -> Tensor:
    """(1, 1, P, P) bool: query i attends to the keys i - `left_context`, ..., i."""
    place = torch.arange(positions, device=device)
    distance = place.unsqueeze(1) - place
    return ((distance >= 0) & (distance <= left_context))[None, None]
