"""Log power spectra of a centred STFT, on linear or mel bins, after bringing every waveform to one level.

Source: s3prl `upstream/baseline/preprocessor.py` (OnlinePreprocessor) and `upstream/mockingjay/builder.py` (level).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchaudio.functional import melscale_fbanks

from pretrain.features.cmvn import valid_mask
from pretrain.features.fbank import SHIFT_SAMPLES
from pretrain.features.mel import SAMPLE_RATE, WINDOW_SAMPLES

LINEAR_BINS = WINDOW_SAMPLES // 2 + 1
EPS = 1e-10


class LogSpectrogram(nn.Module):
    """Logarithm of the power in `bins` mel bands (HTK scale, 0 Hz to 8 kHz, not normalised), or in 201 linear bins.

    Waveforms are scaled to an RMS of `level_db` dBFS first. Frames are centred on multiples of 160 samples; the ends
    of every waveform are reflected, its own end where the batch is padded, so that frames do not depend on the batch.
    """

    window: Tensor
    mel: Tensor | None

    def __init__(self, bins: int | None, level_db: float) -> None:
        super().__init__()
        self.level = 10 ** (level_db / 20)
        # On the CPU, whatever the default device: torchaudio looks at values while it builds the bands.
        with torch.device("cpu"):
            window = torch.hann_window(WINDOW_SAMPLES)
            mel = None if bins is None else melscale_fbanks(LINEAR_BINS, 0.0, SAMPLE_RATE / 2, bins, SAMPLE_RATE)
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("mel", mel, persistent=False)

    def forward(self, waveforms: Tensor, lengths: Tensor | None) -> Tensor:
        """(B, T) float32, zero after `lengths` (B,), to (B, 1 + T // 160, bins or 201)."""
        padded = _reflect(scale_to_level(waveforms, lengths, self.level), lengths)
        spectrum = torch.stft(
            padded,
            WINDOW_SAMPLES,
            SHIFT_SAMPLES,
            window=self.window,
            center=False,
            return_complex=True,
        )
        power = spectrum.abs().square().transpose(1, 2)
        return ((power if self.mel is None else power @ self.mel) + EPS).log()


def scale_to_level(waveforms: Tensor, lengths: Tensor | None, level: float) -> Tensor:
    """Multiply each of (B, T) `waveforms` so that the RMS of its first `lengths` samples is `level`."""
    count = waveforms.shape[1] if lengths is None else lengths.unsqueeze(1)
    rms = (waveforms.square().sum(1, keepdim=True) / count).sqrt()
    return waveforms * (level / (rms + EPS))


def _reflect(waveforms: Tensor, lengths: Tensor | None) -> Tensor:
    """(B, T) to (B, T + 400): half a window mirrored at both ends of each row, zeros after that."""
    half = WINDOW_SAMPLES // 2
    if lengths is None:
        return F.pad(waveforms, (half, half), mode="reflect")
    last = lengths.unsqueeze(1) - 1
    position = torch.arange(-half, waveforms.shape[1] + half, device=waveforms.device).abs().expand(len(waveforms), -1)
    mirrored = torch.where(position > last, 2 * last - position, position)
    # A waveform shorter than half a window runs out of samples to mirror; its first one stands for the rest.
    padded = waveforms.gather(1, mirrored.clamp(min=0))
    return torch.where(valid_mask(lengths + 2 * half, padded.shape[1]), padded, 0.0)
