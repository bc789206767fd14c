"""The audio and labels of one run: resolves `data`, falls back on the embedded sample, checks before training."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from pretrain.config import ConfigError, CorpusConfig, DataConfig
from pretrain.data.folders import resolve_data_dir
from pretrain.data.joined import JoinedLabels, JoinedManifest, JoinedRows, first_rows
from pretrain.data.labels import LabelSet
from pretrain.data.loader import Split, check_files
from pretrain.data.manifest import Manifest
from pretrain.data.mix import Mix
from pretrain.data.speakers import speaker_groups
from pretrain.data.transcripts import (
    NoTranscripts,
    TranscriptError,
    Transcripts,
    TranscriptTable,
    make_dictionary,
    read_dictionary,
)
from pretrain.method import LabelInfo, LabelSource

MFCC_CLUSTERS = 100  # HuBERT's first iteration
SPLITS = ("train", "valid")
SAMPLE_SPEAKERS, SAMPLE_TRANSCRIPTS = "{dir}/utterances.tsv", "{dir}/transcripts.tsv"


@dataclass
class Part:
    """One corpus: where it lies, its label directories and transcripts, and the manifests of the splits it has."""

    tag: str
    directory: Path
    label_dirs: list[Path]
    transcripts: str | None
    weight: float | None
    manifests: dict[str, Manifest]

    def file(self, pattern: str, split: str) -> Path:
        """The path that a pattern with `{dir}` and `{split}` means here."""
        return Path(pattern.replace("{dir}", str(self.directory)).replace("{split}", split))


@dataclass
class Corpus:
    """What a run trains and validates on.

    `mix` is there where several corpora were given, `symbols` where transcripts are read. `notes` are sentences for the
    run's first and last lines, `facts` for its first lines only.
    """

    train: Split
    valid: Split | None
    kmeans_dir: Path | None
    notes: list[str]
    facts: list[str] = field(default_factory=list)
    mix: Mix | None = None
    symbols: list[str] | None = None
    transcript_hashes: list[str] | None = None

    @property
    def labels(self) -> list[LabelInfo]:
        """Rate, classes and directory of each label set; of several corpora, the first one's directory."""
        return [LabelInfo(s.rate_hz, s.num_classes, s.directory) for s in self.train.label_sets]

    def identity(self) -> dict[str, object]:
        """What a resumed run must find again: the same rows and the same labels, wherever they lie."""
        mix, groups = self.mix, self.train.groups
        return {
            "audio": self.train.manifest.fingerprint(),
            "labels": [s.kmeans_sha256 for s in self.train.label_sets],
            "corpora": mix and {"tags": mix.tags, "rows": mix.first_rows.tolist()},
            "sampling": mix and {"alpha": mix.alpha, "weights": mix.weights},
            "speakers": None if groups is None else hashlib.sha256(groups.tobytes()).hexdigest(),
            "transcripts": self.transcript_hashes,
        }


def open_corpus(
    data: DataConfig,
    label_classes: list[int],
    output_dir: Path,
    *,
    by_speaker: bool = False,
    with_transcripts: bool = False,
    label_source: LabelSource | None = None,
) -> Corpus:
    """Open and check the splits of `data`, with one label set for each entry of `label_classes`.

    `by_speaker` finds the speaker of every row; `with_transcripts` reads transcripts and makes a dictionary of all
    their symbols where none is given. On the embedded sample, labels that were not given are made, by `label_source`
    or by k-means on MFCC. A collective call where labels are made. Raises ConfigError, ManifestError, LabelError,
    TranscriptError or AudioError before anything is trained.
    """
    notes = []
    if data.dir is None and data.corpora is None:
        notes.append(f"{data.name}: data.dir was not given, so this run uses the embedded sample of synthetic speech")
        data = replace(data, dir="sample", speakers=SAMPLE_SPEAKERS, transcripts=SAMPLE_TRANSCRIPTS, dictionary=None)
    parts = [_open_part(corpus, data.corpora is not None) for corpus in _entries(data)]
    if not label_classes:
        parts = [replace(part, label_dirs=[]) for part in parts]
    elif not all(part.label_dirs for part in parts):
        source = label_source or _mfcc_source(min(label_classes[0], MFCC_CLUSTERS))
        made = _sample_labels(parts, source, output_dir)
        parts = [replace(part, label_dirs=[made]) for part in parts]
        notes.append(f"data.labels were not given: {source.kind} of the sample, in {made}")
    splits = {name: _open_split(parts, name, data, by_speaker) for name in SPLITS if _having(parts, name)}
    kmeans = parts[0].label_dirs[0] / "kmeans" if parts[0].label_dirs else None
    corpus = Corpus(splits["train"], splits.get("valid"), kmeans if kmeans and kmeans.is_dir() else None, notes)
    if data.corpora is not None:
        weights = [part.weight for part in parts if part.weight is not None]
        alpha = 1.0 if data.sampling_alpha is None else data.sampling_alpha
        firsts = first_rows([part.manifests["train"] for part in parts])
        corpus.mix = Mix([part.tag for part in parts], firsts, alpha, weights or None)
    if with_transcripts:
        _add_transcripts(corpus, splits, parts, data)
    return corpus


def _entries(data: DataConfig) -> list[CorpusConfig]:
    return data.corpora or [CorpusConfig(data.name, data.dir or "sample", data.labels, data.transcripts)]


def _open_part(corpus: CorpusConfig, is_one_of_many: bool) -> Part:
    where = f"data.corpora: {corpus.tag}: dir" if is_one_of_many else "data.dir"
    directory = resolve_data_dir(corpus.dir, where)
    manifests = {}
    for name in SPLITS:
        if name == "train" or (directory / f"{name}.tsv").is_file():
            manifests[name] = Manifest.read(directory / f"{name}.tsv")
            check_files(manifests[name], str(directory / name) if is_one_of_many else name)
    return Part(corpus.tag, directory, corpus.label_dirs(), corpus.transcripts, corpus.weight, manifests)


def _having(parts: list[Part], split: str) -> list[Part]:
    return [part for part in parts if split in part.manifests]


def _open_split(parts: list[Part], name: str, data: DataConfig, by_speaker: bool) -> Split:
    """One split of all parts that have it, as one."""
    parts = _having(parts, name)
    manifests = [part.manifests[name] for part in parts]
    rate = data.label_rate_hz
    sets = [[LabelSet.open(path, name, part.manifests[name], rate) for path in part.label_dirs] for part in parts]
    groups = _groups(parts, name, data.speakers) if by_speaker else None
    if data.corpora is None:
        return Split(manifests[0], sets[0], groups=groups)
    if len({len(label_sets) for label_sets in sets}) > 1:
        counts = ", ".join(f"{part.tag} {len(label_sets)}" for part, label_sets in zip(parts, sets, strict=True))
        raise ConfigError(f"data.corpora: labels: the numbers of label sets differ ({counts}); give all the same")
    firsts = first_rows(manifests)
    joined = [JoinedLabels(list(label_sets), firsts) for label_sets in zip(*sets, strict=True)]
    return Split(JoinedManifest(manifests), joined, groups=groups)


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


def _add_transcripts(corpus: Corpus, splits: dict[str, Split], parts: list[Part], data: DataConfig) -> None:
    """Read every table once, check it against the manifests that it serves, number its symbols."""
    uses = {
        (part.tag, name): part.file(part.transcripts, name)
        for part in parts
        if part.transcripts
        for name in part.manifests
    }
    if not uses:
        raise ConfigError(
            "data.transcripts: missing, and this recipe trains on them; give a table with the columns utt and phones "
            "(symbols between blanks)"
        )
    tables = {path: TranscriptTable(path) for path in uses.values()}
    manifests = {(part.tag, name): manifest for part in parts for name, manifest in part.manifests.items()}
    for path, table in tables.items():
        table.check_utterances(manifests[key] for key, used in uses.items() if used == path)
    if data.dictionary is not None:
        symbols = read_dictionary(parts[0].file(data.dictionary, "train"))
    else:
        lines = (tables[path].rows(manifests[key]) for key, path in uses.items())
        symbols = make_dictionary(line for rows in lines for line in rows)
    opened = {key: Transcripts(tables[path], manifests[key], symbols) for key, path in uses.items()}
    labelled = sum(int(opened[key].labelled().sum()) for key in opened if key[1] == "train")
    if not labelled:
        raise TranscriptError(f"{next(iter(tables))}: no training utterance has a transcript; check data.transcripts")
    for name, split in splits.items():
        mine = [part for part in parts if name in part.manifests]
        rows = [opened.get((part.tag, name), NoTranscripts()) for part in mine]
        firsts = first_rows([part.manifests[name] for part in mine])
        split.transcripts = JoinedRows(rows, firsts) if data.corpora is not None else rows[0]
    corpus.symbols = symbols
    corpus.transcript_hashes = [opened[key].fingerprint() for key in sorted(opened) if key[1] == "train"]
    source = data.dictionary or "data.dictionary was not given: made from the transcripts"
    corpus.facts.append(
        f"transcripts for {labelled} of {len(corpus.train.manifest)} training utterances, {len(symbols)} symbols "
        f"({source})"
    )


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
