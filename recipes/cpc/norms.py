"""The norms of CPC's convolutions beside the shared batch norm; both take frames (B, F, C), in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import ConfigError

EPSILON = 1e-5


class ChannelNorm(nn.Module):
    """Every frame over its channels, with the UNBIASED variance (CPC_audio `cpc/model.py`, ChannelNorm).

    `F.layer_norm` divides by the biased one: a factor of (C - 1) / C, which goes into the weight and the epsilon.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, C) to (B, F, C)."""
        ratio = 1 - 1 / x.shape[-1]
        return F.layer_norm(x.float(), x.shape[-1:], self.weight * ratio**0.5, self.bias, EPSILON * ratio)


class GroupNorm(nn.Module):
    """Every group of channels over all frames of its row (scaling-contrastive `model/encoder.py`, GroupNorm1D).

    Frames where `valid` (B, F, 1) is False, and which must be zero, do not enter the statistics.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        if channels % groups:
            raise ConfigError(f"method.encoder.norm_groups: {groups} does not divide {channels} channels")
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """(B, F, C) to (B, F, C)."""
        grouped = x.float().unflatten(2, (self.groups, -1))
        if valid is None:
            variance, mean = torch.var_mean(grouped, dim=(1, 3), correction=0, keepdim=True)
        else:
            counted = valid.unsqueeze(3)
            count = counted.sum(1, keepdim=True) * grouped.shape[3]
            mean = (grouped * counted).sum((1, 3), keepdim=True) / count
            variance = ((grouped - mean) * counted).square().sum((1, 3), keepdim=True) / count
        normalized = (grouped - mean) * torch.rsqrt(variance + EPSILON)
        return normalized.flatten(2) * self.weight + self.bias
