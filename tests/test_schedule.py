"""Learning rates after every update: fairseq's numbers where it has the schedule, closed forms elsewhere."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.config import ConfigError
from pretrain.training.schedule import SCHEDULES, build_schedule

OFFICIAL: dict[str, Any] = json.loads((Path(__file__).parent / "fixtures" / "optim_fairseq.json").read_text())
RATES: dict[str, dict[str, float]] = OFFICIAL["lr_after_step_update"]


@pytest.mark.parametrize("update", sorted(map(int, RATES["polynomial_decay"])))
def test_polynomial_is_fairseqs(update: int) -> None:
    config = OFFICIAL["config"]["polynomial_decay"]
    schedule = build_schedule(
        {
            "name": "polynomial",
            "warmup_updates": config["warmup_updates"],
            "total_updates": config["total_num_update"],
            "power": config["power"],
            "end_factor": config["end_learning_rate"] / config["lr"],
        }
    )
    expected = RATES["polynomial_decay"][str(update)]
    assert config["lr"] * schedule.factor(update) == pytest.approx(expected, rel=1e-12, abs=1e-18)


@pytest.mark.parametrize("update", sorted(map(int, RATES["tri_stage"])))
def test_tri_stage_is_fairseqs(update: int) -> None:
    config = OFFICIAL["config"]["tri_stage"]
    warmup, hold, _ = (round(share * config["max_update"]) for share in config["phase_ratio"])
    schedule = build_schedule(
        {
            "name": "tri_stage",
            "warmup_updates": warmup,
            "hold_updates": hold,
            "total_updates": config["max_update"],
            "init_factor": config["init_lr_scale"],
            "final_factor": config["final_lr_scale"],
        }
    )
    assert config["lr"] * schedule.factor(update) == pytest.approx(RATES["tri_stage"][str(update)], rel=1e-12)


def test_polynomial_with_a_power_and_an_end_is_torchs() -> None:
    values = {"name": "polynomial", "warmup_updates": 0, "total_updates": 20, "power": 2.0, "end_factor": 0.1}
    schedule = build_schedule(values)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.9)
    peer = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=20, power=2.0)
    for update in range(20):
        # torch's goes to zero; ours to a tenth of the peak.
        assert schedule.factor(update) == pytest.approx(peer.get_last_lr()[0] + 0.1)
        optimizer.step()
        peer.step()


def test_linear_and_cosine_after_their_warmup() -> None:
    linear = build_schedule({"name": "linear", "warmup_updates": 10, "total_updates": 110})
    cosine = build_schedule({"name": "cosine", "warmup_updates": 10, "total_updates": 110, "end_factor": 0.2})
    for n in range(10):
        assert linear.factor(n) == cosine.factor(n) == n / 10
    for n in range(10, 111):
        assert linear.factor(n) == pytest.approx((110 - n) / 100)
        assert cosine.factor(n) == pytest.approx(0.2 + 0.4 * (1 + math.cos(math.pi * (n - 10) / 100)))
    assert (linear.factor(500), cosine.factor(500)) == (0.0, pytest.approx(0.2))


def test_cosine_warms_up_from_its_first_rate() -> None:
    values = {
        "name": "cosine",
        "warmup_updates": 500,
        "total_updates": 400_000,
        "init_factor": 2e-5,
        "end_factor": 2e-4,
    }
    schedule = build_schedule(values)
    # fairseq's wav2vec: from 1e-7 to 5e-3 in steps of (5e-3 - 1e-7) / 500, then down to 1e-6.
    for update, rate in ((0, 1e-7), (1, 1e-7 + 4.9999e-3 / 500), (250, 2.50005e-3), (500, 5e-3), (400_000, 1e-6)):
        assert 5e-3 * schedule.factor(update) == pytest.approx(rate, rel=1e-9)


def test_constant_stays_at_its_peak_after_a_ramp() -> None:
    schedule = build_schedule({"name": "constant", "warmup_updates": 4, "total_updates": 100})
    assert [schedule.factor(n) for n in (0, 1, 3, 4, 99, 1000)] == [0.0, 0.25, 0.75, 1.0, 1.0, 1.0]


def test_inverse_square_root_is_the_transformers() -> None:
    schedule = build_schedule({"name": "inverse_square_root", "warmup_updates": 400, "total_updates": 5000})
    for n in (1, 100, 399, 400, 401, 1600, 6400):
        # "Attention is all you need", section 5.3, over its value at the peak.
        noam = min(n**-0.5, n * 400**-1.5) / 400**-0.5
        assert schedule.factor(n) == pytest.approx(noam)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_begins_at_its_peak_without_a_warmup(name: str) -> None:
    schedule = build_schedule({"name": name, "warmup_updates": 0, "total_updates": 10})
    assert schedule.factor(0) == 1.0
    assert all(0 <= schedule.factor(n) <= 1 for n in range(25))


SHORT = {"warmup_updates": 2, "total_updates": 4}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "cosin"}, r"schedule\.name: unknown schedule 'cosin'; did you mean cosine\?"),
        ({"name": "linear", "powr": 1}, r"schedule\.powr: no such option"),
        ({"name": "polynomial", "powr": 1}, r"schedule\.powr: no such option; did you mean power\?"),
        ({"name": "linear", "warmup_updates": 5}, r"schedule\.total_updates: missing"),
        ({"name": "linear", "warmup_updates": 5, "total_updates": 4}, r"shorten schedule\.warmup_updates"),
        ({"name": "linear", "warmup_updates": 0, "total_updates": 0}, r"schedule: need"),
        ({"name": "linear", "warmup_updates": "many", "total_updates": 4}, r"schedule\.warmup_updates"),
        ({"name": "polynomial", **SHORT, "power": math.nan}, r"schedule\.power: nan; give a positive number"),
        ({"name": "polynomial", **SHORT, "end_factor": -0.1}, r"schedule\.end_factor: -0\.1 is no share of the peak"),
        ({"name": "cosine", **SHORT, "init_factor": 1.5}, r"schedule\.init_factor: 1\.5 is no share of the peak"),
        ({"name": "tri_stage", **SHORT, "final_factor": 0.0}, r"schedule\.final_factor: 0 is no end"),
        ({"name": "tri_stage", **SHORT, "hold_updates": 3}, r"schedule\.hold_updates: 3; give 0 to 2"),
    ],
)
def test_wrong_schedules_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_schedule(values)
