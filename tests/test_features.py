"""MFCC and log-mel against torchaudio written out, frame counts against the closed form."""

from __future__ import annotations

import pytest
import torch
import torchaudio
from audio_maker import babble
from torchaudio.compliance import kaldi

from pretrain.features.mel import log_mel, stack_context
from pretrain.features.mfcc import mfcc39


def waveform(samples: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(babble(samples, seed))


def test_mfcc_is_kaldis_with_two_deltas() -> None:
    audio = waveform(16000)
    cepstra = kaldi.mfcc(
        audio[None],
        sample_frequency=16000.0,
        use_energy=False,
        num_ceps=13,
        num_mel_bins=23,
        frame_length=25.0,
        frame_shift=10.0,
        window_type="povey",
        preemphasis_coefficient=0.97,
        cepstral_lifter=22.0,
        dither=0.0,
        low_freq=20.0,
        high_freq=0.0,
        snip_edges=True,
        subtract_mean=False,
    )
    deltas = torchaudio.transforms.ComputeDeltas(win_length=5, mode="replicate")
    first = deltas(cepstra.T)
    expected = torch.cat([cepstra, first.T, deltas(first).T], dim=1)
    torch.testing.assert_close(mfcc39(audio), expected, rtol=0, atol=0)


def test_mfcc_first_difference_is_the_regression_slope() -> None:
    features = mfcc39(waveform(8000))
    cepstra, first = features[:, :13], features[:, 13:26]
    slope = sum(n * (cepstra[10 + n] - cepstra[10 - n]) for n in (1, 2)) / 10
    torch.testing.assert_close(first[10], slope, rtol=1e-4, atol=1e-4)


def test_log_mel_is_kaldis_fbank_on_the_16_bit_scale() -> None:
    audio = waveform(16000)
    expected = kaldi.fbank(audio[None] * 32768, num_mel_bins=80, sample_frequency=16000.0, use_energy=False)
    torch.testing.assert_close(log_mel(audio), expected, rtol=0, atol=0)
    louder = log_mel(audio) - log_mel(audio, scale=1.0)
    assert louder.median() == pytest.approx(2 * 15 * 0.693147, abs=1e-3)


@pytest.mark.parametrize("samples", [0, 399, 400, 559, 560, 8001, 31999])
def test_frame_counts_follow_the_closed_form(samples: int) -> None:
    frames = 0 if samples < 400 else (samples - 400) // 160 + 1
    assert mfcc39(waveform(samples)).shape == (frames, 39)
    assert log_mel(waveform(samples), bins=40).shape == (frames, 40)


def test_context_holds_the_neighbours_in_order_and_repeats_the_edges() -> None:
    stacked = stack_context(torch.arange(4.0)[:, None], frames=2)
    assert stacked.tolist() == [[0, 0, 0, 1, 2], [0, 0, 1, 2, 3], [0, 1, 2, 3, 3], [1, 2, 3, 3, 3]]
    assert stack_context(torch.zeros(0, 3), frames=5).shape == (0, 33)
