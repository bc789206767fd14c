"""What collators share: stacking waveforms, making a batch of them, and cutting labels to a crop's frames."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pretrain.data.audio import SAMPLE_RATE
from pretrain.method import Batch, Example


class Stacked(NamedTuple):
    """The part of a batch that is the same for every method.

    `waveforms` (B, T) are zero after each of the `lengths` (B,), in samples; `rows` (B,) int64 are manifest rows;
    `padded` says whether any row is shorter than T.
    """

    waveforms: Tensor
    lengths: Tensor
    rows: Tensor
    padded: bool

    def batch(
        self,
        sample_size: int,
        extras: Mapping[str, np.ndarray | Tensor] | None = None,
        other_sizes: dict[str, int] | None = None,
    ) -> Batch:
        """The batch whose loss is a sum over `sample_size` units; arrays in `extras` become tensors.

        `other_sizes` are the units of `StepOutput.other_losses`, by name.
        """
        tensors = {
            name: value if isinstance(value, Tensor) else torch.from_numpy(np.ascontiguousarray(value))
            for name, value in (extras or {}).items()
        }
        return Batch(
            self.waveforms, self.lengths, sample_size, self.rows, self.padded, tensors, other_sizes=other_sizes or {}
        )


def stack_waveforms(examples: list[Example]) -> Stacked:
    """The examples' waveforms as one (B, T) tensor, padded with zeros."""
    waveforms = torch.nn.utils.rnn.pad_sequence([example.waveform for example in examples], batch_first=True)
    return _stacked(examples, waveforms)


def silent_waveforms(examples: list[Example]) -> Stacked:
    """As `stack_waveforms` for a collator that reads no audio: the (B, T) zeros take the memory of one number."""
    longest = max(len(example.waveform) for example in examples)
    return _stacked(examples, torch.zeros(()).expand(len(examples), longest))


def _stacked(examples: list[Example], waveforms: Tensor) -> Stacked:
    lengths = torch.tensor([len(example.waveform) for example in examples])
    rows = torch.tensor([example.row for example in examples])
    return Stacked(waveforms, lengths, rows, bool((lengths < waveforms.shape[1]).any()))


def frame_labels(labels: np.ndarray, rate_hz: int, start: int, stride_samples: int, frames: int) -> np.ndarray:
    """The labels of a crop's frames: at most `frames` of them, fewer where the label line ends earlier.

    Frame t of a crop that starts at sample `start` takes label `start * rate / 16000 + floor(t * stride * rate /
    16000)`; at 100 Hz and a stride of 320 samples these are every second label. With crops on the frame grid this is
    fairseq's rule (`forward_targets` in `fairseq/models/hubert/hubert.py`) without its rounding of the start.
    """
    first = start * rate_hz // SAMPLE_RATE
    index = first + np.arange(frames) * stride_samples * rate_hz // SAMPLE_RATE
    return np.asarray(labels[index[index < len(labels)]])
