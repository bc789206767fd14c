"""Alterations: the statistics of s3prl's policies, and what they do to features."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pretrain.errors import UserError
from recipes.mockingjay.alterations import (
    Alteration,
    AlterationConfig,
    alter,
    draw_alteration,
    scored_elements,
    stack_alterations,
)

TIME = AlterationConfig(
    mask_proportion=0.15,
    mask_consecutive_min=7,
    mask_consecutive_max=7,
    mask_allow_overlap=True,
    mask_bucket_ratio=1.5,
    zero_share=0.8,
    replace_share=0.1,
    mask_frequency=0.0,
    noise_proportion=0.0,
    noise_std=0.2,
)
BANDS = 80


def draws(
    config: AlterationConfig, count: int, valid: int, frames: int | None = None, dim: int = BANDS
) -> list[Alteration]:
    rngs = (np.random.default_rng([valid, index]) for index in range(count))
    return [draw_alteration(rng, valid, frames or valid, dim, config) for rng in rngs]


def runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """Start and length of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(int)))
    return [(int(start), int(end - start)) for start, end in zip(edges[::2], edges[1::2], strict=True)]


# Shares that s3prl's own function gave with overlapping spans, when it was run.
@pytest.mark.parametrize(("frames", "share"), [(100, 0.136), (500, 0.145), (1000, 0.138), (1501, 0.140)])
def test_the_share_of_chosen_frames_is_s3prls(frames: int, share: float) -> None:
    shares = [row.mask.mean() for row in draws(TIME, 2000, frames)]
    assert np.mean(shares) == pytest.approx(share, abs=0.0015)


@pytest.mark.parametrize(("frames", "spans"), [(10, 0), (23, 0), (24, 1), (69, 1), (70, 2), (71, 2), (117, 3)])
def test_the_number_of_spans_is_rounded_to_even_and_short_rows_have_none(frames: int, spans: int) -> None:
    for row in draws(TIME, 50, frames):
        lengths = [length for _, length in runs(row.mask)]
        assert all(length >= 7 for length in lengths)
        # Spans may overlap or touch: no more than 7 frames each, and no fewer runs than one where there are spans.
        assert sum(lengths) <= 7 * spans
        assert bool(lengths) == bool(spans)
        assert not row.mask[-1], "the last start leaves the last frame out, as in s3prl"


def test_spans_take_every_length_between_the_bounds() -> None:
    config = replace(TIME, mask_consecutive_min=3, mask_consecutive_max=6, mask_proportion=0.02)
    lengths = [length for row in draws(config, 4000, 200) for _, length in runs(row.mask) if length <= 6]
    counts = np.bincount(lengths, minlength=7)
    assert not counts[:3].any()
    assert (counts[3:] > 500).all()


def test_without_overlap_spans_start_on_a_grid() -> None:
    config = replace(TIME, mask_allow_overlap=False, mask_proportion=0.3)
    first_starts = set()
    for row in draws(config, 300, 400):
        found = runs(row.mask)
        # 10 samples from start to start: round(7 * 1.5) is 10, so three frames or more lie between two spans.
        assert all(length == 7 for _, length in found)
        assert len({start % 10 for start, _ in found}) == 1
        assert len(found) == round(400 * 0.3 / 7)
        first_starts.add(found[0][0] % 10)
    assert len(first_starts) > 5


def test_eighty_ten_ten_by_utterance() -> None:
    rows = draws(TIME, 6000, 100)
    zeroed = np.array([row.zeroed.any() for row in rows])
    replaced = np.array([(row.source != np.arange(100)).any() for row in rows])
    assert not (zeroed & replaced).any()
    # Standard error of a share of 0.8 from 6,000 draws is 0.005.
    assert zeroed.mean() == pytest.approx(0.8, abs=0.016)
    assert replaced.mean() == pytest.approx(0.1, abs=0.012)
    for row in rows:
        assert row.mask.any(), "chosen frames are scored whatever happens to them"
        assert np.array_equal(row.zeroed, row.mask) or not row.zeroed.any()
        assert not (row.source != np.arange(100))[~row.mask].any()


def test_replacing_frames_come_in_spans_from_the_same_real_frames() -> None:
    config = replace(TIME, zero_share=0.0, replace_share=1.0, mask_allow_overlap=False)
    for row in draws(config, 200, valid=120, frames=150):
        for start, length in runs(row.mask):
            source = row.source[start : start + length]
            assert np.array_equal(np.diff(source), np.ones(6))
            assert source.max() < 120
        assert not row.mask[120:].any()


def test_the_width_of_the_block_is_uniform_and_so_is_its_place() -> None:
    config = replace(TIME, mask_frequency=0.2)
    bands = np.array([row.band for row in draws(config, 8500, 100)])
    widths = bands[:, 1] - bands[:, 0]
    counts = np.bincount(widths, minlength=17)
    assert len(counts) == 17
    # 500 expected of each width; five standard errors are 110.
    assert np.abs(counts - 500).max() < 110
    hit = np.array([((bands[:, 0] <= band) & (band < bands[:, 1])).mean() for band in range(BANDS)])
    assert hit[20:60].std() < 0.01
    assert bands.max() < BANDS, "the last band starts no block: the start is drawn from 0 to D - width - 1"
    wide = [row.band[1] - row.band[0] for row in draws(config, 300, 100, dim=240)]
    assert max(wide) > 40
    assert max(wide) <= 48


def test_noise_by_utterance() -> None:
    noisy = [row.noisy for row in draws(replace(TIME, noise_proportion=0.15), 6000, 100)]
    assert np.mean(noisy) == pytest.approx(0.15, abs=0.015)


def test_each_draw_differs_and_follows_from_the_generator() -> None:
    config = replace(TIME, mask_frequency=0.2)
    by_epoch = [draw_alteration(np.random.default_rng([1, epoch, 7]), 300, 300, BANDS, config) for epoch in (0, 1, 0)]
    assert not np.array_equal(by_epoch[0].mask, by_epoch[1].mask)
    assert np.array_equal(by_epoch[0].mask, by_epoch[2].mask)
    assert by_epoch[0].band == by_epoch[2].band


def batch_of(rows: list[Alteration], config: AlterationConfig) -> tuple[torch.Tensor, torch.Tensor, dict]:
    features = torch.randn(len(rows), len(rows[0].mask), BANDS, generator=torch.Generator().manual_seed(0))
    extras = stack_alterations(rows)
    return features, alter(features, extras, config), extras


def test_what_is_altered_and_what_is_scored() -> None:
    config = replace(TIME, mask_frequency=0.2)
    rows = draws(config, 40, valid=90, frames=100)
    features, altered, extras = batch_of(rows, config)
    elements = torch.zeros(40 * 100, BANDS, dtype=torch.bool)
    elements[extras["scored_positions"]] = scored_elements(extras, BANDS)
    elements = elements.view(40, 100, BANDS)
    for index, row in enumerate(rows):
        expected = features[index, torch.from_numpy(row.source)].clone()
        expected[torch.from_numpy(row.zeroed)] = 0.0
        expected[:, slice(*row.band)] = 0.0
        assert torch.equal(altered[index], expected)
        scored = torch.from_numpy(row.mask)[:, None].repeat(1, BANDS)
        scored[:90, slice(*row.band)] = True
        assert torch.equal(elements[index], scored)
        assert int(scored.sum()) == row.scored_elements(BANDS)
    # Whatever differs from the original is scored or padding.
    assert not ((altered != features) & ~elements)[:, :90].any()


def test_noise_reaches_only_the_noisy_rows() -> None:
    config = replace(TIME, mask_proportion=0.0, noise_proportion=0.5)
    rows = draws(config, 20, valid=200)
    features, altered, extras = batch_of(rows, config)
    added = altered - features
    noisy = extras["noisy"]
    assert 0 < noisy.sum() < 20
    assert not added[~noisy].any()
    assert added[noisy].std().item() == pytest.approx(0.2, rel=0.02)
    # Magnitude alone: every real frame is scored.
    assert extras["mask"].all()
    assert len(extras["scored_positions"]) == 20 * 200


def test_the_copied_frame_is_visible_and_in_the_same_row() -> None:
    rows = draws(TIME, 2, 100)
    extras = stack_alterations(rows)
    copied = extras["copied_positions"]
    assert not extras["mask"].flatten()[copied].any()
    assert (copied // 100 == extras["scored_positions"] // 100).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_proportion": 1.5}, r"mask_proportion: 1\.5 is no share"),
        ({"zero_share": 0.95, "replace_share": 0.1}, "exceed 1"),
        ({"mask_consecutive_min": 8}, "mask_consecutive_min <= mask_consecutive_max"),
        ({"mask_proportion": 0.0}, "nothing is learnt"),
    ],
)
def test_a_policy_that_cannot_be_says_so(changes: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(TIME, **changes)
