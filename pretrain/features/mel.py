"""Kaldi log-mel filter banks of a waveform, and context stacking; 100 frames a second unless asked otherwise."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torchaudio.compliance import kaldi

SAMPLE_RATE = 16000
WINDOW_SAMPLES = 400
INT16_SCALE = 32768.0  # Kaldi reads 16-bit integers; the floor inside its logarithm is set for that range


def log_mel(waveform: Tensor, bins: int = 80, scale: float = INT16_SCALE) -> Tensor:
    """(T,) float waveform in [-1, 1] at 16 kHz to (F, bins) float32 log energies of mel bands.

    F = (T - 400) // 160 + 1, and 0 for T < 400. Kaldi's defaults: 25 ms Povey window every 10 ms, bands from 20 Hz to
    8 kHz, power spectrum, no dither, no mean subtraction. `scale` multiplies the waveform first.
    """
    if waveform.shape[0] < WINDOW_SAMPLES:
        return waveform.new_zeros(0, bins, dtype=torch.float32)
    scaled = waveform.float().unsqueeze(0) * scale
    return kaldi.fbank(scaled, num_mel_bins=bins, sample_frequency=SAMPLE_RATE, use_energy=False)


def stack_context(features: Tensor, frames: int = 5) -> Tensor:
    """(F, D) to (F, (2 * frames + 1) * D): each frame between its neighbours, oldest first; edge frames repeat."""
    count, width = features.shape
    if count == 0:
        return features.new_zeros(0, (2 * frames + 1) * width)
    padded = functional.pad(features.T.unsqueeze(0), (frames, frames), mode="replicate")[0].T
    return torch.cat([padded[shift : shift + count] for shift in range(2 * frames + 1)], dim=1)
