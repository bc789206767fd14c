"""The loop: fetch a step, count its units, forward and backward, update, log, validate, save."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pretrain.config import RunConfig
from pretrain.data.audio import SAMPLE_RATE, AudioError
from pretrain.data.loader import MicroBatchReader, batches
from pretrain.data.plan import rank_share
from pretrain.method import Batch, Progress
from pretrain.models.batch_norm import update_running_statistics
from pretrain.training import checkpoint
from pretrain.training.distributed import World
from pretrain.training.engine import Engine
from pretrain.training.health import HealthMonitor, HopelessRun
from pretrain.training.metrics import Accumulator, Reporter, Throughput, short
from pretrain.training.profiling import UpdateProfiler
from pretrain.training.schedule import Schedule
from pretrain.weights.export import ExportConfig, export

EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped by a signal after a checkpoint; the same command goes on
MIN_ROWS_FOR_BAD_SHARE = 200


class Trainer:
    """One run of one method; knows no method by name."""

    def __init__(
        self,
        config: RunConfig,
        resolved: dict[str, Any],
        engine: Engine,
        schedule: Schedule,
        reader: MicroBatchReader,
        valid_reader: MicroBatchReader | None,
        state: checkpoint.RunState,
        world: World,
        notes: list[str],
        reminders: list[str],
    ) -> None:
        """`notes` are said at the start, `reminders` first of all and again at the end."""
        self.config = config
        self.resolved = resolved
        self.engine = engine
        self.schedule = schedule
        self.reader = reader
        self.valid_reader = valid_reader
        self.state = state
        self.world = world
        self.notes = [*reminders, *notes]
        self.reminders = reminders
        self.accumulation = config.batch.accumulation(world.size)
        self.last_update = min(schedule.total_updates, config.trainer.stop_after_updates or schedule.total_updates)
        self.metrics = Accumulator()
        self.throughput = Throughput(world.device, world.size)
        self.health = HealthMonitor(config.optimizer.clip_norm)
        self.reporter: Reporter | None = None
        self._stop = False
        self._rows_read = self._bad_rows = 0
        self._saved_at = time.monotonic()

    def fit(self) -> int:
        """Train to the last update or until a signal; returns the process' exit status."""
        with ExitStack() as stack:
            self._handle_signals(stack)
            if self.world.is_main:
                total = self.last_update * self.config.batch.micro_batches_per_step
                done = self.state.update * self.config.batch.micro_batches_per_step
                self.reporter = Reporter(self.config.run_dir, total, done, self.state.update)
                stack.callback(self.reporter.close)
            self._say(*self._opening())
            if self.reporter and self.reader.plan.shares:
                shares = [share.scalars() for share in self.reader.plan.shares]
                self.reporter.scalars({k: v for share in shares for k, v in share.items()}, self.state.update, "data")
            profiler = None
            if self.config.trainer.profile:
                profiler = stack.enter_context(UpdateProfiler(self.config.run_dir, self.world.rank, self.world.device))
            status = self._loop(profiler)
            if self.state.update >= self.last_update and self.world.is_main:
                self._export()
            self._say(*self._closing(status))
        return status

    def _export(self) -> None:
        """The finished run in the native format, for `Upstream`."""
        run_dir = self.config.run_dir
        export(ExportConfig(checkpoint=str(run_dir), output=str(run_dir / "export")))
        self._say(f"exported to {run_dir / 'export'}")

    def _loop(self, profiler: UpdateProfiler | None) -> int:
        before = self.state.update
        for stop, save in self.steps():
            if profiler is not None and profiler.update_done():
                self._say(f"profile of {self.state.update} updates in {profiler.folder}")
                return 0
            update, trainer = self.state.update, self.config.trainer
            done, advanced = update >= self.last_update, update > before
            if advanced and (update % trainer.log_every == 0 or done):
                self._log()
            if advanced and self.valid_reader and (update % trainer.validate_every == 0 or done):
                self._validate()
            if stop or save or done or (advanced and update % trainer.save_every == 0):
                self._save(last=stop or done)
            if stop and not done:
                return EXIT_STOPPED
            before = update
        return 0

    def steps(self) -> Iterator[tuple[bool, bool]]:
        """Step after step up to the last update; after each, whether a signal asked to stop, and whether to save."""
        micro_batches = self.config.batch.micro_batches_per_step
        order = rank_share(self.reader.plan, self.state.step, micro_batches, self.world.rank, self.world.size)
        incoming = batches(self.reader, order, self.config.data.workers, self.world.device.type == "cuda")
        upcoming = [next(incoming) for _ in range(self.accumulation)] if self.state.update < self.last_update else []
        self.throughput.restart()
        while self.state.update < self.last_update:
            upcoming, stop, save = self._step(upcoming, incoming)
            yield stop, save

    def _step(self, current: list[Batch], incoming: Iterator[Batch]) -> tuple[list[Batch], bool, bool]:
        """One update on `current`; returns the next step's batches and whether to stop and to save."""
        engine, state, world = self.engine, self.state, self.world
        engine.method.train()
        engine.method.before_step(self._progress())
        units, flags = self._agree(current)
        upcoming: list[Batch] = []
        for index, batch in enumerate(current):
            if self._interrupted():
                return [], True, True
            self._seed_network(index * world.size + world.rank)
            output = engine.forward(batch.to(world.device))
            engine.backward(output.loss * (world.size / units.clamp(min=1)), last=index == self.accumulation - 1)
            self.metrics.add(output.metrics)
            self._count(batch)
            # Taken one by one while the device works, so that the next step never waits for all of its batches.
            upcoming.append(next(incoming))
        lr = self.config.optimizer.lr * self.schedule.factor(state.update)
        applied = engine.step(lr, skip=(units == 0).float())
        update_running_statistics(engine.method, applied)
        state.step += 1
        if applied:
            state.update += 1
            state.failed_steps = 0
            engine.method.after_step(self._progress())
            self.metrics.commit()
        else:
            self._refused(current)
        stop, save, bad_rows, rows = flags.tolist()
        self._check_bad_share(int(bad_rows), int(rows))
        return upcoming, stop > 0, save > 0

    def _agree(self, current: list[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum over ranks, on the device: units of this step; wishes to stop and to save, unreadable rows, rows."""
        for batch in current:
            self._rows_read += len(batch.rows)
            self._bad_rows += len(batch.problems)
            for problem in batch.problems:
                self._report_bad_row(problem)
        due = self.world.is_main and time.monotonic() - self._saved_at > 60 * self.config.trainer.save_minutes
        numbers = [sum(b.sample_size for b in current), self._stop, due, self._bad_rows, self._rows_read]
        shared = torch.tensor(numbers, dtype=torch.float64).to(self.world.device, non_blocking=True)
        dist.all_reduce(shared)
        return shared[0].float(), shared[1:]

    def _interrupted(self) -> bool:
        """Whether to leave in the middle of an update; its micro-batches come again after the restart.

        Only on CPUs, where a micro-batch can take a minute and asking all ranks costs nothing beside it; GPUs finish
        the update, so that the host need not wait for the device.
        """
        if self.world.device.type != "cpu":
            return False
        wish = torch.tensor(float(self._stop))
        dist.all_reduce(wish)
        return bool(wish)

    def _seed_network(self, micro_batch: int) -> None:
        """Dropout and its like follow from (seed, step, micro-batch), whatever the rank."""
        entropy = np.random.SeedSequence([self.config.seed, self.state.step, micro_batch])
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))

    def _count(self, batch: Batch) -> None:
        samples = batch.waveforms.shape[1]
        flops = self.engine.method.training_flops(samples) * len(batch.rows)
        self.throughput.add(len(batch.rows) * samples / SAMPLE_RATE * self.world.size, flops * self.world.size)
        if self.reporter:
            self.reporter.bar.update(self.world.size)

    def _refused(self, current: list[Batch]) -> None:
        """An update without a finite gradient, or without anything to learn from: its data are passed over."""
        self.metrics.roll_back()
        self.state.failed_steps += 1
        paths = [self.reader.manifest.path(int(row)) for batch in current for row in batch.rows]
        self._say(
            f"step {self.state.step}: gradient not finite or nothing to score; weights unchanged "
            f"({self.state.failed_steps} in a row); first files: {', '.join(paths[:3])}"
        )
        if self.state.failed_steps >= self.config.trainer.max_failed_steps:
            listing = self.config.run_dir / f"failed_rank{self.world.rank}.txt"
            listing.write_text("\n".join(paths) + "\n")
            raise HopelessRun(
                f"{self.config.run_dir}: {self.state.failed_steps} updates in a row without a finite gradient; the "
                f"files of the last one are in {listing}; lower optimizer.lr, or use precision=fp32"
            )

    def _report_bad_row(self, problem: str) -> None:
        with (self.config.run_dir / f"bad_audio_rank{self.world.rank}.txt").open("a") as file:
            file.write(problem + "\n")

    def _check_bad_share(self, bad_rows: int, rows: int) -> None:
        limit = self.config.data.max_bad_share
        if rows >= MIN_ROWS_FOR_BAD_SHARE and bad_rows > limit * rows:
            raise AudioError(
                f"{self.config.run_dir}/bad_audio_rank*.txt: {bad_rows} of {rows} files read could not be used, more "
                f"than data.max_bad_share={limit:g}; repair them or run tools/prepare_manifest.py again"
            )

    def _log(self) -> None:
        values, histograms = self.metrics.reduce()
        values["gradient_norm"] = self.engine.grad_norm
        lines = self.health.check(self.state.update, values, self.metrics.roles) if self.config.trainer.health else []
        values["optimizer/learning_rate"] = self.config.optimizer.lr * self.schedule.factor(self.state.update)
        values["optimizer/loss_scale"] = self.engine.loss_scale
        values |= self.throughput.report()
        self._say(*lines)
        if self.reporter:
            self.reporter.scalars(values, self.state.update, "train")
            for name, counts in histograms.items():
                self.reporter.histogram(f"train/{name}", counts, self.state.update)
            accuracy = next((name for name in sorted(values) if name.startswith("accuracy")), "")
            shown = ["loss", accuracy, "speed/audio_hours_per_hour", "speed/share_of_peak", "memory/peak_gb"]
            self.reporter.bar.set_postfix(update=self.state.update, **short(values, shown))

    @torch.no_grad()
    def _validate(self) -> None:
        """The same micro-batches, masks and crops at every validation, shared out over the ranks."""
        assert self.valid_reader is not None
        plan, world = self.valid_reader.plan, self.world
        count = min(plan.batches_per_epoch, self.config.trainer.max_validation_batches)
        # Every rank runs as many forwards; what is beyond the end is not counted (ZeRO 3 communicates in forward).
        rounds = -(-count // world.size)
        indices = [round_ * world.size + world.rank for round_ in range(rounds)]
        order = [plan.micro_batch(index % count) for index in indices]
        method, metrics = self.engine.method, Accumulator()
        method.eval()
        for index, batch in zip(
            indices, batches(self.valid_reader, order, self.config.data.workers, False), strict=True
        ):
            on_device = batch.to(world.device)
            output = self.engine.forward(on_device)
            if index < count:
                metrics.add(output.metrics)
            elif index < world.size:
                metrics.add({name: value.nothing() for name, value in output.metrics.items()})
        figures = self.engine.figures(on_device)
        metrics.commit()
        values, _ = metrics.reduce()
        if self.reporter:
            self.reporter.scalars(values, self.state.update, "validation")
            self.reporter.figures(figures, self.state.update)
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            self._say(f"update {self.state.update}: validation: {numbers}")
        self.throughput.restart()

    def _save(self, last: bool) -> None:
        """Raises CheckpointError where the process' last checkpoint cannot be written: it must not seem finished."""
        scalars = self.engine.scalars()
        self.state.adam_step, self.state.loss_scale = scalars["adam_step"], scalars["loss_scale"]
        keep = self.config.trainer.keep_checkpoints
        problem = checkpoint.save(self.config.run_dir, self.engine, self.state, self.resolved, self.world, keep)
        if problem and last:
            raise checkpoint.CheckpointError(
                f"{problem}; the older checkpoints are intact: make room, and the same command goes on from the newest"
            )
        if problem:
            self._say(f"CHECKPOINT NOT WRITTEN, the older ones are intact, training goes on: {problem}")
        self._saved_at = time.monotonic()
        self.throughput.restart()

    def _progress(self) -> Progress:
        return Progress(self.state.update, self.schedule.total_updates, self.config.seed)

    def _handle_signals(self, stack: ExitStack) -> None:
        def ask_to_stop(number: int, frame: FrameType | None) -> None:
            self._stop = True

        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            stack.callback(signal.signal, number, signal.signal(number, ask_to_stop))

    def _opening(self) -> list[str]:
        """What the run is, before it starts."""
        plan, batch = self.reader.plan, self.config.batch
        method = self.engine.method
        published = batch.seconds_per_micro_batch * batch.micro_batches_per_step
        seconds = plan.seconds_per_epoch / plan.batches_per_epoch * batch.micro_batches_per_step
        epochs = self.schedule.total_updates * batch.micro_batches_per_step / plan.batches_per_epoch
        lines = [
            *self.notes,
            f"{self.config.recipe}: encoder {_millions(method.encoder)}, method {_millions(method)} parameters; "
            f"{self.world.size} rank(s) on {self.world.device.type}, {self.accumulation} micro-batches each an update",
            f"{len(plan.rows)} utterances, {plan.seconds_per_epoch / 3600:.2f} h per epoch after cropping "
            f"({plan.kept_share:.1%} kept); {seconds:.0f} s of audio per update, {epochs:.1f} epochs in "
            f"{self.schedule.total_updates} updates",
            *(share.sentence() for share in plan.shares),
        ]
        if seconds < 0.6 * published:
            lines.append(
                f"WARNING: the recipe means {published:.0f} s of audio per update, this corpus gives {seconds:.0f} s: "
                "its utterances are too few, or long beside batch.seconds_per_micro_batch"
            )
        return lines

    def _closing(self, status: int) -> list[str]:
        run_dir = self.config.run_dir
        outcome = "stopped by a signal; the same command goes on" if status == EXIT_STOPPED else "finished"
        return [
            f"{outcome}: update {self.state.update} of {self.schedule.total_updates}; checkpoints in "
            f"{run_dir / 'checkpoints'}, curves in {run_dir / 'tensorboard'}",
            *reversed(self.reminders),
        ]

    def _say(self, *lines: str) -> None:
        if self.reporter:
            for line in lines:
                self.reporter.text(line)


def _millions(module: torch.nn.Module) -> str:
    return f"{sum(getattr(p, 'ds_numel', p.numel()) for p in module.parameters()) / 1e6:.2f} M"
