"""Kaldi's mel filter banks and differences over time of a whole batch; torchaudio's take one waveform at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchaudio.compliance import kaldi

from pretrain.features.mel import SAMPLE_RATE, WINDOW_SAMPLES

SHIFT_SAMPLES = 160
FFT_SAMPLES = 512  # the window's 400 samples, rounded up to a power of two
PREEMPHASIS = 0.97
POVEY_POWER = 0.85
DELTA_REACH = 2  # frames on either side


class Fbank(nn.Module):
    """Log energies of mel bands, as `torchaudio.compliance.kaldi.fbank` computes them with its defaults.

    Each window loses its mean, is pre-emphasised, shaped by the Povey or the Hamming window and padded to 512 samples;
    bands reach from `low_hz` to 8 kHz; energies are those of the waveform in [-1, 1], floored at float32's epsilon.
    """

    window: Tensor
    mel: Tensor

    def __init__(self, bins: int, window: str, low_hz: float) -> None:
        super().__init__()
        # On the CPU, whatever the default device: torchaudio looks at values while it builds the bands.
        with torch.device("cpu"):
            mel, _ = kaldi.get_mel_banks(bins, FFT_SAMPLES, SAMPLE_RATE, low_hz, 0.0, 100.0, -500.0, 1.0)
            self.register_buffer("window", _window(window), persistent=False)
        # The last row is the Nyquist bin, which no band counts.
        self.register_buffer("mel", F.pad(mel, (0, 1)).T.contiguous(), persistent=False)

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(B, T) float32 to (B, (T - 400) // 160 + 1, bins); what lies after `lengths` is not looked at here."""
        windows = waveforms.unfold(1, WINDOW_SAMPLES, SHIFT_SAMPLES)
        windows = windows - windows.mean(2, keepdim=True)
        windows = windows - PREEMPHASIS * F.pad(windows, (1, 0), mode="replicate")[..., :-1]
        spectrum = torch.fft.rfft(windows * self.window, FFT_SAMPLES)
        energies = spectrum.abs().square() @ self.mel
        return energies.clamp(min=torch.finfo(torch.float32).eps).log()


def append_deltas(features: Tensor, order: int, frame_lengths: Tensor | None) -> Tensor:
    """(B, F, D) to (B, F, D * (order + 1)): each frame followed by its first, second, ... differences over time.

    A difference is the regression slope over five frames, the edge frames repeated beyond each row's own ends, as in
    `torchaudio.functional.compute_deltas`.
    """
    parts = [features]
    for _ in range(order):
        held = parts[-1] if frame_lengths is None else _hold_last(parts[-1], frame_lengths)
        padded = F.pad(held.transpose(1, 2), (DELTA_REACH, DELTA_REACH), mode="replicate").transpose(1, 2)
        frames = features.shape[1]
        shifted = [padded[:, shift : shift + frames] for shift in range(2 * DELTA_REACH + 1)]
        parts.append((2 * (shifted[4] - shifted[0]) + (shifted[3] - shifted[1])) / 10)
    return torch.cat(parts, 2) if order else features


def _hold_last(features: Tensor, frame_lengths: Tensor) -> Tensor:
    """(B, F, D) with every row's last real frame in place of the frames after it."""
    index = torch.arange(features.shape[1], device=features.device).minimum(frame_lengths.unsqueeze(1) - 1)
    return features.gather(1, index.unsqueeze(2).expand(-1, -1, features.shape[2]))


def _window(name: str) -> Tensor:
    if name == "hamming":
        return torch.hamming_window(WINDOW_SAMPLES, periodic=False)
    return torch.hann_window(WINDOW_SAMPLES, periodic=False).pow(POVEY_POWER)
