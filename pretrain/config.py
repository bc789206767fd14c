"""Typed, strict configuration: every block of a run, the batch arithmetic, and `key=value` command lines for tools."""

from __future__ import annotations

import sys
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from pretrain.data.augment.options import AugmentConfig
from pretrain.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
CONF_DIR = ROOT / "conf"
SAMPLE_DIR = Path(__file__).resolve().parent / "data" / "sample"
PRECISIONS = ("auto", "fp32", "bf16", "fp16")

T = TypeVar("T")


class ConfigError(UserError):
    """A configuration that cannot be run; the message names the field and the fix."""


@dataclass
class BatchConfig:
    """The published batch: seconds of audio in one micro-batch, micro-batches in one optimiser update.

    `within` "speaker" fills each micro-batch with utterances of one speaker, as `data.speakers` tells them apart.
    """

    seconds_per_micro_batch: float
    micro_batches_per_step: int
    within: str | None = None

    def __post_init__(self) -> None:
        if self.seconds_per_micro_batch <= 0 or self.micro_batches_per_step < 1:
            raise ConfigError("batch: both fields must be positive")
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
        if not 0 < self.min_seconds <= self.max_seconds:
            raise ConfigError(f"crop: need 0 < min_seconds <= max_seconds, not {self.min_seconds}, {self.max_seconds}")


@dataclass
class OptimizerConfig:
    """AdamW with the published values; `clip_norm` 0 switches clipping off."""

    name: str
    lr: float
    betas: list[float]
    eps: float
    weight_decay: float
    clip_norm: float

    def __post_init__(self) -> None:
        if self.name != "adamw":
            raise ConfigError(f"optimizer.name: unknown optimiser '{self.name}'; known: adamw")


@dataclass
class CorpusConfig:
    """One of `data.corpora`: `tag` is its name or language, the rest as in `data`; `weight` its share of the audio."""

    tag: str
    dir: str
    labels: Any = None
    transcripts: str | None = None
    weight: float | None = None

    def label_dirs(self) -> list[Path]:
        """The label directories, one per label set."""
        return _paths(self.labels)


@dataclass
class DataConfig:
    """Where the audio and its labels are. `labels` is a label directory, a list of them, or null.

    `speakers` (for `batch.within`) is the place of the speaker in a path, or a table; `transcripts` a table of symbol
    strings and `dictionary` the file that numbers their symbols; in these paths `{dir}` stands for the corpus' folder
    and `{split}` for train or valid. `corpora` takes the place of `dir`, `labels` and `transcripts`. `noise` and `rirs`
    (room impulse responses) are manifests, or folders with train.tsv, for recipes whose `augment` block needs them.
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
    corpora: Any = None
    sampling_alpha: float | None = None
    noise: str | None = None
    rirs: str | None = None

    def __post_init__(self) -> None:
        if self.sampling_alpha is not None and self.sampling_alpha < 0:
            raise ConfigError(
                f"data.sampling_alpha: {self.sampling_alpha:g} is negative; 1 is natural, 0 makes all equal"
            )
        if self.corpora is None:
            return
        entries = [vars(entry) if is_dataclass(entry) else entry for entry in self.corpora]
        self.corpora = [typed(CorpusConfig, entry, f"data.corpora[{i}]") for i, entry in enumerate(entries)]
        self._check_corpora()

    def _check_corpora(self) -> None:
        for name in ("dir", "labels", "transcripts"):
            if getattr(self, name) is not None:
                raise ConfigError(f"data.{name}: given together with data.corpora; leave it out (data=corpora does)")
        tags = [corpus.tag for corpus in self.corpora]
        if not tags or len(set(tags)) < len(tags):
            raise ConfigError(f"data.corpora: the tags are {tags}; list at least one corpus, each tag once")
        weights = [corpus.weight for corpus in self.corpora if corpus.weight is not None]
        if weights and (len(weights) < len(tags) or min(weights) <= 0 or self.sampling_alpha is not None):
            raise ConfigError(
                "data.corpora: weight: give every corpus a positive one, without data.sampling_alpha, or none of them"
            )

    def label_dirs(self) -> list[Path]:
        """The label directories, one per label set."""
        return _paths(self.labels)


def _paths(names: Any) -> list[Path]:
    """None, one name or a list of them as paths."""
    return [Path(name) for name in ([] if names is None else [names] if isinstance(names, str) else names)]


@dataclass
class TrainerConfig:
    """How the loop runs; nothing here changes the optimisation."""

    log_every: int
    validate_every: int
    save_every: int
    keep_checkpoints: int
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
        if self.dry_run_ranks is not None and self.dry_run_ranks < 1:
            raise ConfigError(f"trainer.dry_run_ranks: {self.dry_run_ranks} is not a positive number")
        for name in ("log_every", "validate_every", "save_every", "keep_checkpoints", "max_validation_batches"):
            if getattr(self, name) < 1:
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
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision: '{self.precision}' is not one of {', '.join(PRECISIONS)}")
        if self.init_head not in ("keep", "reset"):
            raise ConfigError(f"init_head: '{self.init_head}' is not one of keep, reset")

    @property
    def run_dir(self) -> Path:
        """A function of recipe and name alone, so that the same command finds its checkpoints again."""
        return Path(self.output_dir) / (self.name or self.recipe)


def nearest(word: str, known: list[str]) -> str:
    """A hint for a mistyped name: the closest known ones, or all of them."""
    near = get_close_matches(word, known, n=3)
    return f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(sorted(known))}"


def typed(cls: type[T], values: dict[str, Any], where: str = "") -> T:
    """Build dataclass `cls` from plain `values`, refusing unknown keys, missing fields and wrong types.

    `where` is the dotted path of the block, for messages. Raises ConfigError.
    """
    check_keys(cls, values, where)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(cls), values)
        return OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        key = f"{where}.{error.full_key}" if where else error.full_key
        raise ConfigError(f"{key}: missing; state it in the recipe or on the command line") from None
    except ConfigKeyError as error:
        raise ConfigError(f"{where}: {error}") from None
    except OmegaConfBaseException as error:
        key = ".".join(part for part in (where, getattr(error, "full_key", "")) if part)
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}") from None


def check_keys(cls: type, values: dict[str, Any], where: str) -> None:
    """Refuse keys that `cls`, or a dataclass nested in it, does not have; name the nearest ones."""
    hints = get_type_hints(cls)
    for key, value in values.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in hints:
            raise ConfigError(f"{path}: no such option; {nearest(str(key), list(hints))}")
        if is_dataclass(hints[key]) and isinstance(value, dict):
            check_keys(hints[key], value, path)


def run_config(values: dict[str, Any]) -> RunConfig:
    """Type a composed configuration. The method block is typed later, by the method that it names."""
    if "name" not in (values.get("method") or {}):
        raise ConfigError("method.name: missing; choose a recipe with recipe=<name>")
    return typed(RunConfig, values)


def recipe_names() -> list[str]:
    """Every recipe that can be named on the command line, aliases included."""
    return sorted(path.stem for path in (CONF_DIR / "recipe").glob("*.yaml"))


def compose_recipe(recipe: str, overrides: list[str] | None = None) -> dict[str, Any]:
    """The configuration of one recipe as plain data, as `pretrain/train.py recipe=<recipe>` would see it."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    if recipe not in recipe_names():
        raise ConfigError(f"recipe: unknown recipe '{recipe}'; {nearest(recipe, recipe_names())}")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = compose("config", [f"recipe={recipe}", *(overrides or [])], return_hydra_config=True)
    values = OmegaConf.to_container(config, resolve=False)
    values.pop("hydra")
    return {**OmegaConf.to_container(OmegaConf.create(values), resolve=True), "recipe": recipe}


def check_overrides(arguments: list[str]) -> None:
    """Refuse `key=value` arguments whose recipe or key does not exist, with the nearest names. Raises ConfigError.

    Hydra's own answer to a mistyped key is to prefix it with +, after which it would be taken and ignored.
    """
    pairs = [argument.split("=", 1) for argument in arguments if "=" in argument and argument[0] not in "-~"]
    recipe = next((value for key, value in pairs if key == "recipe"), None)
    if recipe is None:
        raise ConfigError(f"recipe: missing; say recipe=<name>; known: {', '.join(recipe_names())}")
    known = _flat_keys(compose_recipe(recipe))
    groups = {path.name for path in CONF_DIR.iterdir() if path.is_dir()}
    for key, _ in pairs:
        name = key.lstrip("+")
        if name not in known and name not in groups and not name.startswith(("hydra.", "deepspeed.")):
            raise ConfigError(f"{name}: no such option; {nearest(name, sorted(known))}")


def _flat_keys(values: dict[str, Any], prefix: str = "") -> set[str]:
    keys = set()
    for key, value in values.items():
        keys |= {f"{prefix}{key}"} | (_flat_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else set())
    return keys


def resolve_data_dir(directory: str, where: str = "data.dir") -> Path:
    """`sample` is the embedded sample; anything else is a folder with train.tsv. Raises ConfigError about `where`."""
    path = SAMPLE_DIR if directory == "sample" else Path(directory)
    if not (path / "train.tsv").is_file():
        raise ConfigError(
            f"{where}: {path} has no train.tsv; run python tools/prepare_manifest.py audio_dir=<audio> output={path}"
        )
    return path


def save_yaml(values: dict[str, Any], path: Path) -> None:
    """Write plain data as YAML in the order given."""
    path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def parse_cli(cls: type[T], arguments: list[str], description: str | None = None) -> T:
    """Type a tool's `key=value` arguments (nested keys with dots) as dataclass `cls`.

    `--help` prints the fields and exits. Raises SystemExit with the message on a wrong argument.
    """
    if any(argument in ("-h", "--help") for argument in arguments):
        print((description or "").strip(), _usage(cls), sep="\n\n")
        raise SystemExit(0)
    wrong = [argument for argument in arguments if "=" not in argument]
    if wrong:
        raise SystemExit(f"{wrong[0]}: arguments have the form key=value; --help lists the keys")
    try:
        return typed(cls, OmegaConf.to_container(OmegaConf.from_dotlist(arguments)))
    except ConfigError as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: {error}") from None


def _usage(cls: type, prefix: str = "") -> str:
    lines = []
    hints = get_type_hints(cls)
    for f in fields(cls):
        name = f"{prefix}{f.name}"
        if is_dataclass(hints[f.name]):
            lines.append(_usage(hints[f.name], f"{name}."))
            continue
        required = f.default is MISSING and f.default_factory is MISSING
        default = f.default if f.default_factory is MISSING else f.default_factory()
        shown = "required" if required else f"default {default}"
        lines.append(f"  {name:<28} {getattr(hints[f.name], '__name__', hints[f.name])!s:<12} {shown}")
    return "\n".join(lines)
