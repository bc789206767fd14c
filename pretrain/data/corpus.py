"""The audio and labels of one run: resolves `data`, falls back on the embedded sample, checks before training."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from pretrain.config import ConfigError, CorpusConfig, DataConfig
from pretrain.data.folders import resolve_data_dir
from pretrain.data.joined import JoinedLabels, JoinedManifest, first_rows
from pretrain.data.labels import LabelSet
from pretrain.data.loader import Split, check_files
from pretrain.data.manifest import Manifest
from pretrain.data.mix import Mix
from pretrain.data.speakers import speaker_groups
from pretrain.data.targets import Source, TableTarget, Target, open_tables
from pretrain.data.utterance_targets import DICTIONARY_FIELDS, TABLE_FIELDS
from pretrain.method import LabelSource, TargetInfo, TargetSpec

MFCC_CLUSTERS = 100  # HuBERT's first iteration
SPLITS = ("train", "valid")
SAMPLE_SPEAKERS, SAMPLE_TRANSCRIPTS = "{dir}/utterances.tsv", "{dir}/transcripts.tsv"


@dataclass
class Part:
    """One corpus: where it lies, its label directories and tables, and the manifests of the splits it has."""

    tag: str
    directory: Path
    label_dirs: list[Path]
    transcripts: str | None
    classes: str | None
    weight: float | None
    manifests: dict[str, Manifest]

    def file(self, pattern: str, split: str) -> Path:
        """The path that a pattern with `{dir}` and `{split}` means here."""
        return Path(pattern.replace("{dir}", str(self.directory)).replace("{split}", split))


@dataclass
class Corpus:
    """What a run trains and validates on.

    `found` says what the data hold for each target of the recipe, `mix` how several corpora share an epoch (None for
    one). `notes` are sentences for the run's first and last lines, `facts` for its first lines only; `fingerprints`
    identify the targets for a run that resumes, by kind.
    """

    train: Split
    valid: Split | None
    kmeans_dir: Path | None
    notes: list[str]
    found: dict[str, TargetInfo] = field(default_factory=dict)
    facts: list[str] = field(default_factory=list)
    mix: Mix | None = None
    fingerprints: dict[str, list[str]] = field(default_factory=dict)

    def identity(self) -> dict[str, object]:
        """What a resumed run must find again: the same rows and the same labels, wherever they lie."""
        mix, groups = self.mix, self.train.groups
        return {
            "audio": self.train.manifest.fingerprint(),
            "labels": self.fingerprints.get("frames", []),
            "corpora": mix and {"tags": mix.tags, "rows": mix.first_rows.tolist()},
            "sampling": mix and {"alpha": mix.alpha, "weights": mix.weights},
            "speakers": None if groups is None else hashlib.sha256(groups.tobytes()).hexdigest(),
            "transcripts": self.fingerprints.get("symbols"),
            "classes": self.fingerprints.get("class"),
            "tags": self.fingerprints.get("tags"),
        }


def open_corpus(
    data: DataConfig,
    specs: list[TargetSpec],
    output_dir: Path,
    *,
    by_speaker: bool = False,
) -> Corpus:
    """Open and check the splits of `data` with the targets that `specs` ask for.

    `by_speaker` finds the speaker of every row. The names in tables are numbered from all of them where no dictionary
    is given. On the embedded sample, labels that were not given are made, as the spec says or by k-means on MFCC. A
    collective call where labels are made. Raises ConfigError, ManifestError, LabelError, TargetError or AudioError
    before anything is trained.
    """
    frames = [spec for spec in specs if spec.kind == "frames"]
    notes = []
    if data.dir is None and data.corpora is None:
        notes.append(f"{data.name}: data.dir was not given, so this run uses the embedded sample of synthetic speech")
        data = replace(data, dir="sample", speakers=SAMPLE_SPEAKERS, transcripts=SAMPLE_TRANSCRIPTS, dictionary=None)
    parts = [_open_part(corpus, data.corpora is not None) for corpus in _entries(data)]
    if not frames:
        parts = [replace(part, label_dirs=[]) for part in parts]
    elif not all(part.label_dirs for part in parts):
        source = frames[0].source or _mfcc_source(min(frames[0].num_classes, MFCC_CLUSTERS))
        made = _sample_labels(parts, source, output_dir)
        parts = [replace(part, label_dirs=[made]) for part in parts]
        notes.append(f"data.labels were not given: {source.kind} of the sample, in {made}")
    splits = {name: _open_split(parts, name, data, by_speaker) for name in SPLITS if _having(parts, name)}
    kmeans = parts[0].label_dirs[0] / "kmeans" if parts[0].label_dirs else None
    corpus = Corpus(splits["train"], splits.get("valid"), kmeans if kmeans and kmeans.is_dir() else None, notes)
    if frames:
        _add_labels(corpus, splits, parts, frames, data)
    for spec in specs:
        if spec.kind != "frames":
            opened = _open_table_target(spec, parts, data)
            corpus.found[spec.name] = opened.info
            corpus.facts.append(opened.fact)
            corpus.fingerprints.setdefault(spec.kind, []).extend(opened.fingerprints)
            for name, target in opened.splits.items():
                splits[name].targets[spec.name] = target
    if data.corpora is not None:
        weights = [part.weight for part in parts if part.weight is not None]
        alpha = 1.0 if data.sampling_alpha is None else data.sampling_alpha
        firsts = first_rows([part.manifests["train"] for part in parts])
        corpus.mix = Mix([part.tag for part in parts], firsts, alpha, weights or None)
    return corpus


def _entries(data: DataConfig) -> list[CorpusConfig]:
    if data.corpora is not None:
        return data.corpora
    assert data.dir is not None  # the sample's by now
    return [CorpusConfig(data.name, data.dir, data.labels, data.transcripts, data.classes)]


def _open_part(corpus: CorpusConfig, is_one_of_many: bool) -> Part:
    where = f"data.corpora: {corpus.tag}: dir" if is_one_of_many else "data.dir"
    directory = resolve_data_dir(corpus.dir, where)
    manifests = {}
    for name in SPLITS:
        if name == "train" or (directory / f"{name}.tsv").is_file():
            manifests[name] = Manifest.read(directory / f"{name}.tsv")
            check_files(manifests[name], str(directory / name) if is_one_of_many else name)
    tables = corpus.transcripts, corpus.classes
    return Part(corpus.tag, directory, corpus.label_dirs(), *tables, corpus.weight, manifests)


def _having(parts: list[Part], split: str) -> list[Part]:
    return [part for part in parts if split in part.manifests]


def _open_split(parts: list[Part], name: str, data: DataConfig, by_speaker: bool) -> Split:
    """One split of all parts that have it, as one."""
    parts = _having(parts, name)
    manifests = [part.manifests[name] for part in parts]
    groups = _groups(parts, name, data.speakers) if by_speaker else None
    return Split(manifests[0] if data.corpora is None else JoinedManifest(manifests), groups=groups)


def _add_labels(
    corpus: Corpus, splits: dict[str, Split], parts: list[Part], specs: list[TargetSpec], data: DataConfig
) -> None:
    """Label sets of every split, one for each of `specs`. Raises ConfigError where the numbers differ."""
    counts = {part.tag: len(part.label_dirs) for part in parts}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{tag} {count}" for tag, count in counts.items())
        raise ConfigError(f"data.corpora: labels: the numbers of label sets differ ({listed}); give all the same")
    given = len(parts[0].label_dirs)
    if specs[0].several:
        stem = specs[0].name.rstrip("0123456789")
        specs = [replace(specs[0], name=f"{stem}{index}") for index in range(given)]
    if given != len(specs):
        where = "data.labels" if data.corpora is None else "data.corpora: labels"
        raise ConfigError(f"{where}: {given} label directories, but this recipe trains on {len(specs)}; give as many")
    for name, split in splits.items():
        having = _having(parts, name)
        firsts = first_rows([part.manifests[name] for part in having])
        for index, spec in enumerate(specs):
            own = [
                LabelSet.open(part.label_dirs[index], name, part.manifests[name], data.label_rate_hz) for part in having
            ]
            labels = own[0] if data.corpora is None else JoinedLabels(own, firsts)
            split.targets[spec.name] = Target(spec.kind, labels)
            if name == "train":
                corpus.found[spec.name] = TargetInfo(labels.num_classes, labels.rate_hz, labels.directory)
                corpus.facts.append(
                    f"{spec.name}: {labels.num_classes} classes, {labels.rate_hz} labels a second, from "
                    f"{labels.directory}"
                )
                corpus.fingerprints.setdefault("frames", []).append(labels.fingerprint())


def _groups(parts: list[Part], name: str, speakers: int | str | None) -> np.ndarray:
    """Speakers of all rows; those of different corpora are different people."""
    if speakers is None:
        raise ConfigError(
            "data.speakers: missing, and batch.within=speaker needs to know them; give the place of the speaker's "
            "folder in the path (84/121123/84-121123-0000.flac: 0), or a table with the columns utt and speaker"
        )
    groups, count = [], 0
    for part in parts:
        source = speakers if isinstance(speakers, int) else str(part.file(str(speakers), name))
        groups.append(speaker_groups(source, part.manifests[name]) + count)
        count = int(groups[-1].max()) + 1
    return np.concatenate(groups)


def _open_table_target(spec: TargetSpec, parts: list[Part], data: DataConfig) -> TableTarget:
    """One target that comes from tables, of all parts. Raises ConfigError where no table is given."""
    field = TABLE_FIELDS[spec.kind].removeprefix("data.")
    sources = {
        name: [
            Source(part.file(table, name) if (table := getattr(part, field)) else None, part.manifests[name])
            for part in _having(parts, name)
        ]
        for name in SPLITS
        if _having(parts, name)
    }
    if not any(source.table for split in sources.values() for source in split):
        raise ConfigError(
            f"data.{field}: missing, and this recipe trains on them; give a table with the columns utt and "
            f"{spec.column}" + (" (symbols between blanks)" if spec.kind == "symbols" else "")
        )
    dictionary = getattr(data, DICTIONARY_FIELDS[spec.kind].removeprefix("data."))
    return open_tables(spec, sources, None if dictionary is None else parts[0].file(dictionary, "train"))


def _sample_labels(parts: list[Part], source: LabelSource, output_dir: Path) -> Path:
    without = next(part for part in parts if not part.label_dirs)
    if without.directory != resolve_data_dir("sample") or len(parts) > 1:
        raise ConfigError(
            f"data.labels: missing; make them with {source.command.format(dir=without.directory)} output=labels/iter1 "
            "and give data.labels=labels/iter1 (or labels: in the entry of data.corpora)"
        )
    return source.make(without.directory, output_dir)


def _mfcc_source(clusters: int) -> LabelSource:
    def make(data_dir: Path, output_dir: Path) -> Path:
        from pretrain.labelling.kmeans.generate import (
            ensure_mfcc_labels,  # k-means libraries only where labels are made
        )

        return ensure_mfcc_labels(data_dir, output_dir / f"sample_mfcc{clusters}", clusters)

    command = f"python tools/kmeans_labels.py features=mfcc clusters={clusters} data.dir={{dir}}"
    return LabelSource("k-means on MFCC", command, make)
