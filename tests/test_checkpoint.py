"""Checkpoints are complete or absent, whatever happens while they are written or to their files afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
from conftest import ROOT
from small_method import SmallMethod, engine_of, plain, train
from two_ranks import load, save

from pretrain.config import recipe_method_block, with_defaults
from pretrain.registry import load_method
from pretrain.training import checkpoint
from pretrain.training.checkpoint import (
    CheckpointError,
    check_identity,
    damage,
    find_resumable,
    newest_checkpoint,
    run_lock,
    set_aside_damaged,
)
from pretrain.training.engine import Engine
from pretrain.training.setup import _changed_rules, _completed
from pretrain.world import World

# With `--dist loadgroup` one worker launches the two ranks for this file and test_engine.py.
pytestmark = pytest.mark.xdist_group("two_ranks")


@pytest.fixture(scope="module")
def engine(world: World) -> Engine:
    engine = engine_of(1, "fp32", world)
    train(engine, world, 0, 1)
    return engine


@pytest.fixture
def run(tmp_path: Path, engine: Engine, world: World) -> Path:
    """A run folder with checkpoints of steps 1 and 2."""
    folder = tmp_path / "run"
    for step in (1, 2):
        assert save(folder, engine, world, step) is None
    return folder


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def newest(run: Path) -> str | None:
    found = newest_checkpoint(run)
    return found.name if found else None


def test_what_is_published(run: Path, engine: Engine) -> None:
    step = run / "checkpoints" / "step_00000002"
    files = json.loads((step / "complete.json").read_text())["files"]
    assert sorted([*files, "complete.json"]) == sorted(path.name for path in step.iterdir())
    assert plain(checkpoint.load_weights(step)) == plain(engine.weights(keep=True))
    assert checkpoint.load_state(step).update == 2
    with checkpoint.moment_reader(step) as read:
        assert plain((key, read(key)) for key, _ in engine.optimizer_state()) == plain(engine.optimizer_state())
        with pytest.raises(CheckpointError, match="optimiser state of 'other/exp_avg' is missing"):
            read("other/exp_avg")


def test_the_newest_are_kept(run: Path, engine: Engine, world: World) -> None:
    assert save(run, engine, world, 10) is None
    assert names(run) == ["step_00000002", "step_00000010"]
    assert save(run, engine, world, 11, keep=1) is None
    assert names(run) == ["step_00000011"]
    assert newest(run) == "step_00000011"


def test_the_same_step_may_be_saved_twice(run: Path, engine: Engine, world: World) -> None:
    assert save(run, engine, world, 2) is None
    assert names(run) == ["step_00000001", "step_00000002"]
    assert damage(run / "checkpoints" / "step_00000002") is None


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


FILES = ["model.safetensors", "optimizer-00000-of-00001.safetensors", "state.json", "config.yaml", "complete.json"]


@pytest.mark.parametrize("harm", [cut, flip, Path.unlink], ids=["cut", "flipped", "missing"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_passed_over(run: Path, world: World, name: str, harm: Callable[[Path], None]) -> None:
    harm(run / "checkpoints" / "step_00000002" / name)
    if name == "complete.json" and harm is flip:
        # A flipped bit in a name or a hash makes the list disagree with the files; one in white space does no harm.
        assert newest(run) in ("step_00000001", "step_00000002")
        return
    assert newest(run) == "step_00000001"
    found, passed_over = find_resumable(run, world)
    assert found is not None
    assert found.name == "step_00000001"
    assert len(passed_over) == 1
    assert name in passed_over[0]


def test_two_ranks_find_damage_in_either_part(two_ranks: dict[str, Any]) -> None:
    for name, (found, passed_over) in two_ranks["damaged"].items():
        assert found == "step_00000001"
        assert name in passed_over[0]
        assert "content differs" in passed_over[0]


def test_nothing_is_found_where_nothing_is_complete(tmp_path: Path, run: Path, world: World) -> None:
    assert newest_checkpoint(tmp_path / "absent") is None
    assert find_resumable(tmp_path / "absent", world) == (None, [])
    for step in (1, 2):
        cut(run / "checkpoints" / f"step_0000000{step}" / "model.safetensors")
    found, passed_over = find_resumable(run, world)
    assert found is None
    assert len(passed_over) == 2


def test_damaged_checkpoints_take_no_place_among_the_newest(run: Path, engine: Engine, world: World) -> None:
    """What was resumed from, and what is written then, stay: newer ones that are damaged are set aside first."""
    assert save(run, engine, world, 12, keep=3) is None
    cut(run / "checkpoints" / "step_00000002" / "model.safetensors")
    cut(run / "checkpoints" / "step_00000012" / "model.safetensors")
    found, _ = find_resumable(run, world)
    set_aside_damaged(run, found)
    assert names(run) == ["step_00000001", "step_00000002.damaged", "step_00000012.damaged"]
    assert save(run, engine, world, 3, keep=2) is None
    assert [name for name in names(run) if not name.endswith(".damaged")] == ["step_00000001", "step_00000003"]
    assert newest(run) == "step_00000003"


def test_a_run_without_any_whole_checkpoint_does_not_begin_anew(run: Path, world: World) -> None:
    for step in (1, 2):
        cut(run / "checkpoints" / f"step_0000000{step}" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"none of step_00000001, step_00000002 is whole; restore one of them"):
        set_aside_damaged(run, find_resumable(run, world)[0])
    assert names(run) == ["step_00000001", "step_00000002"]
    set_aside_damaged(run / "absent", None)


def test_folders_of_other_names_are_ignored(run: Path, engine: Engine, world: World) -> None:
    for name in ("step_00000009.tmp", "step_9", "old_step_00000009"):
        (run / "checkpoints" / name).mkdir()
    assert newest(run) == "step_00000002"
    # A half-written folder of a dead process is no obstacle to writing that step.
    (run / "checkpoints" / "step_00000009.tmp" / "model.safetensors").write_text("half")
    assert save(run, engine, world, 9) is None
    assert newest(run) == "step_00000009"


class Crash(BaseException):
    """The process dies here: nothing in the code under test may catch it."""


def crash(*_: Any, **__: Any) -> None:
    raise Crash


@pytest.mark.parametrize(
    "place",
    ["save_file", "save_yaml", "_make_durable", "_publish", "_sync_folder", "shutil.rmtree", "Path.rename"],
)
def test_a_crash_while_saving_never_leaves_a_wrong_newest(
    run: Path, engine: Engine, world: World, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(engine, world, 1, 2)
    before = plain(checkpoint.load_weights(run / "checkpoints" / "step_00000002"))
    with monkeypatch.context() as patch:
        patch.setattr(f"pretrain.training.checkpoint.{place}", crash)
        with pytest.raises(Crash):
            save(run, engine, world, 3)
    found = newest_checkpoint(run)
    assert found is not None
    expected = before if found.name == "step_00000002" else plain(engine.weights(keep=True))
    assert plain(checkpoint.load_weights(found)) == expected
    assert save(run, engine, world, 3) is None
    assert newest(run) == "step_00000003"
    assert not [name for name in names(run) if name.endswith(".tmp")]


def test_a_crash_between_writing_again_and_publishing_keeps_the_step_before(
    run: Path, engine: Engine, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step that is saved a second time may be lost, never the one before."""
    monkeypatch.setattr("pretrain.training.checkpoint.Path.rename", crash)
    with pytest.raises(Crash):
        save(run, engine, world, 2)
    assert newest(run) == "step_00000001"


@pytest.mark.parametrize("place", ["save_file", "save_yaml", "_make_durable", "Path.rename"])
def test_a_full_disk_leaves_the_older_ones(
    run: Path, engine: Engine, world: World, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"pretrain.training.checkpoint.{place}", no_space)
    problem = save(run, engine, world, 3)
    assert problem is not None
    assert "No space left on device" in problem
    assert names(run) == ["step_00000001", "step_00000002"]
    assert newest(run) == "step_00000002"


def test_no_rank_publishes_where_one_could_not_write(two_ranks: dict[str, Any]) -> None:
    failing = two_ranks["failing"]
    assert failing["first"] is None
    assert "No space left on device" in failing["second"]
    assert (failing["found"], failing["passed_over"]) == ("step_00000001", [])
    assert failing["left"] == ["step_00000001"]


def test_a_checkpoint_before_the_first_update(tmp_path: Path, world: World) -> None:
    for stage in (0, 1, 3):
        run = tmp_path / str(stage)
        fresh = engine_of(stage, "fp32", world)
        assert save(run, fresh, world, 1) is None
        again = load(run, stage, "fp32", world)
        assert again.scalars()["adam_steps"] == [0, 0]
        assert [h["loss"] for h in train(again, world, 3, 5)] == [h["loss"] for h in train(fresh, world, 3, 5)]


def test_the_weights_of_another_method_are_refused(run: Path) -> None:
    weights = checkpoint.load_weights(run / "checkpoints" / "step_00000002")
    del weights["net.0.weight"]
    with pytest.raises(RuntimeError, match=r"net\.0\.weight"):
        SmallMethod().load_state_dict(weights)


@dataclass
class Block:
    """A block to which fields were added: one with a default at each depth, and one without."""

    width: int
    nested: Inner
    optional: Inner | None = None
    kind: str = "plain"
    sizes: list[int] = field(default_factory=lambda: [1, 2])


@dataclass
class Inner:
    """A nested block."""

    depth: int
    rate: float = 0.0


def test_fields_that_a_checkpoint_lacks_count_as_their_defaults(tmp_path: Path) -> None:
    old = {"block": with_defaults(Block, {"width": 3, "nested": {"depth": 1}})}
    present = {"block": asdict(Block(3, Inner(1)))}
    check_identity(old, present, tmp_path)
    check_identity(json.loads(json.dumps(old)), present, tmp_path)
    check_identity({"block": {"a": (1, [2])}}, {"block": {"a": [1, (2,)]}, "new": None}, tmp_path)
    for now in (
        Block(3, Inner(1, 0.5)),
        Block(3, Inner(1), Inner(1)),
        Block(3, Inner(1), kind="other"),
        Block(3, Inner(1), sizes=[1, 2, 3]),
        Block(3, Inner(2)),
    ):
        with pytest.raises(CheckpointError, match="block: was"):
            check_identity(old, {"block": asdict(now)}, tmp_path)
    # No default, so nothing says what an old run did.
    old = {"block": with_defaults(Block, {"nested": {"depth": 1}})}
    with pytest.raises(CheckpointError, match="block: was"):
        check_identity(old, present, tmp_path)
    assert with_defaults(Block, {"optional": {"depth": 2}, "more": 1}) == {
        "optional": {"depth": 2, "rate": 0.0},
        "more": 1,
        "kind": "plain",
        "sizes": [1, 2],
    }


@dataclass
class Chosen:
    """A block that has kinds, one of which got a field."""

    kind: str
    VARIANTS: ClassVar[dict[str, type]] = {}


@dataclass
class Wide(Chosen):
    """The kind with the later field."""

    width: int = 3


def test_a_field_that_a_kind_of_block_lacks_counts_as_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Chosen, "VARIANTS", {"wide": Wide})
    assert with_defaults(Chosen, {"kind": "wide"}) == {"kind": "wide", "width": 3}
    assert with_defaults(Chosen, {"kind": "unknown"}) == {"kind": "unknown"}


def test_a_block_of_a_former_shape_is_that_of_the_run_which_resumes(tmp_path: Path) -> None:
    """vq-wav2vec's quantizer was flat once; its checkpoints are read so too (`Wav2VecConfig.upgraded`)."""
    block = recipe_method_block("vq_wav2vec_tiny")
    training, old = block["quantizer_training"], {k: v for k, v in block.items() if k != "quantizer_training"}
    old |= {name: training.get(name) for name in ("vq_temp", "diversity_loss_weight", "vq_gamma", "kmeans_loss_weight")}
    old |= {"kmeans_init_std": None}
    method = load_method("wav2vec").Method
    present = _completed({"method": block}, method)
    check_identity(_completed({"method": old}, method), present, tmp_path)
    with pytest.raises(CheckpointError, match="method: was"):
        check_identity(_completed({"method": old | {"diversity_loss_weight": 0.5}}, method), present, tmp_path)


def test_a_resumed_run_says_which_rules_changed() -> None:
    before = {"optimizer": {"name": "adam", "lr": 0.1}, "schedule": {"name": "linear"}}
    assert _changed_rules(before, before) == []
    now = {"optimizer": {"name": "adamw", "lr": 0.1}, "schedule": {"name": "linear", "power": 2}}
    assert _changed_rules(before, now) == [
        "optimizer.name: was adam, is adamw from this update on",
        "schedule.power: was None, is 2 from this update on",
    ]


def test_labels_that_an_older_run_did_not_identify_are_unknown(tmp_path: Path) -> None:
    check_identity({"labels": ["", "ab"]}, {"labels": ["cd", "ab"]}, tmp_path)
    for now in (["cd", "ef"], ["cd"]):
        with pytest.raises(CheckpointError, match="labels: was"):
            check_identity({"labels": ["", "ab"]}, {"labels": now}, tmp_path)


@pytest.mark.parametrize("text", ["[]", "5", '{"files": []}', '{"files": {}}', '{"files": {"state.json": 1}}', "{}"])
def test_a_complete_json_of_another_shape_is_damage(run: Path, engine: Engine, world: World, text: str) -> None:
    older = newest(run)
    assert save(run, engine, world, 9) is None
    (run / "checkpoints" / names(run)[-1] / "complete.json").write_text(text)
    assert newest(run) == older
    found, passed_over = find_resumable(run, world)
    assert found is not None
    assert found.name == older
    assert "complete.json: " in passed_over[0]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda state: state | {"later": 1}, "unexpected keyword argument 'later'"),
        (lambda state: {"step": 1}, "missing 5 required positional arguments"),
    ],
)
def test_the_state_of_another_version_is_named(run: Path, change: Callable[[dict], dict], problem: str) -> None:
    place = run / "checkpoints" / names(run)[-1]
    (place / "state.json").write_text(json.dumps(change(json.loads((place / "state.json").read_text()))))
    with pytest.raises(CheckpointError, match=rf"state\.json: .*{problem}.*; it is of another version of this package"):
        checkpoint.load_state(place)


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        CheckpointError, match=r"file/x/run: cannot be written \(Not a directory: .*give another output_dir="
    ):
        run_lock(tmp_path / "file" / "x" / "run").__enter__()


def test_changed_settings_are_refused_with_both_values(tmp_path: Path) -> None:
    saved = {"seed": 1, "batch": {"micro_batches_per_step": 4}, "crop": {"max_seconds": 2.0}}
    check_identity(saved, dict(saved), tmp_path)
    with pytest.raises(CheckpointError) as error:
        check_identity(saved, saved | {"batch": {"micro_batches_per_step": 8}, "seed": 2}, tmp_path)
    message = str(error.value)
    assert str(tmp_path) in message
    assert "seed: was 1, is 2" in message
    assert "'micro_batches_per_step': 4" in message
    assert "'micro_batches_per_step': 8" in message
    assert "crop" not in message
    assert "name=" in message
    assert "init_from=" in message


def test_a_folder_that_cannot_be_made_is_reported(tmp_path: Path, engine: Engine, world: World) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("a file in the way")
    problem = save(tmp_path / "run", engine, world, 1)
    assert problem is not None
    assert str(tmp_path / "run" / "checkpoints") in problem


# Holds the lock, and leaves a child that outlives it as data workers outlive a killed trainer.
HOLDER = """
import os, pathlib, sys, time
from pretrain.training.checkpoint import run_lock
with run_lock(pathlib.Path(sys.argv[1])):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(120)
"""


def test_the_lock_names_its_holder_and_falls_with_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        try:
            with pytest.raises(CheckpointError, match=rf"in use by process {holder.pid} on {os.uname().nodename}"):
                run_lock(tmp_path / "run").__enter__()
            holder.kill()
            holder.wait()
            with run_lock(tmp_path / "run"):
                assert str(os.getpid()) in (tmp_path / "run" / "lock").read_text()
        finally:
            os.kill(child, signal.SIGKILL)
