"""Files and directories that appear whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def new_file(path: Path, durable: bool = False) -> Iterator[Path]:
    """A path beside `path` for the block to write; the file takes its place when the block ends.

    When the block raises, nothing is left and a file that was there stays. `durable` flushes the content to the disk
    before the renaming, so that not even a power failure leaves a file that is named but not whole.
    """
    temporary = _beside(path)
    try:
        yield temporary
        if durable:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def open_new(path: Path, mode: str = "wb") -> Iterator[IO]:
    """As `new_file`, durable, with the file opened for writing; text is UTF-8 whatever the locale is."""
    encoding = None if "b" in mode else "utf-8"
    with new_file(path, durable=True) as temporary, temporary.open(mode, encoding=encoding) as file:
        yield file


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A directory beside `target` that takes its place when the block ends, and vanishes when it raises."""
    temporary = _beside(target)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        take_place(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def take_place(directory: Path, target: Path) -> None:
    """Give a finished `directory` the name `target` beside it, in place of a directory that had it."""
    replaced = _beside(target)
    if target.exists():
        os.replace(target, replaced)
    os.replace(directory, target)
    shutil.rmtree(replaced, ignore_errors=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
