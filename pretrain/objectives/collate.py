"""What collators share: stacking waveforms and cutting labels to a crop's frames."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pretrain.data.audio import SAMPLE_RATE
from pretrain.method import Example


def stack_waveforms(examples: list[Example]) -> tuple[Tensor, Tensor, bool]:
    """(B, T) waveforms with zeros after each length, (B,) lengths, and whether any row is padded."""
    lengths = torch.tensor([len(example.waveform) for example in examples])
    waveforms = torch.nn.utils.rnn.pad_sequence([example.waveform for example in examples], batch_first=True)
    return waveforms, lengths, bool((lengths < waveforms.shape[1]).any())


def silent_waveforms(examples: list[Example]) -> tuple[Tensor, Tensor, bool]:
    """As `stack_waveforms` for a collator that reads no audio: the (B, T) zeros take the memory of one number."""
    lengths = torch.tensor([len(example.waveform) for example in examples])
    longest = int(lengths.max())
    return torch.zeros(()).expand(len(examples), longest), lengths, bool((lengths < longest).any())


def frame_labels(labels: np.ndarray, rate_hz: int, start: int, stride_samples: int, frames: int) -> np.ndarray:
    """The labels of a crop's frames: at most `frames` of them, fewer where the label line ends earlier.

    Frame t of a crop that starts at sample `start` takes label `start * rate / 16000 + floor(t * stride * rate /
    16000)`; at 100 Hz and a stride of 320 samples these are every second label. With crops on the frame grid this is
    fairseq's rule (`forward_targets` in `fairseq/models/hubert/hubert.py`) without its rounding of the start.
    """
    first = start * rate_hz // SAMPLE_RATE
    index = first + np.arange(frames) * stride_samples * rate_hz // SAMPLE_RATE
    return np.asarray(labels[index[index < len(labels)]])
