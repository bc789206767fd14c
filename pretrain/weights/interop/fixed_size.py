"""Files that say nothing of a network's size, because the only client that reads them has it in its code."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from pretrain.weights.interop.types import InteropError


def state_of_size(checkpoint: Mapping[str, Any], title: str, key: str, shape: tuple[int, ...]) -> Mapping[str, Tensor]:
    """The state dict under "model", where tensor `key` has `shape`.

    Raises InteropError, calling the method `title`, for any other file.
    """
    state = checkpoint.get("model")
    if not isinstance(state, Mapping) or (weight := state.get(key)) is None:
        raise InteropError(
            f"keys {', '.join(map(str, checkpoint))}: not {title}'s layout (model.{key}); give a checkpoint of {title}"
        )
    if tuple(weight.shape) != shape:
        raise InteropError(
            f"model.{key}: {tuple(weight.shape)}, not {shape}; this layout has one size, so give a checkpoint of "
            f"{title} in the published one"
        )
    return state


def require_size(
    config: Mapping[str, Any], published: Mapping[str, Any], client: str, free: Collection[str] = ()
) -> None:
    """Raises InteropError where an encoder's `config` differs from what s3prl's `client` has; `free` fields may."""
    for name, value in published.items():
        if name not in free and config[name] != value:
            raise InteropError(
                f"method.encoder.{name}: {config[name]} where s3prl's {client} has {value} in its code; export to the "
                "native format instead"
            )
