"""Several corpora as one: rows are numbered through the manifests in the order given, without copying their texts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np

from pretrain.data.labels import LabelError, LabelSet
from pretrain.data.manifest import Manifest

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class ByRow(Protocol[T_co]):
    """Whatever is asked for by manifest row: labels, transcripts."""

    def __getitem__(self, row: int, /) -> T_co: ...


def first_rows(manifests: Sequence[Manifest]) -> np.ndarray:
    """(C + 1,) joint row at which each of C manifests begins, and the number of all rows."""
    return np.concatenate([[0], np.cumsum([len(manifest) for manifest in manifests])])


def locate(firsts: np.ndarray, row: int) -> tuple[int, int]:
    """Joint row to the part that has it, and its row there; `firsts` as `first_rows` gives them."""
    part = int(np.searchsorted(firsts, row, side="right")) - 1
    return part, row - int(firsts[part])


class JoinedManifest:
    """Manifests one behind the other, as one manifest is read; the parts stay memory-mapped."""

    def __init__(self, parts: list[Manifest]) -> None:
        self.parts = parts
        self.lengths = np.concatenate([part.lengths for part in parts])
        self._firsts = first_rows(parts)

    def __reduce__(self) -> tuple[type[JoinedManifest], tuple[list[Manifest]]]:
        return JoinedManifest, (self.parts,)

    def __len__(self) -> int:
        return len(self.lengths)

    def path(self, row: int) -> str:
        """The absolute path, as `Manifest.path` gives it."""
        part, own = locate(self._firsts, row)
        return self.parts[part].path(own)

    def fingerprint(self) -> str:
        """SHA-256 over the parts' fingerprints, in order."""
        return hashlib.sha256("".join(part.fingerprint() for part in self.parts).encode()).hexdigest()


class JoinedRows(Generic[T]):
    """What the parts hold by row, by joint row."""

    def __init__(self, parts: Sequence[ByRow[T]], firsts: np.ndarray) -> None:
        self.parts = list(parts)
        self._firsts = firsts

    def __getitem__(self, row: int) -> T:
        part, own = locate(self._firsts, row)
        return self.parts[part][own]


class JoinedLabels(JoinedRows[np.ndarray]):
    """Label sets of several corpora as one."""

    def __init__(self, parts: list[LabelSet], firsts: np.ndarray) -> None:
        """Raises LabelError, naming two directories, where their rates, classes or k-means models differ."""
        super().__init__(parts, firsts)
        first = parts[0]
        for other in parts[1:]:
            for name in ("rate_hz", "num_classes", "kmeans_sha256"):
                mine, its = getattr(first, name), getattr(other, name)
                if mine != its:
                    raise LabelError(
                        f"{other.directory}: {name}: is {its}, but {first.directory} has {mine}; a class must mean the "
                        f"same in all corpora: make the labels with tools/kmeans_labels.py kmeans={first.directory}"
                    )
        self.rate_hz, self.num_classes, self.kmeans_sha256 = first.rate_hz, first.num_classes, first.kmeans_sha256
        self.directory = first.directory
        self._sets = parts

    def fingerprint(self) -> str:
        """As `LabelSet.fingerprint`: of the k-means model that the parts share, or over their contents, in order."""
        if self.kmeans_sha256:
            return self.kmeans_sha256
        return hashlib.sha256("".join(part.fingerprint() for part in self._sets).encode()).hexdigest()
