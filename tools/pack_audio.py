"""Pack the files of a manifest into stored zip archives, for file systems that are slow with many small files.

python tools/pack_audio.py manifest=data/speech/train.tsv output=data/packed/train

Writes data/packed/train_00000.zip, ... and data/packed/train.tsv. Pack before making labels: labels are bound to the
paths of their manifest, and packing changes them. Utterance ids stay the same.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pretrain.config import parse_cli, run_tool
from pretrain.data.manifest import Manifest
from pretrain.data.prepare.pack import pack


@dataclass
class PackOptions:
    """`archive_mb` is the size, in millions of bytes, at which an archive is closed."""

    manifest: Path
    output: Path
    archive_mb: float = 1024


def main(arguments: list[str]) -> None:
    options = parse_cli(PackOptions, arguments, __doc__)
    archives = pack(Manifest.read(options.manifest), options.output, int(options.archive_mb * 1e6))
    print(f"{archives} archive(s) and {options.output}.tsv written")


if __name__ == "__main__":
    run_tool(main)
