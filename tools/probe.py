"""Probe an upstream: linear classification of phones or utterances on each layer, beside baselines; unit quality.

python tools/probe.py upstream=outputs/iter2 task=phone alignments=phones.tsv
python tools/probe.py upstream=outputs/iter2 task=utterance labels=utterances.tsv column=speaker
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# Before torch is loaded: threads that spin while they wait make a busy machine many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from pretrain.config import parse_cli, run_tool
from pretrain.probe.options import ProbeOptions, output_dir
from pretrain.probe.report import write_report
from pretrain.probe.run import run_probe


def main(arguments: list[str]) -> None:
    options = parse_cli(ProbeOptions, arguments, __doc__)
    output = output_dir(options)
    report = run_probe(options)
    paths = write_report(report, output)
    print(report.markdown())
    print(*(f"wrote {path}" for path in paths), sep="\n")


if __name__ == "__main__":
    run_tool(main)
