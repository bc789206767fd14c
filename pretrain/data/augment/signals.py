"""Arithmetic of augmentation on (T,) float32 waveforms at 16 kHz.

Everything runs in numpy on one thread, so that a waveform is the same to the bit in every process.
"""

from __future__ import annotations

import numpy as np

BLOCK_SAMPLES = 1 << 16


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
    peak = int(np.abs(response).argmax())
    wet = convolve(waveform, response)[peak : peak + len(waveform)]
    wet_power = power(wet)
    if wet_power <= 0:
        return waveform
    return wet * np.float32(np.sqrt(power(waveform) / wet_power))


def convolve(waveform: np.ndarray, response: np.ndarray) -> np.ndarray:
    """(T,) and (R,) to their whole convolution (T + R - 1,), by FFT of blocks whose tails are added to the next ones.

    Blocks that fit the processor's cache take about half the time of one transform of 15 s.
    """
    samples, taps = len(waveform), len(response)
    size = max(BLOCK_SAMPLES, _power_of_two(2 * taps))
    size = min(size, _power_of_two(samples + taps - 1))
    hop = size - taps + 1
    blocks = np.zeros((-(-samples // hop), hop), np.float32)
    blocks.reshape(-1)[:samples] = waveform
    convolved = np.fft.irfft(np.fft.rfft(blocks, size) * np.fft.rfft(response, size), size)
    total = np.zeros(blocks.size + taps - 1, np.float32)
    for index, block in enumerate(convolved):
        total[index * hop : index * hop + size] += block
    return total[: samples + taps - 1]


def _power_of_two(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()
