"""Packing many small audio files into a few stored zip archives that are read by byte range."""

from __future__ import annotations

import os
import shutil
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from pretrain.data.archive import parse_range, stored_entries
from pretrain.data.manifest import Manifest, write_manifest
from pretrain.errors import UserError
from pretrain.files import new_file

COPY_BYTES = 1 << 20
MAX_ENTRIES = 1 << 20  # keeps an archive's directory small enough to read at once


class PackError(UserError):
    """A manifest that cannot be packed: "<file>: <what>; <what to do>"."""


def pack(manifest: Manifest, output: Path, archive_bytes: int) -> int:
    """Pack a manifest's files into `<output>_00000.zip`, ... and write `<output>.tsv`; returns the number of archives.

    An archive is closed when it has reached `archive_bytes`. The manifest is written last; its root is ".", so that
    the folder can be moved. Raises PackError where the output exists, a file is gone or the audio is packed already.
    """
    target = output.with_name(output.name + ".tsv")
    if target.exists():
        raise PackError(f"{target}: exists; remove it with its archives, or choose another output")
    if archive_bytes <= 0:
        raise PackError(f"archive_mb: {archive_bytes} bytes is not a size; 1024 is usual")
    output.parent.mkdir(parents=True, exist_ok=True)
    archives = list(_archives(manifest, archive_bytes))
    write_manifest(target, Path("."), _packed_rows(manifest, output, archives))
    return len(archives)


def _packed_rows(manifest: Manifest, output: Path, archives: list[range]) -> Iterator[tuple[str, int]]:
    """Write the archives one after the other and give the rows of the new manifest."""
    with tqdm(total=len(manifest), desc=f"packing {output}", unit="file", disable=None) as progress:
        for number, rows in enumerate(archives):
            archive = output.with_name(f"{output.name}_{number:05d}.zip")
            ranges = _write_archive(archive, manifest, rows)
            for row, (offset, length) in zip(rows, ranges, strict=True):
                yield f"{archive.name}:{offset}:{length}", int(manifest.lengths[row])
            progress.update(len(rows))


def _archives(manifest: Manifest, archive_bytes: int) -> Iterator[range]:
    """Consecutive rows whose files fill one archive each."""
    first, size = 0, 0
    for row in range(len(manifest)):
        path = manifest.path(row)
        if parse_range(path):
            raise PackError(f"{manifest.path_of_manifest}: line {row + 2}: is packed already; give the first manifest")
        try:
            size += os.stat(path).st_size
        except OSError as error:
            raise PackError(f"{path}: cannot be read ({error.strerror}); prepare the manifest again") from error
        if size >= archive_bytes or row + 1 - first >= MAX_ENTRIES:
            yield range(first, row + 1)
            first, size = row + 1, 0
    if first < len(manifest):
        yield range(first, len(manifest))


def _write_archive(archive: Path, manifest: Manifest, rows: range) -> list[tuple[int, int]]:
    """Write one archive in one move; returns (offset, length) in bytes of every row's file."""
    with new_file(archive, durable=True) as temporary:
        with zipfile.ZipFile(temporary, "x", zipfile.ZIP_STORED) as file:
            for row in rows:
                # A fixed date (the format's first) makes equal input give equal archives.
                entry = zipfile.ZipInfo(manifest.relative_path(row), (1980, 1, 1, 0, 0, 0))
                entry.external_attr = (stat.S_IFREG | 0o644) << 16
                entry.file_size = os.stat(manifest.path(row)).st_size  # decides on the 64-bit header
                with open(manifest.path(row), "rb") as source, file.open(entry, "w") as destination:
                    shutil.copyfileobj(source, destination, COPY_BYTES)
        ranges = sorted((offset, length) for offset, (_, length) in stored_entries(str(temporary)).items())
    return ranges
