"""Positional embeddings of speech encoders."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.kernels import grouped_conv1d


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
        out = grouped_conv1d(x.transpose(1, 2), weight, self.bias, self.kernel // 2, self.groups)
        # An even kernel with symmetric padding makes one frame too many.
        return F.gelu(out[:, :, : x.shape[1]]).transpose(1, 2)


class PositionConv(nn.Conv1d):
    """A grouped `nn.Conv1d` over frames that keeps their number, through `grouped_conv1d`: (B, D, F) to (B, D, F)."""

    def __init__(self, dim: int, kernel: int, groups: int) -> None:
        super().__init__(dim, dim, kernel, padding=kernel // 2, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        out = grouped_conv1d(x, self.weight, self.bias, self.kernel_size[0] // 2, self.groups)
        # An even kernel with symmetric padding makes one frame too many.
        return out[:, :, : x.shape[2]]


class StackedConvPositions(nn.Module):
    """Convolutional positional embedding of `depth` grouped convolutions, each with a layer norm and GELU behind it.

    The convolutions have no weight norm and the layer norms no weights. Frames behind the end of a padded row are what
    the convolution before has made of them, so that the last real frames of a row depend on the padding, as in fairseq.
    Source: data2vec, arXiv 2202.03555; fairseq `TransformerEncoder` with `pos_conv_depth` above 1.
    """

    def __init__(self, dim: int, kernel: int, groups: int, depth: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(PositionConv(dim, kernel, groups) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, D) to (B, F, D)."""
        for conv in self.convs:
            out = conv(x.transpose(1, 2)).transpose(1, 2)
            # In the precision of the weights, as all layer norms here.
            x = F.gelu(F.layer_norm(out.to(conv.weight.dtype), out.shape[2:]))
        return x


def position_kernel(conv_pos: int, depth: int) -> int:
    """Frames that each of `depth` positional convolutions sees: `conv_pos` shared out, 3 at least, as in fairseq."""
    return conv_pos if depth == 1 else max(3, conv_pos // depth)


def conv_positions(dim: int, conv_pos: int, groups: int, depth: int) -> nn.Module:
    """The positional convolution of fairseq's `conv_pos`, `conv_pos_groups` and `pos_conv_depth`."""
    kernel = position_kernel(conv_pos, depth)
    return ConvPositions(dim, kernel, groups) if depth == 1 else StackedConvPositions(dim, kernel, groups, depth)


class SinusoidalPositions(nn.Module):
    """Fixed sinusoids of the absolute position: sines in even columns, cosines in odd ones, base 10,000, not scaled.

    Source: arXiv 1706.03762, section 3.5. The table is kept and grows to the longest input seen; it is no buffer, since
    those keep their shape.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self._table = torch.empty(0, dim)

    def forward(self, frames: int, device: torch.device) -> Tensor:
        """(frames, D) float32 on `device`."""
        if frames > len(self._table) or self._table.device != device:
            self._table = self._compute(max(frames, len(self._table)), device)
        return self._table[:frames]

    def _compute(self, frames: int, device: torch.device) -> Tensor:
        # In double precision, since float32 angles of late positions would be off in the fourth digit.
        column = torch.arange(self.dim, dtype=torch.float64, device=device)
        rate = 10_000.0 ** (-2 * (column // 2) / self.dim)
        angles = torch.arange(frames, dtype=torch.float64, device=device).unsqueeze(1) * rate
        return torch.where(column % 2 == 0, angles.sin(), angles.cos()).float()


def relative_positions(frames: int, dim: int, device: torch.device) -> Tensor:
    """(2 F, D) sinusoids of the distances F - 1, ..., -F from a key to a query: sines in even, cosines in odd columns.

    Source: fairseq `RelPositionalEncoding`, base 10,000; the last row is a filler (see `conformer.shifted`).
    """
    distance = torch.arange(frames - 1, -frames - 1, -1, device=device, dtype=torch.float32)
    rate = torch.exp(torch.arange(0, dim, 2, device=device, dtype=torch.float32) * (-math.log(10_000.0) / dim))
    angles = distance.unsqueeze(1) * rate
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[:, :dim]


def rotary_rates(dim: int, device: torch.device | None = None) -> Tensor:
    """(dim / 2,) radians per frame by which rotary positions turn each pair of a head's channels; base 10,000."""
    return 1.0 / 10_000.0 ** (torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)


def rotary_positions(frames: int, head_dim: int, device: torch.device) -> Tensor:
    """(2, F, D_head) cosines and sines of rotary positions; the two halves of a head hold the pairs.

    Source: arXiv 2104.09864, fairseq `RotaryPositionalEmbedding`.
    """
    angles = torch.arange(frames, device=device, dtype=torch.float32).unsqueeze(1) * rotary_rates(head_dim, device)
    angles = torch.cat([angles, angles], dim=1)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, positions: Tensor, heads: int) -> Tensor:
    """Turn every head of (B, F, D) by `rotary_positions`."""
    cos, sin = positions.unsqueeze(2).unbind(0)
    x = x.unflatten(2, (heads, -1))
    first, second = x.chunk(2, dim=3)
    return (x * cos + torch.cat([-second, first], dim=3) * sin).flatten(2)
