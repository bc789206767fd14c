"""One probing run: baselines, the upstream layer by layer, the same network untrained, and its units."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from pretrain.config import ConfigError
from pretrain.data.alignments import read_phones, read_utterance_labels
from pretrain.data.audio import SAMPLE_RATE
from pretrain.probe.classify import fit_and_predict
from pretrain.probe.collect import (
    BASELINES,
    Layer,
    PhoneTask,
    Source,
    Split,
    Task,
    UtteranceTask,
    baseline_source,
    collect,
    open_split,
    upstream_source,
)
from pretrain.probe.options import ProbeOptions, data_dir, label_file
from pretrain.probe.report import BASELINE, UNTRAINED, UPSTREAM, Report, Score, UnitScore
from pretrain.probe.units import codebook_scores, fitted_unit_score, travelling_unit_score
from pretrain.upstream import Upstream


@dataclass(frozen=True)
class Labels:
    """The task's labels: class `names` by id, the ids of `silence`, what is `known` by utterance, and the maker of a
    task that keeps a given share of the frames.
    """

    names: list[str]
    silence: frozenset[int]
    known: dict
    make_task: Callable[[float], Task]


def _read_labels(options: ProbeOptions, directory: Path) -> Labels:
    path = label_file(options, directory)
    if options.task == "phone":
        phones = read_phones(path)
        ignored, silence = (phones.ids(*names.split(",")) for names in (options.ignore, options.silence))
        return Labels(
            phones.names,
            silence,
            phones.utterances,
            lambda share: PhoneTask(phones, ignored, share, options.seed),
        )
    labels = read_utterance_labels(path, options.column)
    names = sorted(set(labels.values()))
    ids = {key: names.index(label) for key, label in labels.items()}
    return Labels(names, frozenset(), labels, lambda share: UtteranceTask(ids))


def _collect(kind: str, source: Source, split: Split, labels: Labels, max_frames: int) -> list[Layer]:
    frames = float(split.manifest.lengths[split.rows].sum()) / min(source.strides)
    share = min(1.0, max_frames / frames) if max_frames else 1.0
    return collect(source, split, labels.make_task(share), f"{kind}, {split.manifest.path_of_manifest.stem}")


def _score(kind: str, name: str, layers: list[tuple[Layer, Layer]], labels: Labels, options: ProbeOptions) -> Score:
    """Fit on the first of each pair, score on the second; several pairs are mixed."""
    train, valid = layers[0]
    device = _device(options.device)
    fitted = fit_and_predict(
        [pair[0].features for pair in layers],
        train.labels,
        train.groups,
        [pair[1].features for pair in layers],
        len(labels.names),
        options.seed,
        device,
    )
    right = fitted.predictions == valid.labels
    speech = ~np.isin(valid.labels, list(labels.silence))
    commonest = np.bincount(train.labels).argmax()
    return Score(
        kind=kind,
        name=name,
        dim=train.features.shape[1],
        accuracy=float(right.mean()),
        speech_accuracy=float(right[speech].mean()) if options.task == "phone" else None,
        majority=float((valid.labels == commonest).mean()),
        trained=len(train.labels),
        scored=len(valid.labels),
        epochs=fitted.epochs,
        layer_weights=fitted.layer_weights if len(layers) > 1 else None,
    )


def _mixable(layers: list[tuple[Layer, Layer]]) -> bool:
    """Whether a weighted sum is defined: several layers of one width on the same frames."""
    widths = {train.features.shape for train, _ in layers}
    return len(layers) > 1 and len(widths) == 1


def _device(name: str) -> torch.device:
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def _layers(options: ProbeOptions, count: int) -> list[int]:
    """`layers` as numbers: "all", or comma-separated ones of 0 to count - 1."""
    parts = [str(layer) for layer in range(count)] if options.layers == "all" else options.layers.split(",")
    chosen = [int(part) for part in parts if part.strip().isdigit() and int(part) < count]
    if len(chosen) != len(parts):
        raise ConfigError(f"layers: '{options.layers}' must be all, or numbers of 0 to {count - 1} with commas between")
    if options.units_layer is not None and options.units_layer not in chosen:
        raise ConfigError(f"units_layer: {options.units_layer} is not probed; choose one of {chosen}")
    return chosen


def _sources(options: ProbeOptions, upstream: Upstream) -> list[tuple[str, Callable[[], Source]]]:
    """What to probe, in the table's order; made one after the other, so that one set of features is in memory."""
    device, layers = _device(options.device), _layers(options, upstream.num_layers)

    def untrained() -> Source:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            network = Upstream(options.name or None, options.upstream, randomize=True)
        return upstream_source(network, device, layers)

    # Averaged over an utterance, log-mel with context is log-mel again.
    count = len(BASELINES) if options.task == "phone" else len(BASELINES) - 1
    trained = (UPSTREAM, lambda: upstream_source(upstream, device, layers))
    baselines = [(BASELINE, lambda: baseline_source(count)), (UNTRAINED, untrained)]
    return [*baselines, trained] if options.baselines else [trained]


def _fitted_units(
    kind: str, source: Source, pairs: list[tuple[Layer, Layer]], labels: Labels, options: ProbeOptions
) -> list[UnitScore]:
    """k-means on `units_layer` of a network, on MFCC among the baselines; nothing where no layer was asked for."""
    wanted = BASELINES[0] if kind == BASELINE else f"layer {options.units_layer}"
    if options.task != "phone" or options.units_layer is None or wanted not in source.names:
        return []
    index = source.names.index(wanted)
    name = f"k-means fitted on {wanted}" if kind == BASELINE else f"k-means fitted on {kind}, {wanted}"
    rate_hz = SAMPLE_RATE / source.strides[index]
    return [fitted_unit_score(name, *pairs[index], options.clusters, labels.silence, rate_hz, options.seed)]


def _probe_source(
    kind: str, source: Source, splits: tuple[Split, Split], labels: Labels, options: ProbeOptions, report: Report
) -> None:
    """Probe every layer of `source`, and their weighted sum; its features leave the memory with this function."""
    trained, scored = (_collect(kind, source, split, labels, options.max_frames) for split in splits)
    pairs = list(zip(trained, scored, strict=True))
    for name, pair in zip(source.names, pairs, strict=True):
        report.scores.append(_score(kind, name, [pair], labels, options))
    if kind != BASELINE and _mixable(pairs):
        report.scores.append(_score(kind, "weighted sum", pairs, labels, options))
    report.units += _fitted_units(kind, source, pairs, labels, options)


def run_probe(options: ProbeOptions) -> Report:
    """Everything that tools/probe.py reports, written nowhere.

    Raises ConfigError for an option, AlignmentError for a label file, and UserError for data that cannot be probed.
    """
    started = time.monotonic()
    directory = data_dir(options)
    labels = _read_labels(options, directory)
    train = open_split(directory / "train.tsv", labels.known, options.max_train_hours, options.seed)
    valid = open_split(directory / "valid.tsv", labels.known)
    upstream = Upstream(options.name or None, options.upstream)
    shown = [name for name in labels.names if options.task != "phone" or name not in options.ignore.split(",")]
    report = Report(options.upstream, options.task, shown, train.hours, valid.hours, asdict(options))
    for split, name in ((train, "train"), (valid, "valid")):
        if split.without_label:
            report.notes.append(f"{split.without_label} utterances of {name} have no label and were left out.")
    for kind, make in _sources(options, upstream):
        _probe_source(kind, make(), (train, valid), labels, options, report)
    if options.task == "phone":
        task, device = labels.make_task(1.0), _device(options.device)
        assert isinstance(task, PhoneTask)
        report.units += codebook_scores(upstream, valid, task, labels.silence, device)
        if upstream.kmeans is not None:
            report.units.append(travelling_unit_score(upstream, valid, task, labels.silence, device))
    report.wall_seconds = time.monotonic() - started
    return report
