"""wav2vec's networks: waveform to latent frames z, z to quantized frames (vq-wav2vec), these to context frames c.

Source: arXiv 1904.05862, section 2.1, and 1910.05453, section 3; `fairseq/models/wav2vec/wav2vec.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import ConfigError
from pretrain.errors import UserError
from pretrain.method import Encoder
from pretrain.models import conv_features
from pretrain.models.compiled_layers import compile_in_place
from pretrain.models.conv_features import Conv1d, convolve_and_normalize
from pretrain.quantizers.gumbel import GumbelVectorQuantizer
from recipes.wav2vec.kmeans_quantizer import KMeansVectorQuantizer

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


@dataclass
class QuantizerConfig:
    """The codebooks of vq-wav2vec; `kind` is "gumbel" or "kmeans", the other names are fairseq's."""

    VARIANTS: ClassVar[dict[str, type[QuantizerConfig]]] = {}

    kind: str
    vq_vars: int
    vq_groups: int
    combine_groups: bool

    @staticmethod
    def upgraded(values: dict[str, Any]) -> dict[str, Any]:
        """A block of before the kinds had classes of their own: `vq_type`, and `vq_depth` of k-means too."""
        if "vq_type" not in values:
            return values
        dropped = ("vq_type", "vq_depth") if values["vq_type"] == "kmeans" else ("vq_type",)
        return {"kind": values["vq_type"]} | {name: value for name, value in values.items() if name not in dropped}


@dataclass
class KMeansQuantizerConfig(QuantizerConfig):
    """The nearest entry; one projection comes before it."""


@dataclass
class GumbelQuantizerConfig(QuantizerConfig):
    """An entry by Gumbel-softmax; `vq_depth` counts the layers that compute its logits."""

    vq_depth: int


QuantizerConfig.VARIANTS.update(gumbel=GumbelQuantizerConfig, kmeans=KMeansQuantizerConfig)


@dataclass
class Wav2VecEncoderConfig:
    """Shape of the networks; the names are fairseq's, the values the recipe's.

    `conv_feature_layers` lists (dim, kernel, stride), `conv_aggregator_layers` (dim, kernel), their stride being 1.
    `activation` is "relu" or "gelu"; `quantizer` None means wav2vec, otherwise vq-wav2vec.
    """

    conv_feature_layers: list[list[int]]
    conv_aggregator_layers: list[list[int]]
    activation: str
    log_compression: bool
    skip_connections_agg: bool
    residual_scale: float
    quantizer: QuantizerConfig | None

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            known = " or ".join(ACTIVATIONS)
            raise ConfigError(f"method.encoder.activation: unknown activation '{self.activation}'; use {known}")


class ClipNorm(nn.GroupNorm):
    """Group norm with one group, channels last: (B, F, C) normalised over channels and the whole clip, in float32.

    Padding is part of the clip, as in the official code. torch's group norm wants channels first, and on the CPU takes
    several times as long as its layer norm over a whole row, which is the same.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(1, dim)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cpu:
            return F.layer_norm(x.float(), x.shape[1:], eps=self.eps) * self.weight + self.bias
        return super().forward(x.float().transpose(1, 2)).transpose(1, 2)


class ExtractorLayer(nn.Module):
    """Convolution without bias, norm over the clip, activation."""

    def __init__(self, in_dim: int, dim: int, kernel: int, stride: int, activation: str) -> None:
        super().__init__()
        self.conv = Conv1d(in_dim, dim, kernel, stride, bias=False)
        self.norm = ClipNorm(dim)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C_in) to (B, F, C)."""
        if x.shape[2] == 1:
            return self.activation(convolve_and_normalize(x.squeeze(2), self.conv, self.norm))
        x = self.conv(x)
        return self.activation(self.norm(x).to(x.dtype))


class FeatureExtractor(nn.Module):
    """Waveforms (B, T) to latent frames (B, F, C)."""

    def __init__(self, conv_layers: list[list[int]], activation: str, log_compression: bool) -> None:
        super().__init__()
        in_dims = [1] + [dim for dim, _, _ in conv_layers[:-1]]
        self.conv_layers = nn.ModuleList(
            ExtractorLayer(in_dim, dim, kernel, stride, activation)
            for in_dim, (dim, kernel, stride) in zip(in_dims, conv_layers, strict=True)
        )
        self.log_compression = log_compression

    def forward(self, waveforms: Tensor) -> Tensor:
        x = waveforms.unsqueeze(2)
        for layer in self.conv_layers:
            x = layer(x)
        return x.float().abs().log1p().to(x.dtype) if self.log_compression else x


class AggregatorLayer(nn.Module):
    """Causal convolution over frames, norm over the clip, activation; then (x + input) * sqrt(residual_scale).

    The first frame is repeated to the left, so that a frame sees itself and the `kernel - 1` frames before it. The
    residual is projected where the widths differ; `residual_scale` None leaves it out.
    """

    def __init__(self, in_dim: int, dim: int, kernel: int, activation: str, residual_scale: float | None) -> None:
        super().__init__()
        self.kernel = kernel
        self.conv = Conv1d(in_dim, dim, kernel)
        self.norm = ClipNorm(dim)
        self.activation = ACTIVATIONS[activation]
        self.scale = None if residual_scale is None else math.sqrt(residual_scale)
        projects = self.scale is not None and in_dim != dim
        self.residual_proj = Conv1d(in_dim, dim, 1, bias=False) if projects else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, C_in) to (B, F, C)."""
        padded = torch.cat([x[:, :1].expand(-1, self.kernel - 1, -1), x], dim=1)
        out = self.conv(padded)
        out = self.activation(self.norm(out).to(out.dtype))
        if self.scale is None:
            return out
        residual = x if self.residual_proj is None else self.residual_proj(x)
        return (out + residual) * self.scale


class Wav2VecEncoder(Encoder):
    """Waveforms to the L + 1 hidden states that s3prl has: z, the inputs of aggregator layers 2 to L, and c.

    z is the extractor's output before quantization; all others come after it. A frame every 160 samples sees 465
    samples through the extractor; through the norms it sees the whole row, padding included.
    """

    Config = Wav2VecEncoderConfig
    config: Wav2VecEncoderConfig

    def __init__(self, config: Wav2VecEncoderConfig) -> None:
        super().__init__()
        self.config = config
        dim, layers = config.conv_feature_layers[-1][0], config.conv_aggregator_layers
        self.feature_extractor = FeatureExtractor(config.conv_feature_layers, config.activation, config.log_compression)
        self.vector_quantizer = _build_quantizer(config.quantizer, dim, config.activation)
        scale = config.residual_scale if config.skip_connections_agg else None
        in_dims = [dim] + [width for width, _ in layers[:-1]]
        self.feature_aggregator = nn.ModuleList(
            AggregatorLayer(in_dim, width, kernel, config.activation, scale)
            for in_dim, (width, kernel) in zip(in_dims, layers, strict=True)
        )
        self.hidden_sizes = [dim] + [width for width, _ in layers]
        self.downsample_rates = [self.stride_samples] * len(self.hidden_sizes)

    @property
    def stride_samples(self) -> int:
        return conv_features.stride_samples(self.config.conv_feature_layers)

    @property
    def receptive_field_samples(self) -> int:
        return conv_features.receptive_field_samples(self.config.conv_feature_layers)

    @property
    def code_shape(self) -> tuple[int, int]:
        """Groups of codes and entries per group; (0, 0) without a codebook."""
        quantizer = self.config.quantizer
        return (0, 0) if quantizer is None else (quantizer.vq_groups, quantizer.vq_vars)

    def features(self, waveforms: Tensor) -> Tensor:
        """Latent frames z (B, F, C) of waveforms (B, T), zero after their lengths."""
        return self.feature_extractor(waveforms)

    def context(self, features: Tensor) -> list[Tensor]:
        """L states of (B, F, C) latent or quantized frames: the inputs of layers 2 to L, then c."""
        states, x = [], features
        for layer in self.feature_aggregator:
            x = layer(x)
            states.append(x)
        return states

    def forward(self, waveforms: Tensor, lengths: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        """(B, T) float32 and (B,) samples, or None where nothing is padded, to hidden states and frame counts.

        In train mode a Gumbel quantizer draws noise.
        """
        z = self.features(waveforms)
        states = [z, *self.context(self._quantized(z)[0])]
        return states, [self.frame_lengths(waveforms, lengths)] * len(states)

    @torch.no_grad()
    def codes(self, waveforms: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, T) waveforms and (B,) samples to codes (B, F, G) int64 and frame counts (B,); call it in eval mode.

        One code per group and frame; those beyond a row's frame count belong to padding. Raises UserError for wav2vec,
        which has no codebook.
        """
        codes = self._quantized(self.features(waveforms))[1]
        if codes is None:
            raise UserError("method.encoder.quantizer: null, so there are no codes; give a vq-wav2vec checkpoint")
        return codes, self.frame_lengths(waveforms, lengths)

    def frame_lengths(self, waveforms: Tensor, lengths: Tensor | None) -> Tensor:
        """(B,) int64 frames of each row of (B, T) waveforms, at least 1."""
        total = conv_features.frames(waveforms.shape[1], self.config.conv_feature_layers)
        if lengths is None:
            return torch.full((len(waveforms),), total, device=waveforms.device)
        return conv_features.frames(lengths, self.config.conv_feature_layers).clamp(1, total)

    def _quantized(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the aggregator sees of z (B, F, C), and its codes (B, F, G); z itself and None without a codebook."""
        if isinstance(self.vector_quantizer, GumbelVectorQuantizer):
            quantized = self.vector_quantizer(z.flatten(0, 1))
            return quantized.vectors.view(z.shape), quantized.codes.unflatten(0, z.shape[:2])
        if isinstance(self.vector_quantizer, KMeansVectorQuantizer):
            quantized = self.vector_quantizer(z)
            return quantized.vectors, quantized.codes
        return z, None

    def compile_layers(self) -> None:
        """Compile the extractor and each aggregator layer in place; parameter names stay. Meant for GPUs."""
        compile_in_place((self.feature_extractor, *self.feature_aggregator))

    def forward_flops(self, samples: int) -> float:
        """Floating-point operations (two per multiply-add) of one forward of a waveform of `samples`."""
        total, in_dim, length = 0.0, 1, samples
        for dim, kernel, stride in self.config.conv_feature_layers:
            length = (length - kernel) // stride + 1
            total += 2.0 * length * in_dim * dim * kernel
            in_dim = dim
        if self.vector_quantizer is not None:
            total += 2.0 * length * sum(p.numel() for p in self.vector_quantizer.parameters() if p.dim() > 1)
        for dim, kernel in self.config.conv_aggregator_layers:
            total += 2.0 * length * in_dim * dim * kernel
            in_dim = dim
        return total

    def training_flops(self, samples: int) -> float:
        """Forward and backward of one waveform; the waveform itself needs no gradient."""
        dim, kernel, _ = self.config.conv_feature_layers[0]
        first = 2.0 * conv_features.frames(samples, self.config.conv_feature_layers[:1]) * dim * kernel
        return 3 * self.forward_flops(samples) - first


def _build_quantizer(config: QuantizerConfig | None, dim: int, activation: str) -> nn.Module | None:
    if config is None:
        return None
    if not isinstance(config, GumbelQuantizerConfig):
        return KMeansVectorQuantizer(dim, config.vq_vars, config.vq_groups, config.combine_groups)
    return GumbelVectorQuantizer(
        dim,
        config.vq_vars,
        config.vq_groups,
        vq_dim=dim,
        combine_groups=config.combine_groups,
        depth=config.vq_depth,
        activation=activation,
    )
