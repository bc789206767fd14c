"""Activation checkpointing: layers whose activations are not kept for backward, which runs their forward again."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def call(module: nn.Module, *inputs: Any, checkpointing: bool) -> Any:
    """`module(*inputs)`; with `checkpointing` only the inputs are kept, and backward repeats the forward.

    The repetition draws the same dropout and runs under the same autocast; without gradients it never happens.
    """
    if not checkpointing or not torch.is_grad_enabled():
        return module(*inputs)
    # Autocast would keep its copy of every weight until forward ends, although backward makes a new one.
    keeps_copies = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        return checkpoint(module, *inputs, use_reentrant=False)
    finally:
        torch.set_autocast_cache_enabled(keeps_copies)
