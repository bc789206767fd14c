"""The demo: the text that it ends with, and the promise in it, that training helps, in fp32 and in bf16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, run_python

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
    with pytest.raises(SystemExit, match="is there already"):
        demo.prepare(demo.DemoOptions(output=str(tmp_path)))
    assert tmp_path.is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_demo_keeps_its_promise(precision: str, tmp_path: Path) -> None:
    """Minutes: the whole demo. The bounds leave room below what three seeds reached."""
    folder = tmp_path / "demo"
    done = run_python([str(ROOT / "tools" / "demo.py"), f"output={folder}", f"precision={precision}"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1].startswith("Training raised the phone accuracy of the best layer")
    probe = json.loads((folder / "iter2" / "probe" / "probe.json").read_text())
    trained, untrained = (demo.best_layer(probe, kind)["accuracy"] for kind in ("upstream", "untrained"))
    assert trained >= 1.3 * untrained
    assert trained >= 0.55
    # Those of MFCC, which iteration 1 learned from, have 0.634.
    assert demo.unit_quality(folder / "labels2") >= 0.5
