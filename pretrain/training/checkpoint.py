"""Checkpoints that are complete or absent, and that any world size and ZeRO stage can resume.

A checkpoint is a folder `checkpoints/step_N` of the run: `model.safetensors` (the whole method), `optimizer-R-of-W.
safetensors` (whole moments by parameter name, shared out among the W ranks that wrote them), `state.json`,
`config.yaml`, and `complete.json` with every file's size and SHA-256. It is written as `step_N.tmp`, made durable,
and renamed; DeepSpeed's own format is not used because it publishes its `latest` before all ranks have written.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import socket
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretrain.config import TrainerConfig, nearest, save_yaml
from pretrain.errors import UserError
from pretrain.weights.interop.files import give_default_mode
from pretrain.world import World

if TYPE_CHECKING:  # readers of checkpoints need no deepspeed
    from pretrain.training.engine import Engine

STEP_FOLDER = re.compile(r"step_(\d{8})")
COMPLETE = "complete.json"


class CheckpointError(UserError):
    """A run folder that cannot be resumed or written; the message says what to do."""


@dataclass
class RunState:
    """Where a run stands: `step` micro-batch groups of the plan consumed, `update` optimiser updates applied.

    `adam_steps` counts the optimiser's steps for each parameter group; one number stands for all groups.

    `best` holds the `metric` of `trainer.keep_best`, its best `value` and the `step` of that checkpoint; it is empty
    before the first validation.
    """

    step: int
    update: int
    failed_steps: int
    adam_steps: list[float]
    loss_scale: float
    identity: dict[str, Any]
    best: dict[str, Any] = field(default_factory=dict)


def save(run_dir: Path, engine: Engine, state: RunState, config: dict[str, Any], world: World, keep: int) -> str | None:
    """Publish a checkpoint on all ranks together; returns why it could not be written, or None.

    A failure (a full disk, say) leaves the older checkpoints as they are. Only after the new one is in place are all
    but the newest `keep` and the best one removed.
    """
    final = run_dir / "checkpoints" / step_folder(state.step)
    folder = final.with_suffix(".tmp")
    written: dict[str, dict[str, Any]] = {}
    problem = _make_empty(folder) if world.is_main else None
    world.barrier()
    weights = engine.weights(keep=world.is_main)
    moments = dict(_own_moments(engine, world))
    try:
        name = f"optimizer-{world.rank:05d}-of-{world.size:05d}.safetensors"
        save_file(moments, folder / name)
        written[name] = _make_durable(folder / name)
        if world.is_main:
            save_file(weights, folder / "model.safetensors")
            (folder / "state.json").write_text(json.dumps(asdict(state), indent=1))
            save_yaml(config, folder / "config.yaml")
            for name in ("model.safetensors", "state.json", "config.yaml"):
                written[name] = _make_durable(folder / name)
    except Exception as error:  # safetensors raises its own type for a full disk
        problem = problem or f"{folder}: {error}"
    reports = world.gather((problem, written))
    problem = next((p for p, _ in reports if p), None)
    if world.is_main:
        files = {name: facts for _, part in reports for name, facts in part.items()}
        best = step_folder(state.best["step"]) if state.best else None
        problem = problem or _publish(folder, final, files, keep, best)
        if problem:
            shutil.rmtree(folder, ignore_errors=True)
    return world.from_main(lambda: problem)


def step_folder(step: int) -> str:
    """The name of the checkpoint after `step` steps."""
    return f"step_{step:08d}"


def _make_empty(folder: Path) -> str | None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"{folder}: {error}"
    return None


def _own_moments(engine: Engine, world: World) -> Iterator[tuple[str, Tensor]]:
    """Every rank takes part in gathering every moment and keeps each `world.size`-th one."""
    for index, (key, value) in enumerate(engine.optimizer_state()):
        if index % world.size == world.rank:
            yield key, value


def new_best(state: RunState, trainer: TrainerConfig, values: dict[str, float]) -> dict[str, Any] | None:
    """The next `RunState.best` where the validation's `trainer.keep_best` is the best so far, None where it is not.

    Raises CheckpointError as `check_metric`.
    """
    metric = trainer.keep_best
    if metric is None:
        return None
    check_metric(metric, values)
    value, sign = values[metric], -1 if trainer.keep_best_maximize else 1
    known = state.best.get("metric") == metric
    if math.isnan(value) or (known and sign * value >= sign * state.best["value"]):
        return None
    return {"metric": metric, "value": value, "step": state.step}


def check_metric(metric: str, names: Collection[str]) -> None:
    """Raise CheckpointError, with the nearest of `names`, where the validation has no such metric."""
    if metric not in names:
        raise CheckpointError(f"trainer.keep_best: validation has no '{metric}'; {nearest(metric, sorted(names))}")


def _publish(folder: Path, final: Path, files: dict[str, dict[str, Any]], keep: int, best: str | None) -> str | None:
    try:
        (folder / COMPLETE).write_text(json.dumps({"files": files}, indent=1))
        _make_durable(folder / COMPLETE)
        _sync_folder(folder)
        shutil.rmtree(final, ignore_errors=True)
        folder.rename(final)
        _sync_folder(final.parent)
        for old in _steps(final.parent.parent)[:-keep]:
            if old.name != best:
                shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        return f"{final}: {error}"
    return None


def _make_durable(path: Path) -> dict[str, Any]:
    """Flush a file to the disk, readable as the umask says; its size and hash as read back."""
    give_default_mode(path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _steps(run_dir: Path) -> list[Path]:
    """Published checkpoints, oldest first, verified or not."""
    folder = run_dir / "checkpoints"
    found = [p for p in folder.iterdir() if STEP_FOLDER.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found)


def damage(checkpoint: Path, part: int = 0, parts: int = 1, names: Collection[str] | None = None) -> str | None:
    """What is wrong with a checkpoint, or None.

    Sizes are checked for all files; hashed is every `parts`-th one, or those in `names` alone, for a reader of these.
    """
    try:
        files = json.loads((checkpoint / COMPLETE).read_text())["files"]
        listed = [(name, facts["bytes"], facts["sha256"]) for name, facts in sorted(files.items())]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{checkpoint / COMPLETE}: {error}"
    if not listed:
        return f"{checkpoint / COMPLETE}: lists no files"
    for index, (name, size, sha256) in enumerate(listed):
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != size:
            return f"{path}: missing or of another size than complete.json says"
        if index % parts == part and (names is None or name in names):
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    return f"{path}: content differs from complete.json"
    return None


def method_block(run_dir: Path) -> dict[str, Any] | None:
    """The resolved `method` block of a run folder's newest checkpoint whose config.yaml is whole, None without one."""
    step = newest_checkpoint(run_dir, ("config.yaml",))
    return None if step is None else load_config(step)["method"]


def newest_checkpoint(run_dir: Path, names: Collection[str] | None = None) -> Path | None:
    """The newest complete checkpoint of a run folder whose files `names` (None: all) are verified; for one process."""
    return next((step for step in reversed(_steps(run_dir)) if damage(step, names=names) is None), None)


def find_resumable(run_dir: Path, world: World) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies on all ranks, and a line about each newer one that was passed over."""
    passed_over: list[str] = []
    for name in world.from_main(lambda: [step.name for step in reversed(_steps(run_dir))]):
        step = run_dir / "checkpoints" / name
        problems = [problem for problem in world.gather(damage(step, world.rank, world.size)) if problem]
        if not problems:
            return step, passed_over
        passed_over.append(problems[0])
    return None, passed_over


def set_aside_damaged(run_dir: Path, found: Path | None) -> None:
    """Rename the checkpoints newer than `found`, which did not verify, to `step_N.damaged`; for one process.

    So they take no place among the newest ones, which are kept. Raises CheckpointError, and leaves everything as it is,
    where there are checkpoints and none verified (`found` None): to begin anew in silence would lose the run.
    """
    steps = _steps(run_dir)
    if found is None and steps:
        raise CheckpointError(
            f"{run_dir / 'checkpoints'}: none of {', '.join(step.name for step in steps)} is whole; restore one "
            "of them from a copy, start under another name=, or remove that folder to begin anew"
        )
    for step in steps:
        if found is not None and step.name > found.name:
            shutil.rmtree(step.with_suffix(".damaged"), ignore_errors=True)
            step.rename(step.with_suffix(".damaged"))


def load_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The method's whole state."""
    return load_file(checkpoint / "model.safetensors")


def load_state(checkpoint: Path) -> RunState:
    """Counters and the facts that a resumed run must agree with.

    Raises CheckpointError for the state that another version of this package wrote with other fields.
    """
    values = json.loads((checkpoint / "state.json").read_text())
    if "adam_step" in values:  # checkpoints from before parameter groups could be inactive
        values["adam_steps"] = [values.pop("adam_step")]
    try:
        return RunState(**values)
    except TypeError as error:  # names the field that is unknown or missing
        problem = str(error).removeprefix("RunState.__init__() ")
        raise CheckpointError(
            f"{checkpoint / 'state.json'}: {problem}; it is of another version of this package: update it, or start "
            f"under another name= with init_from={checkpoint}"
        ) from None


def load_config(checkpoint: Path) -> dict[str, Any]:
    """The resolved configuration of the run that wrote a checkpoint."""
    loaded: dict[str, Any] = yaml.safe_load((checkpoint / "config.yaml").read_text(encoding="utf-8"))
    return loaded


@contextmanager
def moment_reader(checkpoint: Path) -> Iterator[Any]:
    """A function from `parameter/moment` to its tensor, reading one at a time, however many ranks wrote them."""
    files = [safe_open(path, framework="pt") for path in sorted(checkpoint.glob("optimizer-*.safetensors"))]
    owner = {key: file for file in files for key in file.keys()}  # noqa: SIM118  # not a dict

    def read(key: str) -> Tensor:
        if key not in owner:
            raise CheckpointError(f"{checkpoint}: optimiser state of '{key}' is missing; it is from another method")
        return owner[key].get_tensor(key)

    yield read


def check_identity(saved: dict[str, Any], now: dict[str, Any], run_dir: Path) -> None:
    """Refuse to resume with another method, batch, crop, seed, audio or labels. Raises CheckpointError with both.

    A fact that `saved` lacks, at any depth, is one that its run did not know yet: None. So is "" among its labels: of
    labels without a k-means model nothing was known once.
    """
    known, labels = saved.get("labels") or [], now.get("labels") or []
    if len(known) == len(labels):
        saved = saved | {"labels": [old or new for old, new in zip(known, labels, strict=True)]}
    changed = [key for key in now if not _same(saved.get(key), now[key])]
    if changed:
        lines = "\n".join(f"  {key}: was {saved.get(key)}, is {now[key]}" for key in changed)
        raise CheckpointError(
            f"{run_dir}: holds a run with other settings; start under another name=, take over its weights with "
            f"init_from={run_dir}, or restore these:\n{lines}"
        )


def _same(saved: Any, now: Any) -> bool:
    """Whether two facts agree, tuples being the lists that JSON makes of them."""
    if isinstance(saved, dict) and isinstance(now, dict):
        return all(_same(saved.get(key), now.get(key)) for key in saved.keys() | now.keys())
    if isinstance(now, list | tuple) and isinstance(saved, list | tuple):
        return len(saved) == len(now) and all(map(_same, saved, now))
    return bool(saved == now)


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold the run folder against a second process. Raises CheckpointError naming the holder's host and pid."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        opened = (run_dir / "lock").open("a+")
    except OSError as error:  # a file among the folders, no right to write
        raise CheckpointError(
            f"{run_dir}: cannot be written ({error.strerror}: {error.filename}); give another output_dir="
        ) from None
    with opened as file:
        try:
            # Not flock: that lock would live on in data workers that outlast a killed trainer by seconds.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise CheckpointError(
                f"{run_dir}: in use by {file.read().strip() or 'another process'}; stop it or choose another name="
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
