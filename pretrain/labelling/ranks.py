"""The processes that label together: torchrun's, the trainer's, or this one alone; and how they share the work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import numpy as np
import torch.distributed as dist
from torch import Tensor

from pretrain.world import World

FIT_TIMEOUT = timedelta(days=2)  # the other ranks wait while the main one fits


@contextmanager
def labelling_world() -> Iterator[World]:
    """Torchrun's processes, or those of a process group that exists already; it stays when the block ends.

    They exchange plain objects and CPU tensors over gloo, whatever the trainer's backend.
    """
    world, owns_process_group = World.described(), not dist.is_initialized()
    if world.size == 1:
        yield world
        return
    if owns_process_group:
        dist.init_process_group("gloo", timeout=FIT_TIMEOUT)
    group = dist.new_group(backend="gloo", timeout=FIT_TIMEOUT)
    try:
        yield replace(world, group=group)
    finally:
        dist.destroy_process_group(None if owns_process_group else group)


def share_of(world: World, weights: np.ndarray) -> range:
    """This rank's contiguous range of the (N,) items, cut so that the ranks' sums of `weights` are about equal."""
    total = np.concatenate([[0], np.cumsum(weights)])
    cuts = np.searchsorted(total, total[-1] * np.arange(world.size + 1) / world.size)
    cuts[0], cuts[-1] = 0, len(weights)
    return range(int(cuts[world.rank]), int(cuts[world.rank + 1]))


def gather_rows(world: World, rows: Tensor) -> Tensor | None:
    """The ranks' (n, D) CPU tensors joined in rank order, on the main rank; None elsewhere."""
    if world.size == 1:
        return rows
    counts = world.gather(len(rows))
    if not world.is_main:
        dist.send(rows.contiguous(), dst=0, group=world.group)
        return None
    joined = rows.new_empty(sum(counts), *rows.shape[1:])
    pieces = joined.split(counts)
    pieces[0].copy_(rows)
    for source, piece in enumerate(pieces[1:], start=1):
        dist.recv(piece, src=source, group=world.group)
    return joined
