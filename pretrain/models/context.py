"""The layers between a speech encoder's convolutions and its output: Transformer or conformer, with positions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.models.conformer import ConformerLayer
from pretrain.models.kernels import LayerNorm, dropout
from pretrain.models.layer_stack import LayerStack, StackEncoder
from pretrain.models.position_bias import GatedBiasSelfAttention, RelativePositionBias
from pretrain.models.positions import conv_positions, relative_positions, rotary_positions
from pretrain.models.transformer import SelfAttention, TransformerLayer


class ContextConfig(Protocol):
    """What positions and layers need of an encoder's configuration; `SpeechEncoderConfig` says what the fields mean.

    `depthwise_conv_kernel_size` is read where `is_conformer` alone, and a positional convolution where not;
    `num_buckets` and `max_distance` where there is a relative position bias.
    """

    encoder_layers: int
    encoder_embed_dim: int
    encoder_ffn_embed_dim: int
    encoder_attention_heads: int
    conv_pos: int
    conv_pos_groups: int
    dropout: float
    attention_dropout: float
    activation_dropout: float
    encoder_layerdrop: float

    # Properties, since a configuration may have them as class variables.
    @property
    def layer_norm_first(self) -> bool: ...

    @property
    def pos_conv_depth(self) -> int: ...

    @property
    def pos_enc_type(self) -> str: ...

    @property
    def depthwise_conv_kernel_size(self) -> int: ...

    @property
    def num_buckets(self) -> int: ...

    @property
    def max_distance(self) -> int: ...

    @property
    def is_conformer(self) -> bool: ...


class ContextNetwork(nn.Module):
    """Positions and layers: projected frames to hidden states.

    Source: fairseq `TransformerEncoder` and `ConformerEncoder`. The positional convolution, which the latter inherits
    but never uses, exists only where it is used: a parameter without a gradient would be a burden under ZeRO.
    `skipped` says which layers a forward in training leaves out (LayerDrop).
    """

    def __init__(self, config: ContextConfig) -> None:
        super().__init__()
        dim = config.encoder_embed_dim
        self.dropout, self.layer_norm_first = config.dropout, config.layer_norm_first
        self.pos_enc_type, self.head_dim = config.pos_enc_type, dim // config.encoder_attention_heads
        if not config.is_conformer:
            self.pos_conv = conv_positions(dim, config.conv_pos, config.conv_pos_groups, config.pos_conv_depth)
        if self.pos_enc_type == "gated_bias":
            self.relative_attention_bias = RelativePositionBias(
                config.num_buckets, config.encoder_attention_heads, config.max_distance
            )
        self.layers = LayerStack(make_layer(config) for _ in range(config.encoder_layers))
        self.layerdrop, self.skipped = config.encoder_layerdrop, [False] * config.encoder_layers
        self.layer_norm = LayerNorm(dim)
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, mean=0.0, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def draw_layerdrop(self, rng: np.random.Generator) -> None:
        """Draw which layers the next forwards in training skip, each with probability `encoder_layerdrop`.

        Drawn per update and not per forward, so that all micro-batches and ranks give gradients to the same layers.
        """
        self.skipped = [bool(rng.random() <= self.layerdrop) for _ in self.skipped]

    def forward(self, x: Tensor, frame_lengths: Tensor | None) -> list[Tensor]:
        """(B, F, D) to L + 1 hidden states (B, F, D): the input of every layer, then the encoder's output."""
        x, inputs = self._layer_inputs(x, frame_lengths)
        hidden_states = self.layers(x, *inputs, skipped=self.skipped if self.training else ())
        if self.layer_norm_first:
            hidden_states[-1] = self.layer_norm(hidden_states[-1])
        return hidden_states

    def feed_forwards(self, x: Tensor, frame_lengths: Tensor | None) -> Iterator[Tensor]:
        """(B, F, D) to what the feed-forward of each layer makes, (B, F, D) before dropout and residual, one by one.

        Of Transformer layers; none is skipped. One by one, so that whoever averages them need not keep them all.
        """
        x, inputs = self._layer_inputs(x, frame_lengths)
        for layer in self.layers:
            x, feed_forward = cast(TransformerLayer, layer).with_feed_forward(x, *inputs)
            yield feed_forward

    def _layer_inputs(self, x: Tensor, frame_lengths: Tensor | None) -> tuple[Tensor, tuple[Any, ...]]:
        """What the first layer takes, and what every layer takes beside its frames."""
        valid = None
        if frame_lengths is not None:
            valid = torch.arange(x.shape[1], device=x.device) < frame_lengths.unsqueeze(1)
            x = torch.where(valid.unsqueeze(2), x, 0.0)
            valid = valid[:, None, None, :]
        x, positions = self._positions(x)
        if not self.layer_norm_first:
            x = self.layer_norm(x)
        return dropout(x, self.dropout, self.training), (valid, *positions)

    def _positions(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Frames with their absolute positions, and the table or biases that the layers take beside them."""
        _, frames, dim = x.shape
        if self.pos_enc_type == "abs":
            return x + self.pos_conv(x), ()
        if self.pos_enc_type == "gated_bias":
            return x + self.pos_conv(x), (self.relative_attention_bias(frames),)
        if self.pos_enc_type == "rel_pos":
            return x, (relative_positions(frames, dim, x.device),)
        return x, (rotary_positions(frames, self.head_dim, x.device),)


class ContextEncoder(StackEncoder):
    """An encoder with a `ContextNetwork` in `encoder`."""

    encoder: ContextNetwork

    @property
    def layers(self) -> LayerStack:  # type: ignore[override]
        """The layers of the context network."""
        return self.encoder.layers

    def draw_layerdrop(self, rng: np.random.Generator) -> None:
        """Draw which layers the next forwards in training skip; see `ContextNetwork.draw_layerdrop`."""
        self.encoder.draw_layerdrop(rng)


def make_layer(config: ContextConfig) -> nn.Module:
    """One layer of the configured type."""
    dim, ffn_dim, heads = config.encoder_embed_dim, config.encoder_ffn_embed_dim, config.encoder_attention_heads
    if config.is_conformer:
        kernel = config.depthwise_conv_kernel_size
        return ConformerLayer(dim, ffn_dim, heads, config.dropout, kernel, config.pos_enc_type)
    return TransformerLayer(
        dim,
        ffn_dim,
        heads,
        config.dropout,
        config.attention_dropout,
        config.activation_dropout,
        config.layer_norm_first,
        attention_type=GatedBiasSelfAttention if config.pos_enc_type == "gated_bias" else SelfAttention,
    )
