"""Compiling the layers of a network that repeat."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def compile_in_place(layers: Iterable[nn.Module]) -> None:
    """Compile each layer; parameter names stay. Meant for GPUs, and for batches that come in few shapes."""
    # Each shape is compiled for training and evaluation; torch gives up after eight by default.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for layer in layers:
        layer.compile(dynamic=False)
