"""From a configuration to a trainer: data, method, weights, engine, in the order in which errors are cheapest."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pretrain.config import BatchConfig, ConfigError, CropConfig, RunConfig, typed_method, upgraded, with_defaults
from pretrain.data.augment.augmenter import Augmenter, open_augmenter
from pretrain.data.augment.options import AugmentError
from pretrain.data.corpus import Corpus, open_corpus
from pretrain.data.loader import planned_reader
from pretrain.data.utterance_targets import write_dictionary
from pretrain.files import new_directory
from pretrain.method import Collator, Method
from pretrain.registry import load_method
from pretrain.training import checkpoint
from pretrain.training.engine import Engine
from pretrain.training.memory import probe_memory
from pretrain.training.precision import checked_precision, resolve_precision
from pretrain.training.run_log import Run
from pretrain.training.schedule import build_schedule
from pretrain.training.trainer import Trainer
from pretrain.training.validation import Validation
from pretrain.weights.read import initialise
from pretrain.world import join_world, share_cores

MAX_SHOWN = 8  # entries of a list in a sentence


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
    if config.trainer.keep_best is not None and not corpus.valid:
        raise ConfigError(
            f"trainer.keep_best: {config.trainer.keep_best} is of the validation, and there are no validation data; "
            "give the data a valid.tsv, or set trainer.keep_best=null"
        )
    collator = method_class.collator(method_config)
    augmenter = open_augmentation(config, corpus, collator)
    reader = planned_reader(config, corpus.train, collator, corpus.mix, augmenter)

    world.from_main(lambda: resources.enter_context(checkpoint.run_lock(config.run_dir)))
    torch.manual_seed(config.seed)
    method = method_class(method_config)
    found, notes = checkpoint.find_resumable(config.run_dir, world)
    world.from_main(lambda: checkpoint.set_aside_damaged(config.run_dir, found))
    identity = _identity(resolved, corpus, augmenter)
    if found is None:
        state = checkpoint.RunState(0, 0, 0, [0.0], 1.0, identity)
        notes += [] if config.init_from is None else initialise(method, config.init_from, config.init_head)
        method.begin(corpus.found)
    else:
        state = checkpoint.load_state(found)
        checkpoint.check_identity(_completed(state.identity, method_class), identity, config.run_dir)
        state.identity = identity  # knows more than that of an older version
        method.load_state_dict(checkpoint.load_weights(found))
        notes.append(f"resuming from {found}: update {state.update}")
        notes += _changed_rules(checkpoint.load_config(found), resolved)
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
        method.encoder.compile_layers()
    engine = Engine(method, config.optimizer, config.deepspeed, precision, world.device)
    if found is not None:
        with checkpoint.moment_reader(found) as read:
            engine.load_optimizer_state(read, {"adam_steps": state.adam_steps, "loss_scale": state.loss_scale})
    if world.is_main:
        _keep_kmeans(corpus.kmeans_dir, config.run_dir / "kmeans")
        for name, info in corpus.found.items():
            if info.names:
                write_dictionary(config.run_dir / f"dict.{name}.txt", info.names)
    run = Run(config, resolved, schedule, world, [*corpus.facts, *notes], corpus.notes)
    trainer = Trainer(run, engine, reader, state)
    if corpus.valid:
        valid_reader = planned_reader(config, corpus.valid, collator)
        trainer.validation = Validation(valid_reader, world, config.trainer.max_validation_batches, config.data.workers)
    return trainer


def open_run(config: RunConfig, with_labels: bool = True) -> tuple[type[Method], Any, Corpus]:
    """The method's class, its configuration fitted to the targets of this run, and the data.

    Without `with_labels` no label directory is opened, and the configuration keeps the recipe's classes. Raises
    ConfigError where utterances with transcripts would be cropped.
    """
    method_class: type[Method] = load_method(config.method["name"]).Method
    method_config: Any = typed_method(method_class.Config, config.method)
    method_config = method_class.complete(method_config, checkpoint.method_block(config.run_dir))
    wanted = method_class.targets(method_config)
    if any(spec.kind == "symbols" for spec in wanted) and not config.crop.whole:
        raise ConfigError(
            "crop.whole: is false, but this recipe trains on transcripts of whole utterances; set it true"
        )
    specs = [spec for spec in wanted if with_labels or spec.kind != "frames"]
    by_speaker = config.batch.within == "speaker"
    corpus = open_corpus(config.data, specs, Path(config.output_dir), by_speaker=by_speaker)
    if specs and len(specs) == len(wanted):
        fitted = method_class.fit_to_targets(method_config, corpus.found)
        corpus.facts += changed_options(asdict(method_config), asdict(fitted))
        method_config = fitted
    return method_class, method_config, corpus


def changed_options(before: dict[str, Any], after: dict[str, Any], prefix: str = "method") -> list[str]:
    """A sentence for every option that the data changed: a run trains what its recipe says and what was found."""
    lines = []
    for name, value in after.items():
        old = before.get(name)
        if isinstance(value, dict) and isinstance(old, dict):
            lines += changed_options(old, value, f"{prefix}.{name}")
        elif value != old:
            shown = f"{len(value)} names" if isinstance(value, list) and len(value) > MAX_SHOWN else value
            lines.append(f"{prefix}.{name}: {old} in the recipe, {shown} by the data")
    return lines


def open_augmentation(config: RunConfig, corpus: Corpus, collator: Collator) -> Augmenter | None:
    """What alters the training waveforms, None for recipes without it; adds a sentence to `corpus.facts`.

    Raises AugmentError where files that a stage needs are missing, or where the method reads no audio.
    """
    data = config.data
    augmenter = open_augmenter(config.augment, data.noise, data.rirs, corpus.train.manifest)
    if augmenter is not None and not collator.reads_audio:
        raise AugmentError("augment: this recipe trains on labels alone and reads no audio; leave the block out")
    if augmenter is not None:
        corpus.facts.append(augmenter.sentence())
    for name, path, stage in (("noise", data.noise, "noise"), ("rirs", data.rirs, "reverberation")):
        if path is not None and stage not in config.augment.stages():
            corpus.facts.append(f"data.{name} is given, but augment.{stage} is null, so nothing is taken from it")
    return augmenter


def _identity(resolved: dict[str, Any], corpus: Corpus, augmenter: Augmenter | None) -> dict[str, Any]:
    """What may not change between two starts of one run; see `checkpoint.check_identity`."""
    augment = None if augmenter is None else augmenter.identity()
    own = {name: resolved[name] for name in ("method", "batch", "crop", "seed")}
    return own | {"augment": augment} | corpus.identity()


def _changed_rules(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A sentence for every option of the optimiser and the schedule that a resumed run has changed, which it may."""
    lines = []
    for block in ("optimizer", "schedule"):
        old, new = before.get(block) or {}, now[block]
        for name in old.keys() | new.keys():
            if old.get(name) != new.get(name):
                lines.append(f"{block}.{name}: was {old.get(name)}, is {new.get(name)} from this update on")
    return sorted(lines)


def _completed(identity: dict[str, Any], method_class: type[Method]) -> dict[str, Any]:
    """The identity of a checkpoint as this version would have written it.

    Blocks of a former shape have the present one, and options that came later their defaults, which change nothing.
    """
    classes = {"method": method_class.Config, "batch": BatchConfig, "crop": CropConfig}
    return identity | {name: with_defaults(cls, upgraded(cls, identity.get(name, {}))) for name, cls in classes.items()}


def _keep_kmeans(source: Path | None, target: Path) -> None:
    """The k-means model of the labels stays with the run and goes into its exports."""
    if source is not None and not target.exists():
        with new_directory(target) as folder:
            shutil.copytree(source, folder, dirs_exist_ok=True)
