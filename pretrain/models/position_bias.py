"""Gated relative position bias: what WavLM adds to the scores of self-attention.

Source: arXiv 2110.13900, section III-B; `WavLM/modules.py` of microsoft/UniSpeech. Letters: H heads, F frames.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pretrain.models.kernels import Linear, attention, linear
from pretrain.models.transformer import SelfAttention


def buckets(distances: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """The bucket of each distance (int64) from a query to a key, in [0, num_buckets).

    Keys before the query have the first half of the buckets, keys behind it the second. In each half, one half of the
    buckets holds one distance each, and the others hold ranges that grow logarithmically up to `max_distance`;
    whatever is further away is in the last one.
    """
    half = num_buckets // 2
    exact = half // 2
    size = distances.abs()
    # Below `exact` the logarithm is not used; 1 keeps it finite there.
    growth = torch.log(size.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (growth * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(size < exact, size, far) + half * (distances > 0)


class RelativePositionBias(nn.Embedding):
    """One number per bucket of distances and head: the table that all layers share."""

    def __init__(self, num_buckets: int, heads: int, max_distance: int) -> None:
        super().__init__(num_buckets, heads)
        self.max_distance = max_distance
        nn.init.normal_(self.weight, mean=0.0, std=0.02)

    def forward(self, frames: int) -> Tensor:  # type: ignore[override]  # it looks up distances, not what it is given
        """(H, F, F) float32 biases of query i and key j."""
        distances = torch.arange(1 - frames, frames, device=self.weight.device)
        line = self.weight[buckets(distances, self.num_embeddings, self.max_distance)].T
        # Windows of F distances: the last one begins at 0, which is the first query's.
        return line.unfold(1, frames, 1).flip(1)


class BiasGates(Linear):
    """Two gates (..., 2) in (0, 1) per frame and head, from the head's share of the attention's input (..., D / H).

    The official layer has 8 outputs and sums 4 of them into each gate: here the weights are summed before the product.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__(head_dim, 8)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.unflatten(0, (2, 4)).sum(1), self.bias.view(2, 4).sum(1)
        return linear(x, weight, bias).sigmoid()


class GatedBiasSelfAttention(SelfAttention):
    """Self-attention with a relative position bias, which the gates of each query's frame scale in every head.

    The scale is a (b s - 1) + 2, where a and b are the gates and s is a learnt number per head. s begins at 1, so that
    the scale is between 1 and 2 at first.
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__(dim, heads, dropout)
        self.grep_linear = BiasGates(dim // heads)
        self.grep_a = nn.Parameter(torch.ones(1, heads, 1, 1))

    def forward(self, x: Tensor, valid: Tensor | None, bias: Tensor) -> Tensor:  # type: ignore[override]  # with `bias`
        """(B, F, D) to (B, F, D); `valid` as in SelfAttention, `bias` (H, F, F) from `RelativePositionBias`."""
        q, k, v = self.split(self.qkv_proj(x))
        first, second = self.grep_linear(x.unflatten(2, (self.heads, -1)).transpose(1, 2)).split(1, dim=3)
        scale = first * (second * self.grep_a - 1.0) + 2.0
        return self.merge(attention(q, k, v, valid, self.dropout if self.training else 0.0, scale * bias))
