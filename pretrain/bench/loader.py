"""The data loader alone: ours beside whole-file decoding and lhotse, on the same rows and crops."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import torchaudio.functional
from torch import Tensor
from torch.utils.data import Dataset

from pretrain.bench.timing import Row, add_ratios, environment, interleaved
from pretrain.config import ConfigError, compose_recipe, run_config, typed_method
from pretrain.data.audio import SAMPLE_RATE, audio_info
from pretrain.data.folders import resolve_data_dir
from pretrain.data.labels import LabelSet, write_labels
from pretrain.data.loader import MicroBatchReader, Split, batches, planned_reader
from pretrain.data.manifest import Manifest
from pretrain.data.plan import MicroBatch
from pretrain.data.targets import Target, made_up_infos
from pretrain.method import Method
from pretrain.registry import load_method

OURS = "headwater"
LABEL_RATE_HZ = 50
NOTE = (
    "All read the same rows and crops of one plan through torch's DataLoader with its workers; starting the workers is "
    "part of it, and the files are in the page cache after the warm-up. Ours also cuts labels and draws masks, the "
    "others stop at the stacked waveforms. Audio is counted after cropping; medians of interleaved rounds."
)


@dataclass
class LoaderData:
    """`dir` holds train.tsv, of plain files; `sample` is the embedded sample."""

    dir: str = "sample"


@dataclass
class LoaderOptions:
    """`batches` micro-batches of `recipe` a round; `workers` is a list with commas."""

    task: str
    recipe: str = "hubert_base"
    data: LoaderData = field(default_factory=LoaderData)
    workers: str = "0,2"
    batches: int = 16
    rounds: int = 5
    output: str | None = None


class WholeFileReader(Dataset[Tensor]):
    """Decodes whole files with soundfile and crops afterwards, as fairseq's `HubertDataset` does."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest

    def __getitem__(self, micro_batch: MicroBatch) -> Tensor:
        return torch.stack([self._crop(int(row), micro_batch.crop_samples) for row in micro_batch.rows])

    def _crop(self, row: int, samples: int) -> Tensor:
        frames, rate = soundfile.read(self.manifest.path(row), dtype="float32", always_2d=True)
        waveform = torch.from_numpy(frames).mean(dim=1)
        if rate != SAMPLE_RATE:
            waveform = torchaudio.functional.resample(waveform, rate, SAMPLE_RATE)
        start = int(torch.randint(max(0, len(waveform) - samples) + 1, ()))
        return _fit(waveform[start : start + samples], samples)


class LhotseReader(Dataset[Tensor]):
    """lhotse's recordings, which read from an offset for a duration."""

    def __init__(self, manifest: Manifest) -> None:
        lhotse = importlib.import_module("lhotse")
        self.recordings = []
        for row in range(len(manifest)):
            info = audio_info(manifest.path(row))
            source = lhotse.audio.AudioSource("file", list(range(info.channels)), info.path)
            native = round(info.samples * info.native_rate_hz / SAMPLE_RATE)
            duration = native / info.native_rate_hz
            recording = lhotse.Recording(str(row), [source], info.native_rate_hz, native, duration)
            self.recordings.append(recording.resample(SAMPLE_RATE))

    def __getitem__(self, micro_batch: MicroBatch) -> Tensor:
        return torch.stack([self._crop(int(row), micro_batch.crop_samples) for row in micro_batch.rows])

    def _crop(self, row: int, samples: int) -> Tensor:
        recording = self.recordings[row]
        start = int(torch.randint(max(0, recording.num_samples - samples) + 1, ()))
        audio = recording.load_audio(offset=start / SAMPLE_RATE, duration=samples / SAMPLE_RATE)
        return _fit(torch.from_numpy(audio).mean(dim=0), samples)


def measure_loaders(options: LoaderOptions) -> dict[str, Any]:
    """Read the same micro-batches in every way with every number of workers; environment, rows, absent peers."""
    machine = environment(torch.device("cpu"))
    manifest = Manifest.read(resolve_data_dir(options.data.dir) / "train.tsv")
    with tempfile.TemporaryDirectory() as folder:
        ours = _our_reader(options.recipe, manifest, Path(folder))
        readers: dict[str, Dataset[Any]] = {OURS: ours, "whole files, soundfile": WholeFileReader(manifest)}
        absent = {}
        try:
            readers["lhotse"] = LhotseReader(manifest)
        except ImportError as error:
            absent["lhotse"] = str(error)
        order = [ours.plan.micro_batch(index) for index in range(options.batches)]
        workers = [int(count) for count in options.workers.split(",")]
        works = {
            f"{count} {name}": partial(_read_all, reader, order, count)
            for count in workers
            for name, reader in readers.items()
        }
        costs = interleaved(works, options.rounds, warmups=1)
    audio_seconds = sum(len(micro_batch.rows) * micro_batch.crop_samples for micro_batch in order) / SAMPLE_RATE
    rows: list[Row] = []
    for count in workers:
        for name in readers:
            cost = costs[f"{count} {name}"]
            rows.append(
                {
                    "variant": name,
                    "workers": count,
                    "wall_seconds": cost.wall_seconds,
                    "cpu_seconds": cost.cpu_seconds,
                    "audio_seconds_per_second": audio_seconds / cost.wall_seconds,
                    "audio_seconds_per_core_second": audio_seconds / cost.cpu_seconds,
                }
            )
    add_ratios(rows, OURS, group="workers")
    data = {"data": options.data.dir, "files": len(manifest), "audio_seconds_per_round": round(audio_seconds, 1)}
    return {"task": "loader", "note": NOTE, "environment": machine | data, "rows": rows, "absent": absent}


def _our_reader(recipe: str, manifest: Manifest, folder: Path) -> MicroBatchReader:
    """The reader that training with `recipe` would use, on random labels that are written to `folder`."""
    config = run_config(compose_recipe(recipe))
    method_class: type[Method] = load_method(config.method["name"]).Method
    method_config: Any = typed_method(method_class.Config, config.method)
    specs = method_class.targets(method_config)
    if specs:
        method_config = method_class.fit_to_targets(method_config, made_up_infos(specs, LABEL_RATE_HZ))
    targets = {}
    for spec in specs:
        if spec.kind != "frames":
            raise ConfigError(f"recipe: {recipe} trains on tables of utterances, which this task cannot make up")
        count, labels = spec.num_classes, folder / spec.name
        write_labels(labels, LABEL_RATE_HZ, count, {"train": (manifest, _random_labels(manifest, count))})
        targets[spec.name] = Target(spec.kind, LabelSet.open(labels, "train", manifest))
    return planned_reader(config, Split(manifest, targets), method_class.collator(method_config))


def _random_labels(manifest: Manifest, classes: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(0)
    for length in manifest.lengths:
        yield rng.integers(classes, size=max(0, int(length) - 400) * LABEL_RATE_HZ // SAMPLE_RATE + 1)


def _read_all(reader: Dataset[Any], order: list[MicroBatch], workers: int) -> None:
    """Read every micro-batch; the workers have ended on return, so that their CPU time is known."""
    loader = batches(reader, order, workers, pin_memory=False)  # type: ignore[arg-type]  # other projects' readers too
    read = sum(1 for _ in islice(loader, len(order)))
    if read != len(order):
        raise ConfigError(f"workers: {read} of {len(order)} micro-batches came back with {workers} workers")


def _fit(waveform: Tensor, samples: int) -> Tensor:
    """Exactly `samples` samples; rounding of durations and rates can leave one too many or too few."""
    return torch.nn.functional.pad(waveform, (0, samples - len(waveform)))
