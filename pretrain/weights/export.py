"""Checkpoints to files that others load: the native export, s3prl's layout, Hugging Face's."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain.config import nearest
from pretrain.files import new_directory
from pretrain.method import Encoder
from pretrain.registry import load_interop, load_method
from pretrain.weights.download import file_sha256
from pretrain.weights.interop.files import (
    write_huggingface,
    write_json,
    write_named,
    write_safetensors,
    write_torch,
)
from pretrain.weights.interop.types import InteropError, NamedFiles, TrainedMethod, errors_name
from pretrain.weights.read import NATIVE_FORMAT, NATIVE_VERSION, interop_of, load_strictly, load_trained

# Format -> the function of a method's interop module that makes it.
_FOREIGN_FORMATS = {"s3prl": "to_s3prl", "huggingface": "to_huggingface"}


@dataclass
class ExportConfig:
    """`checkpoint` is a run or checkpoint folder; `kmeans` a label directory or k-means model to attach instead of the
    run's own, for the native format.
    """

    checkpoint: str
    output: str
    format: str = "native"
    kmeans: str | None = None


def export(config: ExportConfig) -> str:
    """Write the export and return a sentence about it. Raises InteropError for what cannot be exported."""
    trained = load_trained(config.checkpoint)
    formats = formats_of(trained.method_name)
    if config.format not in formats:
        raise InteropError(f"format: {trained.method_name} has no '{config.format}'; {nearest(config.format, formats)}")
    if config.kmeans is not None:
        trained = replace(trained, kmeans_dir=find_kmeans(Path(config.kmeans)))
    output, usage = Path(config.output), ""
    if config.format == "native":
        heads = load_method(trained.method_name).Method.exported_heads
        tensors = {key: value for key, value in trained.head_state().items() if key.split(".")[0] in heads}
        encoder = _encoder(trained, config.checkpoint)
        write_native(trained.method_name, encoder, output, trained.kmeans_dir, tensors, trained.config)
    elif config.format == "s3prl":
        usage = _write_s3prl(output, interop_of(trained.method_name).to_s3prl(trained))
    else:
        write_huggingface(output, interop_of(trained.method_name).to_huggingface(trained))
    units = " with its k-means model" if config.format == "native" and trained.kmeans_dir else ""
    return f"{output}: {trained.method_name} in {config.format} format{units}{usage}"


def formats_of(method_name: str) -> list[str]:
    """What checkpoints of a method can be exported to."""
    interop = load_interop(method_name)
    return ["native", *(name for name, function in _FOREIGN_FORMATS.items() if hasattr(interop, function))]


def write_native(
    method_name: str,
    encoder: Encoder,
    directory: Path,
    kmeans_dir: Path | None = None,
    heads: dict[str, Tensor] | None = None,
    method_config: dict[str, Any] | None = None,
) -> None:
    """Write config.json, encoder.safetensors and, where given, a copy of the k-means model; appears in one move.

    `heads` are the tensors of a method's `exported_heads` (heads.safetensors), which `method_config` builds again
    (`pretrain.weights.read.load_head`). config.json lists every file with its sha256, so that the directory can be
    fetched from a plain web server.
    """
    with new_directory(directory) as folder:
        write_safetensors(folder / "encoder.safetensors", encoder.state_dict())
        if heads:
            write_safetensors(folder / "heads.safetensors", heads)
        if kmeans_dir is not None:
            shutil.copytree(kmeans_dir, folder / "kmeans")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        content = {
            "format": NATIVE_FORMAT,
            "version": NATIVE_VERSION,
            "method": method_name,
            "encoder": encoder.to_config(),
            **({"config": method_config} if heads else {}),
            "files": {path.relative_to(folder).as_posix(): file_sha256(path) for path in files},
        }
        write_json(folder / "config.json", content)


def _write_s3prl(output: Path, content: dict[str, Any] | NamedFiles) -> str:
    """One file, or a directory of those that s3prl reads together; returns how to use it, where that needs saying."""
    if isinstance(content, NamedFiles):
        write_named(output, content)
        return f"; {content.usage}"
    write_torch(output, content)
    return ""


def find_kmeans(path: Path) -> Path:
    """The k-means model in a label directory, or the directory itself where it is one."""
    for candidate in (path / "kmeans", path):
        if (candidate / "kmeans.json").is_file():
            return candidate
    raise InteropError(f"{path}: no k-means model; give a label directory of tools/kmeans_labels.py")


def _encoder(trained: TrainedMethod, origin: str) -> Encoder:
    with errors_name(origin):
        encoder = load_method(trained.method_name).Encoder.from_config(trained.encoder_config())
    load_strictly(encoder, trained.encoder_state(), origin)
    return encoder
