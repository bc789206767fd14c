"""Targets of whole utterances, from tables: strings of symbols for CTC, a class, or any number of tags.

A table is `utt<TAB><column>` below a header that names at least these two: the relative path without suffix, and
symbols between blanks, one class, or tags between commas. Utterances that it lacks, or whose cell is empty, are
unlabelled. A dictionary has one symbol (class, tag) a line, which fairseq follows by a count; its first line is
number 0.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain.config import nearest
from pretrain.data.manifest import Manifest
from pretrain.errors import UserError
from pretrain.files import open_new
from pretrain.method import TargetKind
from pretrain.tables import Table

LISTED_LINES = 10
# Kind of a target -> the options that hold its table and its dictionary.
TABLE_FIELDS = {"symbols": "data.transcripts", "class": "data.classes", "tags": "data.classes"}
DICTIONARY_FIELDS = {"symbols": "data.dictionary", "class": "data.class_names", "tags": "data.class_names"}


class TargetError(UserError):
    """A table or dictionary that does not fit: "<file>: line <n>: <what is wrong>; <what to do>"."""


@dataclass(frozen=True)
class Line:
    """One line of a table: its number in the file, and the names in its cell."""

    number: int
    names: list[str]


def split_cell(cell: str, kind: TargetKind) -> list[str]:
    """The names in one cell: symbols between blanks, tags between commas, one class."""
    parts = cell.split() if kind == "symbols" else cell.split(",") if kind == "tags" else [cell]
    return [part.strip() for part in parts if part.strip()]


class UtteranceTable:
    """The lines of one file by utterance; `column` holds what is trained on."""

    def __init__(self, path: Path, kind: TargetKind, column: str) -> None:
        """Raises TargetError for a file that is missing, a wrong header or line, an utterance that comes twice."""
        self.path, self.kind = path, kind
        self.lines: dict[str, Line] = {}
        table = Table(path, ("utt", column), TargetError, TABLE_FIELDS[kind])
        for number, (utterance, cell) in table:
            if utterance in self.lines:
                first = self.lines[utterance].number
                raise table.error(number, f"'{utterance}' stands in line {first} already", "remove one of the lines")
            self.lines[utterance] = Line(number, split_cell(cell, kind))

    def rows(self, manifest: Manifest) -> list[Line | None]:
        """The lines in the manifest's order; None for rows without one."""
        return [self.lines.get(utterance) for utterance in manifest.utterance_ids()]

    def check_utterances(self, manifests: Iterable[Manifest]) -> None:
        """Raises TargetError for lines whose utterance none of the manifests has, with the first of them."""
        manifests = list(manifests)
        unknown = self.lines.keys() - {utterance for manifest in manifests for utterance in manifest.utterance_ids()}
        if unknown:
            lines = sorted((self.lines[utterance].number, utterance) for utterance in unknown)
            listed = "\n  ".join(f"line {number}: {utterance}" for number, utterance in lines[:LISTED_LINES])
            raise TargetError(
                f"{self.path}: {len(unknown)} of {len(self.lines)} utterances are not in "
                f"{' or '.join(str(manifest.path_of_manifest) for manifest in manifests)}; utt is a manifest's path "
                f"without suffix: correct the lines or take them out. The first ones:\n  {listed}"
            )


class TableTargets:
    """The targets of one table by manifest row, as `pretrain.method.TargetSpec` describes them; None: unlabelled."""

    def __init__(self, table: UtteranceTable, manifest: Manifest, names: list[str]) -> None:
        """Raises TargetError, with the nearest names, for one that the dictionary lacks."""
        self.kind, self.num_classes = table.kind, len(names)
        ids = {name: index for index, name in enumerate(names)}
        flat, counts = [], []
        for line in table.rows(manifest):
            own = line.names if line else []
            try:
                flat.append(np.array([ids[name] for name in own], dtype=np.int32))
            except KeyError as error:
                unknown = error.args[0]
                raise TargetError(
                    f"{table.path}: line {line.number if line else 0}: '{unknown}' is not one of the {len(names)} "
                    f"names of the dictionary ({nearest(unknown, names)}); correct it or add it to "
                    f"{DICTIONARY_FIELDS[table.kind]}"
                ) from None
            counts.append(len(own))
        self._ids = np.concatenate(flat)
        self._offsets = np.concatenate([[0], np.cumsum(counts)])

    def __getitem__(self, row: int) -> np.ndarray | None:
        ids = self._ids[self._offsets[row] : self._offsets[row + 1]].astype(np.int64)
        if not len(ids):
            return None
        if self.kind == "tags":
            return np.bincount(ids, minlength=self.num_classes).clip(max=1).astype(np.float32)
        return ids[0] if self.kind == "class" else ids

    def labelled(self) -> np.ndarray:
        """(N,) bool: which rows have a target."""
        return np.diff(self._offsets) > 0

    def fingerprint(self) -> str:
        """SHA-256 over the numbers of all rows."""
        return hashlib.sha256(self._ids.tobytes() + self._offsets.tobytes()).hexdigest()


class NoTargets:
    """A corpus of which nothing is labelled."""

    def __getitem__(self, row: int) -> None:
        return None

    def labelled(self) -> np.ndarray:
        """No row at all."""
        return np.zeros(0, dtype=bool)


def read_dictionary(path: Path, kind: TargetKind) -> list[str]:
    """The names in the dictionary of targets of `kind`, in order.

    A symbol ends at a blank, since fairseq writes its count behind it; a class or a tag is the whole line. Raises
    TargetError for a dictionary that is missing, empty or has repeats.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TargetError(
            f"{path}: cannot be read ({error}); give {DICTIONARY_FIELDS[kind]} a file with one name a line, or leave "
            "it out"
        ) from None
    names = [line.split()[0] if kind == "symbols" else line.strip() for line in lines if line.strip()]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated or not names:
        problem = f"'{repeated[0]}' comes more than once" if repeated else "is empty"
        raise TargetError(f"{path}: {problem}; write each name once, one a line")
    return names


def make_dictionary(lines: Iterable[Line | None]) -> list[str]:
    """Every name of the lines, the commonest first, as fairseq orders symbols; ties by name."""
    counts = Counter(name for line in lines if line for name in line.names)
    return [name for name, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]


def write_dictionary(path: Path, names: Iterable[str]) -> None:
    """One name a line."""
    with open_new(path, "w") as file:
        file.writelines(f"{name}\n" for name in names)
