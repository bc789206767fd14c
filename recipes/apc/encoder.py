"""APC's network: filter banks into a stack of GRUs, and VQ-APC's quantizer after the last of them.

Source: arXiv 1904.03240, section 2; arXiv 2005.08392, section 2; `s3prl/upstream/apc/apc.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pretrain.features.cmvn import valid_mask
from pretrain.features.front_end import FrontEndConfig
from pretrain.models.kernels import dropout
from pretrain.models.predictive_encoder import PredictiveEncoder
from pretrain.quantizers.linear_gumbel import LinearGumbelConfig, check_width


@dataclass
class ApcEncoderConfig:
    """`dropout` follows every GRU, before the residual sum, which every layer but the first has if `residual`.

    `quantizer` null is APC; otherwise the last layer's output is quantised before it predicts, as in VQ-APC.
    """

    front_end: FrontEndConfig
    hidden_size: int
    num_layers: int
    dropout: float
    residual: bool
    quantizer: LinearGumbelConfig | None

    def __post_init__(self) -> None:
        check_width(self.quantizer, self.hidden_size)


class ApcEncoder(PredictiveEncoder):
    """Waveforms to the output of every GRU layer, residual sum included, before any quantisation."""

    Config = ApcEncoderConfig
    config: ApcEncoderConfig
    weight_independent_fields = ("dropout", "quantizer.temperature")

    def __init__(self, config: ApcEncoderConfig) -> None:
        super().__init__(config.front_end, config.quantizer, config.hidden_size, config.num_layers)
        self.config = config
        widths = [self.front_end.dim] + [config.hidden_size] * (config.num_layers - 1)
        self.rnn_layers = nn.ModuleList(nn.GRU(width, config.hidden_size, batch_first=True) for width in widths)

    def context(self, features: Tensor, frame_lengths: Tensor | None) -> list[Tensor]:
        """(B, F, dim) features to the hidden states (B, F, H) of all layers, zero after `frame_lengths` (B,).

        `frame_lengths` None says that every frame is real. Padding comes after the frames that it could disturb, so
        the GRUs run over it instead of over packed sequences, whose gradient is many times slower.
        """
        valid = None if frame_lengths is None else valid_mask(frame_lengths, features.shape[1]).unsqueeze(2)
        hidden_states: list[Tensor] = []
        x = features
        for layer in self.rnn_layers:
            out = dropout(layer(x)[0], self.config.dropout, self.training)
            x = out + x if self.config.residual and hidden_states else out
            hidden_states.append(x if valid is None else torch.where(valid, x, 0.0))
        return hidden_states

    def training_flops(self, samples: int) -> float:
        """Forward and backward of one waveform of `samples`; the features themselves need no gradient."""
        frames, width = self.front_end.frames(samples), self.config.hidden_size
        from_input = 2.0 * frames * 3 * width * self.front_end.dim
        recurrent = 2.0 * frames * 3 * width * width
        stack = from_input + recurrent + (self.config.num_layers - 1) * 2 * recurrent
        codes = self.quantizer.flops(frames) if self.quantizer else 0.0
        # Choosing a code costs the logits alone, its gradient those of the logits and of the soft mixture.
        return 3 * stack - from_input + 4 * codes
