"""Weights behind http(s) addresses, kept in a cache: ~/.cache/headwater, or the folder in HEADWATER_CACHE."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
import urllib.error
import urllib.request
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit, urlunsplit

from pretrain.files import new_directory, new_file
from pretrain.weights.interop.files import (
    HUGGINGFACE_WEIGHTS,
    read_json,
    shard_names,
)
from pretrain.weights.interop.types import InteropError

_TIMEOUT_SECONDS = 60


def is_url(path_or_url: str) -> bool:
    """Whether the text is an http(s) address."""
    return path_or_url.startswith(("http://", "https://"))


def cache_dir() -> Path:
    """Where downloads are kept."""
    return Path(os.environ.get("HEADWATER_CACHE") or Path.home() / ".cache" / "headwater")


def fetch(url: str, refresh: bool = False) -> Path:
    """The local copy of a .pt or .pth file, or of a native or Hugging Face directory, behind `url`.

    Downloads only what the cache lacks, or everything when `refresh`; a copy appears in one move, when it is complete.
    Of several processes that ask at once, one downloads and the others take its copy. Raises InteropError when the
    address cannot be read or what arrives is incomplete.
    """
    asked = time.time()
    name = PurePosixPath(urlsplit(url).path).name
    target = cache_dir() / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f"{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists() and not (refresh and target.stat().st_mtime < asked):
            return target
        if name.endswith((".pt", ".pth")):
            _download_file(url, target)
        else:
            with new_directory(target) as folder:
                _download_directory(url, folder)
    return target


def _download_file(url: str, target: Path) -> None:
    with new_file(target) as temporary:
        _download(url, temporary)


def _download_directory(url: str, folder: Path) -> None:
    _download(_below(url, "config.json"), folder / "config.json")
    config = read_json(folder / "config.json")
    if config.get("format") != "headwater":
        _download_huggingface(url, folder)
        return
    for name, digest in config["files"].items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise InteropError(f"{url}: files: {name} lies outside the directory; do not use this export")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        _download(_below(url, name), folder / name)
        if file_sha256(folder / name) != digest:
            raise InteropError(f"{url}: {name}: differs from the hash in config.json; download it again")


def _download_huggingface(url: str, folder: Path) -> None:
    _download(_below(url, "preprocessor_config.json"), folder / "preprocessor_config.json", optional=True)
    for single, index in HUGGINGFACE_WEIGHTS:
        if _download(_below(url, single), folder / single, optional=True):
            return
        if _download(_below(url, index), folder / index, optional=True):
            for name in shard_names(read_json(folder / index), folder / index):
                _download(_below(url, name), folder / name)
            return
    names = ", ".join(single for single, _ in HUGGINGFACE_WEIGHTS)
    raise InteropError(f"{url}: none of {names}; give the address of a complete directory")


def _download(url: str, path: Path, optional: bool = False) -> bool:
    """Copy one file; False where `optional` and the server has none."""
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response, path.open("wb") as file:
            shutil.copyfileobj(response, file)
            expected = response.headers.get("Content-Length")
    except urllib.error.HTTPError as error:
        if optional and error.code == 404:
            return False
        raise InteropError(f"{url}: {error}; check the address") from error
    except OSError as error:
        raise InteropError(f"{url}: {error}; check the address and the connection") from error
    if expected is not None and path.stat().st_size != int(expected):
        raise InteropError(f"{url}: {path.stat().st_size} of {expected} bytes arrived; try again")
    return True


def _below(url: str, name: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def file_sha256(path: Path) -> str:
    """Hash of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
