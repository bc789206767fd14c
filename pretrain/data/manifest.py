"""Manifests in fairseq's format: the root folder, then one `relative/path<TAB>samples` a line (samples at 16 kHz)."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from pretrain.data.archive import parse_range, stored_entries
from pretrain.errors import UserError
from pretrain.files import open_new

CHUNK_BYTES = 1 << 24
MAX_DIGITS = 15
MISSING_CHECKS = 10_000
HINT = "run `python tools/prepare_manifest.py audio_dir=... output=...`"
NEWLINE, TAB, CARRIAGE_RETURN, ZERO = b"\n\t\r0"
Fail = Callable[[int, str], None]  # line and problem; raises


class ManifestError(UserError):
    """A manifest that cannot be used: "<file>: line <n>: <what>; <what to do>"."""


class Manifest:
    """The rows of one split. Only offsets and lengths are in memory (16 bytes a row), the text is memory-mapped.

    Pickling takes the path alone; the receiver maps the file again.
    """

    def __init__(self, path: Path) -> None:
        self.path_of_manifest = path
        self._text = _map_file(path)
        header_end = self._text.find(b"\n")
        header = self._text[: header_end if header_end >= 0 else len(self._text)].rstrip(b"\r")
        if not header or b"\t" in header:
            raise ManifestError(f"{path}: line 1: the root folder is missing; write it alone on the first line")
        if header_end < 0 or header_end + 1 == len(self._text):
            raise ManifestError(f"{path}: lists no audio; {HINT}")
        self.root = (path.parent / os.fsdecode(header)).resolve()
        self._body = header_end + 1
        self._offsets, self.lengths = self._index()

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Index a manifest; relative roots are resolved against its folder.

        Raises ManifestError, with file and line, for a file or root line that is missing, for a manifest without rows,
        and for a row without exactly one tab or whose length is not a positive integer.
        """
        return cls(Path(path))

    def __reduce__(self) -> tuple[type[Manifest], tuple[Path]]:
        return Manifest, (self.path_of_manifest.absolute(),)

    def __len__(self) -> int:
        return len(self.lengths)

    def relative_path(self, row: int) -> str:
        """The path as the manifest has it, `archive.zip:offset:length` included."""
        begin = int(self._offsets[row])
        return os.fsdecode(self._text[begin : self._text.find(b"\t", begin)])

    def path(self, row: int) -> str:
        """The absolute path, in the form that `pretrain.data.audio.read_audio` takes."""
        return os.path.join(self.root, self.relative_path(row))

    def utterance_id(self, row: int) -> str:
        """One of `utterance_ids`."""
        return self._utterance_id(row, self.relative_path(row))

    def utterance_ids(self) -> Iterator[str]:
        """Every row's relative path without suffix; for packed audio that of the entry's name inside the archive.

        Raises ManifestError where the archive has no stored entry at that place.
        """
        row = 0
        for begin, end in self._chunks():
            for line in self._text[begin:end].removesuffix(b"\n").split(b"\n"):
                yield self._utterance_id(row, os.fsdecode(line[: line.index(b"\t")]))
                row += 1

    def _utterance_id(self, row: int, relative: str) -> str:
        byte_range = parse_range(os.path.join(self.root, relative)) if ".zip:" in relative else None
        if byte_range is not None:
            entries = _entries(byte_range.archive)
            if byte_range.offset not in entries:
                raise ManifestError(f"{self.path_of_manifest}: line {row + 2}: no entry there; pack the audio again")
            relative = entries[byte_range.offset][0]
        return os.path.splitext(relative)[0]

    def fingerprint(self) -> str:
        """SHA-256 over relative paths and lengths; the root and the line ends do not count."""
        digest = hashlib.sha256()
        for begin, end in self._chunks():
            digest.update(self._text[begin:end].replace(b"\r\n", b"\n"))
        if self._text[-1] != NEWLINE:
            digest.update(b"\n")
        return digest.hexdigest()

    def missing(self, limit: int = 10) -> list[str]:
        """The first `limit` paths that are gone, among at most 10,000 rows taken at even distances."""
        gone: list[str] = []
        present: set[str] = set()
        for row in np.unique(np.linspace(0, len(self) - 1, min(len(self), MISSING_CHECKS)).astype(np.int64)):
            path = self.path(int(row))
            byte_range = parse_range(path)
            file = byte_range.archive if byte_range else path
            if file in present:
                continue
            if os.path.exists(file):
                present.add(file)
            else:
                gone.append(path)
                if len(gone) == limit:
                    break
        return gone

    def _chunks(self) -> Iterator[tuple[int, int]]:
        """Byte ranges of whole lines, about CHUNK_BYTES each, from the first row to the end."""
        begin = self._body
        while begin < len(self._text):
            end = self._text.find(b"\n", min(begin + CHUNK_BYTES, len(self._text)) - 1)
            end = len(self._text) if end < 0 else end + 1
            yield begin, end
            begin = end

    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        """(N,) int64 offsets of the rows in the file and (N,) int64 lengths, found chunk by chunk in numpy."""
        offsets, lengths, line = [], [], 2
        for begin, end in self._chunks():
            starts, values = _parse_rows(np.frombuffer(self._text, np.uint8, end - begin, begin), self._fail, line)
            offsets.append(starts + begin)
            lengths.append(values)
            line += len(starts)
        return np.concatenate(offsets), np.concatenate(lengths)

    def _fail(self, line: int, problem: str) -> None:
        raise ManifestError(f"{self.path_of_manifest}: line {line}: {problem}; correct the line, or {HINT}")


def _map_file(path: Path) -> mmap.mmap:
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise ManifestError(f"{path}: is empty; {HINT}")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ManifestError(f"{path}: no such manifest; {HINT}") from error


def _parse_rows(text: np.ndarray, fail: Fail, first_line: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts of the lines and the numbers behind their tabs; `text` is (n,) uint8 and holds whole lines."""
    ends = np.flatnonzero(text == NEWLINE)
    if text[-1] != NEWLINE:
        ends = np.append(ends, len(text))
    starts = np.concatenate([[0], ends[:-1] + 1])
    tabs = np.flatnonzero(text == TAB)
    tabs_per_row = np.searchsorted(tabs, ends) - np.searchsorted(tabs, starts)
    _require(tabs_per_row == 1, fail, first_line, "is not `path<TAB>samples`")
    _require(tabs > starts, fail, first_line, "has no path before the tab")
    digits = ends - (text[ends - 1] == CARRIAGE_RETURN) - tabs - 1
    integer = (digits > 0) & (digits <= MAX_DIGITS)
    values = np.zeros(len(ends), np.int64)
    for place in range(int(digits[integer].max(initial=0))):
        rows = np.flatnonzero(integer & (digits > place))
        digit = text[tabs[rows] + 1 + place].astype(np.int64) - ZERO
        integer[rows[(digit < 0) | (digit > 9)]] = False
        values[rows] = values[rows] * 10 + digit
    _require(integer & (values > 0), fail, first_line, "the length is not a positive integer")
    return starts, values


def _require(good: np.ndarray, fail: Fail, first_line: int, problem: str) -> None:
    if not good.all():
        fail(first_line + int(np.argmin(good)), problem)


@lru_cache(maxsize=64)
def _entries(archive: str) -> dict[int, tuple[str, int]]:
    return stored_entries(archive)


def write_manifest(path: Path, root: Path, rows: Iterable[tuple[str, int]]) -> None:
    """Write a manifest in one move; `rows` are relative paths and lengths in samples at 16 kHz.

    Raises ManifestError for a path with a tab or line break and for a length that is not positive.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_new(path) as file:
        file.write(os.fsencode(root) + b"\n")
        for relative, length in rows:
            if set("\t\r\n") & set(relative):
                raise ManifestError(f"{path}: {relative!r}: a tab or line break in a file name; rename the file")
            if length <= 0:
                raise ManifestError(f"{path}: {relative}: {length} samples; leave the file out")
            file.write(os.fsencode(relative) + b"\t%d\n" % length)
