"""Labels on the frames of a crop, by fairseq's rule, for every length and start on the grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pretrain.method import Example
from pretrain.objectives.collate import frame_labels, stack_waveforms

STRIDE = 320


def frames_of(samples: int) -> int:
    """Frames of the seven convolutions, layer by layer."""
    for kernel, stride in [(10, 5), *[(3, 2)] * 4, *[(2, 2)] * 2]:
        samples = (samples - kernel) // stride + 1
    return samples


def labels_of(samples: int, rate_hz: int) -> np.ndarray:
    """As many labels as a window of 25 ms gives at this rate; each label is its own index."""
    hop = 16_000 // rate_hz
    return np.arange((samples - 400) // hop + 1)


@pytest.mark.parametrize("rate_hz", [50, 100])
def test_whole_utterances_of_every_length(rate_hz: int) -> None:
    """fairseq: frame t takes label floor(t * ratio), and the first floor(labels / ratio) frames are kept."""
    ratio, dropped = rate_hz // 50, 0
    lengths = range(400, 400 + 4 * STRIDE)
    for samples in lengths:
        labels, frames = labels_of(samples, rate_hz), frames_of(samples)
        cut = frame_labels(labels, rate_hz, 0, STRIDE, frames)
        assert cut.tolist() == [t * ratio for t in range(len(cut))]
        fairseq_keeps = min(frames, int(len(labels) / ratio))
        dropped += frames - fairseq_keeps
        # fairseq drops the last frame where its second label of 10 ms is missing; its first one is all that is read.
        assert len(cut) == frames
        assert len(cut) - fairseq_keeps == (0 if rate_hz == 50 else len(labels) % 2)
    # The sheet: at 100 Hz fairseq drops a frame for half of all lengths, at 50 Hz never.
    assert dropped == (0 if rate_hz == 50 else len(lengths) // 2)


@pytest.mark.parametrize("rate_hz", [50, 100])
def test_crops_start_on_a_label_of_their_own(rate_hz: int) -> None:
    """A crop's frame sees the same samples as its frame of the whole utterance, and takes the same label."""
    samples = 40_000
    whole = frame_labels(labels_of(samples, rate_hz), rate_hz, 0, STRIDE, frames_of(samples))
    for crop in range(400 + 20 * STRIDE, samples, 7 * STRIDE):
        for start in range(0, samples - crop + 1, STRIDE):
            cut = frame_labels(labels_of(samples, rate_hz), rate_hz, start, STRIDE, frames_of(crop))
            first = start // STRIDE
            assert cut.tolist() == whole[first : first + frames_of(crop)].tolist()
            assert len(cut) == frames_of(crop)
            # In time: the label's window starts with the frame's.
            hop = 16_000 // rate_hz
            assert (cut * hop == start + np.arange(len(cut)) * STRIDE).all()


def test_a_line_that_ends_early_gives_fewer_labels() -> None:
    assert frame_labels(np.arange(10), 50, 0, STRIDE, 12).tolist() == list(range(10))
    assert frame_labels(np.arange(10), 50, 3 * STRIDE, STRIDE, 12).tolist() == list(range(3, 10))
    assert frame_labels(np.arange(19), 100, 0, STRIDE, 12).tolist() == list(range(0, 19, 2))


@pytest.mark.parametrize(("rate_hz", "stride"), [(25, 320), (100, 160), (50, 640)])
def test_other_rates_and_strides(rate_hz: int, stride: int) -> None:
    """Frame t of a crop at s covers the time of label floor((s + t * stride) / hop), for starts on the label grid."""
    hop = 16_000 // rate_hz
    labels = np.arange(200)
    for start in range(0, 10 * hop, max(hop, stride)):
        cut = frame_labels(labels, rate_hz, start, stride, 20)
        assert cut.tolist() == [(start + t * stride) // hop for t in range(20)]


def test_rows_of_one_length_are_stacked_without_padding() -> None:
    def example(values: list[float]) -> Example:
        return Example(torch.tensor(values), 0, 0, {}, np.random.default_rng(0))

    waveforms, lengths, _, padded = stack_waveforms([example([1.0, 2.0]), example([3.0, 4.0])])
    assert waveforms.tolist() == [[1, 2], [3, 4]]
    assert (lengths.tolist(), padded) == ([2, 2], False)
    waveforms, lengths, _, padded = stack_waveforms([example([1.0, 2.0, 5.0]), example([3.0])])
    assert waveforms.tolist() == [[1, 2, 5], [3, 0, 0]]
    assert (lengths.tolist(), padded) == ([3, 1], True)
