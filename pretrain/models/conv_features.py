"""The 7-layer convolution stack that turns a waveform into frames (wav2vec 2.0, HuBERT, WavLM, data2vec)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def frames(samples: int | Tensor, conv_layers: list[list[int]]) -> int | Tensor:
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


class ConvLayer(nn.Module):
    """Convolution, norm ("group": each channel over time, "layer": each frame over channels, or "none"), GELU."""

    def __init__(self, in_dim: int, dim: int, kernel: int, stride: int, bias: bool, norm: str) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_dim, dim, kernel, stride, bias=bias)
        nn.init.kaiming_normal_(self.conv.weight)
        self.norm: nn.Module | None = None
        if norm == "group":
            self.norm = nn.GroupNorm(dim, dim)
        elif norm == "layer":
            self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, T) to (B, C, F)."""
        x = self.conv(x)
        if isinstance(self.norm, nn.LayerNorm):
            x = self.norm(x.float().transpose(1, 2)).transpose(1, 2)
        elif self.norm is not None:
            x = self.norm(x.float())
        return F.gelu(x)


class ConvFeatureExtractor(nn.Module):
    """Waveforms (B, T) to features (B, F, C): wav2vec 2.0, arXiv 2006.11477, section 2; fairseq wav2vec2.py.

    `mode` "default" has a group norm after the first convolution, whose statistics run over time, padding included;
    "layer_norm" has a layer norm after every convolution. Norms are computed in float32.
    """

    def __init__(self, conv_layers: list[list[int]], mode: str, bias: bool) -> None:
        super().__init__()
        if mode not in ("default", "layer_norm"):
            raise ValueError(f"extractor_mode: unknown mode '{mode}'; use 'default' or 'layer_norm'")
        self.conv_layers = nn.ModuleList()
        in_dim = 1
        for i, (dim, kernel, stride) in enumerate(conv_layers):
            norm = "layer" if mode == "layer_norm" else "group" if i == 0 else "none"
            self.conv_layers.append(ConvLayer(in_dim, dim, kernel, stride, bias, norm))
            in_dim = dim

    def forward(self, waveforms: Tensor) -> Tensor:
        x = waveforms.unsqueeze(1)
        for layer in self.conv_layers:
            x = layer(x)
        return x.transpose(1, 2)
