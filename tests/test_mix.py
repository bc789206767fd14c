"""Several corpora in one plan: exact shares, rows alike on average, the same whatever the ranks, found at any step."""

from __future__ import annotations

from collections import Counter
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
from scipy.stats import chi2
from test_plan import epoch, make_plan, same, speech_lengths

from pretrain.config import ConfigError
from pretrain.data.mix import Draws, Mix, largest_remainder
from pretrain.data.plan import Plan, rank_share

SIZES = {"en": 3000, "fr": 300, "it": 40}
TAGS, FIRSTS = list(SIZES), np.cumsum([0, *SIZES.values()])
LENGTHS = speech_lengths(int(FIRSTS[-1]), seed=5)


def mixed(alpha: float = 1.0, weights: list[float] | None = None, **options: Any) -> Plan:
    return make_plan(LENGTHS, mix=Mix(TAGS, FIRSTS, alpha, weights), **options)


def usable_samples(rows: np.ndarray) -> np.ndarray:
    return np.minimum(LENGTHS[rows], 8 * 16_000)


def corpus_of(rows: np.ndarray) -> np.ndarray:
    return np.searchsorted(FIRSTS, rows, side="right") - 1


def rows_of(plan: Plan, number: int) -> np.ndarray:
    return np.concatenate([batch.rows for batch in epoch(plan, number)])


@pytest.mark.parametrize(
    ("expected", "total"), [([0.2, 3.7, 6.1], 10), ([2.5, 2.5, 5.0], 10), ([0.1, 0.1, 0.1, 9.7], 10), ([1.0, 1.0], 2)]
)
def test_largest_remainder(expected: list[float], total: int) -> None:
    counts = largest_remainder(np.array(expected), total)
    assert counts.sum() == total
    assert counts.min() >= 1
    assert all(abs(c - e) < 1 or c == 1 for c, e in zip(counts, expected, strict=True) if e != max(expected))


@pytest.mark.parametrize(("size", "count"), [(7, 7), (7, 3), (7, 17), (5, 1), (1, 4), (1000, 999), (12, 8)])
def test_every_position_of_a_sampling_group_comes_as_often_on_average(size: int, count: int) -> None:
    """Exactly: over all starts of the systematic sample, each position comes count / size times."""

    class Start:
        def __init__(self, value: int) -> None:
            self.value = value

        def integers(self, sizes: np.ndarray) -> np.ndarray:
            return np.minimum(self.value, sizes - 1)

    draws = Draws(np.array([size, 3]), np.array([count, 3]))
    drawn = [draws.positions(Start(value)) for value in range(size)]  # type: ignore[arg-type]
    seen = Counter(int(position) for positions in drawn for position in positions[draws.sampling_group == 0])
    assert seen == dict.fromkeys(range(size), count)
    for positions in drawn:
        assert ((draws.first <= positions) & (positions <= draws.last)).all()
        assert len(set(zip(positions.tolist(), draws.copies.tolist(), strict=True))) == count + 3


@pytest.mark.parametrize("alpha", [0.5, 0.0, 0.3])
def test_shares_of_audio_follow_alpha(alpha: float) -> None:
    plan = mixed(alpha)
    hours = np.bincount(corpus_of(plan.rows), usable_samples(plan.rows), 3)
    wanted = (hours / hours.sum()) ** alpha
    wanted /= wanted.sum()
    fed = np.mean([np.bincount(corpus_of(r), usable_samples(r), 3) for r in (rows_of(plan, e) for e in range(30))], 0)
    np.testing.assert_allclose(fed / fed.sum(), wanted, rtol=0.02)
    np.testing.assert_allclose([share.share for share in plan.shares], wanted, rtol=0.01)
    # The epoch stays as long as one pass over everything.
    assert fed.sum() == pytest.approx(hours.sum(), rel=0.02)
    assert [share.tag for share in plan.shares] == TAGS
    assert [share.hours for share in plan.shares] == pytest.approx(
        [LENGTHS[a:b].sum() / 16_000 / 3600 for a, b in pairwise(FIRSTS)]
    )
    assert [s.sampled_hours for s in plan.shares] == pytest.approx((fed / 16_000 / 3600).tolist(), rel=0.02)


def test_shares_of_audio_follow_weights() -> None:
    plan = mixed(weights=[1, 2, 1])
    np.testing.assert_allclose([share.share for share in plan.shares], [0.25, 0.5, 0.25], rtol=0.01)
    counts = [np.bincount(corpus_of(rows_of(plan, e)), minlength=3).tolist() for e in range(4)]
    assert counts == [counts[0]] * 4  # to the row, in every epoch


def test_natural_sampling_is_no_sampling() -> None:
    plain, natural = make_plan(LENGTHS), mixed(1.0)
    assert all(same(plain.micro_batch(k), natural.micro_batch(k)) for k in (0, 5, 200, 999))
    hours = np.bincount(corpus_of(plain.rows), usable_samples(plain.rows), 3)
    assert [share.share for share in natural.shares] == pytest.approx((hours / hours.sum()).tolist())


def test_rows_of_a_corpus_are_drawn_alike() -> None:
    """Chi-square over the rows of the corpus that is passed over in part, and of one that comes several times."""
    plan, epochs = mixed(0.3), 200
    seen = np.bincount(np.concatenate([rows_of(plan, e) for e in range(epochs)]), minlength=len(LENGTHS))
    for index, tag in enumerate(TAGS):
        rows = plan.rows[corpus_of(plan.rows) == index]
        mean = seen[rows].mean()
        part = mean / epochs - mean // epochs
        # A row comes a whole number of times and once more with probability `part`, whatever the others do.
        deviation = ((seen[rows] - mean) ** 2).sum() / (epochs * part * (1 - part))
        assert deviation < chi2.ppf(0.999, len(rows)), tag
        assert seen[rows].min() > 0, tag


def test_a_row_that_comes_again_is_told_apart() -> None:
    plan = mixed(0.0)
    for number in (0, 3):
        batches = epoch(plan, number)
        places = [p for b in batches for p in zip(b.rows.tolist(), b.copies.tolist(), strict=True)]
        assert len(set(places)) == len(places)
        copies = Counter(row for row, _ in places)
        assert max(copies.values()) > 10  # the small one
        assert all({copy for r, copy in places if r == row} == set(range(copies[row])) for row in list(copies)[:20])


def test_batches_mix_the_corpora_fit_and_are_as_many_in_every_epoch() -> None:
    plan = mixed(0.0)
    batches = epoch(plan, 0)
    for batch in batches:
        assert batch.crop_samples <= LENGTHS[batch.rows].min()
        assert len(batch.rows) * batch.crop_samples <= 30 * 16_000
    large = [batch for batch in batches if len(batch.rows) >= 8]
    assert np.mean([len(set(corpus_of(batch.rows))) == 3 for batch in large]) > 0.6
    assert sum(len(b.rows) * b.crop_samples for b in epoch(plan, 4)) == pytest.approx(plan.seconds_per_epoch * 16_000)
    assert 0.85 < plan.kept_share <= 1


def test_whole_utterances_of_a_mix_fit_their_place() -> None:
    plan = mixed(0.3, whole=True)
    for number in (0, 1):
        for batch in epoch(plan, number):
            assert (usable_samples(batch.rows) <= batch.crop_samples).all()
            assert len(batch.rows) * batch.crop_samples <= 30 * 16_000


def test_any_step_is_found_at_once_and_ranks_share_it() -> None:
    walked, jumped = mixed(0.5), mixed(0.5)
    last = 2 * walked.batches_per_epoch + 3
    seen = [walked.micro_batch(index) for index in range(last + 1)]
    assert same(seen[last], jumped.micro_batch(last))
    assert np.array_equal(seen[last].copies, jumped.micro_batch(last).copies)
    alone = list(islice(rank_share(mixed(0.5), 3, 4, 0, 1), 8))
    ranks = [list(islice(rank_share(mixed(0.5), 3, 4, rank, 2), 4)) for rank in range(2)]
    for index, batch in enumerate(alone):
        assert same(ranks[index % 2][index // 2], batch)
        assert np.array_equal(ranks[index % 2][index // 2].copies, batch.copies)
    assert not same(walked.micro_batch(1), mixed(0.5, seed=8).micro_batch(1))


def test_a_mix_within_speakers() -> None:
    speakers = corpus_of(np.arange(len(LENGTHS))) * 100 + np.random.default_rng(2).integers(0, 10, len(LENGTHS))
    plan = mixed(0.3, groups=speakers)
    seen = np.zeros(len(LENGTHS), np.int64)
    for number in range(60):
        batches = epoch(plan, number)
        assert all(len(set(speakers[batch.rows])) == 1 for batch in batches)
        assert all(batch.crop_samples <= LENGTHS[batch.rows].min() for batch in batches)
        seen += np.bincount(np.concatenate([b.rows for b in batches]), minlength=len(LENGTHS))
    assert seen[plan.rows].min() > 0
    fed = np.bincount(corpus_of(plan.rows), seen[plan.rows] * usable_samples(plan.rows), 3)
    np.testing.assert_allclose(fed / fed.sum(), [share.share for share in plan.shares], rtol=0.02)


def test_what_cannot_be_shared_out_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'en' gets \d+ utterances an epoch for its 2\d\d\d speakers"):
        mixed(0.0, groups=np.arange(len(LENGTHS)))
    short = LENGTHS.copy()
    short[FIRSTS[2] :] = 9_000
    with pytest.raises(ConfigError, match=r"data\.corpora: 'it' has no utterance of crop\.min_seconds"):
        make_plan(short, mix=Mix(TAGS, FIRSTS, 0.5))
