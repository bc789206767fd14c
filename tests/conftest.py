"""Fixtures that several test files use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pretrain.world import World

ROOT = Path(__file__).resolve().parent.parent
# What torchrun and DeepSpeed leave in the environment of a process; children must start without it.
LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with parity fixtures and real speech, where there is one beside the repository."""
    folder = Path(os.environ.get("HEADWATER_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: set HEADWATER_SHARED to the folder of fixtures and real speech")
    return folder


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """This process as a world of one, for everything that calls collectives."""
    import torch.distributed as dist

    from pretrain.world import join_world

    before = {name: os.environ.pop(name, None) for name in LAUNCH_VARIABLES}
    yield join_world()
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ.pop("LOCAL_RANK", None)
    os.environ.update({name: value for name, value in before.items() if value is not None})


def run_python(arguments: list[str], ranks: int = 1, **options: Any) -> subprocess.CompletedProcess[str]:
    """A script in a process of its own, under torchrun where `ranks` is more than one."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCH_VARIABLES}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *launcher, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, **options)


@pytest.fixture(scope="session")
def two_ranks(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two_ranks.py found, launched once, after this process has left its own checkpoints beside it."""
    from two_ranks import STAGES, unbroken

    folder = tmp_path_factory.mktemp("ranks")
    alone = {stage: unbroken(folder, stage, world) for stage in STAGES}
    done = run_python([str(ROOT / "tests" / "two_ranks.py"), str(folder)], ranks=2, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return {**json.loads((folder / "two_ranks.json").read_text()), "alone": alone, "folder": folder}
