"""The causal Transformer layer of CPC_audio, several of them side by side on one input.

Source: facebookresearch/CPC_audio `cpc/transformers.py`. K layers, B batch, F frames, D width, H heads.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.kernels import dropout, linear


class CausalLayers(nn.Module):
    """K independent Transformer layers that read the same input, computed together: (B, F, D) to (K, B, F, D).

    Each attends to the present and the past with a learned term per distance (`positions`: the last column belongs to
    distance 0), has no bias in its four attention products, a ReLU between the two of its feed-forward part, and layer
    norms after the sums. Frames further back than `max_distance` have no learned term and are not attended to; the
    official layer takes inputs of exactly `max_distance` frames only, where both compute the same.
    """

    def __init__(self, count: int, dim: int, heads: int, ffn_dim: int, max_distance: int, dropout: float) -> None:
        super().__init__()
        self.count, self.heads, self.max_distance, self.dropout = count, heads, max_distance, dropout
        self.qkv_weight = _uniform(dim, count, 3 * dim, dim)
        self.out_weight = _uniform(dim, count, dim, dim)
        self.positions = _uniform(dim // heads, count, dim // heads, max_distance)
        self.attention_norm_weight = nn.Parameter(torch.ones(count, dim))
        self.attention_norm_bias = nn.Parameter(torch.zeros(count, dim))
        self.fc1_weight = _uniform(dim, count, ffn_dim, dim)
        self.fc1_bias = _uniform(dim, count, ffn_dim)
        self.fc2_weight = _uniform(ffn_dim, count, dim, ffn_dim)
        self.fc2_bias = _uniform(ffn_dim, count, dim)
        self.final_norm_weight = nn.Parameter(torch.ones(count, dim))
        self.final_norm_bias = nn.Parameter(torch.zeros(count, dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, D) to (K, B, F, D)."""
        batch, frames, dim = x.shape
        y = x.flatten(0, 1) + self._attention(x)
        y = _norm(y, self.attention_norm_weight, self.attention_norm_bias)
        hidden = torch.baddbmm(self.fc1_bias.unsqueeze(1), y, self.fc1_weight.mT).relu()
        hidden = dropout(hidden, self.dropout, self.training)
        y = y + torch.baddbmm(self.fc2_bias.unsqueeze(1), hidden, self.fc2_weight.mT)
        y = _norm(y, self.final_norm_weight, self.final_norm_bias)
        return y.view(self.count, batch, frames, dim)

    def _attention(self, x: Tensor) -> Tensor:
        """(B, F, D) to (K, B * F, D)."""
        batch, frames, dim = x.shape
        qkv = linear(x, self.qkv_weight.flatten(0, 1))
        q, k, v = qkv.view(batch, frames, self.count, 3, self.heads, -1).permute(3, 2, 0, 4, 1, 5).unbind(0)
        scores = q @ k.transpose(-2, -1) + self._position_scores(q)
        distance = torch.arange(frames, device=x.device).unsqueeze(1) - torch.arange(frames, device=x.device)
        hidden = (distance < 0) | (distance >= self.max_distance)
        scores = (scores * q.shape[-1] ** -0.5).masked_fill(hidden, -torch.inf)
        weights = dropout(scores.float().softmax(-1).to(v.dtype), self.dropout, self.training)
        out = (weights @ v).permute(0, 1, 3, 2, 4).reshape(self.count, batch * frames, dim)
        return out @ self.out_weight.mT

    def _position_scores(self, q: Tensor) -> Tensor:
        """Queries (K, B, H, F, D / H) to the learned part of their scores (K, B, H, F, F).

        Column F - 1 - d of the product belongs to distance d. Read with rows that are one longer, the flat table is
        shifted so that entry (i, j) is the one of distance i - j; entries above the diagonal are meaningless.
        """
        frames = q.shape[-2]
        table = self.positions[..., -frames:]
        table = F.pad(table, (frames - table.shape[-1], 0))
        product = (q.flatten(1, 3) @ table).view(*q.shape[:-1], frames)
        return F.pad(product, (1, 0)).view(*q.shape[:3], frames + 1, frames)[..., 1:, :]

    def forward_flops(self, frames: int) -> float:
        """Floating-point operations of one forward of a sequence of `frames`."""
        dim, ffn_dim = self.fc2_weight.shape[1:]
        linears = 2.0 * frames * (4 * dim * dim + 2 * dim * ffn_dim)
        return self.count * (linears + 6.0 * frames * frames * dim)


def _uniform(fan_in: int, *shape: int) -> nn.Parameter:
    """U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)): what `nn.Linear` and the official position table start from."""
    bound = 1 / math.sqrt(fan_in)
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


def _norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Layer norm of (K, N, D) with an affine map (K, D) per layer, in float32."""
    return F.layer_norm(x.float(), x.shape[-1:]) * weight.unsqueeze(1) + bias.unsqueeze(1)
