"""The 7-layer convolution stack that turns a waveform into frames (wav2vec 2.0, HuBERT, WavLM, data2vec)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.method import CollatorDefaults
from pretrain.models.kernels import linear

# One number, or an integer tensor of many.
Samples = TypeVar("Samples", int, Tensor)


def frames(samples: Samples, conv_layers: list[list[int]]) -> Samples:
    """Frames that a stack of unpadded convolutions [[dim, kernel, stride], ...] makes of `samples` samples.

    Takes a number or an integer tensor; fewer samples than the receptive field give a count below one.
    """
    for _, kernel, stride in conv_layers:
        samples = (samples - kernel) // stride + 1
    return samples


def stride_samples(conv_layers: list[list[int]]) -> int:
    """Samples from the start of one frame to the start of the next."""
    total = 1
    for _, _, stride in conv_layers:
        total *= stride
    return total


def receptive_field_samples(conv_layers: list[list[int]]) -> int:
    """Samples that one frame sees."""
    field = 1
    for _, kernel, stride in reversed(conv_layers):
        field = (field - 1) * stride + kernel
    return field


@dataclass(frozen=True)
class ConvFrames(CollatorDefaults):
    """The frame grid of a stack of convolutions [[dim, kernel, stride], ...]: what a collator says of its crops."""

    conv_feature_layers: list[list[int]]

    @property
    def stride_samples(self) -> int:
        """Samples from one frame to the next."""
        return stride_samples(self.conv_feature_layers)

    @property
    def receptive_field_samples(self) -> int:
        """Samples that one frame sees."""
        return receptive_field_samples(self.conv_feature_layers)


def valid_frames(lengths: Tensor, samples: int, frame_count: int, conv_layers: list[list[int]], rule: str) -> Tensor:
    """Real frames of each row of a padded batch of `samples` that gave `frame_count` frames; (B,) int64, at least 1.

    "fold" is fairseq's rule for HuBERT and WavLM (`forward_padding_mask`): samples are folded into `frame_count`
    groups, and a frame is padding only if its whole group is. "conv" counts what the convolutions give for the row.
    """
    if rule == "fold":
        group = samples // frame_count
        counts = (lengths + group - 1) // group
    else:
        counts = frames(lengths, conv_layers)
    # A waveform shorter than the receptive field still counts one frame: attention needs a key.
    return counts.clamp(1, frame_count)


class Windows(torch.autograd.Function):
    """(B, T, C) to (B, F, kernel * C): the samples under each position of a kernel (at least `stride` long), in a row.

    Gathering is one strided copy; the gradient adds the overlaps up without torch's slow scatter.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: int, stride: int) -> Tensor:
        batch, time, dim = x.shape
        count = (time - kernel) // stride + 1
        ctx.shape, ctx.kernel, ctx.stride = x.shape, kernel, stride
        strides = (time * dim, stride * dim, 1)
        return x.contiguous().as_strided((batch, count, kernel * dim), strides).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (batch, _, dim), kernel, stride = ctx.shape, ctx.kernel, ctx.stride
        count = grad.shape[1]
        taps = grad.view(batch, count, kernel, dim)
        out = grad.new_empty(ctx.shape)
        out[:, : count * stride].view(batch, count, stride, dim).copy_(taps[:, :, :stride])
        out[:, count * stride :] = 0
        for tap in range(stride, kernel):
            out[:, tap : tap + stride * count : stride] += taps[:, :, tap]
        return out, None, None


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1) -> Tensor:
    """`F.conv1d` without padding, channels last: (B, T, C_in) and weight (C, C_in, kernel) to (B, F, C).

    On the CPU as a matrix product over gathered windows, about 1.6 times as fast as oneDNN's convolution and its
    gradients.
    """
    if x.is_cpu:
        windows = Windows.apply(x, weight.shape[2], stride)
        return linear(windows, weight.transpose(1, 2).flatten(1), bias)
    out = F.conv2d(x.transpose(1, 2).unsqueeze(2), weight.unsqueeze(2), bias, stride=(1, stride))
    return out.squeeze(2).transpose(1, 2)


class Conv1d(nn.Conv1d):
    """`nn.Conv1d` without padding, channels last: (B, T, C_in) to (B, F, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return convolve(x, self.weight, self.bias, self.stride[0])


def convolve_and_normalize(waveforms: Tensor, conv: Conv1d, norm: nn.GroupNorm) -> Tensor:
    """Convolution of waveforms (B, T), normalised per group of channels over time, in one product: (B, F, C).

    Mean and variance of a convolution's output follow from mean and covariance of the windows it sees, w'm and w'Sw:
    so the norm becomes a scale and a shift of the weights, per waveform, and the largest activation of the network is
    neither read for statistics nor kept for a gradient. Statistics are in float64: the spectrum of speech is steep.
    """
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    windows = waveforms.unfold(1, kernel, stride)
    weight = conv.weight.squeeze(1).double()
    mean = windows.double().mean(1, keepdim=True)
    centred = windows - mean
    covariance = centred.transpose(1, 2) @ centred / windows.shape[1]
    bias = torch.zeros_like(norm.bias) if conv.bias is None else conv.bias
    channel_mean = (mean @ weight.T).squeeze(1) + bias
    group_mean = channel_mean.unflatten(1, (norm.num_groups, -1)).mean(2, keepdim=True)
    # The channels of a group spread around their own means, and these around the group's.
    spread = (channel_mean.unflatten(1, (norm.num_groups, -1)) - group_mean).square().flatten(1)
    variance = ((weight @ covariance) * weight).sum(2) + spread
    variance = variance.unflatten(1, (norm.num_groups, -1)).mean(2, keepdim=True)
    per_group = norm.num_channels // norm.num_groups
    scale = norm.weight * torch.rsqrt(variance + norm.eps).expand(-1, -1, per_group).flatten(1)
    shift = norm.bias + (bias - group_mean.expand(-1, -1, per_group).flatten(1)) * scale
    # Columns of ones carry the shift; matrix units want rows of a multiple of eight numbers.
    columns = -(kernel + 1) % 8 + kernel + 1
    scaled = torch.cat([weight * scale.unsqueeze(2), shift.unsqueeze(2)], dim=2).to(windows.dtype)
    scaled = F.pad(scaled, (0, columns - kernel - 1))
    return F.pad(windows, (0, columns - kernel), value=1.0) @ scaled.transpose(1, 2)


class ConvLayer(nn.Module):
    """Convolution, norm ("group": each channel over time, "layer": each frame over channels, or "none"), GELU."""

    def __init__(self, in_dim: int, dim: int, kernel: int, stride: int, bias: bool, norm: str) -> None:
        super().__init__()
        self.conv = Conv1d(in_dim, dim, kernel, stride, bias=bias)
        nn.init.kaiming_normal_(self.conv.weight)
        self.norm: nn.Module | None = None
        if norm == "group":
            self.norm = nn.GroupNorm(dim, dim)
        elif norm == "layer":
            self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C_in) to (B, F, C)."""
        if isinstance(self.norm, nn.GroupNorm):
            return F.gelu(convolve_and_normalize(x.squeeze(2), self.conv, self.norm))
        x = self.conv(x)
        if self.norm is not None:
            x = self.norm(x).to(x.dtype)
        return F.gelu(x)


class ConvFeatureExtractor(nn.Module):
    """Waveforms (B, T) to features (B, F, C): wav2vec 2.0, arXiv 2006.11477, section 2; fairseq wav2vec2.py.

    `mode` "default" has a group norm after the first convolution, whose statistics run over time, padding included;
    "layer_norm" has a layer norm after every convolution. Norms are computed in float32.
    """

    def __init__(self, conv_layers: list[list[int]], mode: str, bias: bool) -> None:
        super().__init__()
        self.conv_layers = nn.ModuleList()
        in_dim = 1
        for i, (dim, kernel, stride) in enumerate(conv_layers):
            norm = "layer" if mode == "layer_norm" else "group" if i == 0 else "none"
            self.conv_layers.append(ConvLayer(in_dim, dim, kernel, stride, bias, norm))
            in_dim = dim

    def forward(self, waveforms: Tensor) -> Tensor:
        x = waveforms.unsqueeze(2)
        for layer in self.conv_layers:
            x = layer(x)
        return x
