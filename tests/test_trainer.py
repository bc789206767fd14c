"""What the trainer does when something goes wrong: bad files, refused updates, a full disk; and the memory probe."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small_method import SmallMethod, micro_batch
from small_run import SMALL, checkpoints, metrics, write_data

from pretrain.config import BatchConfig, ConfigError, compose_recipe, run_config
from pretrain.data.audio import AudioError
from pretrain.data.plan import MicroBatch
from pretrain.method import Batch
from pretrain.training.checkpoint import CheckpointError
from pretrain.training.health import HopelessRun
from pretrain.training.memory import probe_memory
from pretrain.training.setup import build_trainer
from pretrain.training.trainer import Trainer
from pretrain.world import World

Build = Callable[..., Trainer]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def build(data: Path, tmp_path: Path, world: World) -> Iterator[Build]:
    """Trainers of three updates, in this process."""
    with ExitStack() as resources:

        def make(*options: str) -> Trainer:
            places = [f"data.dir={data / 'data'}", f"data.labels={data / 'labels'}", f"output_dir={tmp_path / 'out'}"]
            settings = ["data.workers=0", "name=run", "trainer.stop_after_updates=3", "trainer.save_every=1"]
            recipe, *small = SMALL
            values = compose_recipe(recipe.removeprefix("recipe="), [*small, *places, *settings, *options])
            return build_trainer(run_config(values), resources)

        yield make


def test_refused_updates_change_nothing_and_too_many_end_the_run(
    build: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build("trainer.max_failed_steps=2")
    before = trainer.engine.weights(keep=True)
    forward = trainer.engine.forward

    def poisoned(batch: Any) -> Any:
        output = forward(batch)
        return output._replace(loss=output.loss * math.nan)

    monkeypatch.setattr(trainer.engine, "forward", poisoned)
    with pytest.raises(HopelessRun, match=r"2 updates in a row .*failed_rank0\.txt; lower optimizer\.lr"):
        trainer.fit()
    assert (trainer.state.update, trainer.state.step) == (0, 2)
    after = trainer.engine.weights(keep=True)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert metrics(tmp_path / "out") == []
    printed = capsys.readouterr()
    assert "gradient not finite; weights unchanged (1 in a row)" in printed.out + printed.err
    listed = (tmp_path / "out" / "run" / "failed_rank0.txt").read_text().split()
    assert listed
    assert all(Path(path).is_file() for path in listed)


def test_a_run_with_nothing_to_score_says_where_to_look(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build("trainer.max_failed_steps=2")
    read = type(trainer.reader).__getitem__
    monkeypatch.setattr(type(trainer.reader), "__getitem__", lambda *args: replace(read(*args), sample_size=0))
    with pytest.raises(HopelessRun, match=r"refused \(nothing to score\); .* batches have sample_size 0"):
        trainer.fit()


def test_a_refused_update_among_others_is_passed_over(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build()
    real, steps = trainer.engine.step, []

    def refuse_the_second(lr: float, skip: torch.Tensor) -> bool:
        steps.append(lr)
        return real(lr, torch.ones(()) if len(steps) == 2 else skip)

    monkeypatch.setattr(trainer.engine, "step", refuse_the_second)
    assert trainer.fit() == 0
    # Its examples are gone, its update is not: the same rate comes again on the next examples.
    assert (trainer.state.update, trainer.state.step, trainer.state.failed_steps) == (3, 4, 0)
    assert steps[1] == steps[2] != steps[3]


def test_a_full_disk_does_not_stop_training_but_no_run_ends_unsaved(
    build: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build()
    real = trainer._save

    def disk_full_after_the_first(**how: Any) -> None:
        if trainer.state.update == 2:
            monkeypatch.setattr("pretrain.training.checkpoint.save_file", no_space)
        real(**how)

    def no_space(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer, "_save", disk_full_after_the_first)
    with pytest.raises(CheckpointError, match=r"No space left on device.*the same command goes on"):
        trainer.fit()
    assert trainer.state.update == 3
    assert checkpoints(tmp_path / "out") == ["step_00000001"]
    printed = capsys.readouterr()
    assert "CHECKPOINT NOT WRITTEN, the older ones are intact, training goes on" in printed.out + printed.err
    assert not (tmp_path / "out" / "run" / "export").exists()


def test_too_many_unreadable_files_end_the_run(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.training.run_log.MIN_ROWS_FOR_BAD_SHARE", 10)
    trainer = build("data.max_bad_share=0.2")
    bad = trainer.reader.manifest.path(int(trainer.reader.plan.rows[0]))
    real = trainer.reader._example

    def often_unreadable(batch: MicroBatch, row: int, *which: int) -> Any:
        if row % 2:
            raise AudioError(f"{bad}: cannot be decoded; repair it")
        return real(batch, row, *which)

    monkeypatch.setattr(trainer.reader, "_example", often_unreadable)
    with pytest.raises(AudioError, match=r"bad_audio_rank\*\.txt: \d+ of \d+ files read could not be used"):
        trainer.fit()
    assert f"{bad}: cannot be decoded" in (tmp_path / "out" / "run" / "bad_audio_rank0.txt").read_text()


def test_a_profile_run_does_not_say_that_it_has_finished(
    build: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build("trainer.profile=true", "trainer.stop_after_updates=20", "trainer.save_every=50").fit() == 0
    printed = capsys.readouterr()
    said = printed.out + printed.err
    folder = tmp_path / "out" / "run" / "profile"
    assert f"profile of 5 updates written to {folder}, then ended: update 5 of" in said
    assert "finished" not in said
    assert (folder / "rank0.json").is_file()


def test_a_run_in_bf16_says_what_the_precision_check_found(build: Build) -> None:
    found = "precision: bf16; on equal inputs no layer differs from fp32 by more than 0."
    assert any(note.startswith(found) for note in build("precision=bf16").run.notes)


def test_the_precision_check_can_be_switched_off(build: Build) -> None:
    assert not any("precision" in note for note in build("precision=bf16", "trainer.precision_check=false").run.notes)


class Counting(SmallMethod):
    """A method whose forward leaves a trace in a buffer."""

    def forward(self, batch: Any) -> Any:
        self.seen += 1
        return super().forward(batch)


class OneBatch:
    """A reader whose plan has one largest shape."""

    plan = SimpleNamespace(largest_shapes=lambda: [MicroBatch(0, np.arange(5), 8)])

    def __getitem__(self, largest: MicroBatch) -> Batch:
        return micro_batch(0, 0)


def test_the_memory_probe_in_bf16_leaves_no_trace(world: World) -> None:
    method = Counting()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    sentence = probe_memory(method, OneBatch(), "bf16", world, BatchConfig(10.0, 4), {"stage": 1})  # type: ignore[arg-type]
    assert "GB at the largest shapes (5 x 0.00 s)" in sentence
    assert "up to 2.00 GB of DeepSpeed's buffers" in sentence
    assert all(torch.equal(before[name], value) for name, value in method.state_dict().items())
    assert all(parameter.grad is None for parameter in method.parameters())


def test_too_little_memory_names_the_shape_and_the_same_update_in_smaller_parts(world: World) -> None:
    def out_of_memory(batch: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")

    method = SmallMethod()
    method.forward = out_of_memory  # type: ignore[method-assign]
    with pytest.raises(ConfigError) as error:
        probe_memory(method, OneBatch(), "fp32", world, BatchConfig(10.0, 4), {"stage": 1})  # type: ignore[arg-type]
    assert "5 x 0.00 s does not fit" in str(error.value)
    assert "batch.seconds_per_micro_batch=5 batch.micro_batches_per_step=8" in str(error.value)
