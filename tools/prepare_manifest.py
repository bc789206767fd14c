"""Scan a folder of audio and write the manifests that training reads.

python tools/prepare_manifest.py audio_dir=/data/speech output=data/speech valid_percent=1
python tools/prepare_manifest.py audio_dir=/data/train valid_dir=/data/dev output=data/speech check=full

Writes train.tsv, valid.tsv, skipped.tsv (path, reason) and report.json to `output`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pretrain.config import parse_cli, run_tool
from pretrain.data.prepare.scan import PrepareOptions, describe, prepare


def main(arguments: list[str]) -> None:
    options = parse_cli(PrepareOptions, arguments, __doc__)
    report = prepare(options)
    print(describe(report))
    print(f"written to {options.output}")


if __name__ == "__main__":
    run_tool(main)
