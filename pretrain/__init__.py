"""Pre-training of self-supervised speech and audio models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.upstream import Upstream

__all__ = ["Upstream"]


def __getattr__(name: str) -> Any:
    # Lazily, so that importing a submodule does not import torch and the encoder code first.
    if name == "Upstream":
        from pretrain.upstream import Upstream

        return Upstream
    raise AttributeError(f"module 'pretrain' has no attribute '{name}'")
