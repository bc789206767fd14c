"""MFCC as HuBERT's first iteration clusters them: 13 cepstra with first and second differences, 100 frames a second.

Source: facebookresearch/fairseq examples/hubert/simple_kmeans/dump_mfcc_feature.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchaudio.compliance import kaldi
from torchaudio.functional import compute_deltas

from pretrain.features.mel import SAMPLE_RATE, WINDOW_SAMPLES

CEPSTRA = 13
MFCC_DIM = 3 * CEPSTRA


def mfcc39(waveform: Tensor, scale: float = 1.0) -> Tensor:
    """(T,) float waveform in [-1, 1] at 16 kHz to (F, 39) float32: cepstra, differences, second differences.

    F = (T - 400) // 160 + 1, and 0 for T < 400. Kaldi's defaults (25 ms Povey window every 10 ms, pre-emphasis 0.97,
    23 mel bands, liftering 22, no dither) with the zeroth cepstrum in place of the energy; differences over 5 frames.
    `scale` multiplies the waveform first: 1 as in fairseq's labels, `mel.INT16_SCALE` as Kaldi reads audio.
    """
    if waveform.shape[0] < WINDOW_SAMPLES:
        return waveform.new_zeros(0, MFCC_DIM, dtype=torch.float32)
    scaled = waveform.float().unsqueeze(0) * scale
    cepstra = kaldi.mfcc(scaled, num_ceps=CEPSTRA, sample_frequency=SAMPLE_RATE, use_energy=False).T
    first = compute_deltas(cepstra)
    return torch.cat([cepstra, first, compute_deltas(first)]).T.contiguous()
