"""Time and memory beside other projects, in one run and interleaved: a table on the terminal, JSON in `output`.

python tools/benchmark.py task=step recipe=hubert_base batch=4 seconds=5 threads=2 rounds=7 precision=fp32,bf16 \\
    peers=transformers,torchaudio,fairseq output=benchmark.json      # compile=true for the compiled encoder
python tools/benchmark.py task=pipeline recipe=tera_100hr data.dir=data/speech     # beside s3prl's own pre-training
python tools/benchmark.py task=loader recipe=hubert_base data.dir=data/speech workers=0,2
python tools/benchmark.py task=labels features=mfcc clusters=100 data.dir=data/speech hours=1 [alignments=phones.tsv]
python tools/benchmark.py task=memory recipe=hubert_base:2:5,hubert_large_ll60k:1:5 precision=fp32,bf16

Peers that cannot be imported are left out and named. fairseq on today's Python, without touching this environment:
`pip install --no-deps --target /tmp/peers fairseq-fixed bitarray sacrebleu portalocker tabulate colorama lxml`, then
`PYTHONPATH=/tmp/peers python tools/benchmark.py ...`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads: waiting threads must not count as work
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pretrain.bench.labels import LabelBenchOptions, measure_labels
from pretrain.bench.loader import LoaderOptions, measure_loaders
from pretrain.bench.memory import MemoryOptions, measure_memory
from pretrain.bench.pipeline import PipelineOptions, measure_pipelines
from pretrain.bench.step import StepOptions, measure_steps
from pretrain.bench.timing import markdown
from pretrain.bench.turns import TurnError
from pretrain.config import ConfigError, nearest, parse_cli, run_tool
from pretrain.errors import UserError

TASKS: dict[str, tuple[type[Any], Callable[[Any], dict[str, Any]]]] = {
    "step": (StepOptions, measure_steps),
    "pipeline": (PipelineOptions, measure_pipelines),
    "loader": (LoaderOptions, measure_loaders),
    "labels": (LabelBenchOptions, measure_labels),
    "memory": (MemoryOptions, measure_memory),
}


def main(arguments: list[str]) -> None:
    """Measure, print, write."""
    task = next((value.removeprefix("task=") for value in arguments if value.startswith("task=")), "step")
    if task not in TASKS:
        raise ConfigError(f"task: unknown task '{task}'; {nearest(task, list(TASKS))}")
    options_class, measure = TASKS[task]
    options: Any = parse_cli(options_class, arguments, __doc__)
    try:
        result = measure(options)
    except TurnError as error:  # from a module that runs without this project, and so knows no UserError
        raise UserError(str(error)) from None
    print(", ".join(f"{name} {value}" for name, value in result["environment"].items()) + "\n")
    print(markdown(result["rows"]) + "\n\n" + result["note"])
    for name, reason in result["absent"].items():
        print(f"Not measured: {name} ({reason})")
    if options.output is not None:
        Path(options.output).write_text(json.dumps(result, indent=2) + "\n")
        print(f"written to {options.output}")


if __name__ == "__main__":
    run_tool(main)
