"""Data folders: those with manifests, and the embedded sample."""

from __future__ import annotations

from pathlib import Path

from pretrain.config import ConfigError

SAMPLE_DIR = Path(__file__).resolve().parent / "sample"


def resolve_data_dir(directory: str, where: str = "data.dir") -> Path:
    """`sample` is the embedded sample; anything else is a folder with train.tsv. Raises ConfigError about `where`."""
    path = SAMPLE_DIR if directory == "sample" else Path(directory)
    if not (path / "train.tsv").is_file():
        raise ConfigError(
            f"{where}: {path} has no train.tsv; run python tools/prepare_manifest.py audio_dir=<audio> output={path}"
        )
    return path
