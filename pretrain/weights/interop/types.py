"""What travels between a method's `interop` module and the code that reads, exports and initialises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain.errors import UserError


class InteropError(UserError, ValueError):
    """A checkpoint that cannot be read, converted or exported: `<file>: <field>: <what is wrong>; <what to do>`."""


@contextmanager
def errors_name(origin: str | Path) -> Iterator[None]:
    """Errors of the block, in which the configuration of a file is read, become InteropErrors that name `origin`.

    A configuration of somebody else's may hold anything: what no check of ours foresees is reported in Python's words.
    """
    try:
        yield
    except UserError as error:
        named = str(error) if str(error).startswith(str(origin)) else f"{origin}: {error}"
        raise InteropError(named) from error
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise InteropError(
            f"{origin}: its configuration makes no network ({type(error).__name__}: {error}); correct it, or copy or "
            "download it again"
        ) from error


@dataclass(frozen=True)
class Imported:
    """A foreign checkpoint in this project's names.

    `encoder_config` is what `Encoder.from_config` takes, `encoder_state` what `Encoder.load_state_dict` takes, and
    `head_state` the method's tensors outside the encoder, empty where the file has none.
    """

    encoder_config: dict[str, Any]
    encoder_state: dict[str, Tensor]
    head_state: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainedMethod:
    """One of our checkpoints: the resolved `method` block and `Method.state_dict()` (encoder tensors: `encoder.*`).

    `kmeans_dir` is the k-means model that made the run's first label set, where it travelled with the run.
    """

    method_name: str
    config: dict[str, Any]
    state: dict[str, Tensor]
    kmeans_dir: Path | None = None

    def encoder_config(self) -> dict[str, Any]:
        """The plain mapping that the encoder's `from_config` takes."""
        return self.config["encoder"]

    def encoder_state(self) -> dict[str, Tensor]:
        """The encoder's tensors under the encoder's own names."""
        return {key.removeprefix("encoder."): value for key, value in self.state.items() if key.startswith("encoder.")}

    def head_state(self) -> dict[str, Tensor]:
        """Every tensor outside the encoder."""
        return {key: value for key, value in self.state.items() if not key.startswith("encoder.")}


@dataclass(frozen=True)
class NamedFiles:
    """Several .pt files that a client reads together, by file name, and a sentence on how it finds them.

    Their contents are plain, except that an `argparse.Namespace` may hold options where the client insists on one.
    """

    files: dict[str, dict[str, Any]]
    usage: str


@dataclass(frozen=True)
class HuggingFaceModel:
    """The parts of a Hugging Face directory: config.json, the weights, preprocessor_config.json (empty if absent)."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    preprocessor: dict[str, Any] = field(default_factory=dict)
