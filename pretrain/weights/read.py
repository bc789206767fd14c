"""Finding and reading the weights behind a path or address, of whatever kind, and starting a method from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from pretrain.config import nearest, typed_method, upgraded
from pretrain.method import Encoder, Method
from pretrain.registry import load_interop, load_method, method_names
from pretrain.training.checkpoint import COMPLETE, damage, newest_checkpoint
from pretrain.weights.download import fetch, file_sha256, is_url
from pretrain.weights.interop.files import read_huggingface, read_json, read_safetensors, read_torch
from pretrain.weights.interop.types import Imported, InteropError, TrainedMethod, errors_name

NATIVE_FORMAT, NATIVE_VERSION = "headwater", 1
TRAINED_FILES = ("model.safetensors", "config.yaml")  # of a checkpoint: all that is read of it here


@dataclass(frozen=True)
class Weights:
    """An encoder's plain config and tensors, the method's other tensors where the source has them, and its origin.

    `kmeans_dir` holds the k-means model that travelled with the weights, if any. `config_file` is where the config
    stands, for messages, where that is not the origin itself. `method_config` is the method's whole block, where the
    source has it.
    """

    method_name: str
    origin: str
    encoder_config: dict[str, Any]
    encoder_state: dict[str, Tensor]
    head_state: dict[str, Tensor] = field(default_factory=dict)
    kmeans_dir: Path | None = None
    config_file: str = ""
    method_config: dict[str, Any] | None = None

    def build_encoder(self, changes: dict[str, Any] | None = None) -> Encoder:
        """The encoder with fresh weights, `changes` put into its configuration.

        Raises InteropError, naming the file, for a configuration that makes no network.
        """
        with errors_name(self.config_file or self.origin):
            return load_method(self.method_name).Encoder.from_config({**self.encoder_config, **(changes or {})})


def read_weights(path_or_url: str | Path, method_name: str | None = None, refresh: bool = False) -> Weights:
    """Read any source of weights.

    `path_or_url` is a native export, a run folder (its newest complete checkpoint, or its export), one checkpoint
    folder, a Hugging Face directory, a .pt file of fairseq or s3prl, or an http(s) address of a .pt file, a native
    export or a Hugging Face directory. `method_name` is the method wanted; None takes the one that the source names,
    which a .pt file does not. Raises InteropError where the source is unreadable, incomplete or of another method.
    """
    return _read(path_or_url, None if method_name is None else [method_name], refresh)


def _read(path_or_url: str | Path, wanted: list[str] | None, refresh: bool = False) -> Weights:
    """Weights of one of the methods `wanted`, the likeliest first; None is any."""
    if path_or_url == "":  # not the current folder, which it would mean as a path
        raise InteropError("path_or_url: empty; give a run, an export, a Hugging Face folder or a .pt")
    path = fetch(path_or_url, refresh) if isinstance(path_or_url, str) and is_url(path_or_url) else Path(path_or_url)
    if path.is_file():
        weights = _foreign_file(path, wanted)
    elif not path.is_dir():
        raise InteropError(f"{path}: no such file or directory; give a run, an export, a Hugging Face folder or a .pt")
    elif (path / "config.json").is_file():
        weights = _configured_directory(path, wanted)
    else:
        weights = _run_or_checkpoint(path)
    if wanted is not None and weights.method_name not in wanted:
        names = " or ".join(f"'{name}'" for name in wanted)
        raise InteropError(
            f"{path}: method: a checkpoint of '{weights.method_name}', not of {names}; "
            f"name a recipe of {weights.method_name}, or give another checkpoint"
        )
    return weights


def load_trained(path: str | Path) -> TrainedMethod:
    """One of our checkpoints, from a run folder (the newest complete one) or a checkpoint folder.

    Raises InteropError for anything else, for a half-written checkpoint, and for one without weights.
    """
    path = Path(path)
    if step := _newest(path):
        return _trained(step)
    step = path
    if (step / "checkpoints").is_dir():
        raise InteropError(f"{path}: no complete checkpoint under checkpoints/; train on, or give another run")
    if not (step / COMPLETE).is_file():
        is_checkpoint = any((step / name).exists() for name in ("model.safetensors", "state.json", "config.yaml"))
        reason = f"{COMPLETE} is missing, so it was never finished" if is_checkpoint else "not a checkpoint"
        raise InteropError(f"{step}: {reason}; give a run folder, or a checkpoint folder step_* that is complete")
    if problem := damage(step, names=TRAINED_FILES):
        raise InteropError(f"{problem}; give another checkpoint, or the run folder for its newest undamaged one")
    return _trained(step)


def _newest(run: Path) -> Path | None:
    """The run's newest complete checkpoint; None where it has none, or `run` is no run folder.

    Only the files that are read here are hashed, and here alone.
    """
    return newest_checkpoint(run, TRAINED_FILES) if (run / "checkpoints").is_dir() else None


def _trained(step: Path) -> TrainedMethod:
    """What a verified checkpoint folder holds."""
    if missing := [name for name in TRAINED_FILES if not (step / name).is_file()]:
        raise InteropError(f"{step}: {', '.join(missing)}: missing, so it holds no weights; give another checkpoint")
    config = yaml.safe_load((step / "config.yaml").read_text(encoding="utf-8"))["method"]
    config = upgraded(load_method(config["name"]).Method.Config, config)
    kmeans = step.parent.parent / "kmeans"
    return TrainedMethod(
        config["name"], config, read_safetensors(step / "model.safetensors"), kmeans if kmeans.is_dir() else None
    )


def initialise(method: Method, init_from: str, head: str) -> list[str]:
    """Start `method` from the weights behind `init_from`: weights only, no optimiser state, no counters.

    The weights may be of another method with the same encoder. `head` says what becomes of the tensors outside the
    encoder: "keep" loads them and wants every shape to agree, "reset" leaves them as they are. Returns sentences that
    say what was done. Raises InteropError where the architectures differ, naming the first field that does.
    """
    own = method.config.name
    weights = _read(init_from, [own, *_methods_sharing(type(method.encoder), own)])
    differing_options = load_matching(method.encoder, weights, "method.encoder")
    done = [f"encoder: {len(weights.encoder_state)} tensors from {weights.origin}", *differing_options]
    if head == "keep" and not _heads_are_shared(type(method), weights.method_name):
        raise InteropError(
            f"{weights.origin}: a checkpoint of '{weights.method_name}', whose heads are not those of '{own}'; "
            "set init_head=reset"
        )
    fresh = {key: value for key, value in method.state_dict().items() if not key.startswith("encoder.")}
    held = {key.split(".")[0] for key in weights.head_state}
    absent = [part for part in method.separate_parts if part not in held]
    fresh = {key: value for key, value in fresh.items() if key.split(".")[0] not in absent}
    if head == "reset":
        return [*done, f"head: {len(fresh)} tensors drawn anew"]
    differing = [key for key, value in fresh.items() if _shape(weights.head_state, key) != tuple(value.shape)]
    if differing:
        key = differing[0]
        raise InteropError(
            f"{weights.origin}: {key}: {_shape(weights.head_state, key) or 'absent'} there, {tuple(fresh[key].shape)} "
            "in the recipe, so the head cannot be kept; set init_head=reset"
        )
    method.load_state_dict({key: weights.head_state[key] for key in fresh}, strict=False)
    return [*done, f"head: {len(fresh)} tensors kept"]


def _methods_sharing(encoder_class: type[Encoder], own: str) -> list[str]:
    """Other methods whose encoder is the same class."""
    return [name for name in method_names() if name != own and load_method(name).Encoder is encoder_class]


def _heads_are_shared(method_class: type[Method], other: str) -> bool:
    """Whether the methods are one, or make their heads in a class that both inherit, as those do that extend HuBERT."""
    theirs = load_method(other).Method.__mro__
    return next(base for base in method_class.__mro__ if base in theirs) is not Method


def load_matching(encoder: Encoder, weights: Weights, field: str) -> list[str]:
    """Load `weights` into the encoder that the options under `field` describe.

    Returns a sentence on the options in which the weights' encoder differs where it may; none if in nothing. Raises
    InteropError for the first other difference.
    """
    with torch.device("meta"):
        # Through the class, so that weights from before a field existed get its default.
        their_config = weights.build_encoder().to_config()
    ours, theirs = _flat(encoder.to_config()), _flat(their_config)
    differing = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    for name in differing:
        if name not in encoder.weight_independent_fields:
            raise InteropError(
                f"{weights.origin}: {field}.{name}: {theirs.get(name)!r} there, {ours.get(name)!r} in the "
                "recipe; choose the recipe that the weights were trained with, or set the field to their value"
            )
    load_strictly(encoder, weights.encoder_state, weights.origin)
    listed = ", ".join(f"{name} {theirs.get(name)} there, {ours.get(name)} here" for name in differing)
    return [f"the recipe's options of the encoder are used where they differ: {listed}"] if differing else []


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by dotted name, tuples as lists."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def load_encoder(path_or_url: str | Path, method_name: str | None = None) -> Encoder:
    """The encoder behind `path_or_url`, weights loaded; raises InteropError as `read_weights` does."""
    weights = read_weights(path_or_url, method_name)
    encoder = weights.build_encoder()
    load_strictly(encoder, weights.encoder_state, weights.origin)
    return encoder


def load_head(path: str | Path, name: str) -> nn.Module:
    """The sub-module `name` of the method (one of its `exported_heads`) behind a run, a checkpoint or a native export.

    Returned in eval mode. Raises InteropError where the source holds no such head.
    """
    weights = read_weights(path)
    state = {key.removeprefix(f"{name}."): v for key, v in weights.head_state.items() if key.startswith(f"{name}.")}
    if not state or weights.method_config is None:
        known = sorted({key.split(".")[0] for key in weights.head_state})
        raise InteropError(f"{weights.origin}: holds no head '{name}'; {nearest(name, known) if known else 'no heads'}")
    method_class: type[Method] = load_method(weights.method_name).Method
    with errors_name(weights.config_file or weights.origin):
        head = method_class(typed_method(method_class.Config, weights.method_config)).get_submodule(name)
    load_strictly(head, state, weights.origin)
    return head.eval()


def load_strictly(module: nn.Module, state: dict[str, Tensor], origin: str) -> None:
    """`module.load_state_dict`, strict, with an error that names the origin of the tensors."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise InteropError(f"{origin}: {error}; the file is damaged, or its configuration is another model's") from None


def interop_of(method_name: str) -> ModuleType:
    """The method's `interop` module; raises InteropError where it has none."""
    interop = load_interop(method_name)
    if interop is None:
        raise InteropError(f"method.name: {method_name} reads and writes no other project's files; use a native export")
    return interop


def _run_or_checkpoint(path: Path) -> Weights:
    newest, export = _newest(path), path / "export"
    if newest is None and (export / "config.json").is_file():
        return _native(export, read_json(export / "config.json"))
    trained = _trained(newest) if newest else load_trained(path)
    return Weights(
        trained.method_name,
        str(path),
        trained.encoder_config(),
        trained.encoder_state(),
        trained.head_state(),
        trained.kmeans_dir,
        method_config=trained.config,
    )


def _configured_directory(path: Path, wanted: list[str] | None) -> Weights:
    config = read_json(path / "config.json")
    if config.get("format") == NATIVE_FORMAT:
        return _native(path, config)
    if "model_type" not in config:
        raise InteropError(f"{path / 'config.json'}: neither an export of ours nor of Hugging Face; give one of these")
    return _huggingface(path, config["model_type"], wanted)


def _native(path: Path, config: dict[str, Any]) -> Weights:
    if config.get("version") != NATIVE_VERSION:
        raise InteropError(
            f"{path / 'config.json'}: version: {config.get('version')} is not {NATIVE_VERSION}; update this package"
        )
    for name, kind in (("method", str), ("encoder", dict)):
        if not isinstance(config.get(name), kind):
            problem = f"{config[name]!r} is no {kind.__name__}" if name in config else "missing"
            raise InteropError(f"{path / 'config.json'}: {name}: {problem}; copy or download it again")
    kmeans, heads = path / "kmeans", path / "heads.safetensors"
    hashes = config.get("files")
    digests = hashes if isinstance(hashes, dict) else {}  # the first exports listed none
    return Weights(
        config["method"],
        str(path),
        config["encoder"],
        _verified(path, "encoder.safetensors", digests),
        _verified(path, "heads.safetensors", digests) if heads.is_file() else {},
        kmeans_dir=kmeans if kmeans.is_dir() else None,
        config_file=str(path / "config.json"),
        method_config=config.get("config"),
    )


def _verified(folder: Path, name: str, digests: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a file of an export. Raises InteropError unless its SHA-256 is the one that config.json lists."""
    tensors = read_safetensors(folder / name)
    # Reads the file, which loading has just brought into memory, once more: a quarter to one second per GB.
    if name in digests and file_sha256(folder / name) != digests[name]:
        raise InteropError(
            f"{folder / name}: its content is not the one that config.json lists; copy or download it again"
        )
    return tensors


def _huggingface(path: Path, model_type: str, wanted: list[str] | None) -> Weights:
    candidates = method_names() if wanted is None else wanted
    interops = {name: load_interop(name) for name in candidates}
    known = {name: i for name, i in interops.items() if i and model_type in getattr(i, "HF_MODEL_TYPES", ())}
    if not known:
        raise InteropError(f"{path / 'config.json'}: model_type: '{model_type}' is no model of {', '.join(candidates)}")
    model = read_huggingface(path)

    def is_told_apart(name: str) -> bool:
        """Methods that share a class of transformers with others say which of its options tells theirs apart."""
        fields = getattr(known[name], "HF_FIELDS", {})
        return all(model.config.get(field) == value for field, value in fields.items())

    name = next(filter(is_told_apart, known), next(iter(known)))
    return _imported(name, path, known[name].from_huggingface, model, path / "config.json")


def _foreign_file(path: Path, wanted: list[str] | None) -> Weights:
    """The first of `wanted` that reads the file; where none does, the first one's reason is raised."""
    if wanted is None:
        raise InteropError(f"{path}: a .pt file does not name its method; give the method or recipe as well")
    checkpoint = read_torch(path)
    reasons = []
    for name in wanted:
        try:
            return _imported(name, path, interop_of(name).from_pt, checkpoint, path)
        except InteropError as error:
            reasons.append(error)
    raise reasons[0]


def _imported(
    method_name: str, path: Path, read: Callable[[Any], Imported], content: Any, config_file: Path
) -> Weights:
    """What a method's `interop` makes of a foreign checkpoint; errors name `config_file`."""
    with errors_name(config_file):
        imported = read(content)
    return Weights(
        method_name,
        str(path),
        imported.encoder_config,
        imported.encoder_state,
        imported.head_state,
        config_file=str(config_file),
    )


def _shape(state: dict[str, Tensor], key: str) -> tuple[int, ...] | None:
    return tuple(state[key].shape) if key in state else None
