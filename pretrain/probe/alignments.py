"""Labels from TSV files: phone intervals by utterance, or one label per utterance.

Tab separated, UTF-8, a header line, no quoting. Phones: utt, start_s, end_s, phone. Utterances: utt and any columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain.data.audio import SAMPLE_RATE
from pretrain.labelling.kmeans.quality import AlignmentError, Alignments
from pretrain.tables import Table

UNLABELLED = -1


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

    def ids(self, names: str) -> set[int]:
        """Ids of comma-separated phone names; a name that does not occur is no error."""
        return {self.names.index(name) for name in names.split(",") if name in self.names}


def frame_centres(frames: int, stride_samples: int, window_samples: int) -> np.ndarray:
    """(F,) int64 samples: the middle of each window, the first window starting at sample 0."""
    return np.arange(frames, dtype=np.int64) * stride_samples + window_samples // 2


def read_phones(paths: str) -> Phones:
    """Read one TSV, or several separated by commas, with the columns utt, start_s, end_s, phone.

    Raises AlignmentError for a file that is missing or cannot be read, intervals that overlap or run backwards, and an
    utterance that occurs in two files.
    """
    files = [(path, Alignments.read(path)) for path in map(Path, paths.split(","))]
    names = sorted({phone for _, alignments in files for phone in alignments.inventory})
    utterances: dict[str, Intervals] = {}
    for path, alignments in files:
        ids = np.array([names.index(phone) for phone in alignments.inventory], dtype=np.int64)
        for key, phones in alignments.phones.items():
            starts, ends = (
                np.rint(seconds[key] * SAMPLE_RATE).astype(np.int64) for seconds in (alignments.starts, alignments.ends)
            )
            if (ends < starts).any() or (starts[1:] < ends[:-1]).any():
                raise AlignmentError(f"{path}: utterance {key}: intervals overlap or run backwards; repair them")
            if key in utterances:
                raise AlignmentError(f"{path}: utterance {key} is in another file too; give each file once")
            utterances[key] = Intervals(starts, ends, ids[phones])
    return Phones(names, utterances)


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


def match_utterance(utterance: str, known: dict[str, Intervals] | dict[str, str]) -> str | None:
    """The key of `known` for an utterance id (relative path without suffix): the whole id, or its last part."""
    return next((name for name in (utterance, utterance.rsplit("/", 1)[-1]) if name in known), None)
