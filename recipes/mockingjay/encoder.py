"""The network of Mockingjay, TERA and Audio ALBERT: acoustic features, fixed positions, BERT layers.

Source: arXiv 1910.12638, section 2; `s3prl/upstream/mockingjay/model.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pretrain.features.cmvn import valid_mask
from pretrain.features.front_end import FrontEnd, FrontEndConfig
from pretrain.models.kernels import LayerNorm, Linear, dropout
from pretrain.models.layer_stack import LayerStack, StackEncoder
from pretrain.models.positions import SinusoidalPositions
from pretrain.models.transformer import TransformerLayer

LAYER_NORM_EPS = 1e-12


@dataclass
class MockingjayEncoderConfig:
    """`share_layer` passes `encoder_layers` times through one layer, as Audio ALBERT does.

    `initializer_range` is the deviation from which the weights of linear layers are drawn.
    """

    front_end: FrontEndConfig
    encoder_layers: int
    encoder_embed_dim: int
    encoder_ffn_embed_dim: int
    encoder_attention_heads: int
    share_layer: bool
    dropout: float
    attention_dropout: float
    initializer_range: float


class MockingjayEncoder(StackEncoder):
    """Waveforms to L + 1 hidden states: the embedded features, then the output of every layer (norms after the sums).

    Positions are computed for any length, and the whole input is attended to.
    """

    Config = MockingjayEncoderConfig
    config: MockingjayEncoderConfig
    weight_independent_fields = ("dropout", "attention_dropout", "initializer_range")

    def __init__(self, config: MockingjayEncoderConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.encoder_embed_dim
        self.front_end = FrontEnd(config.front_end)
        self.spec_transform = Linear(self.front_end.dim, dim)
        self.positions = SinusoidalPositions(dim)
        self.layer_norm = LayerNorm(dim, LAYER_NORM_EPS)
        layers = (
            TransformerLayer(
                dim,
                config.encoder_ffn_embed_dim,
                config.encoder_attention_heads,
                config.dropout,
                config.attention_dropout,
                activation_dropout=0.0,
                layer_norm_first=False,
                layer_norm_eps=LAYER_NORM_EPS,
            )
            for _ in range(1 if config.share_layer else config.encoder_layers)
        )
        self.layers = LayerStack(layers, config.encoder_layers)
        self.hidden_sizes = [dim] * (config.encoder_layers + 1)
        self.downsample_rates = [self.front_end.stride_samples] * (config.encoder_layers + 1)
        initialise(self, config.initializer_range)

    @property
    def receptive_field_samples(self) -> int:
        """Samples in the window of one frame."""
        return self.front_end.receptive_field_samples

    @property
    def first_centre_samples(self) -> int:
        """The middle of the first frame, for whoever compares frames with times."""
        return self.config.front_end.first_centre_samples

    def context(self, features: Tensor, frame_lengths: Tensor | None) -> list[Tensor]:
        """(B, F, D_in) features, `frame_lengths` (B,) of them real (None: all), to L + 1 hidden states (B, F, D)."""
        valid = None if frame_lengths is None else valid_mask(frame_lengths, features.shape[1])[:, None, None, :]
        x = self.spec_transform(features) + self.positions(features.shape[1], features.device)
        return self.layers(dropout(self.layer_norm(x), self.config.dropout, self.training), valid)

    def forward(self, waveforms: Tensor, lengths: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        """(B, T) float32 and (B,) samples, or None where nothing is padded, to hidden states and frame counts."""
        features, frame_lengths = self.front_end(waveforms, lengths)
        hidden_states = self.context(features, frame_lengths)
        if frame_lengths is None:
            frame_lengths = torch.full((len(waveforms),), features.shape[1], device=waveforms.device)
        return hidden_states, [frame_lengths] * len(hidden_states)

    def forward_flops(self, samples: int) -> float:
        """Floating-point operations (two per multiply-add) of one forward of a waveform of `samples`."""
        config, dim, frames = self.config, self.config.encoder_embed_dim, self.front_end.frames(samples)
        linear = 2.0 * frames * (4 * dim * dim + 2 * dim * config.encoder_ffn_embed_dim)
        attention = 4.0 * frames * frames * dim
        return 2.0 * frames * self.front_end.dim * dim + config.encoder_layers * (linear + attention)


def initialise(module: nn.Module, std: float) -> None:
    """BERT's start: weights of linear layers from N(0, `std`), their biases zero."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, mean=0.0, std=std)
            nn.init.zeros_(part.bias)
