"""One command, however often it is stopped and on however many ranks and workers, trains one model."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file
from small_run import UPDATES, checkpoints, metrics, run, run_here, run_until, write_data
from torch import Tensor, equal

LAST = f"step_{UPDATES:08d}"
# With `--dist loadgroup` one worker makes the runs that the tests compare with.
pytestmark = pytest.mark.xdist_group("resume")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run on one rank without workers, from the first update to the last."""
    output = tmp_path_factory.mktemp("unbroken") / "out"
    run(data, output, "data.workers=0")
    return output


def tensors(output: Path, name: str = "model") -> dict[str, Tensor]:
    files = (output / "run" / "checkpoints" / LAST).glob(f"{name}*.safetensors")
    return {key: value for path in files for key, value in load_file(path).items()}


def assert_equal_to_the_bit(output: Path, unbroken: Path) -> None:
    for prefix in ("train/", "validation/"):
        assert metrics(output, prefix) == metrics(unbroken, prefix)
    for name in ("model", "optimizer"):
        mine, theirs = tensors(output, name), tensors(unbroken, name)
        assert mine.keys() == theirs.keys()
        assert all(equal(mine[key], theirs[key]) for key in mine)


def assert_follows(output: Path, unbroken: Path) -> None:
    """The same losses to 1e-5: sums over ranks round differently."""
    mine, theirs = metrics(output), metrics(unbroken)
    assert [line["update"] for line in mine] == list(range(1, UPDATES + 1))
    for line, expected in zip(mine, theirs, strict=True):
        for name in ("train/loss", "train/loss_masked", "train/loss_features", "train/gradient_norm"):
            assert line[name] == pytest.approx(expected[name], rel=1e-5), (line["update"], name)


def test_an_unbroken_run(unbroken: Path) -> None:
    assert [line["update"] for line in metrics(unbroken)] == list(range(1, UPDATES + 1))
    assert [line["update"] for line in metrics(unbroken, "validation/")] == [8, 16, UPDATES]
    assert checkpoints(unbroken) == [f"step_{step:08d}" for step in (5, 10, 15, 20)]
    assert (unbroken / "run" / "export" / "encoder.safetensors").is_file()
    # LayerDrop and dropout are at work, so equality below is not that of a network without randomness.
    losses = [line["train/loss"] for line in metrics(unbroken)]
    assert len(set(losses)) == UPDATES


def test_killed_at_a_random_moment(data: Path, unbroken: Path, tmp_path: Path) -> None:
    """With one data worker until the kill and three after it: workers change nothing either."""
    output, rng = tmp_path / "out", random.Random()
    moment = rng.randint(6, UPDATES - 3), rng.uniform(0, 0.3)
    assert run_until(data, output, *moment, signal.SIGKILL, "data.workers=1") == -signal.SIGKILL, moment
    printed = run(data, output, "data.workers=3")
    assert "resuming from" in printed, moment
    assert_equal_to_the_bit(output, unbroken)


def test_stopped_by_sigterm(data: Path, unbroken: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert run_until(data, output, 7, 0.05, signal.SIGTERM, "data.workers=0") == 75
    stopped = checkpoints(output)[-1]
    assert stopped not in checkpoints(unbroken)
    assert int(stopped.removeprefix("step_")) >= 7
    printed = run(data, output, "data.workers=0")
    assert f"resuming from {output}/run/checkpoints/{stopped}" in printed
    assert_equal_to_the_bit(output, unbroken)


@pytest.fixture(scope="module")
def on_two_ranks(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("two_ranks") / "out"
    run(data, output, "data.workers=1", "deepspeed=zero2", ranks=2)
    return output


def test_two_ranks_follow_the_same_losses(on_two_ranks: Path, unbroken: Path) -> None:
    assert_follows(on_two_ranks, unbroken)
    pairs = zip(metrics(on_two_ranks, "validation/"), metrics(unbroken, "validation/"), strict=True)
    for mine, theirs in pairs:
        assert mine["validation/loss"] == pytest.approx(theirs["validation/loss"], rel=1e-5)


def test_one_rank_goes_on_where_two_stopped(data: Path, on_two_ranks: Path, unbroken: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(on_two_ranks, output)
    damaged = output / "run" / "checkpoints" / "step_00000015" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    shutil.rmtree(output / "run" / "checkpoints" / LAST)
    printed = run_here(data, output, "data.workers=0", "deepspeed=zero0")
    assert f"resuming from {output}/run/checkpoints/step_00000010" in printed
    assert "step_00000015/model.safetensors: missing or of another size" in printed
    assert_follows(output, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_four_ranks_follow_the_same_losses(data: Path, unbroken: Path, tmp_path: Path, stage: int) -> None:
    run(data, tmp_path / "out", "data.workers=0", f"deepspeed=zero{stage}", ranks=4)
    assert_follows(tmp_path / "out", unbroken)


def test_a_run_from_before_an_option_existed_resumes(data: Path, unbroken: Path, tmp_path: Path) -> None:
    """Its checkpoint states neither the option, nested or not, nor a fact about data that none of its runs had."""
    output = tmp_path / "out"
    shutil.copytree(unbroken, output)
    shutil.rmtree(output / "run" / "checkpoints" / LAST)
    step = output / "run" / "checkpoints" / "step_00000015"
    state = json.loads((step / "state.json").read_text())
    for block, name in (("batch", "within"), ("crop", "whole"), ("method", "encoder")):
        assert name in state["identity"][block]
    for name in ("layer_type", "pos_enc_type", "depthwise_conv_kernel_size"):
        del state["identity"]["method"]["encoder"][name]
    del state["identity"]["batch"]["within"], state["identity"]["crop"]["whole"], state["identity"]["transcripts"]
    text = json.dumps(state)
    (step / "state.json").write_text(text)
    complete = json.loads((step / "complete.json").read_text())
    complete["files"]["state.json"] = {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (step / "complete.json").write_text(json.dumps(complete))
    assert f"resuming from {step}: update 15" in run_here(data, output, "data.workers=0")
    assert_equal_to_the_bit(output, unbroken)


def test_a_changed_recipe_is_refused(data: Path, unbroken: Path) -> None:
    printed = run(data, unbroken, "method.mask_prob=0.5", status=1)
    assert "holds a run with other settings" in printed
    assert "'mask_prob': 0.8" in printed
    assert "'mask_prob': 0.5" in printed
    assert "Traceback" not in printed
