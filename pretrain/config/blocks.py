"""Every block of a run as a dataclass, the batch arithmetic, and the checks that one block can make alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from pretrain.config.strict import ConfigError, typed
from pretrain.data.augment.options import AugmentConfig

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
ZERO_STAGES = range(4)
MAX_SEED = 2**63 - 1  # of torch's and numpy's generators both


def check_seed(seed: int, most: int = MAX_SEED) -> None:
    """Raise ConfigError for a seed that generators do not take."""
    if not 0 <= seed <= most:
        raise ConfigError(f"seed: {seed} is out of range; give 0 to {most}")


@dataclass
class BatchConfig:
    """The published batch: seconds of audio in one micro-batch, micro-batches in one optimiser update.

    `within` "speaker" fills each micro-batch with utterances of one speaker, as `data.speakers` tells them apart.
    """

    seconds_per_micro_batch: float
    micro_batches_per_step: int
    within: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.seconds_per_micro_batch < math.inf or self.micro_batches_per_step < 1:
            raise ConfigError("batch: both fields must be positive and finite")
        if self.within not in (None, "speaker"):
            raise ConfigError(f"batch.within: '{self.within}' is unknown; take speaker, or null for any utterances")

    def accumulation(self, world_size: int) -> int:
        """Micro-batches per rank and update. Raises ConfigError where the world size does not divide the batch."""
        total = self.micro_batches_per_step
        if total % world_size:
            usable = ", ".join(str(n) for n in range(1, total + 1) if total % n == 0)
            raise ConfigError(
                f"batch.micro_batches_per_step: {total} micro-batches cannot be shared by {world_size} ranks; run on "
                f"{usable} ranks, or change batch.micro_batches_per_step and batch.seconds_per_micro_batch together so "
                f"that their product stays {total * self.seconds_per_micro_batch:g} seconds"
            )
        return total // world_size


@dataclass
class CropConfig:
    """Utterances shorter than the minimum are left out; longer ones than the maximum are cropped.

    With `whole` the others are read to their end and padded; without it a micro-batch is cropped to its shortest.
    """

    min_seconds: float
    max_seconds: float
    whole: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.min_seconds <= self.max_seconds < math.inf:
            raise ConfigError(
                f"crop: need 0 < min_seconds <= max_seconds, not {self.min_seconds}, {self.max_seconds}; give two "
                "finite numbers in this order"
            )


@dataclass
class OptimizerConfig:
    """The published values. `name` is adamw, or adam, whose weight decay is an L2 term of the gradient; `clip_norm` 0
    switches clipping off.
    """

    name: str
    lr: float
    betas: list[float]
    eps: float
    weight_decay: float
    clip_norm: float

    def __post_init__(self) -> None:
        if self.name not in ("adam", "adamw"):
            raise ConfigError(f"optimizer.name: unknown optimiser '{self.name}'; known: adam, adamw")
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ConfigError(f"optimizer.betas: {self.betas}; give two numbers from 0 to below 1")
        if not 0.0 < self.eps < math.inf:
            raise ConfigError(f"optimizer.eps: {self.eps:g}; give a positive number")
        for name in ("lr", "weight_decay", "clip_norm"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"optimizer.{name}: {getattr(self, name):g}; give 0 or a positive number")


@dataclass
class CorpusConfig:
    """One of `data.corpora`: `tag` is its name or language, the rest as in `data`; `weight` its share of the audio."""

    tag: str
    dir: str
    labels: Any = None
    transcripts: str | None = None
    classes: str | None = None
    weight: float | None = None

    def __post_init__(self) -> None:
        _check_labels(self.labels, f"data.corpora: {self.tag}: labels")

    def label_dirs(self) -> list[Path]:
        """The label directories, one per label set."""
        return _paths(self.labels)


@dataclass
class DataConfig:
    """Where the audio and its labels are. `labels` is a label directory, a list of them, or null.

    `speakers` (for `batch.within`) is the place of the speaker in a path, or a table; `transcripts` a table of symbol
    strings and `dictionary` the file that numbers their symbols; `classes` a table of classes or tags of utterances and
    `class_names` the file that numbers them; in these paths `{dir}` stands for the corpus' folder and `{split}` for
    train or valid. `corpora` takes the place of `dir`, `labels`, `transcripts` and `classes`. `noise` and `rirs` (room
    impulse responses) are manifests, or folders with train.tsv, for recipes whose `augment` block needs them.
    """

    name: str
    dir: str | None
    labels: Any
    label_rate_hz: int | None
    workers: int
    max_bad_share: float
    speakers: Any = None
    transcripts: str | None = None
    dictionary: str | None = None
    classes: str | None = None
    class_names: str | None = None
    corpora: Any = None
    sampling_alpha: float | None = None
    noise: str | None = None
    rirs: str | None = None

    def __post_init__(self) -> None:
        _check_labels(self.labels, "data.labels")
        if self.speakers is not None and (isinstance(self.speakers, bool) or not isinstance(self.speakers, int | str)):
            raise ConfigError(
                f"data.speakers: {self.speakers!r} is neither a place in the path, such as 0, nor a table"
            )
        if self.workers < 0:
            raise ConfigError(f"data.workers: {self.workers} is negative; 0 reads the audio in the run's own process")
        if not 0 <= self.max_bad_share <= 1:
            raise ConfigError(f"data.max_bad_share: {self.max_bad_share:g} is no share; give 0 to 1")
        if self.sampling_alpha is not None and not 0 <= self.sampling_alpha < math.inf:
            raise ConfigError(
                f"data.sampling_alpha: {self.sampling_alpha:g} is no number from 0 on; 1 is natural, 0 makes all equal"
            )
        if self.corpora is None:
            return
        if not isinstance(self.corpora, list):
            raise ConfigError(f"data.corpora: {self.corpora!r} is no list; give [{{tag: ..., dir: ...}}, ...]")
        entries = [vars(entry) if is_dataclass(entry) else entry for entry in self.corpora]
        self.corpora = [typed(CorpusConfig, entry, f"data.corpora[{i}]") for i, entry in enumerate(entries)]
        self._check_corpora()

    def _check_corpora(self) -> None:
        for name in ("dir", "labels", "transcripts", "classes"):
            if getattr(self, name) is not None:
                raise ConfigError(f"data.{name}: given together with data.corpora; leave it out (data=corpora does)")
        tags = [corpus.tag for corpus in self.corpora]
        if not tags or len(set(tags)) < len(tags):
            raise ConfigError(f"data.corpora: the tags are {tags}; list at least one corpus, each tag once")
        weights = [corpus.weight for corpus in self.corpora if corpus.weight is not None]
        unusable = not all(0 < weight < math.inf for weight in weights)
        if weights and (len(weights) < len(tags) or unusable or self.sampling_alpha is not None):
            raise ConfigError(
                "data.corpora: weight: give every corpus a positive one, without data.sampling_alpha, or none of them"
            )

    def label_dirs(self) -> list[Path]:
        """The label directories, one per label set."""
        return _paths(self.labels)


def _check_labels(labels: Any, where: str) -> None:
    """Raise ConfigError unless `labels` are null, a path or a list of paths."""
    if labels is not None and not all(isinstance(name, str) and name for name in _listed(labels)):
        raise ConfigError(f"{where}: {labels!r} is no path; give a label directory, a list of them, or null")


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _paths(names: Any) -> list[Path]:
    """None, one name or a list of them as paths."""
    return [] if names is None else [Path(name) for name in _listed(names)]


@dataclass
class TrainerConfig:
    """How the loop runs; nothing here changes the optimisation."""

    log_every: int
    validate_every: int
    save_every: int
    keep_checkpoints: int
    keep_best: str | None
    keep_best_maximize: bool
    save_minutes: float
    max_validation_batches: int
    stop_after_updates: int | None
    max_failed_steps: int
    memory_probe: bool
    precision_check: bool
    compile: bool | None
    profile: bool
    health: bool
    threads: int | None
    checkpoint_activations: bool
    dry_run: bool
    dry_run_device: str
    dry_run_ranks: int | None
    audio_examples: int = 0

    def __post_init__(self) -> None:
        if self.dry_run_device not in ("cuda", "cpu"):
            raise ConfigError(f"trainer.dry_run_device: '{self.dry_run_device}' is not one of cuda, cpu")
        for name in ("stop_after_updates", "threads", "dry_run_ranks"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"trainer.{name}: {getattr(self, name)} is not a positive number; give one, or null")
        for name in (
            *("log_every", "validate_every", "save_every", "save_minutes", "keep_checkpoints"),
            *("max_validation_batches", "max_failed_steps"),
        ):
            if not getattr(self, name) > 0:
                raise ConfigError(f"trainer.{name}: {getattr(self, name)} is not a positive number")
        if self.audio_examples < 0:
            raise ConfigError(f"trainer.audio_examples: {self.audio_examples} is negative; 0 writes none")


@dataclass
class ExpectedConfig:
    """Facts that a test holds the recipe against."""

    encoder_parameters: int | None = None


@dataclass
class RunConfig:
    """One run, whole. `method`, `schedule` and `deepspeed` are typed by the method, the schedule and DeepSpeed."""

    name: str | None
    recipe: str
    output_dir: str
    seed: int
    precision: str
    init_from: str | None
    init_head: str
    method: dict[str, Any]
    batch: BatchConfig
    crop: CropConfig
    optimizer: OptimizerConfig
    schedule: dict[str, Any]
    data: DataConfig
    trainer: TrainerConfig
    deepspeed: dict[str, Any]
    expected: ExpectedConfig = field(default_factory=ExpectedConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        if self.name is not None and (self.name in (".", "..") or set(self.name) & set("/\\\0")):
            raise ConfigError(f"name: '{self.name}' is no name of a folder; the folders before it go into output_dir")
        check_seed(self.seed)
        if not isinstance(self.schedule.get("name"), str):
            problem = f"{self.schedule['name']!r} is no name" if "name" in self.schedule else "missing"
            raise ConfigError(f"schedule.name: {problem}; state it in the recipe, such as polynomial")
        self._check_zero()
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision: '{self.precision}' is not one of {', '.join(PRECISIONS)}")
        if self.init_head not in ("keep", "reset"):
            raise ConfigError(f"init_head: '{self.init_head}' is not one of keep, reset")

    def _check_zero(self) -> None:
        where, zero = "deepspeed.zero_optimization", self.deepspeed.get("zero_optimization")
        if not isinstance(zero, dict):
            raise ConfigError(f"{where}: {zero!r} is no block; give {{stage: 0}} to {{stage: 3}}, or deepspeed=zero1")
        stage = zero.get("stage")
        if type(stage) is not int or stage not in ZERO_STAGES:
            raise ConfigError(f"{where}.stage: {stage!r} is no stage of ZeRO; give 0, 1, 2 or 3")

    @property
    def run_dir(self) -> Path:
        """A function of recipe and name alone, so that the same command finds its checkpoints again."""
        return Path(self.output_dir) / (self.name or self.recipe)


def run_config(values: dict[str, Any]) -> RunConfig:
    """Type a composed configuration. The method block is typed later, by the method that it names."""
    method = values.get("method") or {}
    if not isinstance(method, dict) or "name" not in method:
        raise ConfigError("method.name: missing; choose a recipe with recipe=<name>")
    if not isinstance(method["name"], str):
        raise ConfigError(f"method.name: {method['name']!r} is no name; leave it to the recipe")
    return typed(RunConfig, values)


def save_yaml(values: dict[str, Any], path: Path) -> None:
    """Write plain data as YAML in the order given."""
    path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
