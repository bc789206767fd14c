"""Processes: what torchrun says of this one, and the few collectives that are needed outside DeepSpeed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Longer than any micro-batch or checkpoint, so that a dead rank is reported instead of waited for.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """This process among its peers, and the device that it computes on."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints and publishes."""
        return self.rank == 0


def join_world() -> World:
    """Join the process group that torchrun described, or make one of this process alone."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed refuses to start without it
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = None if size > 1 else dist.HashStore()
        dist.init_process_group(backend, rank=rank, world_size=size, store=store, timeout=COLLECTIVE_TIMEOUT)
    return World(rank, size, local_rank, local_size, device)


def share_cores(world: World, threads: int | None) -> None:
    """Give each rank its part of this machine's cores, unless `threads`, OMP_NUM_THREADS or Slurm says how many."""
    if threads is None and "OMP_NUM_THREADS" in os.environ and world.local_size == 1:
        return
    bound = int(os.environ.get("SLURM_CPUS_PER_TASK", 0))
    torch.set_num_threads(threads or bound or max(1, len(os.sched_getaffinity(0)) // world.local_size))


def from_main(value: Any) -> Any:
    """The main rank's `value`, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_agree(verdict: bool) -> bool:
    """True where it is true on every rank."""
    verdicts: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(verdicts, verdict)
    return all(verdicts)
