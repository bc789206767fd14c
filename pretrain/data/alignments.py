"""Labels from TSV files: phone intervals by utterance, or one label per utterance; and the middles of frames.

Tab separated, UTF-8, a header line, no quoting. Phones: utt, start_s, end_s, phone. Utterances: utt and any columns.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data.audio import SAMPLE_RATE
from pretrain.errors import UserError
from pretrain.tables import Table

UNLABELLED = -1
UNKNOWN = "UNK"
SILENCES = frozenset({"SIL", "sil", "sp", "pau"})
HEADER = ("utt", "start_s", "end_s", "phone")


class AlignmentError(UserError):
    """A phone alignment that cannot be read: "<file>: <line>: <what is wrong>; <what to do>"."""


@dataclass(frozen=True)
class Intervals:
    """One utterance's phones: `starts` and `ends` (P,) samples at 16 kHz, ascending; `phones` (P,) ids."""

    starts: np.ndarray
    ends: np.ndarray
    phones: np.ndarray

    def at(self, samples: np.ndarray) -> np.ndarray:
        """Ids (F,) of the phones that cover `samples` (F,): start <= sample < end; UNLABELLED where none does."""
        index = np.searchsorted(self.ends, samples, side="right")
        inside = index < len(self.ends)
        index = np.minimum(index, len(self.ends) - 1)
        return np.where(inside & (self.starts[index] <= samples), self.phones[index], UNLABELLED)


@dataclass(frozen=True)
class Phones:
    """All utterances of one or more files. `names[i]` is the phone with id i; ids follow the sorted names."""

    names: list[str]
    utterances: dict[str, Intervals]

    def ids(self, *names: str) -> frozenset[int]:
        """Ids of phone names; a name that does not occur is no error."""
        return frozenset(self.names.index(name) for name in names if name in self.names)

    def at(self, key: str, centres: np.ndarray, ignored: frozenset[int]) -> np.ndarray:
        """Ids (F,) of the phones at `centres` (F,) samples; UNLABELLED where there is none, or one of `ignored`."""
        labels = self.utterances[key].at(centres)
        labels[np.isin(labels, list(ignored))] = UNLABELLED
        return labels


def frame_centres(frames: int, stride_samples: int, first_centre_samples: int) -> np.ndarray:
    """(F,) int64 samples: the middle of each frame."""
    return np.arange(frames, dtype=np.int64) * stride_samples + first_centre_samples


def first_centre_samples(encoder: Any, stride_samples: int) -> int:
    """The middle of an encoder's first frame.

    It is where the encoder says (`first_centre_samples`), else that of its receptive field where it states one, else
    that of the stride.
    """
    centre: int | None = getattr(encoder, "first_centre_samples", None)
    return getattr(encoder, "receptive_field_samples", stride_samples) // 2 if centre is None else centre


def read_phones(paths: str) -> Phones:
    """Read one TSV, or several separated by commas, with the columns utt, start_s, end_s, phone.

    Raises AlignmentError for a file that is missing or cannot be read, intervals that overlap or run backwards, and an
    utterance that occurs in two files.
    """
    tables = [(path, _read_rows(path)) for path in map(Path, paths.split(","))]
    names = sorted({phone for _, rows in tables for intervals in rows.values() for *_, phone in intervals})
    id_of = {name: i for i, name in enumerate(names)}
    utterances: dict[str, Intervals] = {}
    for path, rows in tables:
        for key, intervals in rows.items():
            if key in utterances:
                raise AlignmentError(f"{path}: utterance {key} is in another file too; give each file once")
            starts, ends = (np.array([row[i] for row in intervals], dtype=np.int64) for i in (0, 1))
            if (ends < starts).any() or (starts[1:] < ends[:-1]).any():
                raise AlignmentError(f"{path}: utterance {key}: intervals overlap or run backwards; repair them")
            utterances[key] = Intervals(starts, ends, np.array([id_of[phone] for *_, phone in intervals]))
    return Phones(names, utterances)


def _read_rows(path: Path) -> dict[str, list[tuple[int, int, str]]]:
    """(start, end, phone) by utterance, in samples, sorted."""
    table = Table(path, HEADER, AlignmentError)
    rows: dict[str, list[tuple[int, int, str]]] = {}
    for number, (utterance, start, end, phone) in table:
        try:
            interval = round(float(start) * SAMPLE_RATE), round(float(end) * SAMPLE_RATE), phone
        except (ValueError, OverflowError):
            raise table.error(
                number, f"start_s '{start}' and end_s '{end}' must be seconds", "correct the line"
            ) from None
        rows.setdefault(utterance, []).append(interval)
    return {utterance: sorted(intervals) for utterance, intervals in rows.items()}


def read_utterance_labels(paths: str, column: str) -> dict[str, str]:
    """Label by utterance from one TSV, or several separated by commas, with the columns utt and `column`.

    Raises AlignmentError for a missing file or column and for an utterance with two labels.
    """
    labels: dict[str, str] = {}
    for path in map(Path, paths.split(",")):
        table = Table(path, ("utt", column), AlignmentError)
        for number, (utterance, label) in table:
            if labels.setdefault(utterance, label) != label:
                raise table.error(number, f"utterance {utterance} has a second {column}", "keep one")
    return labels


def match_utterance(utterance: str, known: Container[str]) -> str | None:
    """The key of `known` for an utterance id (relative path without suffix): the whole id, or its last part."""
    return next((name for name in (utterance, utterance.rsplit("/", 1)[-1]) if name in known), None)
