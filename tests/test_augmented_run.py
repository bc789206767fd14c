"""A method with noise, mixing and two crops of every row: trains, resumes and is the same on one rank and on two."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from augmented_run import build
from conftest import ROOT, run_python
from safetensors.torch import load_file
from small_run import metrics, write_data
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.data.augment.options import AugmentError
from pretrain.data.manifest import write_manifest
from pretrain.training.checkpoint import CheckpointError
from pretrain.world import World


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`write_data`'s corpus, and one impulse response."""
    folder = write_data(tmp_path_factory.mktemp("corpus"))
    response = np.zeros(800, np.float32)
    response[[20, 300, 700]] = 0.5, 0.2, 0.1
    (folder / "rirs").mkdir()
    soundfile.write(folder / "rirs" / "a.wav", response, 16_000)
    write_manifest(folder / "rirs" / "train.tsv", folder / "rirs", [("a.wav", 800)])
    return folder


def train(data: Path, output: Path, updates: int, *options: str) -> None:
    with ExitStack() as resources:
        trainer = build(data, output, resources, f"trainer.stop_after_updates={updates}", *options)
        assert trainer.fit() == 0


@pytest.fixture(scope="module")
def unbroken(data: Path, world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("unbroken") / "out"
    train(data, output, 2, "data.workers=0")
    return output


def test_it_trains_on_noisy_pairs_and_validates_on_clean_ones(unbroken: Path) -> None:
    lines = metrics(unbroken)
    assert [line["update"] for line in lines] == [1, 2]
    assert all(line["train/pairs"] == 1 for line in lines)
    assert all(0.5 < line["train/altered"] <= 1 for line in lines)
    assert all(line["train/distance"] > 0 for line in lines)
    [validation] = metrics(unbroken, "validation/")
    assert (validation["validation/pairs"], validation["validation/altered"]) == (1, 0)


def test_a_resumed_run_is_the_unbroken_one(data: Path, unbroken: Path, world: World, tmp_path: Path) -> None:
    output = tmp_path / "out"
    train(data, output, 1, "data.workers=2")
    train(data, output, 2, "data.workers=1")
    assert metrics(output) == metrics(unbroken)
    last = Path("run") / "checkpoints" / "step_00000002" / "model.safetensors"
    mine, expected = load_file(output / last), load_file(unbroken / last)
    assert mine.keys() == expected.keys()
    assert all(torch.equal(mine[name], expected[name]) for name in expected)
    with pytest.raises(CheckpointError, match=r"(?s)other settings.*augment: was .*'prob': 0\.5.*'prob': 0\.6"):
        train(data, output, 3, "augment.noise.prob=0.6")
    off = [f"augment.{name}=null" for name in ("reverberation", "mixing", "babble", "noise")]
    with pytest.raises(CheckpointError, match=r"augment: was .*, is None"):
        train(data, output, 3, *off)


def test_two_ranks_hear_the_same(data: Path, unbroken: Path, tmp_path: Path) -> None:
    script, output = ROOT / "tests" / "augmented_run.py", tmp_path / "out"
    options = ["trainer.stop_after_updates=2", "data.workers=1"]
    done = run_python([str(script), str(data), str(output), *options], ranks=2, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    for mine, expected in zip(metrics(output), metrics(unbroken), strict=True):
        for name in ("train/loss", "train/distance", "train/altered", "train/gradient_norm"):
            assert mine[name] == pytest.approx(expected[name], rel=1e-5), name


def test_audio_is_in_tensorboard(unbroken: Path) -> None:
    events = EventAccumulator(str(unbroken / "run" / "tensorboard"))
    events.Reload()
    names = [f"audio/{place}_{kind}" for place in (0, 1) for kind in ("augmented", "clean")]
    assert sorted(events.Tags()["audio"]) == names
    for name in names:
        heard = events.Audio(name)
        assert [event.step for event in heard] == [0, 2]
        assert all(event.sample_rate == 16_000 for event in heard)
        assert all(event.encoded_audio_string[:4] == b"RIFF" for event in heard)


def test_the_run_says_what_it_does(data: Path, world: World, tmp_path: Path) -> None:
    with ExitStack() as resources:
        notes = build(data, tmp_path / "out", resources, "augment.noise=null", "data.workers=0").run.notes
    assert (
        "augmentation of training examples, each stage by itself: reverberation 30% from 1 files, "
        "mixing 50% at -5 to 5 dB, babble 30% at 5 to 15 dB from 16 files"
    ) in notes
    assert "data.noise is given, but augment.noise is null, so nothing is taken from it" in notes
    with pytest.raises(AugmentError, match=r"data\.rirs: missing"), ExitStack() as resources:
        build(data, tmp_path / "other", resources, "data.rirs=null")
