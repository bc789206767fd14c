"""What every maker of a label directory does around its own labels: ranks, a place to work, the last steps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.data.labels import LabelError, LabelInfoFile, join_splits, publish_labels
from pretrain.data.manifest import Manifest
from pretrain.files import take_place
from pretrain.labelling.ranks import labelling_world
from pretrain.world import World

SPLITS = ("train", "valid")


@dataclass
class LabelData:
    """`dir` holds train.tsv and valid.tsv; `sample` is the embedded sample."""

    dir: str
    workers: int = 2
    max_bad_share: float = 0.01


def read_manifests(data_dir: Path) -> dict[str, Manifest]:
    """train.tsv and, where it is there, valid.tsv."""
    present = [split for split in SPLITS if split == "train" or (data_dir / f"{split}.tsv").is_file()]
    return {split: Manifest.read(data_dir / f"{split}.tsv") for split in present}


def labels_of(directory: Path, data_dir: Path) -> LabelInfoFile | None:
    """What a label directory says of itself, where it is complete and of the manifests of `data_dir` as they are."""
    if not (directory / "labels.json").is_file():
        return None
    info = LabelInfoFile.read(directory / "labels.json")
    fits = all(
        split in info.splits and info.splits[split].manifest == manifest.fingerprint()
        for split, manifest in read_manifests(data_dir).items()
    )
    return info if fits else None


@contextmanager
def work_directory(output: Path, overwrite: bool) -> Iterator[tuple[World, Path]]:
    """The ranks that label together, and an empty directory beside `output` that they share.

    Enter it on all ranks. `publish` gives the directory its name; what is left of it when the block ends, with or
    without an error, is removed. Raises LabelError where `output` exists, unless `overwrite`.
    """
    with labelling_world() as world:
        work = world.from_main(lambda: _make_work_directory(output, overwrite))
        try:
            yield world, work
        finally:
            if world.is_main:
                shutil.rmtree(work, ignore_errors=True)


def _make_work_directory(output: Path, overwrite: bool) -> Path:
    if output.exists() and not overwrite:
        raise LabelError(f"{output}: output: exists already; name another directory, or set overwrite=true")
    work = output.absolute().with_name(f".{output.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    return work


def publish(
    work: Path,
    output: Path,
    manifests: dict[str, Manifest],
    unreadable: dict[str, dict[int, str]],
    report: dict[str, Any],
    rate_hz: int,
    num_classes: int,
    fingerprint: str,
) -> None:
    """Join the ranks' shards in `work`, write report.json and, last, labels.json, and give the directory its name.

    For one rank, after all have closed their shards and everything else lies in `work`. `unreadable` has the problems
    by row of each split; `fingerprint` is of what gives a class its meaning.
    """
    splits = join_splits(work, manifests, unreadable, num_classes, report["world_size"])
    (work / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    publish_labels(work, LabelInfoFile(rate_hz, num_classes, fingerprint, splits))
    take_place(work, output)
