"""The import of deepspeed, what must be set before it, and every place where we reach into its inside.

Written against DeepSpeed 0.19.8; what is said of its behaviour is of that version. `zero` is the optimiser that
DeepSpeed wraps around ours at ZeRO 1 to 3.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from torch import Tensor, nn

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed  # the accelerator must be chosen before
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.utils import (
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)

__all__ = [
    "deepspeed",
    "forget_gradients",
    "link_moments",
    "parts_by_group",
    "scale_losses",
    "set_whole_moment",
    "whole_moment",
]

# On CPUs DeepSpeed would compile a shared-memory all-reduce at start; gloo does without a compiler.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def scale_losses(zero: Any) -> None:
    """Let ZeRO scale losses and gradients for fp16, which it does by itself only for weights in fp16."""
    zero.loss_scaler = DynamicLossScaler(
        init_scale=2.0**16,
        scale_window=2000,
        min_scale=1.0,
        delayed_shift=1,
        consecutive_hysteresis=False,
        raise_error_at_min_scale=False,
        dtype=torch.half,
    )


def forget_gradients(zero: Any) -> None:
    """After an update at ZeRO 3: its gradients would be used again for a layer that the next update skips."""
    zero.grad_partitions_flat_buffer.zero_()


def link_moments(zero: Any) -> None:
    """Let ZeRO 1 and 2 find the moments of all parameter groups.

    They look for them once, after the first of several groups has stepped, when the other groups have none yet.
    """
    zero._hp_optimizer_states_linked = False
    zero._lazy_init_hp_params_optimizer_state()


def whole_moment(parameter: nn.Parameter, moment: str) -> Tensor:
    """A moment of a parameter, whole, at ZeRO 1 to 3; a collective call."""
    return safe_get_full_optimizer_state(parameter, moment)


def set_whole_moment(parameter: nn.Parameter, moment: str, value: Tensor, zero_stage: int) -> None:
    """Set a moment of a parameter from its whole `value` at ZeRO 1 to 3.

    At ZeRO 3 the setter of a whole value reads past the end where the ranks do not divide the size.
    """
    if zero_stage == 3:
        safe_set_local_optimizer_state(parameter, _own_part(value), moment)
    else:
        safe_set_full_optimizer_state(parameter, value, moment)


def parts_by_group(zero: Any, groups: int) -> list[list[Tensor]]:
    """The flat parts that our optimiser steps at ZeRO 3, by the parameter group that they were cut from."""
    by_group: list[list[Tensor]] = [[] for _ in range(groups)]
    for index, part in enumerate(zero.fp32_partitioned_groups_flat):
        by_group[zero.sub_group_to_group_id[index]].append(part)
    return by_group


def _own_part(value: Tensor) -> Tensor:
    """This rank's equal share of a flat tensor, zeros after its end, as ZeRO 3 cuts parameters."""
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    size = -(-value.numel() // world)
    return nn.functional.pad(value.flatten(), (0, size * world - value.numel()))[rank * size : (rank + 1) * size]
