"""Export a checkpoint: python tools/export_checkpoint.py checkpoint=outputs/iter2 format=s3prl output=hubert.pt

`format` is native (default), s3prl or huggingface; `checkpoint` a run folder or one of its step_* folders; `kmeans`
attaches the k-means model of another label directory to a native export.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pretrain.config import parse_cli, run_tool
from pretrain.weights.export import ExportConfig, export


def main(arguments: list[str]) -> None:
    """Parse, export, say where."""
    print(export(parse_cli(ExportConfig, arguments, __doc__)))


if __name__ == "__main__":
    run_tool(main)
