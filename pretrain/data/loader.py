"""Reads the micro-batches of a plan: crops, labels, collation, workers, and what happens to unreadable files."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pretrain.config import RunConfig
from pretrain.data.audio import AudioError, read_audio
from pretrain.data.augment.augmenter import Augmenter
from pretrain.data.joined import JoinedManifest
from pretrain.data.manifest import Manifest
from pretrain.data.mix import Mix
from pretrain.data.plan import MicroBatch, Plan
from pretrain.data.targets import Target
from pretrain.method import Batch, Collator, Example

MAX_REPLACEMENTS = 8
PREFETCHED_BATCHES = 4


@dataclass
class Split:
    """The rows of one split: their audio, their targets by name, and `groups` (N,), where batches keep to one."""

    manifest: Manifest | JoinedManifest
    targets: dict[str, Target] = field(default_factory=dict)
    groups: np.ndarray | None = None


class MicroBatchReader(Dataset[Batch]):
    """Turns a `MicroBatch` into a `Batch`.

    Everything random about an example follows from (seed, epoch, row), from its copy where the row comes again, and
    from its crop where the collator asks for several. `augmenter` alters the waveforms; None leaves them as they are.
    """

    def __init__(
        self,
        manifest: Manifest | JoinedManifest,
        targets: dict[str, Target],
        plan: Plan,
        collator: Collator,
        seed: int,
        augmenter: Augmenter | None = None,
    ) -> None:
        self.manifest = manifest
        self.targets = targets
        self.plan = plan
        self.collator = collator
        self.seed = seed
        self.augmenter = augmenter

    def __getitem__(self, micro_batch: MicroBatch) -> Batch:
        problems: list[str] = []
        batch = self.collator(self.examples(micro_batch, problems, self.collator.reads_clean_audio))
        batch.problems = problems
        return batch

    def examples(self, micro_batch: MicroBatch, problems: list[str], with_clean: bool) -> list[Example]:
        """What the collator gets, `clean_waveform` included where `with_clean`.

        Files that cannot be read are replaced and reported in `problems`.
        """
        rows = micro_batch.rows.tolist()
        copies = [0] * len(rows) if micro_batch.copies is None else micro_batch.copies.tolist()
        crops = [self._readable(micro_batch, row, copy, problems) for row, copy in zip(rows, copies, strict=True)]
        examples = [example for of_row in crops for example in of_row]
        if with_clean:
            examples = [replace(example, clean_waveform=example.waveform) for example in examples]
        return examples if self.augmenter is None else self.augmenter(examples, problems)

    def _readable(self, micro_batch: MicroBatch, row: int, copy: int, problems: list[str]) -> list[Example]:
        """The crops of `row`, or of another row where its file cannot be read; shapes stay as planned."""
        candidate = row
        for attempt in range(MAX_REPLACEMENTS):
            try:
                crops = range(self.collator.crops_per_example)
                return [self._example(micro_batch, candidate, copy, crop) for crop in crops]
            except AudioError as error:
                problems.append(str(error))
                candidate = self.plan.replacement(micro_batch, row, attempt)
        raise AudioError(
            f"{self.manifest.path(row)}: this file and {MAX_REPLACEMENTS - 1} drawn in its place could not be read; "
            "check that data.dir's root is mounted. " + " | ".join(problems[-MAX_REPLACEMENTS:])
        )

    def _example(self, micro_batch: MicroBatch, row: int, copy: int = 0, crop: int = 0) -> Example:
        # Zeros at the end of a seed count for nothing, hence the 0 in the middle.
        which = [0, copy, crop] if crop else [0, copy] if copy else []
        rng = np.random.default_rng([self.seed, micro_batch.epoch, row, *which])
        length = int(self.manifest.lengths[row])
        samples = min(length, micro_batch.crop_samples)
        start = int(rng.integers((length - samples) // self.plan.stride_samples + 1)) * self.plan.stride_samples
        if self.collator.reads_audio:
            waveform = torch.from_numpy(read_audio(self.manifest.path(row), start, samples))
        else:
            waveform = torch.zeros(()).expand(samples)
        targets = {name: target.of(row, whole=samples == length) for name, target in self.targets.items()}
        return Example(waveform, row, start, targets, rng)


def planned_reader(
    config: RunConfig,
    split: Split,
    collator: Collator,
    mix: Mix | None = None,
    augmenter: Augmenter | None = None,
) -> MicroBatchReader:
    """The reader that a run of `config` uses on one split, with its plan; without `mix` every row comes once.

    `augmenter` is for the training split alone: validation data are never altered.
    """
    plan = Plan(
        split.manifest.lengths,
        min_seconds=config.crop.min_seconds,
        max_seconds=config.crop.max_seconds,
        seconds_per_micro_batch=config.batch.seconds_per_micro_batch,
        stride_samples=collator.stride_samples,
        receptive_field_samples=collator.receptive_field_samples,
        seed=config.seed,
        whole=config.crop.whole,
        groups=split.groups,
        mix=mix,
    )
    return MicroBatchReader(split.manifest, split.targets, plan, collator, config.seed, augmenter)


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
