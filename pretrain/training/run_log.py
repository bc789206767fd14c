"""What a run says and writes for people: its first and last lines, curves, unreadable files, refused updates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.config import RunConfig
from pretrain.data.audio import AudioError
from pretrain.data.loader import MicroBatchReader
from pretrain.data.plan import Plan
from pretrain.method import Batch
from pretrain.training.metrics import Reporter, short
from pretrain.training.schedule import Schedule
from pretrain.world import World

MIN_ROWS_FOR_BAD_SHARE = 200
MIN_SHARE_OF_PUBLISHED_SECONDS = 0.6


@dataclass(frozen=True)
class Run:
    """What stays the same from a run's first to its last update.

    `resolved` is the whole configuration as plain data, the method's fitted to what was found. `notes` are said at the
    start, `reminders` first of all and again at the end.
    """

    config: RunConfig
    resolved: dict[str, Any]
    schedule: Schedule
    world: World
    notes: list[str] = field(default_factory=list)
    reminders: list[str] = field(default_factory=list)

    @property
    def last_update(self) -> int:
        """Where this process ends: at the schedule's end, or at `trainer.stop_after_updates`."""
        total = self.schedule.total_updates
        return min(total, self.config.trainer.stop_after_updates or total)


class RunLog:
    """Screen, TensorBoard and metrics.jsonl of the main rank; on the others the same calls do nothing."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._reporter: Reporter | None = None
        self._rows_read = self._bad_rows = 0

    @contextmanager
    def opened(self, update: int) -> Iterator[RunLog]:
        """Writes go to the run's folder inside; what it holds beyond `update` is taken back."""
        if self.run.world.is_main:
            per_update = self.run.config.batch.micro_batches_per_step
            total, done = self.run.last_update * per_update, update * per_update
            self._reporter = Reporter(self.run.config.run_dir, total, done, update)
        try:
            yield self
        finally:
            if self._reporter:
                self._reporter.close()

    def say(self, *lines: str) -> None:
        """Lines for people, above the progress bar."""
        if self._reporter:
            for line in lines:
                self._reporter.text(line)

    def opening(self, method: nn.Module, encoder: nn.Module, plan: Plan, update: int) -> None:
        """What the run is, before it starts."""
        config, world, schedule = self.run.config, self.run.world, self.run.schedule
        batch = config.batch
        published = batch.seconds_per_micro_batch * batch.micro_batches_per_step
        seconds = plan.seconds_per_epoch / plan.batches_per_epoch * batch.micro_batches_per_step
        epochs = schedule.total_updates * batch.micro_batches_per_step / plan.batches_per_epoch
        self.say(
            *self.run.reminders,
            *self.run.notes,
            f"{config.recipe}: encoder {_millions(encoder)}, method {_millions(method)} parameters; {world.size} "
            f"rank(s) on {world.device.type}, {batch.accumulation(world.size)} micro-batches each an update",
            f"{len(plan.rows)} utterances, {plan.seconds_per_epoch / 3600:.2f} h per epoch after cropping "
            f"({plan.kept_share:.1%} kept); {seconds:.0f} s of audio per update, {epochs:.1f} epochs in "
            f"{schedule.total_updates} updates",
            *(share.sentence() for share in plan.shares),
        )
        if seconds < MIN_SHARE_OF_PUBLISHED_SECONDS * published:
            self.say(
                f"WARNING: the recipe means {published:.0f} s of audio per update, this corpus gives {seconds:.0f} s: "
                "its utterances are too few, or long beside batch.seconds_per_micro_batch"
            )
        if self._reporter and plan.shares:
            shares = {name: value for share in plan.shares for name, value in share.scalars().items()}
            self._reporter.scalars(shares, update, "data")

    def closing(self, outcome: str, update: int) -> None:
        """How the run ended, and where everything is."""
        run_dir = self.run.config.run_dir
        self.say(
            f"{outcome}: update {update} of {self.run.schedule.total_updates}; checkpoints in "
            f"{run_dir / 'checkpoints'}, curves in {run_dir / 'tensorboard'}",
            *reversed(self.run.reminders),
        )

    def micro_batch_done(self) -> None:
        """Move the progress bar: every rank has worked on one micro-batch."""
        if self._reporter:
            self._reporter.bar.update(self.run.world.size)

    def training(self, values: dict[str, float], histograms: dict[str, Tensor], update: int) -> None:
        """Curves of one log interval, and the few numbers beside the bar."""
        if not self._reporter:
            return
        self._reporter.scalars(values, update, "train")
        for name, counts in histograms.items():
            self._reporter.histogram(f"train/{name}", counts, update)
        accuracy = next((name for name in sorted(values) if name.startswith("accuracy")), "")
        shown = ["loss", accuracy, "speed/audio_hours_per_hour", "speed/share_of_peak", "memory/peak_gb"]
        self._reporter.bar.set_postfix(update=update, **short(values, shown))

    def validation(self, values: dict[str, float], figures: dict[str, Any], update: int) -> None:
        """Curves and pictures of one validation, and a line with its numbers."""
        if not self._reporter:
            return
        self._reporter.scalars(values, update, "validation")
        self._reporter.figures(figures, update)
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.say(f"update {update}: validation: {numbers}")

    def audio(self, reader: MicroBatchReader, step: int, update: int) -> None:
        """Examples of the first micro-batch of `step`, as they were read and as they are trained on."""
        count = self.run.config.trainer.audio_examples
        if not self._reporter or not count:
            return
        upcoming = reader.plan.micro_batch(step * self.run.config.batch.micro_batches_per_step)
        for place, example in enumerate(reader.examples(upcoming, [], with_clean=True)[:count]):
            assert example.clean_waveform is not None  # the reader was asked for it
            waveforms = {f"audio/{place}_clean": example.clean_waveform}
            if reader.augmenter is not None:
                waveforms[f"audio/{place}_augmented"] = example.waveform
            self._reporter.audio(waveforms, update)

    def count_rows(self, batches: list[Batch]) -> tuple[int, int]:
        """Write down the files that could not be read; (unreadable rows, rows) of this rank since the start."""
        for batch in batches:
            self._rows_read += len(batch.rows)
            self._bad_rows += len(batch.problems)
            for problem in batch.problems:
                listing = self.run.config.run_dir / f"bad_audio_rank{self.run.world.rank}.txt"
                # A file name may hold bytes of any encoding.
                with listing.open("a", encoding="utf-8", errors="surrogateescape") as file:
                    file.write(problem + "\n")
        return self._bad_rows, self._rows_read

    def check_bad_share(self, bad_rows: int, rows: int) -> None:
        """Raises AudioError where too many of the files read, on all ranks together, could not be used."""
        limit = self.run.config.data.max_bad_share
        if rows >= MIN_ROWS_FOR_BAD_SHARE and bad_rows > limit * rows:
            raise AudioError(
                f"{self.run.config.run_dir}/bad_audio_rank*.txt: {bad_rows} of {rows} files read could not be used, "
                f"more than data.max_bad_share={limit:g}; repair them or run tools/prepare_manifest.py again"
            )


def _millions(module: torch.nn.Module) -> str:
    return f"{sum(getattr(p, 'ds_numel', p.numel()) for p in module.parameters()) / 1e6:.2f} M"
