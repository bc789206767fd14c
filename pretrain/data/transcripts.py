"""Transcripts for CTC: a table of symbol strings, the dictionary that numbers them, and symbol ids by manifest row.

A table is `utt<TAB>phones` below a header of these names: the relative path without suffix, and symbols between blanks.
Utterances that it lacks, or that have no symbol, are unlabelled. A dictionary has one symbol a line, which fairseq
follows by a count; its first line is symbol 0.
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
from pretrain.tables import Table

HEADER = ("utt", "phones")
LISTED_LINES = 10


class TranscriptError(UserError):
    """A table or dictionary that does not fit: "<file>: line <n>: <what is wrong>; <what to do>"."""


@dataclass(frozen=True)
class Line:
    """One line of a table: its number in the file, and its symbols between blanks."""

    number: int
    phones: str


class TranscriptTable:
    """The lines of one file by utterance."""

    def __init__(self, path: Path) -> None:
        """Raises TranscriptError for a file that is missing, a wrong header or line, an utterance that comes twice."""
        self.path = path
        self.lines: dict[str, Line] = {}
        table = Table(path, HEADER, TranscriptError)
        for number, (utterance, phones) in table:
            if utterance in self.lines:
                first = self.lines[utterance].number
                raise table.error(number, f"'{utterance}' has a transcript in line {first}", "remove one of the lines")
            self.lines[utterance] = Line(number, phones)

    def rows(self, manifest: Manifest) -> list[Line | None]:
        """The lines in the manifest's order; None for rows without one."""
        return [self.lines.get(utterance) for utterance in manifest.utterance_ids()]

    def check_utterances(self, manifests: Iterable[Manifest]) -> None:
        """Raises TranscriptError for lines whose utterance none of the manifests has, with the first of them."""
        manifests = list(manifests)
        unknown = self.lines.keys() - {utterance for manifest in manifests for utterance in manifest.utterance_ids()}
        if unknown:
            lines = sorted((self.lines[utterance].number, utterance) for utterance in unknown)
            listed = "\n  ".join(f"line {number}: {utterance}" for number, utterance in lines[:LISTED_LINES])
            raise TranscriptError(
                f"{self.path}: {len(unknown)} of {len(self.lines)} utterances are not in "
                f"{' or '.join(str(manifest.path_of_manifest) for manifest in manifests)}; utt is a manifest's path "
                f"without suffix: correct the lines or take them out. The first ones:\n  {listed}"
            )


class Transcripts:
    """Symbol ids by manifest row: `transcripts[row]` is (S,) int64, or None for a row that is unlabelled."""

    def __init__(self, table: TranscriptTable, manifest: Manifest, symbols: list[str]) -> None:
        """Raises TranscriptError, with the nearest symbols, for one that the dictionary lacks."""
        ids = {symbol: index for index, symbol in enumerate(symbols)}
        flat, counts = [], []
        for line in table.rows(manifest):
            phones = line.phones.split() if line else []
            try:
                flat.append(np.array([ids[phone] for phone in phones], dtype=np.int32))
            except KeyError as error:
                unknown = error.args[0]
                raise TranscriptError(
                    f"{table.path}: line {line.number if line else 0}: '{unknown}' is not one of the {len(symbols)} "
                    f"symbols of the dictionary ({nearest(unknown, symbols)}); correct it or add it to data.dictionary"
                ) from None
            counts.append(len(phones))
        self._ids = np.concatenate(flat)
        self._offsets = np.concatenate([[0], np.cumsum(counts)])

    def __getitem__(self, row: int) -> np.ndarray | None:
        ids = self._ids[self._offsets[row] : self._offsets[row + 1]]
        return ids.astype(np.int64) if len(ids) else None

    def labelled(self) -> np.ndarray:
        """(N,) bool: which rows have a transcript."""
        return np.diff(self._offsets) > 0

    def fingerprint(self) -> str:
        """SHA-256 over the symbol ids of all rows."""
        return hashlib.sha256(self._ids.tobytes() + self._offsets.tobytes()).hexdigest()


class NoTranscripts:
    """A corpus of which nothing is transcribed."""

    def __getitem__(self, row: int) -> None:
        return None


def read_dictionary(path: Path) -> list[str]:
    """The symbols of a dictionary in order. Raises TranscriptError for one that is missing, empty or has repeats."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TranscriptError(
            f"{path}: cannot be read ({error}); give data.dictionary a file with one symbol a line, or leave it out"
        ) from None
    symbols = [line.split()[0] for line in lines if line.strip()]
    repeated = [symbol for symbol, count in Counter(symbols).items() if count > 1]
    if repeated or not symbols:
        problem = f"'{repeated[0]}' comes more than once" if repeated else "has no symbols"
        raise TranscriptError(f"{path}: {problem}; write each symbol once, one a line")
    return symbols


def make_dictionary(lines: Iterable[Line | None]) -> list[str]:
    """Every symbol of the lines, the commonest first, as fairseq orders them; ties by name."""
    counts = Counter(phone for line in lines if line for phone in line.phones.split())
    return [symbol for symbol, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]


def write_dictionary(path: Path, symbols: list[str]) -> None:
    """One symbol a line."""
    with open_new(path, "w") as file:
        file.writelines(f"{symbol}\n" for symbol in symbols)
