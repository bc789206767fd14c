"""Processes: what torchrun says of this one, its device, and the few exchanges that are needed outside DeepSpeed."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist

T = TypeVar("T")
# Longer than any micro-batch or checkpoint, so that a dead rank is reported instead of waited for.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """This process among its peers, and the device that it computes on; `group` None is torch's default group."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    group: dist.ProcessGroup | None = None

    @classmethod
    def described(cls) -> World:
        """What the process group says, or torchrun's environment where there is none yet; one process without both."""
        joined = dist.is_initialized()
        rank = dist.get_rank() if joined else int(os.environ.get("RANK", 0))
        size = dist.get_world_size() if joined else int(os.environ.get("WORLD_SIZE", 1))
        local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", local_rank % torch.cuda.device_count())
        return cls(rank, size, local_rank, local_size, device)

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints and publishes."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier(group=self.group)

    def gather(self, item: T) -> list[T]:
        """Every rank's plain object, in rank order, on every rank."""
        if self.size == 1:
            return [item]
        items: list[T | None] = [None] * self.size
        dist.all_gather_object(items, item, group=self.group)
        return cast(list[T], items)

    def from_main(self, make: Callable[[], T]) -> T:
        """Run `make` on the main rank and hand its plain result to all; an exception there is raised on all ranks."""
        if self.size == 1:
            return make()
        outcome: list[object] = [None, None]
        if self.is_main:
            try:
                outcome[0] = make()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self.group)
        if outcome[1] is not None:
            raise cast(Exception, outcome[1])
        return cast(T, outcome[0])


def join_world() -> World:
    """Join the process group that torchrun described, or make one of this process alone."""
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed refuses to start without it
    world = World.described()
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    if not dist.is_initialized():
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        store = None if world.size > 1 else dist.HashStore()
        dist.init_process_group(
            backend, rank=world.rank, world_size=world.size, store=store, timeout=COLLECTIVE_TIMEOUT
        )
    return world


def share_cores(world: World, threads: int | None) -> None:
    """Give each rank its part of this machine's cores, unless `threads`, OMP_NUM_THREADS or Slurm says how many."""
    if threads is None and "OMP_NUM_THREADS" in os.environ and world.local_size == 1:
        return
    bound = int(os.environ.get("SLURM_CPUS_PER_TASK", 0))
    torch.set_num_threads(threads or bound or max(1, len(os.sched_getaffinity(0)) // world.local_size))
