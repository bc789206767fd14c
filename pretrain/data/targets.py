"""What a recipe trains on beside the audio, on its way from files to examples; see `pretrain.method.TargetSpec`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data.audio import SAMPLE_RATE
from pretrain.data.joined import ByRow, JoinedRows, first_rows
from pretrain.data.manifest import Manifest
from pretrain.data.utterance_targets import (
    DICTIONARY_FIELDS,
    TABLE_FIELDS,
    NoTargets,
    TableTargets,
    TargetError,
    UtteranceTable,
    make_dictionary,
    read_dictionary,
)
from pretrain.method import TargetInfo, TargetKind, TargetSpec

MADE_UP_SYMBOLS, MADE_UP_SYMBOLS_PER_SECOND = 100, 10


@dataclass(frozen=True)
class Target:
    """One target of every row of a split."""

    kind: TargetKind
    rows: ByRow[Any]

    def of(self, row: int, whole: bool) -> np.ndarray | None:
        """The target of `row`, None where it has none; a string of symbols belongs to a `whole` utterance alone."""
        return self.rows[row] if whole or self.kind != "symbols" else None


@dataclass(frozen=True)
class Source:
    """The table of one corpus for one split, None where it has none, and the manifest that it serves."""

    table: Path | None
    manifest: Manifest


@dataclass(frozen=True)
class TableTarget:
    """A target that comes from tables: its rows by split, its names, a sentence and the fingerprints for resuming."""

    splits: dict[str, Target]
    info: TargetInfo
    fact: str
    fingerprints: list[str]


def open_tables(spec: TargetSpec, sources: dict[str, list[Source]], dictionary: Path | None) -> TableTarget:
    """Read the tables of `spec`, check them against their manifests, and number their names.

    `sources` holds, by split, one entry per corpus in the order of the rows. Raises TargetError.
    """
    every = [source for split in sources.values() for source in split]
    used = [(source.manifest, path) for source in every if (path := source.table) is not None]
    tables = {path: UtteranceTable(path, spec.kind, spec.column) for _, path in used}
    for path, table in tables.items():
        table.check_utterances(manifest for manifest, own in used if own == path)
    origin = dictionary or f"{DICTIONARY_FIELDS[spec.kind]} was not given: numbered from the tables"
    if dictionary is None:
        names = make_dictionary(line for manifest, path in used for line in tables[path].rows(manifest))
    else:
        names = read_dictionary(dictionary, spec.kind)

    def rows_of(source: Source) -> TableTargets | NoTargets:
        return NoTargets() if source.table is None else TableTargets(tables[source.table], source.manifest, names)

    opened = {split: [rows_of(source) for source in own] for split, own in sources.items()}
    labelled = sum(int(rows.labelled().sum()) for rows in opened["train"])
    if not labelled:
        path = next(iter(tables))
        raise TargetError(f"{path}: no training utterance has a '{spec.column}'; check {TABLE_FIELDS[spec.kind]}")
    splits = {}
    for split, rows in opened.items():
        firsts = first_rows([source.manifest for source in sources[split]])
        splits[split] = Target(spec.kind, rows[0] if len(rows) == 1 else JoinedRows(rows, firsts))
    return TableTarget(
        splits,
        TargetInfo(len(names), names=tuple(names)),
        f"{spec.name}: {spec.column} of {labelled} of {sum(len(s.manifest) for s in sources['train'])} training "
        f"utterances, {len(names)} names ({origin})",
        [rows.fingerprint() for rows in opened["train"] if isinstance(rows, TableTargets)],
    )


def made_up_infos(specs: Iterable[TargetSpec], rate_hz: int) -> dict[str, TargetInfo]:
    """Targets for plans and measurements without data: as many classes as the recipe states, and made-up symbols."""
    infos = {}
    for spec in specs:
        count = spec.num_classes or MADE_UP_SYMBOLS
        names = () if spec.kind == "frames" else tuple(f"{spec.name}{i}" for i in range(count))
        infos[spec.name] = TargetInfo(count, rate_hz if spec.kind == "frames" else None, names=names)
    return infos


def made_up_targets(
    specs: Iterable[TargetSpec], samples: int, rate_hz: int, rng: np.random.Generator
) -> dict[str, np.ndarray | None]:
    """Targets of one utterance of `samples`, of the kinds and shapes that `specs` ask for."""
    targets: dict[str, np.ndarray | None] = {}
    for spec in specs:
        count = spec.num_classes or MADE_UP_SYMBOLS
        if spec.kind == "frames":
            targets[spec.name] = rng.integers(count, size=samples * rate_hz // SAMPLE_RATE)
        elif spec.kind == "symbols":
            targets[spec.name] = np.arange(samples * MADE_UP_SYMBOLS_PER_SECOND // SAMPLE_RATE) % 2
        elif spec.kind == "class":
            targets[spec.name] = np.asarray(rng.integers(count))
        else:
            targets[spec.name] = (rng.random(count) < 0.1).astype(np.float32)
    return targets
