"""Scan a folder of audio and write the manifests that training reads.

python tools/prepare_manifest.py audio_dir=/data/speech output=data/speech valid_percent=1
python tools/prepare_manifest.py audio_dir=/data/train valid_dir=/data/dev output=data/speech check=full

Writes train.tsv, valid.tsv, skipped.tsv (path, reason) and report.json to `output`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pretrain.config import parse_cli
from pretrain.data.prepare.scan import PrepareOptions, describe, prepare
from pretrain.errors import UserError


def main() -> None:
    options = parse_cli(PrepareOptions, sys.argv[1:], __doc__)
    try:
        report = prepare(options)
    except UserError as error:
        sys.exit(str(error))
    print(describe(report))
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
