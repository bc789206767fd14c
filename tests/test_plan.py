"""The batch plan: every row once an epoch, nothing padded, the same whatever the ranks, found again at any step."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pytest

from pretrain.config import ConfigError
from pretrain.data.buckets import MAX_BUCKETS
from pretrain.data.plan import MicroBatch, Plan, rank_share

STRIDE, FIELD = 320, 400
MIN_SECONDS, MAX_SECONDS, BUDGET_SECONDS = 1.0, 8.0, 30.0


def speech_lengths(count: int, seed: int = 0) -> np.ndarray:
    """Lengths in samples as a corpus of read speech has them: 0.5 to 30 s, most of them short."""
    return (16_000 * np.random.default_rng(seed).lognormal(1.2, 0.7, count).clip(0.5, 30)).astype(np.int64)


def make_plan(lengths: np.ndarray, seed: int = 7, **changes: Any) -> Plan:
    options = {
        "min_seconds": MIN_SECONDS,
        "max_seconds": MAX_SECONDS,
        "seconds_per_micro_batch": BUDGET_SECONDS,
    } | changes
    return Plan(lengths, **options, stride_samples=STRIDE, receptive_field_samples=FIELD, seed=seed)


def epoch(plan: Plan, number: int) -> list[MicroBatch]:
    per_epoch = plan.batches_per_epoch
    return [plan.micro_batch(index) for index in range(number * per_epoch, (number + 1) * per_epoch)]


def same(left: MicroBatch, right: MicroBatch) -> bool:
    shapes = [(batch.epoch, batch.crop_samples) for batch in (left, right)]
    return shapes[0] == shapes[1] and np.array_equal(left.rows, right.rows)


@pytest.fixture(scope="module")
def lengths() -> np.ndarray:
    return speech_lengths(2000)


@pytest.fixture(scope="module")
def plan(lengths: np.ndarray) -> Plan:
    return make_plan(lengths)


@pytest.mark.parametrize("number", [0, 1, 5])
def test_every_eligible_row_exactly_once_an_epoch(plan: Plan, lengths: np.ndarray, number: int) -> None:
    rows = np.concatenate([batch.rows for batch in epoch(plan, number)])
    assert sorted(rows) == np.flatnonzero(lengths >= MIN_SECONDS * 16_000).tolist()
    assert 0 < len(rows) < len(lengths)


def test_no_row_is_shorter_than_its_crop_and_crops_lie_on_the_grid(plan: Plan, lengths: np.ndarray) -> None:
    for batch in epoch(plan, 0):
        assert batch.crop_samples <= lengths[batch.rows].min()
        assert (batch.crop_samples - FIELD) % STRIDE == 0
        assert batch.crop_samples <= MAX_SECONDS * 16_000


def test_the_budget_is_kept_and_used(plan: Plan) -> None:
    batches = epoch(plan, 0)
    budget = BUDGET_SECONDS * 16_000
    assert all(len(batch.rows) * batch.crop_samples <= budget for batch in batches)
    filled = sum(len(batch.rows) * batch.crop_samples for batch in batches) / budget / len(batches)
    assert filled > 0.85
    assert plan.seconds_per_epoch == sum(len(b.rows) * b.crop_samples for b in batches) / 16_000


def test_little_audio_is_cut_away_and_shapes_are_few(plan: Plan, lengths: np.ndarray) -> None:
    usable = np.minimum(lengths[lengths >= MIN_SECONDS * 16_000], MAX_SECONDS * 16_000).sum()
    kept = sum(len(batch.rows) * batch.crop_samples for batch in epoch(plan, 0))
    assert kept / usable == pytest.approx(plan.kept_share)
    assert kept / usable > 0.93
    assert len({batch.crop_samples for batch in epoch(plan, 0)}) <= MAX_BUCKETS + 1


def test_a_row_longer_than_the_budget_goes_alone() -> None:
    plan = make_plan(np.array([160_000, 160_000, 20_000]), max_seconds=10.0, seconds_per_micro_batch=5.0)
    assert sorted(len(batch.rows) for batch in epoch(plan, 0)) == [1, 1, 1]


def test_epochs_differ_in_grouping_and_order(plan: Plan) -> None:
    first, second = epoch(plan, 0), epoch(plan, 1)
    assert len(first) == len(second) == plan.batches_per_epoch
    groups = [{frozenset(batch.rows.tolist()) for batch in batches} for batches in (first, second)]
    assert len(groups[0] & groups[1]) < 0.1 * len(first)
    assert [batch.crop_samples for batch in first] != [batch.crop_samples for batch in second]
    # Long and short ones mix over the epoch: the order of the batches is not that of their lengths.
    crops = np.array([batch.crop_samples for batch in first])
    assert abs(np.corrcoef(crops, np.arange(len(crops)))[0, 1]) < 0.3


def test_a_plan_is_a_function_of_lengths_and_seed(plan: Plan, lengths: np.ndarray) -> None:
    again, other = make_plan(lengths), make_plan(lengths, seed=8)
    indices = [0, 1, plan.batches_per_epoch, 12_345]
    assert all(same(plan.micro_batch(k), again.micro_batch(k)) for k in indices)
    assert not all(same(plan.micro_batch(k), other.micro_batch(k)) for k in indices)


def test_any_step_is_found_without_the_ones_before(lengths: np.ndarray) -> None:
    """A restart asks for batch k of a later epoch at once, and any order of questions gives the same answers."""
    walked, jumped = make_plan(lengths), make_plan(lengths)
    k = 3 * walked.batches_per_epoch + 5
    for index in range(k):
        walked.micro_batch(index)
    assert same(walked.micro_batch(k), jumped.micro_batch(k))
    assert same(jumped.micro_batch(2), walked.micro_batch(2))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_ranks_share_each_step_between_them(plan: Plan, world_size: int) -> None:
    steps, per_step, first = 3, 4, 11
    shares = [
        list(islice(rank_share(plan, first, per_step, rank, world_size), steps * per_step // world_size))
        for rank in range(world_size)
    ]
    for step in range(steps):
        mine = slice(step * per_step // world_size, (step + 1) * per_step // world_size)
        # Batch i of the step goes to rank i modulo the world size, as the seeds of the network count it.
        together = [share[mine] for share in shares]
        planned = [plan.micro_batch((first + step) * per_step + i) for i in range(per_step)]
        for i, batch in enumerate(planned):
            assert same(together[i % world_size][i // world_size], batch)


def test_a_corpus_smaller_than_a_step_wraps_into_the_next_epoch() -> None:
    plan = make_plan(np.array([32_000, 40_000]))
    assert plan.batches_per_epoch == 1
    step = list(islice(rank_share(plan, 0, 4, 0, 1), 4))
    assert [batch.epoch for batch in step] == [0, 1, 2, 3]
    assert all(sorted(batch.rows) == [0, 1] for batch in step)


def test_a_replacement_is_long_enough_and_drawn_anew(plan: Plan, lengths: np.ndarray) -> None:
    for batch in epoch(plan, 0)[:10]:
        drawn = [plan.replacement(batch, int(batch.rows[0]), attempt) for attempt in range(20)]
        assert lengths[drawn].min() >= batch.crop_samples
        assert set(drawn) <= set(plan.rows.tolist())
        assert len(set(drawn)) > 1
        assert drawn == [plan.replacement(batch, int(batch.rows[0]), attempt) for attempt in range(20)]


def test_the_memory_probe_gets_the_largest_shapes(plan: Plan) -> None:
    batches, probed = epoch(plan, 0), plan.largest_shapes()
    assert max(len(b.rows) * b.crop_samples for b in probed) == max(len(b.rows) * b.crop_samples for b in batches)
    assert max(b.crop_samples for b in probed) == max(b.crop_samples for b in batches)


@pytest.mark.parametrize("lengths", [[8_000, 15_999], []])
def test_a_corpus_without_a_usable_utterance_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"crop\.min_seconds: no utterance has 1 s"):
        make_plan(np.array(lengths, dtype=np.int64))


def test_a_minimum_below_one_frame_means_one_frame() -> None:
    plan = make_plan(np.array([399, 400, 800]), min_seconds=0.001)
    assert plan.rows.tolist() == [1, 2]
    assert {batch.crop_samples for batch in epoch(plan, 0)} <= {400, 720}


@pytest.fixture(scope="module")
def speakers(lengths: np.ndarray) -> np.ndarray:
    """20 speakers of unlike shares, in no order."""
    return np.random.default_rng(1).zipf(1.3, len(lengths)).clip(max=20) + 5


def test_batches_of_one_speaker(lengths: np.ndarray, speakers: np.ndarray) -> None:
    plan = make_plan(lengths, groups=speakers)
    first, second = epoch(plan, 0), epoch(plan, 1)
    for batches in (first, second):
        assert all(len(set(speakers[batch.rows])) == 1 for batch in batches)
        assert sorted(np.concatenate([b.rows for b in batches])) == np.flatnonzero(lengths >= 16_000).tolist()
        assert all(len(b.rows) * b.crop_samples <= BUDGET_SECONDS * 16_000 for b in batches)
        assert all(b.crop_samples <= lengths[b.rows].min() for b in batches)
    # Speakers take turns, and who is with whom changes.
    turns = np.array([speakers[batch.rows[0]] for batch in first])
    assert (np.diff(turns) != 0).mean() > 0.5
    groups = [{frozenset(batch.rows.tolist()) for batch in batches} for batches in (first, second)]
    assert len(groups[0] & groups[1]) < 0.2 * len(first)
    assert plan.seconds_per_epoch == pytest.approx(sum(len(b.rows) * b.crop_samples for b in first) / 16_000)
    assert same(make_plan(lengths, groups=speakers).micro_batch(777), plan.micro_batch(777))


def test_a_replacement_is_of_the_same_speaker_while_there_is_one(lengths: np.ndarray, speakers: np.ndarray) -> None:
    plan = make_plan(lengths, groups=speakers)
    for batch in epoch(plan, 0):
        if len(batch.rows) < 2:
            continue
        row = int(batch.rows[0])
        drawn = [plan.replacement(batch, row, attempt) for attempt in range(5)]
        assert set(speakers[drawn]) == {speakers[row]}
        assert row not in drawn
    alone = make_plan(np.array([32_000, 32_000]), groups=np.array([0, 1]))
    assert alone.replacement(MicroBatch(0, np.array([0]), 31_760), 0, 0) in (0, 1)


def test_whole_utterances(lengths: np.ndarray) -> None:
    plan = make_plan(lengths, whole=True)
    batches, limit = epoch(plan, 0), int(MAX_SECONDS * 16_000)
    assert sorted(np.concatenate([b.rows for b in batches])) == np.flatnonzero(lengths >= 16_000).tolist()
    for batch in batches:
        read = np.minimum(lengths[batch.rows], batch.crop_samples)
        assert (read == np.minimum(lengths[batch.rows], limit)).all()  # nothing but max_seconds crops
        assert len(batch.rows) * batch.crop_samples <= BUDGET_SECONDS * 16_000
    usable = np.minimum(lengths[lengths >= 16_000], limit)
    assert plan.seconds_per_epoch == pytest.approx(usable.sum() / 16_000)
    assert plan.kept_share == pytest.approx(1.0)
    padded = sum(len(b.rows) * np.minimum(lengths[b.rows], limit).max() for b in batches)
    assert usable.sum() / padded > 0.93
    assert any(len(set(lengths[batch.rows])) > 1 for batch in batches)
    replaced = plan.replacement(batches[0], int(batches[0].rows[0]), 0)
    assert min(lengths[replaced], limit) <= batches[0].crop_samples
    assert max(b.crop_samples for b in plan.largest_shapes()) == limit


def test_millions_of_rows_are_planned_in_arrays() -> None:
    plan = make_plan(speech_lengths(200_000), max_seconds=15.625, seconds_per_micro_batch=87.5)
    batch = plan.micro_batch(123_456)
    assert len(batch.rows) * batch.crop_samples <= 87.5 * 16_000
    assert plan.kept_share > 0.9
