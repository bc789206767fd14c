"""Arithmetic of augmentation on (T,) float32 waveforms at 16 kHz.

Everything runs in numpy on one thread, so that a waveform is the same to the bit in every process.
"""

from __future__ import annotations

import numpy as np


def power(waveform: np.ndarray) -> float:
    """Mean square; 0 for silence."""
    return float(np.mean(np.square(waveform), dtype=np.float64))


def gain(speech_power: float, added_power: float, snr_db: float) -> float:
    """The factor that brings a signal of `added_power` to `snr_db` below `speech_power`; 0 where either is silent."""
    if speech_power <= 0 or added_power <= 0:
        return 0.0
    return float(np.sqrt(speech_power / added_power * 10 ** (-snr_db / 10)))


def repeated(waveform: np.ndarray, samples: int, first: int = 0) -> np.ndarray:
    """(samples,) of `waveform` over and over, from its sample `first` on."""
    return np.resize(np.roll(waveform, -first), samples)


def reverberate(waveform: np.ndarray, response: np.ndarray) -> np.ndarray:
    """`waveform` convolved with the impulse response `response` (R,), with the same length and energy.

    The peak of the response, which is the direct path, is moved to time 0, so that frame labels keep their places; what
    rings on beyond the end is cut. Where the result would be silent, the waveform is returned as it is.
    """
    samples, peak = len(waveform), int(np.abs(response).argmax())
    size = fft_size(samples + len(response) - 1)
    spectrum = np.fft.rfft(waveform, size) * np.fft.rfft(response, size)
    wet = np.fft.irfft(spectrum, size)[peak : peak + samples].astype(np.float32)
    wet_power = power(wet)
    if wet_power <= 0:
        return waveform
    return wet * np.float32(np.sqrt(power(waveform) / wet_power))


def fft_size(samples: int) -> int:
    """The smallest number from `samples` on without prime factors beyond 5: such transforms are the fastest."""
    best = 1 << (samples - 1).bit_length()
    five = 1
    while five < best:
        odd = five
        while odd < best:
            best = min(best, odd << max(0, (-(-samples // odd) - 1).bit_length()))
            odd *= 3
        five *= 5
    return best
