"""Label directories: one integer per frame for every row of a manifest, checked against the audio when opened.

A directory holds per split `{split}.km` (fairseq's text, one line per manifest row), `{split}.npy` (the same, flat, for
memory mapping) and `{split}.offsets.npy` ((N + 1,) int64); `dict.km.txt`; and, written last, `labels.json`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from pretrain.data.audio import AudioError
from pretrain.data.label_files import (
    LabelWriter,
    label_dtype,
    merge_shards,
    parse_fairseq_split,
    write_dictionary,
)
from pretrain.data.manifest import Manifest
from pretrain.errors import UserError
from pretrain.files import open_new

SAMPLE_RATE = 16000
WINDOW_SAMPLES = 400
LISTED_LINES = 10
SCAN_LABELS = 1 << 24
# A fingerprint reads this much of the labels at most, in so many blocks: whole up to 3000 hours at 50 labels a second,
# which takes seconds; of more, a sample, since labels of other units differ in nearly every block.
FINGERPRINT_BYTES, FINGERPRINT_BLOCKS = 1 << 30, 1 << 10


class LabelError(UserError):
    """A label directory that does not fit: "<file>: <what is wrong>; <what to do>"."""


@dataclass(frozen=True)
class SplitInfo:
    """What labels.json says of one split: its rows, its manifest's fingerprint, the rows whose audio was unreadable."""

    rows: int
    manifest: str
    unlabelled: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class LabelInfoFile:
    """The contents of labels.json."""

    rate_hz: int
    num_classes: int
    kmeans_sha256: str
    splits: dict[str, SplitInfo]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> LabelInfoFile:
        """Raises LabelError where the file is not what `to_json` writes."""
        try:
            values = json.loads(path.read_text())
            splits = {name: SplitInfo(**split) for name, split in values.pop("splits").items()}
            return cls(**values, splits=splits)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise LabelError(f"{path}: cannot be understood ({error}); make the labels again") from None


def accepted_counts(lengths: np.ndarray, rate_hz: int) -> tuple[np.ndarray, np.ndarray]:
    """(N,) samples to the least and greatest number of labels accepted for each row.

    A window of 400 samples gives (n - 400) // hop + 1 labels. One fewer is accepted (fairseq loses a frame at each
    chunk boundary), and up to ceil(n / hop) + 1 for tools that pad the ends.
    """
    hop = SAMPLE_RATE // rate_hz
    return np.maximum((lengths - WINDOW_SAMPLES) // hop, 0), -(-lengths // hop) + 1


class LabelSet:
    """The labels of one split; `label_set[row]` is a (F,) integer array that views a memory-mapped file.

    `unlabelled` lists the rows whose audio could not be read when the labels were made.
    """

    def __init__(self, directory: Path, split: str, info: LabelInfoFile, manifest: Manifest) -> None:
        self.directory = directory
        self.split = split
        self.rate_hz = info.rate_hz
        self.num_classes = info.num_classes
        self.kmeans_sha256 = info.kmeans_sha256
        self.unlabelled = np.array(info.splits[split].unlabelled, dtype=np.int64)
        self.manifest = manifest
        self._map_arrays()

    @classmethod
    def open(cls, directory: Path, split: str, manifest: Manifest, rate_hz: int | None = None) -> LabelSet:
        """Open and check `split` against `manifest`.

        A directory with only `{split}.km` and `dict.km.txt`, as fairseq's tools leave it, needs `rate_hz` (labels per
        second); it is parsed once, into arrays beside the text. Raises LabelError, naming file, line and remedy, for a
        missing file, another number of rows, labels of another manifest, a class outside the dictionary, another rate,
        and counts that do not fit the audio (the first ten lines are listed).
        """
        directory = Path(directory)
        if (directory / "labels.json").is_file():
            info = _read_native(directory, split, manifest, rate_hz)
        else:
            info = _read_fairseq(directory, split, manifest, rate_hz)
        label_set = cls(directory, split, info, manifest)
        label_set._check_rows()
        label_set._check_counts()
        label_set._check_classes()
        return label_set

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def fingerprint(self) -> str:
        """What tells these labels from others: the SHA-256 of their k-means model or, without one, of their content.

        Of labels larger than `FINGERPRINT_BYTES` their number, the counts of all rows and evenly spaced blocks.
        """
        if self.kmeans_sha256:
            return self.kmeans_sha256
        digest = hashlib.sha256(self._offsets.tobytes())
        total, size = len(self._labels), FINGERPRINT_BYTES // FINGERPRINT_BLOCKS // self._labels.dtype.itemsize
        starts = list(range(0, total, size))
        if len(starts) > FINGERPRINT_BLOCKS:
            starts = [int(start) for start in np.linspace(0, total - size, FINGERPRINT_BLOCKS)]
        for start in starts:
            digest.update(self._labels[start : start + size].tobytes())
        return digest.hexdigest()

    def counts(self) -> np.ndarray:
        """(N,) int64: labels per row."""
        return np.diff(self._offsets)

    def __getitem__(self, row: int) -> np.ndarray:
        """Raises AudioError for a row without labels, so that a loader replaces it as it does an unreadable file."""
        labels = np.asarray(self._labels[self._offsets[row] : self._offsets[row + 1]])
        if len(labels) == 0:
            raise AudioError(
                f"{self.manifest.path(row)}: has no labels in {self.directory} (unreadable when they were made, or "
                "shorter than 25 ms); repair the file and make the labels again"
            )
        return labels

    def __getstate__(self) -> dict[str, object]:
        """Without the arrays: pickling a memory map would copy it into every spawned loader worker."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_labels", "_offsets")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._map_arrays()

    def _map_arrays(self) -> None:
        self._labels = self._load("npy", label_dtype(self.num_classes))
        self._offsets = self._load("offsets.npy", np.dtype(np.int64))
        if len(self._offsets) == 0 or self._offsets[-1] != len(self._labels) or np.any(np.diff(self._offsets) < 0):
            raise LabelError(
                f"{self.directory / self.split}.offsets.npy: does not belong to {self.split}.npy; make the labels again"
            )

    def _load(self, suffix: str, dtype: np.dtype) -> np.ndarray:
        path = self.directory / f"{self.split}.{suffix}"
        try:
            array = np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise LabelError(f"{path}: cannot be read ({error}); make the labels again") from None
        if array.ndim != 1 or array.dtype != dtype:
            raise LabelError(f"{path}: is {array.dtype} {array.shape}, expected {dtype} (N,); make the labels again")
        return array

    def _check_rows(self) -> None:
        if len(self) != len(self.manifest):
            raise LabelError(
                f"{self.directory / self.split}.km: has {len(self)} lines, but {self.split}.tsv has "
                f"{len(self.manifest)}; every audio file needs one line, in the manifest's order"
            )

    def _check_counts(self) -> None:
        counts, lengths = self.counts(), self.manifest.lengths
        low, high = accepted_counts(lengths, self.rate_hz)
        wrong = (counts < low) | (counts > high)
        wrong[self.unlabelled] = counts[self.unlabelled] != 0
        if not wrong.any():
            return
        lines = [
            f"line {row + 1} ({self.manifest.relative_path(row)}): {counts[row]} labels for {lengths[row]} samples, "
            f"expected {low[row]} to {high[row]}"
            for row in map(int, np.flatnonzero(wrong)[:LISTED_LINES])
        ]
        measured = SAMPLE_RATE * counts.sum() / max(1, lengths.sum())
        raise LabelError(
            f"{self.directory / self.split}.km: {wrong.sum()} of {len(self)} lines do not fit their audio at "
            f"{self.rate_hz} labels per second (on average the file has {measured:.1f}); check the label rate, that "
            "the lines follow the manifest's order, and that no line was cut:\n  " + "\n  ".join(lines)
        )

    def _check_classes(self) -> None:
        for start in range(0, len(self._labels), SCAN_LABELS):
            block = self._labels[start : start + SCAN_LABELS]
            wrong = np.flatnonzero((block < 0) | (block >= self.num_classes))
            if len(wrong):
                row = int(np.searchsorted(self._offsets, start + wrong[0], side="right")) - 1
                raise LabelError(
                    f"{self.directory / self.split}.npy: line {row + 1} ({self.manifest.relative_path(row)}) has class "
                    f"{block[wrong[0]]}, but there are {self.num_classes} (0 to {self.num_classes - 1}); make the "
                    "labels again"
                )


def join_splits(
    directory: Path,
    manifests: Mapping[str, Manifest],
    unreadable: Mapping[str, Iterable[int]],
    classes: int,
    ranks: int,
) -> dict[str, SplitInfo]:
    """Join the shards that `ranks` ranks wrote, in every split; `unreadable` are rows that have no labels."""
    infos = {}
    for split, manifest in manifests.items():
        merge_shards(directory, split, classes, range(ranks))
        infos[split] = SplitInfo(len(manifest), manifest.fingerprint(), sorted(unreadable[split]))
    return infos


def publish_labels(directory: Path, info: LabelInfoFile) -> None:
    """Write the dictionary and, last, labels.json: from then on the directory counts as complete."""
    write_dictionary(directory, info.num_classes)
    with open_new(directory / "labels.json", "w") as file:
        file.write(info.to_json())


def write_labels(
    directory: Path, rate_hz: int, num_classes: int, splits: dict[str, tuple[Manifest, Iterable[np.ndarray]]]
) -> None:
    """Write a label directory from labels made elsewhere: per split the manifest and one (F,) array per row of it.

    Raises ValueError for a class outside 0 to num_classes - 1.
    """
    directory.mkdir(parents=True, exist_ok=True)
    infos = {}
    for split, (manifest, rows) in splits.items():
        writer = LabelWriter(directory, split, num_classes)
        for labels in rows:
            writer.write(labels)
        writer.close()
        merge_shards(directory, split, num_classes)
        infos[split] = SplitInfo(len(manifest), manifest.fingerprint())
    publish_labels(directory, LabelInfoFile(rate_hz, num_classes, "", infos))


def _read_native(directory: Path, split: str, manifest: Manifest, rate_hz: int | None) -> LabelInfoFile:
    path = directory / "labels.json"
    info = LabelInfoFile.read(path)
    if rate_hz is not None and rate_hz != info.rate_hz:
        raise LabelError(
            f"{path}: rate_hz: the labels have {info.rate_hz} per second, not {rate_hz}; "
            f"set data.label_rate_hz={info.rate_hz} or leave it out"
        )
    _check_rate(info.rate_hz, path)
    if split not in info.splits:
        raise LabelError(
            f"{path}: splits: has no '{split}', only {', '.join(sorted(info.splits))}; "
            "make labels for both splits with tools/kmeans_labels.py, so that they share their centroids"
        )
    if info.splits[split].rows != len(manifest):
        raise LabelError(
            f"{path}: {split} has {info.splits[split].rows} lines, but {split}.tsv has {len(manifest)}; "
            "these labels belong to another manifest"
        )
    if info.splits[split].manifest != manifest.fingerprint():
        raise LabelError(
            f"{path}: {split} was labelled from a manifest with other paths, lengths or order than this {split}.tsv; "
            "use the manifest that the labels were made from, or make the labels again"
        )
    return info


def _read_fairseq(directory: Path, split: str, manifest: Manifest, rate_hz: int | None) -> LabelInfoFile:
    text, dictionary = directory / f"{split}.km", directory / "dict.km.txt"
    for path in (text, dictionary):
        if not path.is_file():
            raise LabelError(
                f"{path}: is missing; make labels with tools/kmeans_labels.py data.dir=... output={directory}"
            )
    if rate_hz is None:
        raise LabelError(
            f"{directory}: has no labels.json, so the label rate is unknown; set data.label_rate_hz "
            "(100 for MFCC units, 50 for units of transformer features)"
        )
    _check_rate(rate_hz, directory)
    num_classes = _dictionary_size(dictionary)
    problems = parse_fairseq_split(directory, split, num_classes)
    if problems:
        raise LabelError(
            f"{text}: has lines that are not classes 0 to {num_classes - 1} of {dictionary.name}; "
            "use the dictionary that belongs to the labels:\n  " + "\n  ".join(problems[:LISTED_LINES])
        )
    return LabelInfoFile(rate_hz, num_classes, "", {split: SplitInfo(len(manifest), manifest.fingerprint())})


def _check_rate(rate_hz: int, where: Path) -> None:
    if rate_hz <= 0 or SAMPLE_RATE % rate_hz:
        raise LabelError(f"{where}: rate_hz: {rate_hz} does not divide {SAMPLE_RATE}; use 50 or 100")


def _dictionary_size(path: Path) -> int:
    """K, where the lines of fairseq's dictionary are "0 <count>" to "K-1 <count>" in any order."""
    symbols = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
    if not symbols or set(symbols) != set(map(str, range(len(symbols)))):
        raise LabelError(
            f"{path}: has {len(symbols)} symbols that are not 0 to K-1; "
            "fairseq would read every other label as unknown: write one line 'k 1' for each class"
        )
    return len(symbols)
