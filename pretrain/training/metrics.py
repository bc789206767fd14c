"""Metrics that stay on the device until a log step, and where they go: TensorBoard, metrics.jsonl, a progress bar."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from pretrain.data.audio import SAMPLE_RATE
from pretrain.method import Counts, Metric, Predictions, Ratio, Role, SumOfRatios

# bf16 matrix peaks in FLOP/s of the cards that we know; elsewhere no share of peak is shown.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "V100": 125e12, "L40S": 362e12, "A6000": 155e12}


class Accumulator:
    """Sums of ratios and `Counts` over micro-batches, committed per update and rolled back for a failed one.

    `roles` and `minima` have those of the metrics that state one, by name; `names` are those of the values that
    `reduce` gives at validation.

    `Predictions` are gathered where `validation` says so, and left out elsewhere.
    """

    def __init__(self, validation: bool = False) -> None:
        self._validation = validation
        self._committed: dict[str, Tensor] = {}
        self._pending: dict[str, Tensor] = {}
        self._kinds: dict[str, type] = {}
        self._predictions: dict[str, list[Predictions]] = {}
        self.roles: dict[str, Role] = {}
        self.minima: dict[str, float] = {}
        self.names: set[str] = set()

    def add(self, metrics: Mapping[str, Metric]) -> None:
        """Add one micro-batch; nothing leaves the device but predictions at validation."""
        for name, value in metrics.items():
            self.names |= {f"{name}_perplexity", f"{name}_used"} if isinstance(value, Counts) else {name}
            if isinstance(value, Predictions):
                if self._validation:
                    self._predictions.setdefault(name, []).append(_on_host(value))
                continue
            self._kinds[name] = type(value)
            if isinstance(value, SumOfRatios):
                value_sum = torch.stack([_sums(ratio) for ratio in value.ratios])
            elif isinstance(value, Ratio) and isinstance(value.total, Tensor):
                self._learn_role(name, value)
                value_sum = _sums(value)
            elif isinstance(value, Counts) and isinstance(value.counts, Tensor):
                self._learn_role(f"{name}_perplexity", value)
                value_sum = value.counts.detach().double()
            else:
                raise TypeError(f"metric {name}: give a Ratio, Counts or Predictions of tensors, not {value!r}")
            self._pending[name] = self._pending[name] + value_sum if name in self._pending else value_sum

    def _learn_role(self, name: str, metric: Ratio | Counts) -> None:
        if metric.role is not None:
            self.roles[name] = metric.role
        if metric.minimum is not None:
            self.minima[name] = metric.minimum

    def commit(self) -> None:
        """Count what was added since the last commit: the update was applied."""
        for name, value in self._pending.items():
            self._committed[name] = self._committed[name] + value if name in self._committed else value
        self._pending = {}

    def roll_back(self) -> None:
        """Forget what was added since the last commit: the update was refused."""
        self._pending = {}

    def reduce(self) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Sum over ranks and reset: values by name, and the pooled histograms.

        A histogram `x` gives `x_perplexity`, the exponential of its entropy, and `x_used`, the share of its entries
        that occurred. `Predictions` of all ranks are scored together. Every rank calls this with the same metrics.
        """
        values: dict[str, float] = {}
        histograms: dict[str, Tensor] = {}
        for name, value in sorted(self._committed.items()):
            dist.all_reduce(value)
            if self._kinds[name] is Ratio:
                values[name] = _sum_of_quotients([value.tolist()])
            elif self._kinds[name] is SumOfRatios:
                values[name] = _sum_of_quotients(value.tolist())
            else:
                histograms[name] = value.cpu()
                share = histograms[name] / histograms[name].sum().clamp(min=1)
                values[f"{name}_perplexity"] = float(torch.exp(torch.special.entr(share).sum()))
                values[f"{name}_used"] = float((share > 0).double().mean())
        self._committed = {}
        for name, parts in sorted(self._predictions.items()):
            values[name] = _score_of_all_ranks(parts)
        self._predictions = {}
        return values, histograms


def _sums(ratio: Ratio) -> Tensor:
    """(2,) float64: total and weight of one micro-batch, on the device of the total."""
    total = ratio.total.detach().double()
    weight = torch.as_tensor(ratio.weight, dtype=torch.float64)
    return torch.stack([total, weight.to(total.device, non_blocking=True)])


def _sum_of_quotients(sums: list[list[float]]) -> float:
    """The sum of total / weight over those that have units; NaN where none has."""
    return sum(total / weight for total, weight in sums if weight) if any(weight for _, weight in sums) else math.nan


def _on_host(value: Predictions) -> Predictions:
    """The same as numpy can hold it, which knows no bfloat16."""
    predictions, targets = value.predictions.detach().float().cpu(), value.targets.detach()
    return Predictions(predictions, (targets.float() if targets.is_floating_point() else targets).cpu(), value.score)


def _score_of_all_ranks(parts: list[Predictions]) -> float:
    """The score of the predictions of all ranks; NaN where there are none."""
    own = torch.cat([p.predictions for p in parts]).numpy(), torch.cat([p.targets for p in parts]).numpy()
    gathered: list[Any] = [own] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    predictions, targets = (np.concatenate(arrays) for arrays in zip(*gathered, strict=True))
    return float(parts[0].score(predictions, targets)) if len(predictions) else math.nan


class Throughput:
    """Audio and wall time since the last report."""

    def __init__(self, device: torch.device, world_size: int) -> None:
        self.device = device
        self.world_size = world_size
        self.peak_flops = peak_flops(device)
        self.restart()

    def restart(self) -> None:
        """Begin a new interval; pauses (validation, saving) are left out by calling this after them."""
        self.audio_seconds = 0.0
        self.flops = 0.0
        self._started = time.perf_counter()

    def add(self, audio_seconds: float, flops: float) -> None:
        """Count one micro-batch of all ranks."""
        self.audio_seconds += audio_seconds
        self.flops += flops

    def report(self) -> dict[str, float]:
        """Hours of audio per hour, FLOP/s, share of the card's peak, and peak memory in GB; starts a new interval."""
        wall = max(1e-9, time.perf_counter() - self._started)
        values = {"speed/audio_hours_per_hour": self.audio_seconds / wall, "speed/tflops": self.flops / wall / 1e12}
        if self.peak_flops:
            values["speed/share_of_peak"] = self.flops / wall / (self.peak_flops * self.world_size)
        values["memory/peak_gb"] = peak_memory_gb(self.device)
        self.restart()
        return values


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of the card in FLOP/s, where it is known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for card, peak in PEAK_FLOPS.items() if card in name), None)


def peak_memory_gb(device: torch.device) -> float:
    """Most memory that this process has held: on the card, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class Reporter:
    """Writes from the main rank: curves to TensorBoard, the same numbers to metrics.jsonl, a bar to the terminal."""

    def __init__(self, run_dir: Path, total_micro_batches: int, done_micro_batches: int, done_updates: int) -> None:
        """What a killed process reported beyond `done_updates` is taken back: those updates are made again."""
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=done_updates + 1)
        _forget_after(run_dir / "metrics.jsonl", done_updates)
        self._log = (run_dir / "metrics.jsonl").open("a")
        self.bar = tqdm(
            total=total_micro_batches,
            initial=done_micro_batches,
            unit="batch",
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 30.0,  # a log file needs no animation
            smoothing=0.05,
        )

    def scalars(self, values: dict[str, float], update: int, prefix: str) -> None:
        """Curves under `prefix/`; names that already have a folder keep it."""
        named = {name if "/" in name else f"{prefix}/{name}": value for name, value in values.items()}
        for name, value in named.items():
            self._writer.add_scalar(name, value, update)
        self._log.write(json.dumps({"update": update, **named}) + "\n")
        self._log.flush()

    def figures(self, figures: dict[str, Any], update: int) -> None:
        """Pictures drawn by the method."""
        for name, figure in figures.items():
            self._writer.add_figure(f"validation/{name}", figure, update)

    def audio(self, waveforms: dict[str, Tensor], update: int) -> None:
        """(T,) waveforms at 16 kHz by tag, all scaled by one factor where one of them exceeds full scale."""
        peak = max(1.0, *(float(waveform.abs().max()) for waveform in waveforms.values()))
        for name, waveform in waveforms.items():
            self._writer.add_audio(name, waveform / peak, update, SAMPLE_RATE)

    def histogram(self, name: str, counts: Tensor, update: int) -> None:
        """How often each entry of a codebook or label set occurred."""
        edges = torch.arange(len(counts) + 1).numpy()
        total, squares = float(counts.sum()), float((counts * torch.arange(len(counts)) ** 2).sum())
        self._writer.add_histogram_raw(
            name,
            min=0,
            max=len(counts) - 1,
            num=int(total),
            sum=float((counts * torch.arange(len(counts))).sum()),
            sum_squares=squares,
            bucket_limits=edges[1:].tolist(),
            bucket_counts=counts.numpy().tolist(),
            global_step=update,
        )

    def text(self, line: str) -> None:
        """A line for people, above the bar."""
        self.bar.write(line)

    def close(self) -> None:
        """Flush everything."""
        self.bar.close()
        self._writer.close()
        self._log.close()


def _forget_after(path: Path, update: int) -> None:
    """Cut metrics.jsonl behind the last line that is whole and not beyond `update`; lines of others stay."""
    if not path.exists():
        return
    kept = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n") or _update_of(line) > update:
                break
            kept += len(line)
    os.truncate(path, kept)


def _update_of(line: bytes) -> float:
    """The update that a line of metrics.jsonl is about; 0 where it is none of ours."""
    try:
        found = json.loads(line)["update"]
    except (ValueError, KeyError, TypeError, IndexError):
        return 0
    return found if isinstance(found, int | float) else 0


def short(values: dict[str, float], names: list[str]) -> dict[str, str]:
    """The few numbers that fit beside a progress bar."""
    return {name.split("/")[-1]: f"{values[name]:.4g}" for name in names if name in values}
