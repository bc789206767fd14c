"""Reads the micro-batches of a plan: crops, labels, collation, workers, and what happens to unreadable files."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pretrain.config import RunConfig
from pretrain.data.audio import AudioError, read_audio
from pretrain.data.labels import LabelSet
from pretrain.data.manifest import Manifest
from pretrain.data.plan import MicroBatch, Plan
from pretrain.method import Batch, Collator, Example

MAX_REPLACEMENTS = 8
PREFETCHED_BATCHES = 4


class MicroBatchReader(Dataset[Batch]):
    """Turns a `MicroBatch` into a `Batch`; everything random about an example follows from (seed, epoch, row)."""

    def __init__(
        self, manifest: Manifest, label_sets: list[LabelSet], plan: Plan, collator: Collator, seed: int
    ) -> None:
        self.manifest = manifest
        self.label_sets = label_sets
        self.plan = plan
        self.collator = collator
        self.seed = seed

    def __getitem__(self, micro_batch: MicroBatch) -> Batch:
        problems: list[str] = []
        batch = self.collator([self._readable_example(micro_batch, int(row), problems) for row in micro_batch.rows])
        batch.problems = problems
        return batch

    def _readable_example(self, micro_batch: MicroBatch, row: int, problems: list[str]) -> Example:
        """The example of `row`, or of another row where its file cannot be read; shapes stay as planned."""
        candidate = row
        for attempt in range(MAX_REPLACEMENTS):
            try:
                return self._example(micro_batch, candidate)
            except AudioError as error:
                problems.append(str(error))
                candidate = self.plan.replacement(micro_batch, row, attempt)
        raise AudioError(
            f"{self.manifest.path(row)}: this file and {MAX_REPLACEMENTS - 1} drawn in its place could not be read; "
            "check that data.dir's root is mounted. " + " | ".join(problems[-MAX_REPLACEMENTS:])
        )

    def _example(self, micro_batch: MicroBatch, row: int) -> Example:
        rng = np.random.default_rng([self.seed, micro_batch.epoch, row])
        slack = int(self.manifest.lengths[row]) - micro_batch.crop_samples
        start = int(rng.integers(slack // self.plan.stride_samples + 1)) * self.plan.stride_samples
        waveform = read_audio(self.manifest.path(row), start, micro_batch.crop_samples)
        labels = [label_set[row] for label_set in self.label_sets]
        return Example(torch.from_numpy(waveform), row, start, labels, rng)


def planned_reader(
    config: RunConfig, manifest: Manifest, label_sets: list[LabelSet], collator: Collator
) -> MicroBatchReader:
    """The reader that a run of `config` uses on one split, with its plan."""
    plan = Plan(
        manifest.lengths,
        min_seconds=config.crop.min_seconds,
        max_seconds=config.crop.max_seconds,
        seconds_per_micro_batch=config.batch.seconds_per_micro_batch,
        stride_samples=collator.stride_samples,
        receptive_field_samples=collator.receptive_field_samples,
        seed=config.seed,
    )
    return MicroBatchReader(manifest, label_sets, plan, collator, config.seed)


def _leave_signals_to_the_trainer(worker: int) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def batches(reader: MicroBatchReader, order: Iterable[MicroBatch], workers: int, pin_memory: bool) -> Iterator[Batch]:
    """Read `order` in `workers` processes (0: in this one), a few batches ahead."""
    loader = DataLoader(
        reader,
        batch_size=None,
        sampler=order,  # type: ignore[arg-type]  # any iterable serves
        num_workers=workers,
        prefetch_factor=PREFETCHED_BATCHES if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_trainer,
    )
    return iter(loader)


def check_files(manifest: Manifest, split: str, limit: int = 10) -> None:
    """Refuse a manifest that lists files that are gone. Raises AudioError naming the first `limit`."""
    missing = manifest.missing(limit)
    if missing:
        listed = "\n  ".join(missing)
        raise AudioError(
            f"{split}.tsv: lists files that do not exist; correct its first line (the root) or run "
            f"tools/prepare_manifest.py again. The first ones:\n  {listed}"
        )
