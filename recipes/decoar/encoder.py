"""DeCoAR's network: filter banks into a stack of LSTMs from left to right, and another from right to left.

Source: arXiv 1912.01679, section 2; lingss0918/fairseq `examples/decoar/models/decoar.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pretrain.config import ConfigError
from pretrain.features.cmvn import valid_mask
from pretrain.features.front_end import FrontEndConfig
from pretrain.models.kernels import Linear
from pretrain.models.predictive_encoder import PredictiveEncoder

LAYERS = ("all", "last")


@dataclass
class DecoarEncoderConfig:
    """`hidden_size` is the width of each direction; `layers` says which hidden states there are, "all" or "last"."""

    front_end: FrontEndConfig
    hidden_size: int
    num_layers: int
    layers: str

    def __post_init__(self) -> None:
        if self.layers not in LAYERS:
            raise ConfigError(f"method.encoder.layers: '{self.layers}' is unknown; use {' or '.join(LAYERS)}")


class DecoarEncoder(PredictiveEncoder):
    """Waveforms to hidden states (B, F, 2 H) of the layers: at each frame the forward state, then the backward one.

    The two stacks meet nowhere: a layer hears the layer below of its own direction.
    """

    Config = DecoarEncoderConfig
    config: DecoarEncoderConfig
    weight_independent_fields = ("layers",)

    def __init__(self, config: DecoarEncoderConfig) -> None:
        states = config.num_layers if config.layers == "all" else 1
        super().__init__(config.front_end, None, 2 * config.hidden_size, states)
        self.config = config
        width = config.hidden_size
        self.post_extract_proj = Linear(self.front_end.dim, width)
        self.forward_lstms = nn.ModuleList(nn.LSTM(width, width, batch_first=True) for _ in range(config.num_layers))
        self.backward_lstms = nn.ModuleList(nn.LSTM(width, width, batch_first=True) for _ in range(config.num_layers))

    def context(self, features: Tensor, frame_lengths: Tensor | None) -> list[Tensor]:
        """(B, F, dim) features to hidden states (B, F, 2 H), zero after `frame_lengths` (B,) (None: all are real).

        A row is turned round within its own length, so that padding comes last in both directions, after what counts:
        the LSTMs run over it instead of over packed sequences, whose gradient is many times slower.
        """
        valid = None if frame_lengths is None else valid_mask(frame_lengths, features.shape[1]).unsqueeze(2)
        ahead = self.post_extract_proj(features)
        behind = turn_round(ahead, frame_lengths)
        hidden_states: list[Tensor] = []
        for forward_lstm, backward_lstm in zip(self.forward_lstms, self.backward_lstms, strict=True):
            ahead, behind = forward_lstm(ahead)[0], backward_lstm(behind)[0]
            both = torch.cat([ahead, turn_round(behind, frame_lengths)], dim=2)
            hidden_states.append(both if valid is None else torch.where(valid, both, 0.0))
        return hidden_states if self.config.layers == "all" else hidden_states[-1:]

    def training_flops(self, samples: int) -> float:
        """Forward and backward of one waveform of `samples`; the features themselves need no gradient."""
        frames, width = self.front_end.frames(samples), self.config.hidden_size
        first = 2.0 * frames * self.front_end.dim * width
        # Four gates hear the input and the state before.
        layer = 2.0 * frames * 8 * width * width
        return 3 * (first + 2 * self.config.num_layers * layer) - first


def turn_round(x: Tensor, frame_lengths: Tensor | None) -> Tensor:
    """(B, F, D) with the first `frame_lengths` (B,) frames of each row in reverse; `None` says that all are real."""
    if frame_lengths is None:
        return x.flip(1)
    position = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
    last = frame_lengths.unsqueeze(1) - 1
    index = torch.where(position <= last, last - position, position)
    return x.gather(1, index.unsqueeze(2).expand(-1, -1, x.shape[2]))
