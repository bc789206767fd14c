"""The audio and labels of one run: resolves `data`, falls back on the embedded sample, checks before training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pretrain.config import ConfigError, DataConfig, resolve_data_dir
from pretrain.data.labels import LabelSet
from pretrain.data.loader import check_files
from pretrain.data.manifest import Manifest
from pretrain.method import LabelInfo

MFCC_CLUSTERS = 100  # HuBERT's first iteration


@dataclass
class Split:
    """One manifest and its label sets."""

    manifest: Manifest
    label_sets: list[LabelSet]


@dataclass
class Corpus:
    """What a run trains and validates on; `notes` are sentences for the run's first and last lines."""

    train: Split
    valid: Split | None
    kmeans_dir: Path | None
    notes: list[str]

    @property
    def labels(self) -> list[LabelInfo]:
        """Rate and classes of each label set."""
        return [LabelInfo(s.rate_hz, s.num_classes) for s in self.train.label_sets]

    def identity(self) -> dict[str, object]:
        """What a resumed run must find again: the same rows and the same labels, wherever they lie."""
        return {
            "audio": self.train.manifest.fingerprint(),
            "labels": [s.kmeans_sha256 for s in self.train.label_sets],
        }


def open_corpus(data: DataConfig, label_classes: list[int], output_dir: Path) -> Corpus:
    """Open and check the splits of `data`, with one label set for each entry of `label_classes`.

    On the embedded sample, labels that were not given are made: k-means on MFCC. A collective call where labels are
    made. Raises ConfigError, ManifestError, LabelError or AudioError before anything is trained.
    """
    notes = []
    if data.dir is None:
        notes.append(f"{data.name}: data.dir was not given, so this run uses the embedded sample of synthetic speech")
    directory = resolve_data_dir(data.dir or "sample")
    label_dirs = data.label_dirs()
    if label_classes and not label_dirs:
        label_dirs = [_sample_labels(directory, min(label_classes[0], MFCC_CLUSTERS), output_dir)]
        notes.append(f"data.labels were not given: k-means on MFCC of the sample, in {label_dirs[0]}")
    if not label_classes:
        label_dirs = []
    splits = {}
    for name in ("train", "valid"):
        if name == "valid" and not (directory / "valid.tsv").is_file():
            continue
        manifest = Manifest.read(directory / f"{name}.tsv")
        check_files(manifest, name)
        label_sets = [LabelSet.open(path, name, manifest, data.label_rate_hz) for path in label_dirs]
        splits[name] = Split(manifest, label_sets)
    kmeans = label_dirs[0] / "kmeans" if label_dirs else None
    return Corpus(splits["train"], splits.get("valid"), kmeans if kmeans and kmeans.is_dir() else None, notes)


def _sample_labels(directory: Path, clusters: int, output_dir: Path) -> Path:
    if directory != resolve_data_dir("sample"):
        raise ConfigError(
            f"data.labels: missing; make them with python tools/kmeans_labels.py features=mfcc clusters={clusters} "
            f"data.dir={directory} output=labels/iter1 and give data.labels=labels/iter1"
        )
    from pretrain.kmeans.generate import ensure_mfcc_labels  # k-means libraries only where labels are made

    return ensure_mfcc_labels(directory, output_dir / f"sample_mfcc{clusters}", clusters)
