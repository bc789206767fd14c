"""BEST-RQ's encoder: log-mel frames, two strided convolutions, conformer layers.

Source: arXiv 2202.01855, section 4; speechbrain `recipes/LibriSpeech/self-supervised-learning/BEST-RQ`, whose
`ConvolutionFrontEnd`, `TransformerASR` and `ConformerEncoder` this network is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import MAY_BE_ZERO, ConfigError
from pretrain.features.cmvn import valid_mask
from pretrain.features.front_end import FrontEnd, FrontEndConfig
from pretrain.features.positions import whole_positions
from pretrain.models.kernels import LayerNorm, Linear, dropout
from pretrain.models.layer_stack import LayerStack, StackEncoder, with_layers
from pretrain.models.positions import relative_positions
from recipes.best_rq.conformer import ACTIVATIONS, BestRqLayer, past_mask

# Two convolutions halve the frames each.
SUBSAMPLING = 4
FINAL_NORM_EPS = 1e-6


@dataclass
class BestRqEncoderConfig:
    """`conv_channels` are the widths of the two convolutions; `activation` is "gelu" or "swish".

    With `left_context` the encoder hears no later position: attention looks at so many positions before its own, and
    the depthwise convolutions at `depthwise_conv_kernel_size` - 1. Null: attention hears the whole utterance and the
    convolutions are centred. With `absolute_distances` attention knows how far away a key is, but not on which side, as
    in speechbrain.
    """

    front_end: FrontEndConfig
    conv_channels: list[int]
    encoder_layers: int
    encoder_embed_dim: int
    encoder_ffn_embed_dim: int
    encoder_attention_heads: int
    depthwise_conv_kernel_size: int
    activation: str
    dropout: float
    left_context: int | None = field(metadata=MAY_BE_ZERO)
    absolute_distances: bool

    def __post_init__(self) -> None:
        if self.front_end.dim % SUBSAMPLING:
            raise ConfigError(
                f"method.encoder.front_end: frames have {self.front_end.dim} bins, which two convolutions cannot halve "
                f"twice; take a multiple of {SUBSAMPLING}"
            )
        if len(self.conv_channels) != 2:
            raise ConfigError(f"method.encoder.conv_channels: {self.conv_channels}; give two widths")
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"method.encoder.activation: unknown '{self.activation}'; use {' or '.join(ACTIVATIONS)}")
        if self.encoder_embed_dim % self.encoder_attention_heads or self.encoder_embed_dim % 2:
            raise ConfigError(
                f"method.encoder.encoder_embed_dim: {self.encoder_embed_dim} must be even and a multiple of "
                f"encoder_attention_heads, {self.encoder_attention_heads}; correct the recipe"
            )
        if self.left_context is None and self.depthwise_conv_kernel_size % 2 == 0:
            raise ConfigError(
                f"method.encoder.depthwise_conv_kernel_size: {self.depthwise_conv_kernel_size}; a centred convolution "
                "needs an odd kernel, so take one more or one less"
            )


class Subsampling(nn.Module):
    """Two convolutions of 3 x 3 that halve time and bins, each with a norm over its bins and channels, and leaky ReLU.

    Both are padded before the first frame and the lowest bin alone, with the reflected one: what has an even length
    needs no padding at its end. So position p sees frames 4 p - 3 to 4 p + 3, its own and three before.
    """

    def __init__(self, bins: int, channels: list[int], dim: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        widths = [1, *channels]
        self.convs = nn.ModuleList(nn.Conv2d(*pair, 3, stride=2) for pair in zip(widths, channels, strict=False))
        self.norms = nn.ModuleList(LayerNorm([bins // 2 ** (i + 1), width]) for i, width in enumerate(channels))
        self.proj = Linear(bins // SUBSAMPLING * channels[-1], dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 4 P, bins) to (B, P, D)."""
        x = x.unsqueeze(3)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            padded = F.pad(x.permute(0, 3, 1, 2), (1, 0, 1, 0), mode="reflect")
            x = F.leaky_relu(norm(conv(padded).permute(0, 2, 3, 1)))
            x = dropout(x, self.dropout, self.training)
        return dropout(self.proj(x.flatten(2)), self.dropout, self.training)


class BestRqEncoder(StackEncoder):
    """Waveforms to L + 1 hidden states, one position per four frames: what enters the layers, then their outputs.

    The last one goes through a final norm.
    """

    Config = BestRqEncoderConfig
    config: BestRqEncoderConfig
    weight_independent_fields = ("dropout", "left_context", "absolute_distances")

    def __init__(self, config: BestRqEncoderConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.encoder_embed_dim
        self.front_end = FrontEnd(config.front_end)
        self.subsampling = Subsampling(self.front_end.dim, config.conv_channels, dim, config.dropout)
        self.layers = LayerStack(
            BestRqLayer(
                dim,
                config.encoder_ffn_embed_dim,
                config.encoder_attention_heads,
                config.dropout,
                config.depthwise_conv_kernel_size,
                config.left_context is not None,
                ACTIVATIONS[config.activation],
            )
            for _ in range(config.encoder_layers)
        )
        self.layer_norm = LayerNorm(dim, FINAL_NORM_EPS)
        for parameter in (*self.subsampling.proj.parameters(), *self.layers.parameters()):
            if parameter.dim() > 1:
                nn.init.xavier_normal_(parameter)
        self.hidden_sizes = [dim] * (config.encoder_layers + 1)
        self.downsample_rates = [SUBSAMPLING * self.front_end.stride_samples] * (config.encoder_layers + 1)

    def features(self, waveforms: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(B, T) waveforms to (B, 4 P, bins) frames, and the (B,) positions of each row, None where `lengths` is.

        Frames beyond a multiple of four are left out, and a row of fewer than four is filled up with zeros.
        """
        features, frame_lengths = self.front_end(waveforms, lengths)
        return whole_positions(features, frame_lengths, SUBSAMPLING)

    def context(self, features: Tensor, positions: Tensor | None) -> list[Tensor]:
        """What `features` returns, to L + 1 hidden states (B, P, D)."""
        x = self.subsampling(features)
        count, left_context = x.shape[1], self.config.left_context
        valid: Tensor | None = None
        heard: Tensor | None = None
        if left_context is not None:
            # Padding comes after all real positions, so none of them hears it.
            heard = past_mask(count, left_context, x.device)
        elif positions is not None:
            valid = valid_mask(positions, count)
            heard = valid[:, None, None, :]
        distances = relative_positions(count, self.config.encoder_embed_dim, x.device)
        if self.config.absolute_distances:
            # The sines, in even columns, of the keys that come later.
            distances[count:, ::2] *= -1
        hidden_states = self.layers(x, valid, heard, distances)
        hidden_states[-1] = self.layer_norm(hidden_states[-1])
        return hidden_states

    def forward(self, waveforms: Tensor, lengths: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        """(B, T) float32 and (B,) samples, or None where nothing is padded, to hidden states and position counts."""
        features, positions = self.features(waveforms, lengths)
        hidden_states = self.context(features, positions)
        if positions is None:
            positions = torch.full((len(waveforms),), hidden_states[0].shape[1], device=waveforms.device)
        return hidden_states, [positions] * len(hidden_states)

    def truncated(self, layer: int) -> BestRqEncoder:
        """A copy without the layers above hidden state `layer`, whose hidden states up to `layer` are this one's.

        One layer more is kept, because the final norm must not touch `layer`.
        """
        return with_layers(self, min(layer + 1, self.config.encoder_layers))

    def training_flops(self, samples: int) -> float:
        """Forward and backward of one waveform of `samples`; features and distances themselves need no gradient."""
        config, dim = self.config, self.config.encoder_embed_dim
        count = max(1, self.front_end.frames(samples) // SUBSAMPLING)
        bins, (first_width, width) = self.front_end.dim, config.conv_channels
        first = 2.0 * (2 * count) * (bins // 2) * 9 * first_width
        second = 2.0 * count * (bins // SUBSAMPLING) * width * (9 * first_width + dim)
        # Four products of the attention and three of the convolution module; two feed-forwards.
        linear = 2.0 * count * dim * (7 * dim + 4 * config.encoder_ffn_embed_dim + config.depthwise_conv_kernel_size)
        distances = 4.0 * count * dim * dim
        # Scores by content and by distance (2 P of them), and the sum over values.
        attention = 8.0 * count * count * dim
        layers = config.encoder_layers * (linear + distances + attention)
        return 3 * (first + second + layers) - first - config.encoder_layers * distances
