"""What encoders share that read filter banks and predict them again, with or without a codebook in between."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.errors import UserError
from pretrain.features.front_end import FrontEnd, FrontEndConfig
from pretrain.method import Encoder
from pretrain.quantizers.linear_gumbel import Chosen, LinearGumbelConfig, LinearGumbelQuantizer


class PredictiveEncoder(Encoder):
    """Waveforms to features to hidden states of one width, and codes of the last of them where it has a quantizer.

    Subclasses say in `context` what happens to the features. The quantizer is part of the encoder, so that codes can be
    had from an export; hidden states are those before it.
    """

    def __init__(
        self, front_end: FrontEndConfig, quantizer: LinearGumbelConfig | None, width: int, states: int
    ) -> None:
        super().__init__()
        self.front_end = FrontEnd(front_end)
        self.quantizer = LinearGumbelQuantizer(quantizer) if quantizer else None
        self.hidden_sizes = [width] * states
        self.downsample_rates = [self.stride_samples] * states

    @property
    def stride_samples(self) -> int:
        """Samples from one frame to the next."""
        return self.front_end.stride_samples

    @property
    def receptive_field_samples(self) -> int:
        """Samples in the window of one frame."""
        return self.front_end.receptive_field_samples

    @property
    def code_shape(self) -> tuple[int, int]:
        """Groups of codes, and codes in the largest group. Raises UserError without a quantizer."""
        sizes = self._quantizer().config.codebook_sizes
        return len(sizes), max(sizes)

    def context(self, features: Tensor, frame_lengths: Tensor | None) -> list[Tensor]:
        """(B, F, dim) features and (B,) frame counts, or None where nothing is padded, to hidden states (B, F, D)."""
        raise NotImplementedError

    def quantize(self, hidden: Tensor, noise: list[Tensor] | None = None) -> Chosen:
        """The codes that stand for the last hidden state (B, F, D); `noise` as the quantizer takes it."""
        return self._quantizer()(hidden, noise)

    def forward(self, waveforms: Tensor, lengths: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        """(B, T) float32 and (B,) samples, or None where nothing is padded, to hidden states and frame counts."""
        features, frame_lengths = self.front_end(waveforms, lengths)
        hidden_states = self.context(features, frame_lengths)
        if frame_lengths is None:
            frame_lengths = torch.full((len(waveforms),), features.shape[1], device=waveforms.device)
        return hidden_states, [frame_lengths] * len(hidden_states)

    @torch.no_grad()
    def codes(self, waveforms: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, T) waveforms and (B,) samples to codes (B, F, G) int64 and frame counts (B,); call it in eval mode.

        Codes beyond a row's frame count belong to padding. Raises UserError without a quantizer.
        """
        hidden_states, frame_lengths = self(waveforms, lengths)
        return self.quantize(hidden_states[-1]).codes, frame_lengths[-1]

    def _quantizer(self) -> LinearGumbelQuantizer:
        if self.quantizer is None:
            raise UserError("method.encoder.quantizer: null, so there are no codes; give a checkpoint that has them")
        return self.quantizer
