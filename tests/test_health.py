"""The sentences of the health monitor, and when it stops a run."""

from __future__ import annotations

import math

import pytest

from pretrain.errors import UserError
from pretrain.method import Role
from pretrain.training.health import HOPELESS_INTERVALS, HealthMonitor, HopelessRun

HEALTHY = {
    "loss": 3.2,
    "accuracy_masked": 0.3,
    "labels_perplexity": 38.0,
    "predictions_perplexity": 12.0,
    "spread": 0.4,
    "gradient_norm": 2.0,
}


ROLES: dict[str, Role] = {"spread": "target_variance"}


def check(update: int, clip_norm: float = 10.0, **changes: float) -> list[str]:
    return HealthMonitor(clip_norm).check(update, HEALTHY | changes, ROLES)


@pytest.mark.parametrize("update", [1, 100, 5000])
def test_a_healthy_run_hears_nothing(update: int) -> None:
    assert check(update) == []
    assert HealthMonitor(10.0).check(update, {"loss": 3.0}) == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"labels_perplexity": 1.02}, "the training labels are nearly all the same (labels_perplexity 1.02)"),
        ({"spread": 1e-6}, "spread is 1e-06: the teacher's targets have collapsed"),
        ({"loss": math.nan}, "the loss is not finite"),
        ({"loss": math.inf}, "the loss is not finite"),
    ],
)
def test_a_fatal_sign_is_told_at_once_and_stops_the_run_when_it_lasts(changes: dict[str, float], sentence: str) -> None:
    monitor = HealthMonitor(10.0)
    for update in range(1, HOPELESS_INTERVALS):
        [line] = monitor.check(update, HEALTHY | changes, ROLES)
        assert sentence in line
    with pytest.raises(HopelessRun) as error:
        monitor.check(HOPELESS_INTERVALS, HEALTHY | changes, ROLES)
    assert f"update {HOPELESS_INTERVALS}: " in str(error.value)
    assert sentence in str(error.value)
    # A sentence and an exit status, not a traceback.
    assert isinstance(error.value, UserError)


def test_a_metric_may_state_its_own_minimum() -> None:
    monitor, roles = HealthMonitor(0.0), {"pred_var": "prediction_variance"}
    assert monitor.check(1, {"pred_var": 0.05}, roles) == []
    assert monitor.check(1, {"pred_var": 0.05}, roles, {"pred_var": 0.01}) == []
    [line] = monitor.check(1, {"pred_var": 0.005}, roles, {"pred_var": 0.01})
    assert line.startswith("pred_var is 0.005, below 0.01: the network predicts the same for all frames; lower")


def test_a_sign_that_passes_is_forgiven() -> None:
    monitor = HealthMonitor(10.0)
    for update in range(10 * HOPELESS_INTERVALS):
        ill = update % HOPELESS_INTERVALS != 0
        lines = monitor.check(update, HEALTHY | ({"labels_perplexity": 1.1} if ill else {}))
        assert bool(lines) == ill


def test_two_different_signs_do_not_add_up() -> None:
    monitor = HealthMonitor(10.0)
    for update in range(10):
        changes = {"labels_perplexity": 1.1} if update % 2 else {"spread": 0.0}
        assert len(monitor.check(update, HEALTHY | changes, ROLES)) == 1


def test_a_collapse_is_told_by_the_role_of_the_metric_and_not_by_its_name() -> None:
    """CPC has no teacher, so that nobody must tell it to raise the decay of one."""
    monitor = HealthMonitor(10.0)
    [line] = monitor.check(1, {"latent_variance": 1e-6}, {"latent_variance": "feature_variance"})
    assert "latent_variance is 1e-06: the network gives every frame the same features" in line
    assert "EMA" not in line
    assert monitor.check(1, {"my_variance": 0.0}) == []


def test_a_frozen_quantizer_that_gives_one_code_stops_the_run() -> None:
    """The sentence is about the features, since nothing of the quantizer is trained."""
    monitor, codes = HealthMonitor(10.0), {"codes_0_perplexity": 1.3}
    roles: dict[str, Role] = {"codes_0_perplexity": "target_codes"}
    assert monitor.check(1, {"codes_0_perplexity": 400.0}, roles, {"codes_0_perplexity": 2.0}) == []
    for update in range(1, HOPELESS_INTERVALS):
        [line] = monitor.check(update, codes, roles, {"codes_0_perplexity": 2.0})
        assert "codes_0_perplexity is 1.3, below 2: the quantizer, which is not trained," in line
        assert "front_end.normalization" in line
    with pytest.raises(HopelessRun, match="nearly all frames the same code"):
        monitor.check(HOPELESS_INTERVALS, codes, roles, {"codes_0_perplexity": 2.0})


def test_too_good_too_early() -> None:
    [line] = check(200, accuracy_masked=0.999)
    assert "accuracy_masked is 0.999 after 200 updates: too good" in line
    assert check(100_000, accuracy_masked=0.999) == []


def test_one_class_is_predicted_late_in_training() -> None:
    assert check(100, predictions_perplexity=1.0) == []
    [line] = check(10_000, predictions_perplexity=1.0)
    assert "the network predicts one class" in line


def test_the_gradient_norm_leaves_its_band() -> None:
    [line] = check(100, gradient_norm=5000.0)
    assert "the gradient norm is 5e+03, 500 times the clipping norm" in line
    # Without clipping there is no band.
    assert check(100, clip_norm=0.0, gradient_norm=5000.0) == []


CODEBOOK = {"prob_perplexity": 2.03, "codes_0_perplexity": 1.0, "codes_1_perplexity": 1.0, "accuracy": 0.98}


def test_a_collapsed_codebook_stops_the_run_however_good_the_accuracy() -> None:
    monitor = HealthMonitor(10.0)
    for update in range(1, HOPELESS_INTERVALS):
        [line] = monitor.check(update, HEALTHY | CODEBOOK)
        assert "collapsed to one entry per group (prob_perplexity 2.03 of 2 groups)" in line
        assert "accuracy, 0.980, means nothing" in line
    with pytest.raises(HopelessRun, match="collapsed to one entry"):
        monitor.check(HOPELESS_INTERVALS, HEALTHY | CODEBOOK)
    # The dip of a healthy start, and one group fewer.
    assert check(500, **CODEBOOK | {"prob_perplexity": 9.0}) == []
    assert check(500, prob_perplexity=2.03, codes_0_perplexity=2.0) == []


def test_contrasts_that_stay_at_chance_are_told() -> None:
    stuck = {"accuracy": 0.011, "chance": 0.0099, "prob_perplexity": 590.0}
    assert check(1000, **stuck) == []
    [line] = check(20_000, **stuck)
    assert "accuracy 0.011 is that of guessing (0.010) after 20000 updates" in line
    assert check(20_000, **stuck | {"accuracy": 0.12}) == []
