"""Positional embeddings of speech encoders."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvPositions(nn.Module):
    """Convolutional positional embedding: a weight-normed grouped convolution over frames, then GELU.

    Weight norm keeps one gain per tap (`weight_g`, (1, 1, k)) and the direction (`weight_v`, (D, D / groups, k)); the
    parameters are plain, so their names are those of published checkpoints. Source: wav2vec 2.0, arXiv 2006.11477,
    section 2; fairseq `make_conv_pos`.
    """

    def __init__(self, dim: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.kernel, self.groups = kernel, groups
        self.weight_g = nn.Parameter(torch.empty(1, 1, kernel))
        self.weight_v = nn.Parameter(torch.empty(dim, dim // groups, kernel))
        self.bias = nn.Parameter(torch.zeros(dim))
        nn.init.normal_(self.weight_v, mean=0.0, std=math.sqrt(4.0 / (kernel * dim)))
        with torch.no_grad():
            self.weight_g.copy_(self.weight_v.norm(dim=(0, 1), keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, D) to (B, F, D)."""
        weight = self.weight_v * (self.weight_g / self.weight_v.norm(dim=(0, 1), keepdim=True))
        out = F.conv1d(x.transpose(1, 2), weight, self.bias, padding=self.kernel // 2, groups=self.groups)
        # An even kernel with symmetric padding makes one frame too many.
        return F.gelu(out[:, :, : x.shape[1]]).transpose(1, 2)
