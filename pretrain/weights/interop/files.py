"""Reading foreign weight files without executing anything in them, and writing files that other projects read."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretrain.files import new_directory, new_file
from pretrain.weights.interop.types import HuggingFaceModel, InteropError, NamedFiles

# One file, or the index of several; safetensors first, where a directory holds both.
HUGGINGFACE_WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


# What torch.save writes begins like a zip archive, or (until torch 1.5) like a pickle.
TORCH_BEGINNINGS = (b"PK", b"\x80")


def read_torch(path: Path) -> dict[str, Any]:
    """The mapping in a .pt, .pth or .bin file, tensors on the CPU; loaded weights-only, so nothing is executed.

    A namespace of options, as s3prl and old fairseq leave one beside the weights, becomes a mapping of them. Raises
    InteropError for a file that is none of torch's, holds other Python objects, is damaged, or is no mapping.
    """
    try:
        with path.open("rb") as file:
            beginning = file.read(2)
    except OSError as error:
        raise InteropError(
            f"{path}: cannot be read ({error.strerror}); give a file that torch.save has written"
        ) from error
    if not beginning.startswith(TORCH_BEGINNINGS):
        raise InteropError(f"{path}: not a PyTorch file; give a file from torch.save")
    try:
        # Unpickling a namespace sets attributes and runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InteropError(
            f"{path}: it holds Python objects beyond tensors and plain containers, which are not loaded because "
            "unpickling them can run any code; if you trust the file, convert it once where its project is installed: "
            "c = torch.load(file, weights_only=False); torch.save({'model': c['model'], 'cfg': "
            "OmegaConf.to_container(OmegaConf.create(c['cfg']))}, new_file) and give the new file "
            f"({str(error).splitlines()[0]})"
        ) from error
    except Exception as error:  # what unpickling makes of a file that is none of torch's has no end of types
        raise InteropError(f"{path}: not a complete PyTorch file ({error}); copy or download it again") from error
    if not isinstance(content, dict):
        raise InteropError(f"{path}: holds a {type(content).__name__}, not a checkpoint; give a checkpoint dictionary")
    return {key: vars(value) if isinstance(value, argparse.Namespace) else value for key, value in content.items()}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, on the CPU; raises InteropError for a missing or damaged file."""
    try:
        return load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise InteropError(f"{path}: not a complete safetensors file ({error}); copy or download it again") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises InteropError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InteropError(f"{path}: not JSON ({error}); copy or download it again") from error
    if not isinstance(content, dict):
        raise InteropError(f"{path}: not a JSON object; give a configuration file")
    return content


def read_huggingface(directory: Path) -> HuggingFaceModel:
    """A Hugging Face directory: safetensors or pytorch_model.bin, in one file or sharded by an index."""
    config = read_json(directory / "config.json")
    preprocessor = directory / "preprocessor_config.json"
    return HuggingFaceModel(
        config, _huggingface_tensors(directory), read_json(preprocessor) if preprocessor.is_file() else {}
    )


def _huggingface_tensors(directory: Path) -> dict[str, Tensor]:
    for single, index in HUGGINGFACE_WEIGHTS:
        if (directory / single).is_file():
            return _read_weight_file(directory / single)
        if (directory / index).is_file():
            tensors: dict[str, Tensor] = {}
            for name in shard_names(read_json(directory / index), directory / index):
                tensors |= _read_weight_file(directory / name)
            return tensors
    names = ", ".join(name for pair in HUGGINGFACE_WEIGHTS for name in pair)
    raise InteropError(f"{directory}: none of {names}; give a complete Hugging Face directory")


def _read_weight_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InteropError(f"{path}: named in the index beside it but missing; copy it there")
    return read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)


def shard_names(index: Mapping[str, Any], path: Path) -> list[str]:
    """The weight files that an index lists; raises InteropError for a name that leaves the directory."""
    names = sorted(set(index.get("weight_map", {}).values()))
    if not names or any(Path(name).name != name for name in names):
        raise InteropError(f"{path}: weight_map: must name files beside it; copy or download the file again")
    return names


def write_torch(path: Path, content: Mapping[str, Any], with_namespaces: bool = False) -> None:
    """Write plain containers and CPU tensors as a .pt file that loads weights-only anywhere; appears in one move.

    `with_namespaces` writes argparse.Namespace too, which weights-only loading takes only where it is declared safe.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as temporary:
        torch.save(_plain(content, str(path), with_namespaces), temporary)


def write_named(directory: Path, named: NamedFiles) -> None:
    """Write every file into `directory`, which appears in one move."""
    with new_directory(directory) as temporary:
        for name, content in named.files.items():
            write_torch(temporary / name, content, with_namespaces=True)


def write_huggingface(directory: Path, model: HuggingFaceModel) -> None:
    """Write config.json, model.safetensors and preprocessor_config.json; the directory appears in one move."""
    with new_directory(directory) as temporary:
        write_json(temporary / "config.json", model.config)
        write_json(temporary / "preprocessor_config.json", model.preprocessor)
        # transformers refuses safetensors files without this entry.
        write_safetensors(temporary / "model.safetensors", model.tensors, {"format": "pt"})


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write contiguous CPU copies of `tensors`."""
    save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, path, metadata)
    give_default_mode(path)


def give_default_mode(path: Path) -> None:
    """Let the umask decide who reads `path`: safetensors makes files for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write readable JSON with sorted keys."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _plain(value: Any, where: str, with_namespaces: bool) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().contiguous()
    if isinstance(value, Mapping):
        return {key: _plain(item, f"{where}: {key}", with_namespaces) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item, where, with_namespaces) for item in value)
    if value is None or type(value) in (str, int, float, bool):
        return value
    if with_namespaces and type(value) is argparse.Namespace:
        return argparse.Namespace(**_plain(vars(value), where, with_namespaces))
    raise InteropError(f"{where}: a {type(value).__name__} does not load weights-only; convert it to a plain value")
