"""Byte ranges of stored zip entries, written `archive.zip:offset:length` as fairseq writes them; offsets in bytes."""

from __future__ import annotations

import io
import os
import re
import struct
import zipfile
from functools import lru_cache
from typing import NamedTuple

OPEN_ARCHIVES = 64
BUFFER_BYTES = 1 << 16
_RANGE = re.compile(r"(.+\.zip):(\d+):(\d+)", re.DOTALL)
_LOCAL_HEADER_BYTES = 30  # fixed part of a local file header; name and extra field follow (PKZIP APPNOTE 4.3.7)
_NAME_LENGTHS_OFFSET = 26


class ByteRange(NamedTuple):
    """`length` bytes from byte `offset` of the file `archive`."""

    archive: str
    offset: int
    length: int


def parse_range(path: str) -> ByteRange | None:
    """The range that `archive.zip:offset:length` names, or None for an ordinary path."""
    match = _RANGE.fullmatch(path)
    return ByteRange(match[1], int(match[2]), int(match[3])) if match else None


class _Archive:
    """An open file that is closed when nobody refers to it any more."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self.descriptor).st_size

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@lru_cache(maxsize=OPEN_ARCHIVES)
def _open_archive(path: str) -> _Archive:
    return _Archive(path)


class _Window(io.RawIOBase):
    """A read-only file that is a byte range of another.

    It reads by `pread`, which leaves the descriptor's position alone: threads and forked workers share one descriptor.
    """

    def __init__(self, archive: _Archive, offset: int, length: int) -> None:
        self._archive, self._offset, self._length, self._position = archive, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # BufferedReader passes nothing else
        count = min(len(buffer), max(0, self._length - self._position))
        data = os.pread(self._archive.descriptor, count, self._offset + self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def open_range(byte_range: ByteRange) -> io.BufferedReader:
    """The range as a seekable binary file; the archive itself stays open for the next range.

    Raises OSError for an archive that cannot be opened and EOFError for a range that ends behind it.
    """
    archive = _open_archive(byte_range.archive)
    if byte_range.offset + byte_range.length > archive.size:
        raise EOFError(f"the range ends behind the archive's {archive.size} bytes")
    return io.BufferedReader(_Window(archive, byte_range.offset, byte_range.length), BUFFER_BYTES)


def stored_entries(archive: str) -> dict[int, tuple[str, int]]:
    """{offset of the data: (name, length)} of every stored entry of a zip file, from its directory."""
    entries = {}
    with zipfile.ZipFile(archive) as directory, open(archive, "rb") as file:
        for entry in directory.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.is_dir():
                continue
            file.seek(entry.header_offset + _NAME_LENGTHS_OFFSET)
            # The local header's extra field may differ from the directory's, so its length is read there.
            name_length, extra_length = struct.unpack("<HH", file.read(4))
            offset = entry.header_offset + _LOCAL_HEADER_BYTES + name_length + extra_length
            entries[offset] = (entry.filename, entry.file_size)
    return entries
