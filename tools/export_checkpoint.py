"""Export a checkpoint: python tools/export_checkpoint.py checkpoint=outputs/iter2 format=s3prl output=hubert.pt

`format` is native (default), s3prl or huggingface; `checkpoint` a run folder or one of its step_* folders; `kmeans`
attaches the k-means model of another label directory to a native export.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pretrain.config import parse_cli
from pretrain.errors import UserError
from pretrain.weights.export import ExportConfig, export


def main() -> None:
    """Parse, export, say where."""
    try:
        print(export(parse_cli(ExportConfig, sys.argv[1:], __doc__)))
    except UserError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
