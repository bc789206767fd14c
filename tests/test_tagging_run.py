"""Classes and tags as targets, losses over different units, groups of the optimiser, scores over a whole validation."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_python
from safetensors.torch import load_file
from small_run import metrics, write_data
from tagging_run import WITHOUT_EXPORT, TaggingMethod, build

from pretrain.data.utterance_targets import TargetError
from pretrain.method import Progress
from pretrain.training.checkpoint import CheckpointError
from pretrain.world import World


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`write_data`'s corpus with a table: three speakers, every fourth utterance without one, tags of two at most."""
    folder = write_data(tmp_path_factory.mktemp("corpus"))
    lines = ["utt\tspeaker\ttags"]
    for split, count in (("train", 16), ("valid", 4)):
        for row in range(count):
            speaker = "" if row % 4 == 3 else f"s{row % 3}"
            lines.append(f"{split}/{row}\t{speaker}\t{'loud, near' if row % 2 else 'near'}")
    (folder / "classes.tsv").write_text("\n".join(lines) + "\n")
    return folder


def train(data: Path, output: Path, updates: int, *options: str) -> None:
    with ExitStack() as resources, WITHOUT_EXPORT:
        assert build(data, output, resources, f"trainer.stop_after_updates={updates}", *options).fit() == 0


@pytest.fixture(scope="module")
def unbroken(data: Path, world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("unbroken") / "out"
    train(data, output, 3, "trainer.save_every=1", "trainer.keep_checkpoints=5")
    return output


def weights(output: Path, update: int) -> dict[str, torch.Tensor]:
    return load_file(output / "run" / "checkpoints" / f"step_{update:08d}" / "model.safetensors")


def test_classes_and_tags_are_numbered_and_said(data: Path, world: World, tmp_path: Path) -> None:
    with ExitStack() as resources:
        trainer = build(data, tmp_path / "out", resources)
        batches = [trainer.reader[trainer.reader.plan.micro_batch(i)] for i in range(4)]
    config = trainer.engine.method.config
    assert (sorted(config.speakers), config.tags) == (["s0", "s1", "s2"], ["near", "loud"])  # the commonest first
    for batch in batches:
        for row, speaker, tags in zip(batch.rows.tolist(), *map(batch.extras.get, ("speaker", "tags")), strict=True):
            assert config.speakers[speaker] == f"s{row % 3}" if row % 4 != 3 else speaker == -1
            assert tags.tolist() == [1, row % 2]
    assert "speaker: speaker of 12 of 16 training utterances, 3 names (data.class_names was not given: " in "".join(
        trainer.run.notes
    )
    assert any(
        note.startswith("method.tags: [] in the recipe, ['near', 'loud'] by the data") for note in trainer.run.notes
    )
    (tmp_path / "names.txt").write_text("s0\ns1\n")
    with pytest.raises(TargetError, match=r"'s2' is not one of the 2 names .* add it to data\.class_names"):
        build(data, tmp_path / "other", ExitStack(), f"data.class_names={tmp_path / 'names.txt'}")


def test_an_inactive_group_is_left_alone(unbroken: Path) -> None:
    """Updates 0 and 2 leave the speakers' head as it is, weight decay and moments included; update 1 trains it."""
    after = {update: weights(unbroken, update) for update in (1, 2, 3)}
    for name in ("speaker_head.weight", "speaker_head.bias"):
        assert not torch.equal(after[1][name], after[2][name])
        assert torch.equal(after[2][name], after[3][name])
        assert not torch.equal(after[2]["tag_head.weight"], after[3]["tag_head.weight"])
    state = json.loads((unbroken / "run" / "checkpoints" / "step_00000003" / "state.json").read_text())
    assert state["adam_steps"] == [3.0, 1.0, 3.0]
    assert not TaggingMethod.trains_speakers(Progress(0, 3, 0))


@pytest.mark.parametrize("stage", ["zero0", "zero2", "zero3"])
def test_groups_train_in_turns_at_every_zero_stage(
    stage: str, unbroken: Path, data: Path, world: World, tmp_path: Path
) -> None:
    """Saved and resumed between the updates, as the run at ZeRO 1 that was never stopped."""
    for updates in (1, 2, 3):
        train(data, tmp_path, updates, f"deepspeed={stage}")
    mine, expected = weights(tmp_path, 3), weights(unbroken, 3)
    for name in expected:
        torch.testing.assert_close(mine[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)
    state = json.loads((tmp_path / "run" / "checkpoints" / "step_00000003" / "state.json").read_text())
    assert state["adam_steps"] == [3.0, 1.0, 3.0]


def test_a_group_has_a_rate_of_its_own(unbroken: Path) -> None:
    """Adam moves the quickest weight of a tensor by about its rate; the first update of the warm-up has a rate of 0."""
    before, after = weights(unbroken, 1), weights(unbroken, 2)
    moved = {name: float((after[name] - before[name]).abs().max()) for name in after}
    assert moved["final_proj.weight"] > 0
    assert moved["tag_head.weight"] / moved["final_proj.weight"] == pytest.approx(0.1, rel=0.3)


def test_a_score_of_the_whole_validation_is_sklearns(unbroken: Path) -> None:
    lines = metrics(unbroken, "validation/")
    assert all(0 < line["validation/precision"] <= 1 for line in lines)
    assert not any("train/precision" in line for line in metrics(unbroken))


def test_resuming_and_two_ranks_follow_the_unbroken_run(
    unbroken: Path, data: Path, world: World, tmp_path: Path
) -> None:
    for updates in (1, 2, 3):
        train(data, tmp_path / "resumed", updates)
    assert metrics(tmp_path / "resumed") == metrics(unbroken)
    mine, expected = weights(tmp_path / "resumed", 3), weights(unbroken, 3)
    assert all(torch.equal(mine[name], expected[name]) for name in expected)
    script, output = ROOT / "tests" / "tagging_run.py", tmp_path / "two"
    done = run_python([str(script), str(data), str(output), "trainer.stop_after_updates=2"], ranks=2, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    for line, other in zip(metrics(output), metrics(unbroken), strict=False):
        for name in ("train/loss", "train/loss_speakers", "train/gradient_norm"):
            assert line[name] == pytest.approx(other[name], rel=1e-5), name
    validation = [metrics(folder, "validation/")[0]["validation/precision"] for folder in (output, unbroken)]
    assert validation[0] == pytest.approx(validation[1], rel=1e-6)


def test_the_best_checkpoint_is_kept(data: Path, world: World, tmp_path: Path) -> None:
    """With a rate that makes it worse, the first checkpoint stays the best, beside the newest."""
    options = ["optimizer.lr=0.5", "schedule.warmup_updates=1", "trainer.health=false", "trainer.save_every=1"]
    train(data, tmp_path / "out", 4, *options, "trainer.keep_best=loss")
    losses = [line["validation/loss"] for line in metrics(tmp_path / "out", "validation/")]
    best = losses.index(min(losses)) + 1
    kept = sorted(path.name for path in (tmp_path / "out" / "run" / "checkpoints").iterdir())
    assert kept == sorted({f"step_{best:08d}", "step_00000004"})
    with pytest.MonkeyPatch.context() as patch, ExitStack() as resources, WITHOUT_EXPORT:
        settings = ["trainer.stop_after_updates=2", "trainer.keep_best=loss", *options]
        trainer = build(data, tmp_path / "full", resources, *settings)
        patch.setattr("pretrain.training.checkpoint.save", lambda *arguments: "no room")
        with pytest.raises(CheckpointError, match="no room"):
            trainer.fit()
    assert trainer.state.best == {}  # no checkpoint is there that could be the best one
    with pytest.raises(CheckpointError, match=r"trainer\.keep_best: validation has no 'los'; did you mean loss"):
        train(data, tmp_path / "wrong", 3, "trainer.keep_best=los", "trainer.validate_every=3")
    assert metrics(tmp_path / "wrong", "train/") == []  # it is said at the first update, when nothing is lost yet
