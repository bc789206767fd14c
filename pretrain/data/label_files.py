"""Writing label directories: shards per rank, merged in rank order, every file complete or absent."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

from pretrain.files import open_new


def label_dtype(num_classes: int) -> np.dtype:
    """The smallest of int16 and int32 that holds the classes."""
    return np.dtype(np.int16 if num_classes <= np.iinfo(np.int16).max else np.int32)


class LabelWriter:
    """Streams one shard of one split: the labels of a contiguous range of manifest rows, in row order.

    Nothing is visible under the split's own names until `merge_shards` joins the shards.
    """

    def __init__(
        self, directory: Path, split: str, num_classes: int, shard: int | str = 0, with_text: bool = True
    ) -> None:
        self.num_classes = num_classes
        self.split = split
        self.shard = shard
        self._dtype = label_dtype(num_classes)
        self._counts: list[int] = []
        self._paths = _shard_paths(directory, split, shard)
        self._array = self._paths["array"].open("wb")
        self._text = self._paths["text"].open("w") if with_text else None

    def write(self, labels: np.ndarray) -> None:
        """Append the (F,) integer labels of the next row; F may be 0. Raises ValueError for a class out of range."""
        labels = np.asarray(labels)
        if len(labels) and not (labels.min() >= 0 and labels.max() < self.num_classes):
            outside = labels.min() if labels.min() < 0 else labels.max()
            raise ValueError(f"class {outside} is not one of the {self.num_classes} (0 to {self.num_classes - 1})")
        self._array.write(labels.astype(self._dtype).tobytes())
        if self._text is not None:
            self._text.write(" ".join(map(str, labels.tolist())) + "\n")
        self._counts.append(len(labels))

    def close(self) -> None:
        """Complete the shard's files."""
        self._array.close()
        if self._text is not None:
            self._text.close()
        with self._paths["counts"].open("wb") as file:
            np.save(file, np.array(self._counts, dtype=np.int64))

    def discard(self) -> None:
        """Remove the shard's files."""
        for path in self._paths.values():
            path.unlink(missing_ok=True)


def merge_shards(directory: Path, split: str, num_classes: int, shards: Sequence[int | str] = (0,)) -> None:
    """Join the shards in the given order into `{split}.npy`, `{split}.offsets.npy` and, if written, `{split}.km`."""
    paths = [_shard_paths(directory, split, shard) for shard in shards]
    counts = np.concatenate([np.load(path["counts"]) for path in paths])
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    with open_new(directory / f"{split}.npy") as file:
        descr = np.lib.format.dtype_to_descr(label_dtype(num_classes))
        header = {"descr": descr, "fortran_order": False, "shape": (int(offsets[-1]),)}
        np.lib.format.write_array_header_1_0(file, header)
        _append_all(file, [path["array"] for path in paths])
    with open_new(directory / f"{split}.offsets.npy") as file:
        np.save(file, offsets)
    texts = [path["text"] for path in paths if path["text"].exists()]
    if texts:
        with open_new(directory / f"{split}.km") as file:
            _append_all(file, texts)
    for path in paths:
        for part in path.values():
            part.unlink(missing_ok=True)


def write_dictionary(directory: Path, num_classes: int) -> None:
    """Write fairseq's dict.km.txt: "k 1" for every class."""
    with open_new(directory / "dict.km.txt", "w") as file:
        file.writelines(f"{k} 1\n" for k in range(num_classes))


def parse_fairseq_split(directory: Path, split: str, num_classes: int) -> list[str]:
    """Parse `{split}.km` into arrays beside it, unless arrays of this very text are there already.

    Returns what is wrong, one message per bad line (tokens that are no integers, classes out of range); with any, no
    arrays are written. Several processes may do this at once: each writes the same files, whole.
    """
    text, stamp = directory / f"{split}.km", directory / f"{split}.parsed.json"
    status = text.stat()
    current = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "num_classes": num_classes}
    if stamp.is_file() and json.loads(stamp.read_text()) == current:
        return []
    writer = LabelWriter(directory, split, num_classes, shard=uuid.uuid4().hex, with_text=False)
    problems = []
    with text.open() as lines:
        for number, line in enumerate(lines, start=1):
            try:
                writer.write(np.array(line.split(), dtype=np.int64))
            except ValueError as error:
                problems.append(f"line {number}: {error}")
    writer.close()
    if problems:
        writer.discard()
        return problems
    merge_shards(directory, split, num_classes, [writer.shard])
    with open_new(stamp, "w") as file:
        json.dump(current, file)
    return []


def _shard_paths(directory: Path, split: str, shard: int | str) -> dict[str, Path]:
    return {kind: directory / f".{split}.{shard}.{kind}.part" for kind in ("array", "counts", "text")}


def _append_all(target: IO[bytes], paths: list[Path]) -> None:
    for path in paths:
        with path.open("rb") as source:
            shutil.copyfileobj(source, target, length=1 << 20)
