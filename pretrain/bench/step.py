"""One training step, ours beside other projects': same shapes, masks, labels, dropouts and loss."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.bench.timing import Cost, Row, add_ratios, environment, in_fresh_process, interleaved, peak_resident_gb
from pretrain.config import ConfigError, compose_recipe, typed_method
from pretrain.data.audio import SAMPLE_RATE
from pretrain.data.targets import made_up_infos, made_up_targets
from pretrain.method import Batch, Example, Method
from pretrain.registry import load_method, load_reference_steps
from pretrain.training.metrics import peak_flops, peak_memory_gb
from pretrain.training.precision import DTYPES, autocast

OURS = "headwater"
LABEL_RATE_HZ = 50
WARMUPS = {"cpu": 1, "cuda": 5}
NOTE = (
    "One step is forward, backward and the release of the gradients; the optimiser, the same AdamW for all, is left "
    "out for all. All in train mode with the recipe's dropouts and no LayerDrop, on the same waveforms, masks and "
    "labels. Medians of interleaved rounds in one process; memory from a process per row."
)


@dataclass
class StepOptions:
    """`batch` crops of `seconds`; `precision` and `peers` are lists with commas. The last peer is 1 on the scale.

    `memory` measures peak memory in a process per row; `device` is cpu, cuda or auto.
    """

    task: str
    recipe: str = "hubert_base"
    batch: int = 4
    seconds: float = 5.0
    rounds: int = 7
    threads: int | None = None
    precision: str = "fp32,bf16"
    peers: str = "transformers,torchaudio,fairseq"
    compile: bool = False
    memory: bool = True
    device: str = "auto"
    output: str | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: is {getattr(self, name)}; give a positive number")
        if unknown := set(self.precisions) - {"fp32", *DTYPES}:
            raise ConfigError(f"precision: unknown {', '.join(sorted(unknown))}; known: fp32, {', '.join(DTYPES)}")

    @property
    def precisions(self) -> list[str]:
        return self.precision.split(",")

    @property
    def peer_names(self) -> list[str]:
        return [name for name in self.peers.split(",") if name]

    def torch_device(self) -> torch.device:
        automatic = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(automatic if self.device == "auto" else self.device)


@dataclass(frozen=True)
class Subject:
    """What is measured: the recipe's method, its configuration for labels at 50 Hz, and the peers that it brings."""

    method_class: type[Method]
    config: Any
    peers: dict[str, Callable[[Any], nn.Module]]

    @classmethod
    def of_recipe(cls, recipe: str) -> Subject:
        """Peers are `REFERENCE_STEPS` of the method's module `reference_steps`, where it has one.

        Call it before any peer is imported: fairseq registers a schema with Hydra that would then apply to our
        configuration.
        """
        values = compose_recipe(recipe)["method"]
        package = load_method(values["name"])
        config = typed_method(package.Method.Config, values)
        found = made_up_infos(package.Method.targets(config), LABEL_RATE_HZ)
        fitted = package.Method.fit_to_targets(config, found) if found else config
        return cls(package.Method, fitted, getattr(load_reference_steps(values["name"]), "REFERENCE_STEPS", {}))


@dataclass(frozen=True)
class Contender:
    """`model` owns the parameters; `loss` is the training loss of a batch."""

    model: nn.Module
    loss: Callable[[Batch], Tensor]

    def step(self, batch: Batch, precision: str) -> None:
        """Forward, backward, release of the gradients."""
        device = batch.waveforms.device
        with autocast(device, precision):
            loss = self.loss(batch)
        loss.backward()
        self.model.zero_grad(set_to_none=True)


def measure_steps(options: StepOptions) -> dict[str, Any]:
    """Time every contender at every precision; returns environment, rows, and the peers that cannot be imported."""
    device = _prepare(options)
    machine = environment(device)
    subject = Subject.of_recipe(options.recipe)
    absent = missing_peers(options, subject)
    names = [OURS, *(name for name in options.peer_names if name not in absent)]
    batch = make_batch(options, subject).to(device)
    contenders = {name: make_contender(options, name, subject, device) for name in names}
    works = {}
    for precision in options.precisions:
        for name, contender in contenders.items():
            try:
                contender.step(batch, precision)
            except (RuntimeError, TypeError, ValueError) as error:
                if name == OURS:
                    raise
                absent[f"{name} in {precision}"] = f"{type(error).__name__}: {error}"
            else:
                works[precision, name] = partial(contender.step, batch, precision)
    costs = interleaved(works, options.rounds, WARMUPS[device.type], device)
    flops = options.batch * cast(Method, contenders[OURS].model).training_flops(batch.waveforms.shape[1])
    rows = []
    for (precision, name), cost in costs.items():
        row = _row(options, contenders[name], cost, flops, peak_flops(device))
        if options.memory:
            row["peak_gb"] = in_fresh_process(peak_of_step, options, name, precision)
        rows.append({"variant": name, "precision": precision, **row})
    add_ratios(rows, OURS, group="precision")
    reference = [row for row in rows if row["precision"] == options.precisions[0]][-1]
    for row in rows:
        for kind in ("wall", "cpu"):
            row[f"scale_{kind}"] = row[f"{kind}_seconds"] / reference[f"{kind}_seconds"]
    note = f"{NOTE} On the scale, {reference['variant']} in {reference['precision']} is 1."
    return {"task": "step", "note": note, "environment": machine, "rows": rows, "absent": absent}


def _row(options: StepOptions, contender: Contender, cost: Cost, flops: float, peak: float | None) -> Row:
    row: Row = {
        "parameters_m": sum(p.numel() for p in contender.model.parameters()) / 1e6,
        "wall_seconds": cost.wall_seconds,
        "cpu_seconds": cost.cpu_seconds,
        "audio_seconds_per_second": options.batch * options.seconds / cost.wall_seconds,
        "teraflops": flops / cost.wall_seconds / 1e12,
    }
    return row if peak is None else row | {"share_of_bf16_peak": flops / cost.wall_seconds / peak}


def peak_of_step(options: StepOptions, name: str, precision: str) -> float:
    """Peak memory in GB of one step of one contender, the only one of this process: resident, or on the card."""
    device = _prepare(options)
    subject = Subject.of_recipe(options.recipe)
    batch = make_batch(options, subject).to(device)
    contender = make_contender(options, name, subject, device)
    contender.step(batch, precision)
    return peak_memory_gb(device) if device.type == "cuda" else peak_resident_gb()


def missing_peers(options: StepOptions, subject: Subject) -> dict[str, str]:
    """Peers that cannot be imported here, with the reason. Raises ConfigError for a peer that the method lacks."""
    absent = {}
    for name in options.peer_names:
        if name not in subject.peers:
            listed = ", ".join(subject.peers) or "none"
            raise ConfigError(f"peers: '{name}' is no peer of {options.recipe}; known: {listed}")
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a foreign package dies of: on a new Python, fairseq 0.12 of a ValueError
            absent[name] = f"{type(error).__name__}: {error}"
    return absent


def make_contender(options: StepOptions, name: str, subject: Subject, device: torch.device) -> Contender:
    """Our method or a peer, built from the same configuration, in train mode on `device`."""
    torch.manual_seed(0)
    if name == OURS:
        method = subject.method_class(subject.config).to(device).train()
        if options.compile:
            method.encoder.compile_layers()
        return Contender(method, lambda batch: method(batch).total(batch))
    peer = subject.peers[name](subject.config).to(device).train()
    return Contender(peer, peer)


def make_batch(options: StepOptions, subject: Subject) -> Batch:
    """Noise with random labels through the method's collator, which draws the masks."""
    samples = round(options.seconds * SAMPLE_RATE)
    examples = []
    collator = subject.method_class.collator(subject.config)
    for row in range(options.batch):
        rng = np.random.default_rng(row)
        waveform = torch.from_numpy(rng.normal(0.0, 0.1, samples).astype(np.float32))
        targets = made_up_targets(subject.method_class.targets(subject.config), samples, LABEL_RATE_HZ, rng)
        clean = waveform if collator.reads_clean_audio else None
        examples += [Example(waveform, row, 0, targets, rng, clean)] * collator.crops_per_example
    return collator(examples)


def _prepare(options: StepOptions) -> torch.device:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return options.torch_device()
