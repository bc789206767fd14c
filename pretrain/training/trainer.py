"""The loop: fetch a step, count its units, forward and backward, update, log, validate, save."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pretrain.data.audio import SAMPLE_RATE
from pretrain.data.loader import MicroBatchReader, batches
from pretrain.data.plan import rank_share
from pretrain.method import Batch, Progress
from pretrain.models.batch_norm import update_running_statistics
from pretrain.training import checkpoint
from pretrain.training.engine import Engine
from pretrain.training.health import HealthMonitor, HopelessRun
from pretrain.training.metrics import Accumulator, Throughput
from pretrain.training.profiling import UpdateProfiler
from pretrain.training.run_log import Run, RunLog
from pretrain.training.validation import Validation
from pretrain.weights.export import ExportConfig, export

NOT_FINITE, NOTHING_TO_SCORE = "gradient not finite", "nothing to score"
ADVICE = {
    NOT_FINITE: "lower optimizer.lr, or use precision=fp32",
    NOTHING_TO_SCORE: "the collator's batches have sample_size 0: look at crop, at the targets and at what is masked",
}
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped by a signal after a checkpoint; the same command goes on


@dataclass(frozen=True)
class Agreement:
    """What all ranks know of one step: units of the loss and, for each other loss, their ratio to its own units."""

    units: torch.Tensor
    ratios: dict[str, torch.Tensor]
    nothing_to_score: torch.Tensor
    flags: torch.Tensor  # on the device: wishes to stop and to save, unreadable rows, rows

    def scale(self, ranks: int) -> torch.Tensor:
        """What the sum of one micro-batch is multiplied by; DeepSpeed averages over the ranks."""
        return ranks / self.units.clamp(min=1)


class Trainer:
    """One run of one method; knows no method by name."""

    def __init__(self, run: Run, engine: Engine, reader: MicroBatchReader, state: checkpoint.RunState) -> None:
        self.run, self.engine, self.reader, self.state = run, engine, reader, state
        self.config, self.world = run.config, run.world
        self.accumulation = self.config.batch.accumulation(self.world.size)
        self.validation: Validation | None = None
        self.metrics = Accumulator()
        self.throughput = Throughput(self.world.device, self.world.size)
        self.health = HealthMonitor(self.config.optimizer.clip_norm)
        self.log = RunLog(run)
        self._stop = False
        self._saved_at = time.monotonic()

    def fit(self) -> int:
        """Train to the last update or until a signal; returns the process' exit status."""
        with ExitStack() as stack:
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                stack.callback(signal.signal, number, signal.signal(number, self._ask_to_stop))
            stack.enter_context(self.log.opened(self.state.update))
            method = self.engine.method
            self.log.opening(method, method.encoder, self.reader.plan, self.state.update)
            self.log.audio(self.reader, self.state.step, self.state.update)
            profiler = None
            if self.config.trainer.profile:
                profiler = stack.enter_context(UpdateProfiler(self.config.run_dir, self.world.rank, self.world.device))
            outcome, status = self._loop(profiler)
            if self.state.update >= self.run.last_update and self.world.is_main:
                folder = self.config.run_dir / "export"
                export(ExportConfig(checkpoint=str(self.config.run_dir), output=str(folder)))
                self.log.say(f"exported to {folder}")
            self.log.closing(outcome, self.state.update)
        return status

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        self._stop = True

    def _loop(self, profiler: UpdateProfiler | None) -> tuple[str, int]:
        """Every step and what follows it; how the run ended, and the exit status."""
        before = seen = self.state.update
        for stop, save in self.steps():
            if profiler is not None and profiler.update_done():
                return f"profile of {self.state.update - before} updates written to {profiler.folder}, then ended", 0
            update, trainer = self.state.update, self.config.trainer
            if trainer.keep_best is not None and self.metrics.names:
                checkpoint.check_metric(trainer.keep_best, self.metrics.names)  # now, not at the first validation
            done, advanced = update >= self.run.last_update, update > seen
            if advanced and (update % trainer.log_every == 0 or done):
                self._report()
            best = None
            if advanced and self.validation and (update % trainer.validate_every == 0 or done):
                best = self._validate()
            if stop or save or done or best or (advanced and update % trainer.save_every == 0):
                self._save(last=stop or done, best=best)
            if stop and not done:
                return "stopped by a signal; the same command goes on", EXIT_STOPPED
            seen = update
        return "finished", 0

    def steps(self) -> Iterator[tuple[bool, bool]]:
        """Step after step up to the last update; after each, whether a signal asked to stop, and whether to save."""
        micro_batches = self.config.batch.micro_batches_per_step
        order = rank_share(self.reader.plan, self.state.step, micro_batches, self.world.rank, self.world.size)
        incoming = batches(self.reader, order, self.config.data.workers, self.world.device.type == "cuda")
        goes_on = self.state.update < self.run.last_update
        upcoming = [next(incoming) for _ in range(self.accumulation)] if goes_on else []
        self.throughput.restart()
        while self.state.update < self.run.last_update:
            upcoming, stop, save = self._step(upcoming, incoming)
            yield stop, save

    def _step(self, current: list[Batch], incoming: Iterator[Batch]) -> tuple[list[Batch], bool, bool]:
        """One update on `current`; returns the next step's batches and whether to stop and to save."""
        engine, state, world = self.engine, self.state, self.world
        engine.method.train()
        engine.method.before_step(self._progress())
        engine.begin_update(self._progress())
        agreed = self._agree(current)
        upcoming: list[Batch] = []
        for index, batch in enumerate(current):
            if self._interrupted():
                return [], True, True
            self._seed_network(index * world.size + world.rank)
            output = engine.forward(batch.to(world.device))
            loss = output.total(batch, agreed.ratios)
            engine.backward(loss * agreed.scale(world.size), last=index == self.accumulation - 1)
            self.metrics.add(output.reported(batch))
            self._count(batch)
            # Taken one by one while the device works, so that the next step never waits for all of its batches.
            upcoming.append(next(incoming))
        lr = self.config.optimizer.lr * self.run.schedule.factor(state.update)
        applied = engine.step(lr, skip=agreed.nothing_to_score.float())
        update_running_statistics(engine.method, applied)
        state.step += 1
        if applied:
            state.update += 1
            state.failed_steps = 0
            engine.method.after_step(self._progress())
            self.metrics.commit()
        else:
            self._refused(current, NOTHING_TO_SCORE if agreed.nothing_to_score else NOT_FINITE)
        stop, save, bad_rows, rows = agreed.flags.tolist()
        self.log.check_bad_share(int(bad_rows), int(rows))
        return upcoming, stop > 0, save > 0

    def _agree(self, current: list[Batch]) -> Agreement:
        """Sum over ranks, on the device, what every rank must know before the first forward."""
        bad_rows, rows = self.log.count_rows(current)
        due = self.world.is_main and time.monotonic() - self._saved_at > 60 * self.config.trainer.save_minutes
        names = sorted(current[0].other_sizes)
        units = [sum(b.sample_size for b in current), *(sum(b.other_sizes[name] for b in current) for name in names)]
        numbers = [*units, self._stop, due, bad_rows, rows]
        shared = torch.tensor(numbers, dtype=torch.float64).to(self.world.device, non_blocking=True)
        dist.all_reduce(shared)
        summed, flags = shared[: len(units)].float(), shared[len(units) :]
        divisors = summed.clamp(min=1)
        ratios = {name: divisors[0] / divisors[index] for index, name in enumerate(names, start=1)}
        return Agreement(summed[0], ratios, summed.sum() == 0, flags)

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
        self.log.micro_batch_done()

    def _refused(self, current: list[Batch], reason: str) -> None:
        """An update without a finite gradient, or without anything to learn from: its data are passed over."""
        self.metrics.roll_back()
        self.state.failed_steps += 1
        paths = [self.reader.manifest.path(int(row)) for batch in current for row in batch.rows]
        self.log.say(
            f"step {self.state.step}: {reason}; weights unchanged "
            f"({self.state.failed_steps} in a row); first files: {', '.join(paths[:3])}"
        )
        if self.state.failed_steps >= self.config.trainer.max_failed_steps:
            listing = self.config.run_dir / f"failed_rank{self.world.rank}.txt"
            listing.write_text("\n".join(paths) + "\n", encoding="utf-8", errors="surrogateescape")
            raise HopelessRun(
                f"{self.config.run_dir}: {self.state.failed_steps} updates in a row were refused ({reason}); the files "
                f"of the last one are in {listing}; {ADVICE[reason]}"
            )

    def _report(self) -> None:
        """One log interval: reduce, look at the health, write the curves."""
        values, histograms = self.metrics.reduce()
        values["gradient_norm"] = self.engine.grad_norm
        lines = []
        if self.config.trainer.health:
            lines = self.health.check(self.state.update, values, self.metrics.roles, self.metrics.minima)
        values["optimizer/learning_rate"] = self.config.optimizer.lr * self.run.schedule.factor(self.state.update)
        values["optimizer/loss_scale"] = self.engine.loss_scale
        values |= self.throughput.report()
        self.log.say(*lines)
        self.log.training(values, histograms, self.state.update)

    def _validate(self) -> dict[str, Any] | None:
        """Validate and write the curves; what to remember of this step where `trainer.keep_best` was never better."""
        assert self.validation is not None
        values, figures = self.validation.run(self.engine)
        self.log.validation(values, figures, self.state.update)
        self.log.audio(self.reader, self.state.step, self.state.update)
        self.throughput.restart()
        return checkpoint.new_best(self.state, self.config.trainer, values)

    def _save(self, last: bool, best: dict[str, Any] | None = None) -> None:
        """Save a checkpoint, which is the `best` one so far where that is given.

        Raises CheckpointError where the process' last checkpoint cannot be written: it must not seem finished.
        """
        best_before = self.state.best
        self.state.best = best or best_before
        scalars = self.engine.scalars()
        self.state.adam_steps, self.state.loss_scale = scalars["adam_steps"], scalars["loss_scale"]
        keep = self.config.trainer.keep_checkpoints
        problem = checkpoint.save(self.config.run_dir, self.engine, self.state, self.run.resolved, self.world, keep)
        if problem:
            self.state.best = best_before  # the checkpoint that would have been better is not there
        if problem and last:
            raise checkpoint.CheckpointError(
                f"{problem}; the older checkpoints are intact: make room, and the same command goes on from the newest"
            )
        if problem:
            self.log.say(f"CHECKPOINT NOT WRITTEN, the older ones are intact, training goes on: {problem}")
        self._saved_at = time.monotonic()
        self.throughput.restart()

    def _progress(self) -> Progress:
        return Progress(self.state.update, self.run.schedule.total_updates, self.config.seed)
