"""MPC's network: convolutions over time and bands that leave every fourth frame, fixed positions, Transformer layers.

Source: arXiv 1910.09932, section 2; athena-team/athena `athena/models/masked_pc.py`, `athena/layers/transformer.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.features.cmvn import valid_mask
from pretrain.features.front_end import FrontEnd, FrontEndConfig
from pretrain.features.positions import whole_positions
from pretrain.models.batch_norm import BatchNorm
from pretrain.models.kernels import Linear, dropout
from pretrain.models.layer_stack import LayerStack, StackEncoder
from pretrain.models.positions import SinusoidalPositions
from pretrain.models.transformer import TransformerLayer

SUBSAMPLING = 4
LAYER_NORM_EPS = 1e-8
BATCH_NORM_EPS = 1e-3  # TensorFlow's


@dataclass
class MpcEncoderConfig:
    """`num_filters` is the width of both convolutions; `dropout` follows positions, attention and the feed-forward's
    two products. `batch_norm_momentum` is the share of an update in the running statistics.
    """

    front_end: FrontEndConfig
    num_filters: int
    encoder_layers: int
    encoder_embed_dim: int
    encoder_ffn_embed_dim: int
    encoder_attention_heads: int
    dropout: float
    batch_norm_momentum: float


class ConvSubsampling(nn.Module):
    """Two convolutions of 3 x 3 that halve time and bands, each with batch norm and ReLU6, and a projection with ReLU6.

    TensorFlow's "same" pads what is even after its end alone: position t sees frames 4 t to 4 t + 6.
    """

    def __init__(self, bins: int, filters: int, dim: int, momentum: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, filters, 3, stride=2, bias=False)
        self.conv2 = nn.Conv2d(filters, filters, 3, stride=2, bias=False)
        self.norm1, self.norm2 = BatchNorm(filters), BatchNorm(filters)
        for norm in (self.norm1, self.norm2):
            norm.eps, norm.momentum = BATCH_NORM_EPS, momentum
        self.proj = Linear(-(-bins // SUBSAMPLING) * filters, dim)

    def forward(self, x: Tensor, positions: Tensor | None) -> Tensor:
        """(B, 4 P, bins), zero where a row has no position, to (B, P, D); `positions` (B,) are real, None: all."""
        x = self._halve(x.unsqueeze(1), self.conv1, self.norm1)
        if positions is not None:
            # What lies after a row is zero for the second convolution too, as where the row is alone.
            x = torch.where(valid_mask(2 * positions, x.shape[1])[:, :, None, None], x, 0.0)
        x = self._halve(x.permute(0, 3, 1, 2), self.conv2, self.norm2)
        return F.relu6(self.proj(x.flatten(2)))

    def _halve(self, x: Tensor, conv: nn.Conv2d, norm: BatchNorm) -> Tensor:
        """(B, C, F, bins) to (B, F / 2, bins / 2, filters)."""
        odd = x.shape[3] % 2
        return F.relu6(norm(conv(F.pad(x, (odd, 1, 0, 1))).permute(0, 2, 3, 1)))


class MpcEncoder(StackEncoder):
    """Waveforms to L + 1 hidden states, one position per four frames: what enters the layers, then their outputs."""

    Config = MpcEncoderConfig
    config: MpcEncoderConfig
    weight_independent_fields = ("dropout", "batch_norm_momentum")

    def __init__(self, config: MpcEncoderConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.encoder_embed_dim
        self.front_end = FrontEnd(config.front_end)
        self.subsampling = ConvSubsampling(self.front_end.dim, config.num_filters, dim, config.batch_norm_momentum)
        self.positions = SinusoidalPositions(dim)
        self.layers = LayerStack(
            TransformerLayer(
                dim,
                config.encoder_ffn_embed_dim,
                config.encoder_attention_heads,
                config.dropout,
                attention_dropout=0.0,
                activation_dropout=config.dropout,
                layer_norm_first=False,
                layer_norm_eps=LAYER_NORM_EPS,
            )
            for _ in range(config.encoder_layers)
        )
        self.hidden_sizes = [dim] * (config.encoder_layers + 1)
        self.downsample_rates = [SUBSAMPLING * self.front_end.stride_samples] * (config.encoder_layers + 1)

    @property
    def stride_samples(self) -> int:
        """Samples from one position to the next."""
        return self.downsample_rates[0]

    @property
    def receptive_field_samples(self) -> int:
        """Samples behind the four frames of one position."""
        return self.front_end.receptive_field_samples + (SUBSAMPLING - 1) * self.front_end.stride_samples

    def features(self, waveforms: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(B, T) waveforms to (B, 4 P, bins) frames, and the (B,) positions of each row, None where `lengths` is.

        Frames beyond a multiple of four are left out, and a row of fewer than four is filled up with zeros.
        """
        features, frame_lengths = self.front_end(waveforms, lengths)
        return whole_positions(features, frame_lengths, SUBSAMPLING)

    def context(self, features: Tensor, positions: Tensor | None) -> list[Tensor]:
        """What `features` returns, to L + 1 hidden states (B, P, D)."""
        x = self.subsampling(features, positions)
        valid = None if positions is None else valid_mask(positions, x.shape[1])[:, None, None, :]
        return self.layers(dropout(x + self.positions(x.shape[1], x.device), self.config.dropout, self.training), valid)

    def forward(self, waveforms: Tensor, lengths: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        """(B, T) float32 and (B,) samples, or None where nothing is padded, to hidden states and position counts."""
        features, positions = self.features(waveforms, lengths)
        hidden_states = self.context(features, positions)
        if positions is None:
            positions = torch.full((len(waveforms),), hidden_states[0].shape[1], device=waveforms.device)
        return hidden_states, [positions] * len(hidden_states)

    def training_flops(self, samples: int) -> float:
        """Forward and backward of one waveform of `samples`; the features themselves need no gradient."""
        config, dim, filters = self.config, self.config.encoder_embed_dim, self.config.num_filters
        count = max(1, self.front_end.frames(samples) // SUBSAMPLING)
        bands = -(-self.front_end.dim // SUBSAMPLING)
        first = 2.0 * (2 * count) * (2 * bands) * 9 * filters
        second = 2.0 * count * bands * filters * (9 * filters + dim)
        linear = 2.0 * count * (4 * dim * dim + 2 * dim * config.encoder_ffn_embed_dim)
        attention = 4.0 * count * count * dim
        return 3 * (first + second + config.encoder_layers * (linear + attention)) - first
