"""Metrics: sums over micro-batches, roll-back, and what metrics.jsonl and TensorBoard hold after a restart."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from sklearn.metrics import roc_auc_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.method import Batch, Counts, Predictions, Ratio, StepOutput
from pretrain.training.metrics import Accumulator, Reporter, Throughput
from pretrain.world import World


def ratio(total: float, weight: float) -> Ratio:
    return Ratio(torch.tensor(total), weight)


def test_ratios_are_pooled_and_not_averaged(world: World) -> None:
    metrics = Accumulator()
    metrics.add({"loss": ratio(10.0, 2.0)})
    metrics.add({"loss": ratio(1.0, 8.0)})
    metrics.commit()
    metrics.add({"loss": Ratio(torch.tensor(4.0), torch.tensor(5.0))})
    metrics.commit()
    values, _ = metrics.reduce()
    assert values == {"loss": pytest.approx(15.0 / 15.0)}
    assert metrics.reduce() == ({}, {})


def test_counts_give_the_perplexity_of_the_pooled_histogram(world: World) -> None:
    metrics, first, second = Accumulator(), [8.0, 0.0, 0.0, 2.0], [0.0, 4.0, 0.0, 0.0]
    for counts in (first, second):
        metrics.add({"labels": Counts(torch.tensor(counts))})
    metrics.commit()
    values, histograms = metrics.reduce()
    pooled = [a + b for a, b in zip(first, second, strict=True)]
    assert values["labels_perplexity"] == pytest.approx(math.exp(entropy(pooled)))
    assert values["labels_used"] == 0.75
    assert histograms["labels"].tolist() == pooled


def test_a_refused_update_leaves_no_trace(world: World) -> None:
    metrics = Accumulator()
    metrics.add({"loss": ratio(1.0, 1.0)})
    metrics.commit()
    metrics.add({"loss": ratio(math.nan, 5.0), "other": ratio(1.0, 1.0)})
    metrics.roll_back()
    metrics.add({"loss": ratio(3.0, 1.0)})
    metrics.commit()
    assert metrics.reduce()[0] == {"loss": 2.0}


# Units of the loss and of a further one, and their sums, by micro-batch.
PARTS = {
    "both in one": [((10, 1), (10.0, 6.0)), ((30, 0), (30.0, 0.0))],
    "each in its own": [((10, 0), (10.0, 0.0)), ((0, 2), (0.0, 10.0))],
    "one alone": [((10, 0), (5.0, 0.0)), ((10, 0), (5.0, 0.0))],
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_the_loss_is_every_term_over_its_own_units(world: World, parts: list[Any]) -> None:
    """As it is trained, in an update and over a validation, with the mean that each micro-batch weighs by its units."""
    metrics = Accumulator()
    for (units, others), (loss, other) in parts:
        one = torch.ones(1, dtype=torch.int64)
        batch = Batch(torch.zeros(1, 1), one, units, one, other_sizes={"ctc": others})
        output = StepOutput(torch.tensor(loss), {}, torch.tensor(0.5), {"ctc": torch.tensor(other)})
        metrics.add(output.reported(batch))
    metrics.commit()
    (units, others), (loss, other) = (np.sum([part[i] for part in parts], axis=0) for i in (0, 1))
    assert metrics.reduce()[0]["loss"] == pytest.approx(loss / units + 0.5 + (other / others if others else 0.0))


def test_predictions_in_half_precision_are_scored(world: World) -> None:
    metrics, truth = Accumulator(validation=True), torch.tensor([0.0, 1.0, 1.0, 0.0])
    scores = torch.tensor([0.25, 0.75, 0.5, 0.625])
    metrics.add({"auc": Predictions(scores.bfloat16(), truth.bfloat16(), lambda p, t: float(roc_auc_score(t, p)))})
    metrics.commit()
    assert metrics.reduce()[0] == {"auc": roc_auc_score(truth, scores)}
    assert metrics.names == {"auc"}


@pytest.mark.parametrize("value", [0.5, torch.tensor(0.5), Ratio(0.5, 1.0)])
def test_a_metric_that_is_none_of_the_kinds_is_named(world: World, value: object) -> None:
    with pytest.raises(TypeError, match="metric accuracy: give a Ratio, Counts or Predictions of tensors"):
        Accumulator().add({"accuracy": value})


def test_sums_keep_their_small_parts(world: World) -> None:
    """10,000 micro-batches of a float32 loss: 0.1 added to a growing float32 sum would lose digits."""
    metrics = Accumulator()
    for _ in range(10_000):
        metrics.add({"loss": ratio(1000.1, 1.0)})
    metrics.commit()
    assert metrics.reduce()[0]["loss"] == pytest.approx(float(torch.tensor(1000.1)), rel=1e-12)


def test_nothing_scored_is_not_a_number(world: World) -> None:
    metrics = Accumulator()
    metrics.add({"accuracy": ratio(0.0, 0.0), "labels": Counts(torch.zeros(3))})
    metrics.commit()
    values, _ = metrics.reduce()
    assert math.isnan(values["accuracy"])
    assert values["labels_used"] == 0.0


def test_roles_and_minima_are_kept_by_name(world: World) -> None:
    metrics = Accumulator()
    metrics.add({"loss": ratio(1.0, 1.0), "latent_variance": Ratio(torch.tensor(0.5), 1.0, role="feature_variance")})
    metrics.add({"target_var": Ratio(torch.tensor(0.5), 1.0, "target_variance", 0.1)})
    codes = Counts(torch.tensor([3.0, 1.0]), "target_codes", 2.0)
    metrics.add({"codes_0": codes})
    metrics.add({"codes_0": codes.nothing()})
    metrics.commit()
    assert metrics.reduce()[0]["latent_variance"] == 0.5
    assert metrics.roles == {
        "latent_variance": "feature_variance",
        "target_var": "target_variance",
        "codes_0_perplexity": "target_codes",
    }
    assert metrics.minima == {"target_var": 0.1, "codes_0_perplexity": 2.0}


def test_a_metric_of_nothing_changes_no_sum(world: World) -> None:
    """What a rank adds that has no batch of its own at validation."""
    metrics, given = Accumulator(), {"accuracy": ratio(3.0, 4.0), "labels": Counts(torch.tensor([1.0, 1.0]))}
    metrics.add(given)
    metrics.add({name: value.nothing() for name, value in given.items()})
    metrics.commit()
    values, histograms = metrics.reduce()
    assert values["accuracy"] == 0.75
    assert histograms["labels"].tolist() == [1.0, 1.0]


def test_throughput_is_audio_over_wall_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("pretrain.training.metrics.time.perf_counter", lambda: now)
    throughput = Throughput(torch.device("cpu"), 2)
    throughput.add(30.0, 1e12)
    throughput.add(30.0, 3e12)
    now = 104.0
    report = throughput.report()
    assert report["speed/audio_hours_per_hour"] == 15.0
    assert report["speed/tflops"] == 1.0
    assert "speed/share_of_peak" not in report
    assert report["memory/peak_gb"] > 0.1
    now = 105.0
    assert throughput.report()["speed/audio_hours_per_hour"] == 0.0


def report(folder: Path, done: int, updates: range) -> None:
    """A process that resumes after `done` updates and reports `updates`; the value tells the process."""
    reporter = Reporter(folder, 100, 4 * done, done)
    for update in updates:
        reporter.scalars({"loss": done + update / 1000, "speed/tflops": 1.0}, update, "train")
    reporter.close()


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve(folder: Path) -> list[tuple[int, float]]:
    """What TensorBoard shows."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, pytest.approx(event.value)) for event in events.Scalars("train/loss")]


def test_a_restart_takes_back_what_it_makes_again(tmp_path: Path) -> None:
    report(tmp_path, 0, range(1, 9))
    # Killed after update 8 in the middle of a line; the checkpoint is that of update 5.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"update": 9, "train/lo')
    report(tmp_path, 5, range(6, 11))
    expected = [(n, n / 1000) for n in range(1, 6)] + [(n, 5 + n / 1000) for n in range(6, 11)]
    assert [(line["update"], line["train/loss"]) for line in lines(tmp_path)] == expected
    assert curve(tmp_path) == expected
    assert lines(tmp_path)[0]["speed/tflops"] == 1.0


def test_a_run_that_starts_over_starts_an_empty_log(tmp_path: Path) -> None:
    report(tmp_path, 0, range(1, 4))
    report(tmp_path, 0, range(1, 3))
    assert [line["update"] for line in lines(tmp_path)] == [1, 2]


@pytest.mark.parametrize("line", ['{"foo": 1}', "not json", "[]", "5", '{"update": null}', '{"update": "x"}'])
def test_a_line_that_is_none_of_ours_stops_no_restart(line: str, tmp_path: Path) -> None:
    report(tmp_path, 0, range(1, 4))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    report(tmp_path, 2, range(3, 5))
    assert [own["update"] for own in lines(tmp_path)] == [1, 2, 3, 4]
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    report(tmp_path, 2, range(3, 5))
    assert (tmp_path / "metrics.jsonl").read_text().splitlines()[0] == line


def test_histograms_reach_tensorboard(tmp_path: Path) -> None:
    reporter = Reporter(tmp_path, 10, 0, 0)
    reporter.histogram("train/labels", torch.tensor([5.0, 0.0, 3.0]), 7)
    reporter.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    [histogram] = events.Histograms("train/labels")
    assert histogram.step == 7
    assert histogram.histogram_value.num == 8
    assert histogram.histogram_value.sum == 6
    assert histogram.histogram_value.bucket == [5.0, 0.0, 3.0]
