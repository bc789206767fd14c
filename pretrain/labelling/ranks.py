"""The processes that label together: torchrun's, the trainer's, or this one alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
FIT_TIMEOUT = timedelta(days=2)  # the other ranks wait while rank 0 fits


@dataclass
class Ranks:
    """This process' place; exchanges plain objects and CPU tensors over gloo, whatever the trainer's backend."""

    rank: int = 0
    world_size: int = 1
    group: dist.ProcessGroup | None = None
    owns_process_group: bool = False

    @classmethod
    def join(cls) -> Ranks:
        """Join torchrun's processes (WORLD_SIZE in the environment) or a process group that exists already."""
        owns = not dist.is_initialized()
        if owns:
            if int(os.environ.get("WORLD_SIZE", "1")) == 1:
                return cls()
            dist.init_process_group("gloo", timeout=FIT_TIMEOUT)
        group = dist.new_group(backend="gloo", timeout=FIT_TIMEOUT)
        return cls(dist.get_rank(), dist.get_world_size(), group, owns)

    def leave(self) -> None:
        """Close what `join` opened."""
        if self.group is not None:
            dist.destroy_process_group(None if self.owns_process_group else self.group)

    @property
    def device(self) -> torch.device:
        """The GPU of this local rank, or the CPU where there is none."""
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        return torch.device("cpu")

    def share(self, weights: np.ndarray) -> range:
        """This rank's contiguous range of the (N,) items, cut so that the ranks' sums of `weights` are about equal."""
        total = np.concatenate([[0], np.cumsum(weights)])
        cuts = np.searchsorted(total, total[-1] * np.arange(self.world_size + 1) / self.world_size)
        cuts[0], cuts[-1] = 0, len(weights)
        return range(int(cuts[self.rank]), int(cuts[self.rank + 1]))

    def barrier(self) -> None:
        if self.group is not None:
            dist.barrier(group=self.group)

    def gather(self, item: T) -> list[T]:
        """Every rank's plain object, in rank order, on every rank."""
        if self.group is None:
            return [item]
        items: list[T | None] = [None] * self.world_size
        dist.all_gather_object(items, item, group=self.group)
        return items  # type: ignore[return-value]

    def gather_rows(self, rows: Tensor) -> Tensor | None:
        """The ranks' (n, D) CPU tensors joined in rank order, on rank 0; None elsewhere."""
        if self.group is None:
            return rows
        counts = self.gather(len(rows))
        if self.rank != 0:
            dist.send(rows.contiguous(), dst=0, group=self.group)
            return None
        joined = rows.new_empty(sum(counts), *rows.shape[1:])
        pieces = joined.split(counts)
        pieces[0].copy_(rows)
        for source, piece in enumerate(pieces[1:], start=1):
            dist.recv(piece, src=source, group=self.group)
        return joined

    def from_rank_0(self, make: Callable[[], T]) -> T:
        """Run `make` on rank 0 and hand its plain result to all; an exception there is raised on all ranks."""
        if self.group is None:
            return make()
        outcome: list[object] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = make()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self.group)
        if outcome[1] is not None:
            raise outcome[1]  # type: ignore[misc]
        return outcome[0]  # type: ignore[return-value]
