"""The dry run's estimate of one step's memory beside what the step takes, on the CPU."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pretrain.bench.step import StepOptions, Subject, make_batch
from pretrain.bench.timing import environment, in_fresh_process
from pretrain.config import ConfigError
from pretrain.method import Batch, Method
from pretrain.planning.footprint import LiveBytes, measure
from pretrain.training.precision import DTYPES, autocast

NOTE = (
    "Forward and backward beside weights, gradients and the batch, in GB. `estimate` is the dry run's, on tensors "
    "without numbers; `counted` the same count over a real step; `resident` what the process takes more at its peak "
    "than before, after a step on one second. Each figure in a process of its own, allocations above 64 KiB going back "
    "to the system at once."
)
# For glibc: memory that is freed must not count as taken.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


@dataclass
class MemoryOptions:
    """`recipe` lists shapes as recipe:rows:seconds, `precision` fp32 or bf16, both with commas."""

    task: str
    recipe: str = "hubert_base:2:5,hubert_large_ll60k:1:5"
    precision: str = "fp32"
    threads: int | None = None
    output: str | None = None

    def __post_init__(self) -> None:
        if unknown := set(self.precision.split(",")) - {"fp32", "bf16"}:
            raise ConfigError(f"precision: unknown {', '.join(sorted(unknown))}; known: fp32, bf16")
        if any(len(shape.split(":")) != 3 for shape in self.recipe.split(",")):
            raise ConfigError(f"recipe: '{self.recipe}' is no list of recipe:rows:seconds, as in hubert_base:2:5")


def measure_memory(options: MemoryOptions) -> dict[str, Any]:
    """Estimate and measurements for every shape and precision, with and without activation checkpointing."""
    os.environ.update(MALLOC)
    rows = []
    for shape in options.recipe.split(","):
        for precision in options.precision.split(","):
            for checkpoint_activations in (False, True):
                recipe, batch, seconds = shape.split(":")
                row: dict[str, Any] = {"recipe": recipe, "batch": f"{batch} x {seconds} s", "precision": precision}
                row["checkpoint_activations"] = "yes" if checkpoint_activations else "no"
                for column in (estimate_gb, counted_gb, resident_gb):
                    name = column.__name__.removesuffix("_gb")
                    row[name] = in_fresh_process(column, options, shape, precision, checkpoint_activations)
                rows.append(row | {"estimate_by_resident": row["estimate"] / row["resident"]})
    machine = environment(torch.device("cpu"))
    return {"task": "memory", "note": NOTE, "environment": machine, "rows": rows, "absent": {}}


def estimate_gb(options: MemoryOptions, shape: str, precision: str, checkpoint_activations: bool) -> float:
    """What the dry run says."""
    subject, batch = _subject(shape)
    footprint = measure(
        lambda: subject.method_class(subject.config),
        batch,
        dtype=DTYPES.get(precision),
        on_gpu=False,
        checkpoint_activations=checkpoint_activations,
    )
    return footprint.peak / 1e9


def counted_gb(options: MemoryOptions, shape: str, precision: str, checkpoint_activations: bool) -> float:
    """Bytes of the tensors of a real step."""
    method, batch, known = _ready(options, shape, checkpoint_activations)
    with LiveBytes(known) as live:
        _step(method, batch, precision)
    return live.peak / 1e9


def resident_gb(options: MemoryOptions, shape: str, precision: str, checkpoint_activations: bool) -> float:
    """Most resident memory of a real step less that before it. Linux only."""
    method, batch, _ = _ready(options, shape, checkpoint_activations)
    recipe, rows, _ = shape.split(":")
    _step(method, _subject(f"{recipe}:{rows}:1")[1], precision)  # threads, code and kernels' tables are there now
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew at what is resident now
    before = _resident("VmRSS")
    _step(method, batch, precision)
    return (_resident("VmHWM") - before) / 1e9


def _subject(shape: str) -> tuple[Subject, Batch]:
    recipe, rows, seconds = shape.split(":")
    subject = Subject.of_recipe(recipe)
    options = StepOptions("step", recipe=recipe, batch=int(rows), seconds=float(seconds))
    return subject, make_batch(options, subject)


def _ready(
    options: MemoryOptions, shape: str, checkpoint_activations: bool
) -> tuple[Method, Batch, list[torch.Tensor]]:
    """A method in train mode whose gradients have their place, as in every micro-batch but the first."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    subject, batch = _subject(shape)
    torch.manual_seed(0)
    method = subject.method_class(subject.config).train()
    if checkpoint_activations:
        method.encoder.checkpoint_activations()
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter).fill_(0.0)  # zeros would be taken only when written
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    return method, batch, [*method.parameters(), *gradients, *method.buffers(), batch.waveforms, *batch.extras.values()]


def _step(method: Method, batch: Batch, precision: str) -> None:
    with autocast(torch.device("cpu"), precision):
        loss = method(batch).total(batch)
    loss.backward()


def _resident(name: str) -> int:
    """Bytes; `name` is VmRSS for now, VmHWM for the most so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
