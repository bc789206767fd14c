"""Span masks: the statistics of fairseq's sampling and of transformers' own function."""

from __future__ import annotations

import numpy as np
import pytest
from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices

from pretrain.errors import UserError
from pretrain.objectives.masking import equalise, last_visible, separate_span_mask, span_mask

DRAWS = 3000
# Masked share of a row, mean and standard deviation over rows, of fairseq's function [run]: T, p, min_masks.
OFFICIAL = {
    (99, 0.65, 1): (0.499, 0.069),
    (499, 0.65, 1): (0.491, 0.029),
    (781, 0.65, 1): (0.491, 0.023),
    (99, 0.80, 2): (0.572, 0.069),
    (499, 0.80, 2): (0.568, 0.031),
    (781, 0.80, 2): (0.566, 0.025),
}


def rngs(count: int, seed: int = 0) -> list[np.random.Generator]:
    return [np.random.default_rng([seed, row]) for row in range(count)]


@pytest.mark.parametrize(("frames", "mask_prob", "min_masks"), OFFICIAL)
def test_masked_share_is_fairseqs(frames: int, mask_prob: float, min_masks: int) -> None:
    shares = [span_mask(rng, frames, mask_prob, 10, min_masks).mean() for rng in rngs(DRAWS)]
    mean, deviation = OFFICIAL[frames, mask_prob, min_masks]
    # The sheet rounds to three digits; the mean of the draws is known to deviation / sqrt(DRAWS).
    assert np.mean(shares) == pytest.approx(mean, abs=0.0015 + 3 * deviation / np.sqrt(DRAWS))
    assert np.std(shares) == pytest.approx(deviation, abs=0.003)


def test_share_at_each_frame_is_transformers() -> None:
    frames, draws = 60, 4000
    np.random.seed(0)  # noqa: NPY002  # the peer draws from numpy's global generator
    # The peer rounds its number of spans once a call.
    theirs = np.concatenate([_compute_mask_indices((10, frames), 0.65, 10, min_masks=2) for _ in range(draws // 10)])
    ours = np.array([span_mask(rng, frames, 0.65, 10, 2) for rng in rngs(draws)])
    # transformers lets a span begin one frame later, so that ours are a little denser before the last frame.
    # Two estimates of a probability near one half, from 4,000 draws each, are five standard errors apart at 0.056.
    assert np.abs(ours.mean(0) - theirs.mean(0))[:-10].max() < 0.056
    assert ours[:, :-10].mean() == pytest.approx(theirs[:, :-10].mean(), abs=0.015)


@pytest.mark.parametrize("frames", [13, 25, 99, 499])
def test_the_last_frame_is_never_hidden_and_the_first_seldom(frames: int) -> None:
    masks = np.array([span_mask(rng, frames, 0.8, 10, 2) for rng in rngs(500)])
    assert not masks[:, -1].any()
    if frames == 499:
        # One of 489 starts, drawn about 40 times.
        assert masks[:, 0].mean() == pytest.approx(40 / 489, abs=0.04)
        assert masks[:, 10:-20].mean() == pytest.approx(0.58, abs=0.02)


def test_spans_are_whole_and_as_many_as_asked() -> None:
    for rng in rngs(300):
        mask = span_mask(rng, 200, 0.4, 10, 1)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
        runs = edges[1::2] - edges[::2]
        assert runs.min() >= 10
        # 0.4 * 200 / 10 = 8 spans, which may touch or overlap.
        assert 10 < mask.sum() <= 80


def test_the_number_of_spans_is_rounded_at_random() -> None:
    """0.65 * 100 / 10 is 6 or 7, each half of the time; counted on spans of one frame, which cannot overlap."""
    counts = [int(span_mask(rng, 100, 0.065, 1, 1).sum()) for rng in rngs(2000)]
    assert set(counts) == {6, 7}
    assert np.mean(counts) == pytest.approx(6.5, abs=0.05)


@pytest.mark.parametrize(("frames", "min_masks"), [(4, 2), (5, 2), (8, 2), (12, 2), (13, 1)])
def test_short_rows_get_spans_that_leave_a_frame(frames: int, min_masks: int) -> None:
    for rng in rngs(200):
        mask = span_mask(rng, frames, 0.65, 10, min_masks)
        assert mask.any()
        assert not mask[-1]


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_rows_too_short_for_any_span_are_refused(frames: int) -> None:
    with pytest.raises(UserError, match=r"too few for . masked spans; raise crop\.min_seconds"):
        span_mask(np.random.default_rng(0), frames, 0.8, 10, 2)


def test_the_same_generator_gives_the_same_mask() -> None:
    masks = [span_mask(np.random.default_rng(seed), 300, 0.8, 10, 2) for seed in (5, 5, 6)]
    assert np.array_equal(masks[0], masks[1])
    assert not np.array_equal(masks[0], masks[2])


@pytest.mark.parametrize(("rows", "frames", "share"), [(5, 781, 0.535), (16, 250, 0.488)])
def test_equal_counts_give_the_sheets_share(rows: int, frames: int, share: float) -> None:
    shares = []
    for seed in range(200):
        generators = rngs(rows, seed)
        masks = [span_mask(rng, frames, 0.8, 10, 2) for rng in generators]
        equal = equalise(masks, generators)
        counts = {int(mask.sum()) for mask in equal}
        assert counts == {min(int(mask.sum()) for mask in masks)}
        # Frames are unhidden, never hidden.
        assert all(not (after & ~before).any() for before, after in zip(masks, equal, strict=True))
        shares.append(equal[0].mean())
    assert np.mean(shares) == pytest.approx(share, abs=0.004)


def test_the_frames_that_are_unhidden_are_drawn_evenly() -> None:
    full, small = np.arange(100) < 60, np.arange(100) < 30
    kept = np.mean([equalise([full, small], rngs(2, seed))[0] for seed in range(1000)], axis=0)
    assert not kept[60:].any()
    assert kept[:60] == pytest.approx(0.5, abs=0.08)


def runs_of(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First frames of the hidden runs, and the frames after their last."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return edges[::2], edges[1::2]


@pytest.mark.parametrize("min_space", [0, 1, 4])
def test_separate_spans_keep_their_length_and_distance(min_space: int) -> None:
    counts = []
    for rng in rngs(500):
        mask = separate_span_mask(rng, 205, 0.4, 10, 2, min_space)
        counts.append(mask.sum() / 10)
        starts, ends = runs_of(mask)
        if min_space:
            assert (ends - starts == 10).all()
            assert (starts[1:] - ends[:-1] >= min_space).all()
        else:
            assert ((ends - starts) % 10 == 0).all()
    # 0.4 * 205 / 10 = 8.2 spans.
    assert set(counts) == {8, 9}
    assert np.mean(counts) == pytest.approx(8.2, abs=0.08)


def test_separate_spans_lie_anywhere() -> None:
    # Two spans of 2 in 7 frames with one between: starts 0..5 without the sum of 3 apart, ten arrangements less those
    # that touch: (0,3) (0,4) (0,5) (1,4) (1,5) (2,5).
    arrangements = [tuple(runs_of(separate_span_mask(rng, 7, 0.1, 2, 2, 1))[0]) for rng in rngs(DRAWS)]
    found, counts = np.unique(arrangements, axis=0, return_counts=True)
    assert found.tolist() == [[0, 3], [0, 4], [0, 5], [1, 4], [1, 5], [2, 5]]
    assert counts / DRAWS == pytest.approx(1 / 6, abs=0.035)


@pytest.mark.parametrize(("frames", "hidden"), [(2, 1), (10, 9), (11, 10), (20, 10), (21, 10), (22, 20), (23, 20)])
def test_rows_too_short_for_their_separate_spans_leave_a_frame(frames: int, hidden: int) -> None:
    for rng in rngs(50):
        assert separate_span_mask(rng, frames, 0.09, 10, 2, 1).sum() == hidden


def test_a_single_frame_has_no_separate_span() -> None:
    with pytest.raises(UserError, match=r"1 frame is too few"):
        separate_span_mask(np.random.default_rng(0), 1, 0.09, 10, 2, 1)


def test_the_last_visible_frame() -> None:
    mask = np.array([1, 1, 0, 0, 1, 1, 0, 1], dtype=bool)
    assert last_visible(mask).tolist() == [2, 2, 2, 3, 3, 3, 6, 6]
    assert last_visible(np.ones(3, dtype=bool)).tolist() == [0, 0, 0]
