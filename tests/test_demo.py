"""The demo: the text that it ends with, and the promise in it, that training helps, in fp32 and in bf16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, run_python

from pretrain.config import ConfigError
from pretrain.errors import UserError
from tools import demo


def score(kind: str, name: str, accuracy: float, weights: list[float] | None = None) -> dict[str, Any]:
    return {"kind": kind, "name": name, "accuracy": accuracy, "layer_weights": weights}


def probe_report(trained: float) -> dict[str, Any]:
    """As in a probe.json: two layers of a network, the best of them with the accuracy `trained`, untrained 0.314."""
    return {
        "scores": [
            score("baseline", "MFCC-39", 0.719),
            score("baseline", "log-mel 80", 0.707),
            score("untrained", "layer 0", 0.314),
            score("untrained", "layer 1", 0.2),
            score("untrained", "weighted sum", 0.99, [0.5, 0.5]),
            score("upstream", "layer 0", trained - 0.1),
            score("upstream", "layer 1", trained),
            score("upstream", "weighted sum", 0.99, [0.5, 0.5]),
        ]
    }


def test_the_last_lines_set_the_trained_network_beside_the_others() -> None:
    text = demo.comparison(probe_report(0.65), {"100 units of MFCC": 0.634})
    rows = dict(line.strip().rsplit("  ", 1) for line in text.splitlines() if line.startswith("  "))
    assert {name.strip(): float(value) for name, value in rows.items()} == {
        "trained network, layer 1": 0.65,
        "untrained network, layer 0": 0.314,
        "MFCC-39": 0.719,
        "log-mel 80": 0.707,
        "100 units of MFCC": 0.634,
    }
    assert text.count("synthetic") == 1


def test_one_sentence_says_that_training_helped() -> None:
    report = probe_report(0.65)
    assert demo.improved(report)
    assert demo.verdict(report) == (
        "Training raised the phone accuracy of the best layer from 0.314 (untrained) to 0.650."
    )


@pytest.mark.parametrize("accuracy", [0.2, 0.314])
def test_training_that_did_not_help_is_named(accuracy: float) -> None:
    report = probe_report(accuracy)
    assert not demo.improved(report)
    sentence = demo.verdict(report)
    assert sentence.startswith("TRAINING DID NOT HELP")
    assert f"{accuracy:.3f}" in sentence
    assert "0.314" in sentence
    assert "raised" not in sentence


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is there already"):
        demo.prepare(demo.DemoOptions(output=str(tmp_path)))
    assert tmp_path.is_dir()


def test_the_second_iteration_learns_the_units_of_the_first_for_half_as_long() -> None:
    lines = demo.commands(demo.DemoOptions(output="here", precision="bf16", updates=400), ranks=2)
    first, second = (line for line in lines if "train.py" in line)
    assert "name=iter1 schedule.total_updates=400" in first
    assert "data.labels=here/labels2 name=iter2 init_from=here/iter1" in second
    assert second.endswith("schedule.total_updates=200")
    assert all("precision=bf16" in line and "output_dir=here" in line for line in (first, second))


@pytest.mark.parametrize(("option", "value"), [("precision", "fp8"), ("updates", 100)])
def test_an_option_that_cannot_be_is_refused(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{option}: "):
        demo.DemoOptions(**{option: value})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "updates", "accuracy", "pnmi"),
    # On a CPU without bf16 units an update in bf16 takes three times as long, so half of them must do.
    [("fp32", 800, 0.6, 0.58), ("bf16", 400, 0.45, 0.45)],
)
def test_the_demo_keeps_its_promise(precision: str, updates: int, accuracy: float, pnmi: float, tmp_path: Path) -> None:
    """The whole demo, which takes minutes. Untrained, the best layer has an accuracy of 0.314."""
    folder = tmp_path / "demo"
    options = [f"output={folder}", f"precision={precision}", f"updates={updates}"]
    done = run_python([str(ROOT / "tools" / "demo.py"), *options])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1].startswith("Training raised the phone accuracy of the best layer")
    probe = json.loads((folder / "iter2" / "probe" / "probe.json").read_text())
    trained, untrained = (demo.best_layer(probe, kind)["accuracy"] for kind in ("upstream", "untrained"))
    assert trained >= max(accuracy, 1.4 * untrained)
    # Of what the network of iteration 1 knows; the MFCC that it learned from have 0.634.
    assert demo.unit_quality(folder / "labels2") >= pnmi
