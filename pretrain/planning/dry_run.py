"""`trainer.dry_run=true`: what a run would be and what memory it would take, on a machine that need not be able to."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pretrain.config import ConfigError, RunConfig, typed_method
from pretrain.data.audio import SAMPLE_RATE
from pretrain.data.loader import planned_reader
from pretrain.data.plan import Plan
from pretrain.data.targets import made_up_infos, made_up_targets
from pretrain.method import Batch, Example, Method
from pretrain.planning.footprint import Footprint, measure
from pretrain.registry import load_method
from pretrain.training.memory import StateBytes, state_bytes
from pretrain.training.metrics import PEAK_FLOPS
from pretrain.training.precision import DTYPES, resolve_precision
from pretrain.training.schedule import build_schedule
from pretrain.training.setup import open_run

SHARE_OF_PEAK = 0.4
PLANNED_CARDS = ("A100", "H100")
LABEL_RATE_HZ = 200  # of made-up labels: at least as many as any label set has
SYMBOLS, SYMBOLS_PER_SECOND = 100, 10  # of made-up transcripts
GB = 1e9


@dataclass(frozen=True)
class Subject:
    """What is planned. `shapes` lists (rows, samples) of the largest micro-batches; `plan` is None without data."""

    method_class: type[Method]
    method_config: Any
    shapes: list[tuple[int, int]]
    plan: Plan | None


def dry_run(config: RunConfig) -> int:
    """Print the plan of `config` from the first process; nothing is written. Returns the exit status.

    Raises ConfigError and its kin as a run would, and where the method's step cannot be planned.
    """
    if int(os.environ.get("RANK", 0)) == 0:
        print("\n".join(report(config)))
    return 0


def report(config: RunConfig) -> list[str]:
    """The lines that `dry_run` prints."""
    settings, zero = config.trainer, config.deepspeed["zero_optimization"]
    if offloaded := [name for name in ("offload_optimizer", "offload_param") if zero.get(name)]:
        raise ConfigError(
            f"deepspeed.zero_optimization.{offloaded[0]}: the dry run cannot plan offloading; leave it out"
        )
    ranks = settings.dry_run_ranks or int(os.environ.get("WORLD_SIZE", 1))
    config.batch.accumulation(ranks)
    precision = resolve_precision(config.precision, torch.device(settings.dry_run_device))
    subject = open_subject(config)
    footprint = largest_footprint(config, subject, precision)
    frozen = footprint.method_parameters - footprint.trained_parameters
    state = state_bytes(footprint.trained_parameters, frozen, footprint.buffer_bytes, zero, ranks)
    devices = "GPUs" if settings.dry_run_device == "cuda" else "CPUs"
    activations = "checkpointed" if settings.checkpoint_activations else "kept"
    return [
        f"dry run of {config.recipe}: nothing is trained or written",
        f"planned: {ranks} rank(s), {devices}, ZeRO {zero['stage']}, {precision} (precision={config.precision}), "
        f"activations {activations}, no torch.compile",
        _shapes_line(subject),
        "",
        *_table("parameters", "millions", _parameter_rows(footprint)),
        "",
        *_table("memory per rank", "GB", memory_rows(footprint, state)),
        "",
        "Not counted: what the allocator loses to fragmentation, the device's context, kernels' workspaces, NCCL.",
        *_work_lines(config, subject, ranks),
    ]


def largest_footprint(config: RunConfig, subject: Subject, precision: str) -> Footprint:
    """Of the subject's shapes, the one that takes most memory."""
    footprints = [
        measure(
            lambda: subject.method_class(subject.method_config),
            make_batch(subject, rows, samples, config.crop.whole),
            dtype=DTYPES.get(precision),
            on_gpu=config.trainer.dry_run_device == "cuda",
            checkpoint_activations=config.trainer.checkpoint_activations,
        )
        for rows, samples in subject.shapes
    ]
    return max(footprints, key=lambda footprint: footprint.peak)


def open_subject(config: RunConfig) -> Subject:
    """The method and the largest shapes: those of the data's plan, or the recipe's where no data was named."""
    data = config.data
    method_class: type[Method] = load_method(config.method["name"]).Method
    method_config: Any = method_class.complete(typed_method(method_class.Config, config.method), None)
    if data.dir is None and data.corpora is None:
        specs = method_class.targets(method_config)
        if specs:
            method_config = method_class.fit_to_targets(method_config, made_up_infos(specs, LABEL_RATE_HZ))
        longest = round(config.crop.max_seconds * SAMPLE_RATE)
        rows = max(1, round(config.batch.seconds_per_micro_batch * SAMPLE_RATE) // longest)
        return Subject(method_class, method_config, [(rows, longest)], None)
    entries = data.corpora or [data]
    method_class, method_config, corpus = open_run(config, with_labels=all(e.label_dirs() for e in entries))
    plan = planned_reader(config, corpus.train, method_class.collator(method_config), corpus.mix).plan
    shapes = [(len(batch.rows), batch.crop_samples) for batch in plan.largest_shapes()]
    return Subject(method_class, method_config, shapes, plan)


def make_batch(subject: Subject, rows: int, samples: int, whole: bool) -> Batch:
    """Silence with made-up targets through the method's own collator.

    With `whole` utterances the last row is a tenth shorter, so that the batch is padded as theirs are.
    """
    examples = []
    collator = subject.method_class.collator(subject.method_config)
    for row in range(rows):
        rng = np.random.default_rng(row)
        length = samples * 9 // 10 if whole and row == rows - 1 and rows > 1 else samples
        targets = made_up_targets(subject.method_class.targets(subject.method_config), length, LABEL_RATE_HZ, rng)
        waveform = torch.zeros(length)
        example = Example(waveform, row, 0, targets, rng, waveform if collator.reads_clean_audio else None)
        examples += [example] * collator.crops_per_example
    return collator(examples)


def memory_rows(footprint: Footprint, state: StateBytes) -> dict[str, float]:
    """GB by kind. The peak is that of backward or that of the update, whichever is higher."""
    base = state.weights + state.gradients + state.optimizer
    peak = base + max(footprint.peak + state.buffers, state.step_buffers)
    rows = {
        "weights": state.weights,
        "gradients": state.gradients,
        "optimiser: moments, ZeRO's copy of the weights": state.optimizer,
        "DeepSpeed's buffers": max(state.buffers, state.step_buffers),
        "activations kept for backward": footprint.saved,
        "working space beside them": footprint.peak - footprint.saved,
        "peak": peak,
        "largest single tensor (in the above)": footprint.largest,
    }
    return {name: size / GB for name, size in rows.items()}


def _parameter_rows(footprint: Footprint) -> dict[str, float]:
    counts = {
        "encoder": footprint.encoder_parameters,
        "method, encoder included": footprint.method_parameters,
        "trained": footprint.trained_parameters,
    }
    return {name: count / 1e6 for name, count in counts.items()}


def _table(title: str, unit: str, rows: dict[str, float]) -> list[str]:
    width = max(len(name) for name in (title, *rows))
    return [f"{title:<{width}}  {unit:>10}", *(f"{name:<{width}}  {value:>10.3f}" for name, value in rows.items())]


def _shapes_line(subject: Subject) -> str:
    shapes = ", ".join(f"{rows} x {samples / SAMPLE_RATE:.2f} s" for rows, samples in subject.shapes)
    source = "the recipe, since data.dir was not given" if subject.plan is None else "the plan of the data"
    return f"largest micro-batches: {shapes}, from {source}"


def _work_lines(config: RunConfig, subject: Subject, ranks: int) -> list[str]:
    """Audio and arithmetic of one update, and what the whole run takes on known cards."""
    updates = build_schedule(config.schedule).total_updates
    batch, plan = config.batch, subject.plan
    seconds = batch.seconds_per_micro_batch * batch.micro_batches_per_step
    epochs = ""
    if plan is not None:
        seconds = plan.seconds_per_epoch / plan.batches_per_epoch * batch.micro_batches_per_step
        epochs = f", {updates * batch.micro_batches_per_step / plan.batches_per_epoch:.1f} epochs"
    _, samples = max(subject.shapes, key=lambda shape: shape[1])
    with torch.device("meta"):
        method = subject.method_class(subject.method_config)
    flops = method.training_flops(samples) / samples * SAMPLE_RATE * seconds
    hours = {card: updates * flops / (SHARE_OF_PEAK * PEAK_FLOPS[card] * ranks) / 3600 for card in PLANNED_CARDS}
    known = ", ".join(f"{value:,.4g} h on {ranks} x {card}" for card, value in hours.items())
    return [
        f"{seconds:.0f} s of audio and {flops / 1e12:,.4g} TFLOP per update; {updates} updates{epochs}",
        f"the whole run at {SHARE_OF_PEAK:.0%} of the bf16 peak, recomputation not counted: {known}",
    ]
