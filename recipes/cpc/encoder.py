"""CPC's encoder: convolutions with padding and a norm each, then a context network that reads the past.

Sources: facebookresearch/CPC_audio `cpc/model.py`; corticph/scaling-contrastive `model/` for the bidirectional model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import MAY_BE_ZERO, ConfigError, nearest
from pretrain.method import Encoder
from pretrain.models.batch_norm import BatchNorm
from pretrain.models.conv_features import Conv1d
from recipes.cpc.norms import ChannelNorm, GroupNorm
from recipes.cpc.transformer import CausalLayers

NORMS = ("channel", "batch", "group")
RECURRENT = {"gru": (nn.GRU, 3), "lstm": (nn.LSTM, 4)}  # and the number of gates


@dataclass
class CpcEncoderConfig:
    """Shape of the network. `conv_layers` lists [channels, kernel, stride, zeros before, zeros after].

    `norm` is channel, batch or group (of `norm_groups`); `relu_max` clips the ReLU, null does not; waveforms in
    [-1, 1] are multiplied by `input_scale`. `context` is gru, lstm or transformer; the transformer alone reads
    `context_heads`, `context_ffn_dim`, `context_frames` (how far back it sees) and `dropout`, and keeps the width of
    the convolutions, so `context_dim` must equal it. `bidirectional` adds an independent context network that reads
    backwards.
    """

    conv_layers: list[list[int]] = field(metadata=MAY_BE_ZERO)
    conv_bias: bool
    norm: str
    norm_groups: int | None
    relu_max: float | None
    input_scale: float
    context: str
    context_layers: int
    context_dim: int
    context_heads: int
    context_ffn_dim: int
    context_frames: int
    dropout: float
    bidirectional: bool

    def __post_init__(self) -> None:
        if any(len(layer) != 5 or min(layer[:3]) < 1 or layer[1] < layer[2] for layer in self.conv_layers):
            raise ConfigError(
                "method.encoder.conv_layers: state [channels, kernel, stride, zeros before, zeros after] per layer, "
                "with kernels at least as long as their strides"
            )
        if self.norm not in NORMS:
            raise ConfigError(f"method.encoder.norm: unknown norm '{self.norm}'; {nearest(self.norm, list(NORMS))}")
        if (self.norm == "group") != (self.norm_groups is not None):
            raise ConfigError("method.encoder.norm_groups: state it for norm: group, and null for any other")
        if self.context not in (*RECURRENT, "transformer"):
            known = nearest(self.context, [*RECURRENT, "transformer"])
            raise ConfigError(f"method.encoder.context: unknown context network '{self.context}'; {known}")
        if self.context == "transformer" and self.context_dim != self.dim:
            raise ConfigError(
                f"method.encoder.context_dim: a transformer keeps the width of the convolutions; set {self.dim}"
            )

    @property
    def dim(self) -> int:
        """Width of the convolutions' output z."""
        return self.conv_layers[-1][0]

    @property
    def stride_samples(self) -> int:
        """Samples from one frame to the next."""
        total = 1
        for _, _, stride, _, _ in self.conv_layers:
            total *= stride
        return total

    def frames(self, samples: int) -> int:
        """Frames of a waveform of `samples`, at least 1; a multiple of the stride gives exactly samples / stride."""
        for layer in self.conv_layers:
            samples = _layer_frames(samples, layer)
        return max(1, samples)


def _layer_frames(count: Any, layer: list[int]) -> Any:
    """Frames that one layer makes of `count` frames, a number or an integer tensor."""
    _, kernel, stride, before, after = layer
    return (count + before + after - kernel) // stride + 1


class ConvLayer(nn.Module):
    """Convolution with zeros around, norm, ReLU: (B, F, C_in) to (B, F', C)."""

    def __init__(self, in_dim: int, layer: list[int], config: CpcEncoderConfig) -> None:
        super().__init__()
        dim, kernel, stride, self.before, self.after = layer
        self.relu_max = config.relu_max
        self.conv = Conv1d(in_dim, dim, kernel, stride, bias=config.conv_bias)
        if config.norm == "group":
            assert config.norm_groups is not None  # the configuration has checked it
            self.norm: nn.Module = GroupNorm(dim, config.norm_groups)
        else:
            self.norm = ChannelNorm(dim) if config.norm == "channel" else BatchNorm(dim)

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """`lengths` (B,) frames of the output that are real; None where all are. The others come out as zeros."""
        x = self.conv(F.pad(x, (0, 0, self.before, self.after)))
        valid = None
        if lengths is not None:
            valid = (torch.arange(x.shape[1], device=x.device) < lengths.unsqueeze(1)).unsqueeze(2)
        normed = self.norm(x, valid) if isinstance(self.norm, GroupNorm) else self.norm(x)
        x = normed.to(x.dtype)
        x = F.relu(x) if self.relu_max is None else x.clamp(0.0, self.relu_max)
        # Zeros, as the next layer pads with: a row then gives the same frames alone and in a padded batch.
        return x if valid is None else x * valid


class RecurrentContext(nn.Module):
    """GRU or LSTM from a zero state: (B, F, D) to (B, F, H)."""

    def __init__(self, config: CpcEncoderConfig) -> None:
        super().__init__()
        network, self.gates = RECURRENT[config.context]
        self.net = network(config.dim, config.context_dim, config.context_layers, batch_first=True)

    def forward(self, z: Tensor) -> Tensor:
        return self.net(z)[0]

    def forward_flops(self, frames: int) -> float:
        """Floating-point operations of one forward of a sequence of `frames`."""
        inputs = self.net.input_size + (self.net.num_layers - 1) * self.net.hidden_size
        recurrent = self.net.num_layers * self.net.hidden_size
        return 2.0 * frames * self.gates * self.net.hidden_size * (inputs + recurrent)


class TransformerContext(nn.Module):
    """Causal Transformer layers with CPC_audio's relative positions: (B, F, D) to (B, F, D)."""

    def __init__(self, config: CpcEncoderConfig) -> None:
        super().__init__()
        shape = (config.dim, config.context_heads, config.context_ffn_dim, config.context_frames, config.dropout)
        self.layers = nn.ModuleList(CausalLayers(1, *shape) for _ in range(config.context_layers))

    def forward(self, z: Tensor) -> Tensor:
        for layer in self.layers:
            z = layer(z).squeeze(0)
        return z

    def forward_flops(self, frames: int) -> float:
        """Floating-point operations of one forward of a sequence of `frames`."""
        return sum(layer.forward_flops(frames) for layer in cast(Iterable[CausalLayers], self.layers))


class CpcEncoder(Encoder):
    """Waveforms to two hidden states: z of the convolutions and c of the context network (both directions, if two)."""

    Config = CpcEncoderConfig
    config: CpcEncoderConfig
    weight_independent_fields = ("dropout",)

    def __init__(self, config: CpcEncoderConfig) -> None:
        super().__init__()
        self.config = config
        in_dims = [1, *(layer[0] for layer in config.conv_layers[:-1])]
        pairs = zip(in_dims, config.conv_layers, strict=True)
        self.conv_layers = nn.ModuleList(ConvLayer(in_dim, layer, config) for in_dim, layer in pairs)
        context = TransformerContext if config.context == "transformer" else RecurrentContext
        directions = 2 if config.bidirectional else 1
        self.contexts = nn.ModuleList(context(config) for _ in range(directions))
        self.hidden_sizes = [config.dim, directions * config.context_dim]
        self.downsample_rates = [config.stride_samples] * 2

    def features(self, waveforms: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(B, T) waveforms, zero after `lengths` (B,), to z (B, F, D) and its real frames (B,), None where all are."""
        x = (waveforms * self.config.input_scale).unsqueeze(2)
        for layer, shape in zip(self.conv_layers, self.config.conv_layers, strict=True):
            # A waveform shorter than a frame still counts one.
            lengths = None if lengths is None else _layer_frames(lengths, shape).clamp(min=1)
            x = layer(x, lengths)
        return x, lengths

    def readings(self, z: Tensor, frame_lengths: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """(z, c) for every direction of reading, in its own order: the second pair runs backwards in time."""
        sequences = [z, reverse(z, frame_lengths)] if self.config.bidirectional else [z]
        return [(sequence, context(sequence)) for sequence, context in zip(sequences, self.contexts, strict=True)]

    def forward(self, waveforms: Tensor, lengths: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        """(B, T) float32 and (B,) samples, or None where nothing is padded, to [z, c] and frame counts."""
        z, frame_lengths = self.features(waveforms, lengths)
        contexts = [c for _, c in self.readings(z, frame_lengths)]
        if self.config.bidirectional:
            contexts[1] = reverse(contexts[1], frame_lengths)
        if frame_lengths is None:
            frame_lengths = torch.full((len(waveforms),), z.shape[1], device=waveforms.device)
        return [z, torch.cat(contexts, dim=2)], [frame_lengths] * 2

    def training_flops(self, samples: int) -> float:
        """Floating-point operations of forward and backward of one waveform; the waveform needs no gradient."""
        total, in_dim, length = 0.0, 1, samples
        for layer in self.config.conv_layers:
            length = _layer_frames(length, layer)
            forward = 2.0 * length * in_dim * layer[0] * layer[1]
            total += forward * (2 if in_dim == 1 else 3)
            in_dim = layer[0]
        contexts = cast(Iterable[RecurrentContext | TransformerContext], self.contexts)
        return total + 3 * sum(context.forward_flops(length) for context in contexts)


def reverse(sequence: Tensor, lengths: Tensor | None) -> Tensor:
    """(B, F, D) backwards in time: the first `lengths` (B,) frames of each row, what follows them staying in place."""
    if lengths is None:
        return sequence.flip(1)
    frame = torch.arange(sequence.shape[1], device=sequence.device)
    mirrored = lengths.unsqueeze(1) - 1 - frame
    order = torch.where(mirrored >= 0, mirrored, frame)
    return sequence.take_along_dim(order.unsqueeze(2), dim=1)
