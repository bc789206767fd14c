"""From a configuration to a trainer: data, method, weights, engine, in the order in which errors are cheapest."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pretrain.config import BatchConfig, ConfigError, CropConfig, RunConfig, typed_method, with_defaults
from pretrain.data.corpus import Corpus, open_corpus
from pretrain.data.loader import planned_reader
from pretrain.data.transcripts import write_dictionary
from pretrain.files import new_directory
from pretrain.method import Method, load_method
from pretrain.training import checkpoint
from pretrain.training.distributed import join_world, share_cores
from pretrain.training.engine import Engine
from pretrain.training.memory import probe_memory
from pretrain.training.precision import checked_precision, resolve_precision
from pretrain.training.schedule import build_schedule
from pretrain.training.trainer import Trainer
from pretrain.weights.read import initialise


def build_trainer(config: RunConfig, resources: ExitStack) -> Trainer:
    """Everything up to the first update; `resources` holds the run folder's lock until it is closed.

    Raises ConfigError and its kin, naming field and fix, before the engine is built wherever possible.
    """
    world = join_world()
    share_cores(world, config.trainer.threads)
    config.batch.accumulation(world.size)
    schedule = build_schedule(config.schedule)
    method_class, method_config, corpus = open_run(config)
    resolved = {**asdict(config), "method": asdict(method_config)}
    collator = method_class.collator(method_config)
    reader = planned_reader(config, corpus.train, collator, corpus.mix)
    valid_reader = planned_reader(config, corpus.valid, collator) if corpus.valid else None

    if world.is_main:
        resources.enter_context(checkpoint.run_lock(config.run_dir))
    torch.manual_seed(config.seed)
    method = method_class(method_config)
    found, notes = checkpoint.find_resumable(config.run_dir, world)
    identity = _identity(resolved, corpus)
    if found is None:
        state = checkpoint.RunState(0, 0, 0, 0.0, 1.0, identity)
        notes += initialise(method, config.init_from, config.init_head) if config.init_from else []
        method.begin(corpus.labels)
    else:
        state = checkpoint.load_state(found)
        checkpoint.check_identity(_completed(state.identity, method_class), identity, config.run_dir)
        method.load_state_dict(checkpoint.load_weights(found))
        notes.append(f"resuming from {found}: update {state.update}")
    method.to(world.device)
    if config.trainer.checkpoint_activations:
        method.encoder.checkpoint_activations()
    precision = resolve_precision(config.precision, world.device)
    if precision != "fp32" and config.trainer.precision_check:
        trial = reader[reader.plan.small_micro_batch()]
        precision, note = checked_precision(method, trial, config.precision, precision, world)
        notes.append(note)
    zero = config.deepspeed["zero_optimization"]
    if config.trainer.memory_probe and zero["stage"] < 3:
        notes.append(probe_memory(method, reader, precision, world, config.batch, zero))
    if config.trainer.compile or (config.trainer.compile is None and world.device.type == "cuda"):
        method.encoder.compile_regions()
    engine = Engine(method, config.optimizer, config.deepspeed, precision, world.device)
    if found is not None:
        with checkpoint.moment_reader(found) as read:
            engine.load_optimizer_state(read, {"adam_step": state.adam_step, "loss_scale": state.loss_scale})
    if world.is_main:
        _keep_kmeans(corpus.kmeans_dir, config.run_dir / "kmeans")
        if corpus.symbols:
            write_dictionary(config.run_dir / "dict.phones.txt", corpus.symbols)
    notes = [*corpus.facts, *notes]
    return Trainer(config, resolved, engine, schedule, reader, valid_reader, state, world, notes, corpus.notes)


def open_run(config: RunConfig, with_labels: bool = True) -> tuple[type[Method], Any, Corpus]:
    """The method's class, its configuration fitted to the labels and transcripts of this run, and the data.

    Without `with_labels` no label directory is opened, and the configuration keeps the recipe's classes. Raises
    ConfigError where utterances with transcripts would be cropped.
    """
    method_class: type[Method] = load_method(config.method["name"]).Method
    method_config = typed_method(method_class.Config, config.method)
    transcripts = method_class.needs_transcripts(method_config)
    if transcripts and not config.crop.whole:
        raise ConfigError(
            "crop.whole: is false, but this recipe trains on transcripts of whole utterances; set it true"
        )
    classes = method_class.label_classes(method_config) if with_labels else []
    by_speaker = config.batch.within == "speaker"
    corpus = open_corpus(
        config.data,
        classes,
        Path(config.output_dir),
        by_speaker=by_speaker,
        with_transcripts=transcripts,
        label_source=method_class.label_source(method_config),
    )
    if corpus.labels:
        method_config = method_class.adapt(method_config, corpus.labels)
    if corpus.symbols:
        method_config = method_class.adapt_transcripts(method_config, corpus.symbols)
    return method_class, method_config, corpus


def _identity(resolved: dict[str, Any], corpus: Corpus) -> dict[str, Any]:
    """What may not change between two starts of one run; see `checkpoint.check_identity`."""
    return {name: resolved[name] for name in ("method", "batch", "crop", "seed")} | corpus.identity()


def _completed(identity: dict[str, Any], method_class: type[Method]) -> dict[str, Any]:
    """The identity of a checkpoint, where options that came after it have their defaults, which change nothing."""
    classes = {"method": method_class.Config, "batch": BatchConfig, "crop": CropConfig}
    return identity | {name: with_defaults(cls, identity[name]) for name, cls in classes.items()}


def _keep_kmeans(source: Path | None, target: Path) -> None:
    """The k-means model of the labels stays with the run and goes into its exports."""
    if source is not None and not target.exists():
        with new_directory(target) as folder:
            shutil.copytree(source, folder, dirs_exist_ok=True)
