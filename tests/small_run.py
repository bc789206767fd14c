"""Whole runs of pretrain/train.py on a corpus of seconds, in processes of their own, or here without that script."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from audio_maker import write_corpus
from conftest import LAUNCH_VARIABLES, ROOT

from pretrain.config import compose_recipe, run_config
from pretrain.data.labels import write_labels
from pretrain.data.manifest import Manifest, write_manifest

CLASSES = 6
UPDATES = 20
# Regularised, because dropout and LayerDrop must return after a restart as well.
SMALL = [
    "recipe=hubert_tiny",
    "method.encoder.conv_feature_layers=[[16,10,5],[16,3,2],[16,3,2],[16,3,2],[16,3,2],[16,2,2],[16,2,2]]",
    "method.encoder.encoder_layers=2",
    "method.encoder.encoder_embed_dim=16",
    "method.encoder.encoder_ffn_embed_dim=32",
    "method.encoder.encoder_attention_heads=2",
    "method.encoder.conv_pos=8",
    "method.encoder.conv_pos_groups=4",
    "method.encoder.dropout=0.1",
    "method.encoder.dropout_input=0.1",
    "method.encoder.encoder_layerdrop=0.2",
    "method.final_dim=8",
    "batch={seconds_per_micro_batch:2.5,micro_batches_per_step:4}",
    "crop={min_seconds:0.5,max_seconds:1.0}",
    f"schedule={{warmup_updates:4,total_updates:{UPDATES}}}",
    "trainer={log_every:1,validate_every:8,save_every:5,keep_checkpoints:20,threads:1}",
    "optimizer.clip_norm=1.0",
    "precision=fp32",
]


def write_data(folder: Path) -> Path:
    """A corpus of 16 + 4 files of 0.5 to 1.5 s under `folder`/data and labels at 100 Hz under `folder`/labels."""
    rng = np.random.default_rng(0)
    splits = {}
    for split, count in (("train", 16), ("valid", 4)):
        lengths = {f"{split}/{i}.wav": int(rng.integers(8_000, 24_000)) for i in range(count)}
        write_corpus(folder / "data", lengths)
        write_manifest(folder / "data" / f"{split}.tsv", folder / "data", lengths.items())
        manifest = Manifest.read(folder / "data" / f"{split}.tsv")
        rows = [rng.integers(0, CLASSES, size=(n - 400) // 160 + 1) for n in lengths.values()]
        splits[split] = (manifest, rows)
    write_labels(folder / "labels", 100, CLASSES, splits)
    return folder


def arguments(data: Path, output: Path, *options: str) -> list[str]:
    """What is said of one run, the recipe first; the last of two values of an option holds."""
    places = [f"data.dir={data / 'data'}", f"data.labels={data / 'labels'}", f"output_dir={output}", "name=run"]
    return [*SMALL, *places, *options]


def command(data: Path, output: Path, *options: str, ranks: int = 1) -> list[str]:
    """The command line of one run."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return [sys.executable, *launcher, str(ROOT / "pretrain" / "train.py"), *arguments(data, output, *options)]


def environment() -> dict[str, str]:
    """Without what torchrun left in this process."""
    return {k: v for k, v in os.environ.items() if k not in LAUNCH_VARIABLES} | {"OMP_NUM_THREADS": "1"}


def run(data: Path, output: Path, *options: str, ranks: int = 1, status: int = 0) -> str:
    """Run to the end; returns standard error and output. Fails where the exit status is another one."""
    done = subprocess.run(
        command(data, output, *options, ranks=ranks),
        capture_output=True,
        text=True,
        env=environment(),
        cwd=output.parent,
        timeout=400,
        check=False,
    )
    assert done.returncode == status, f"exit status {done.returncode}\n{done.stderr[-3000:]}"
    return done.stderr + done.stdout


def run_here(data: Path, output: Path, *options: str) -> str:
    """As `run` with status 0, in this process: starting one takes longer than such a run."""
    from pretrain.training.setup import build_trainer

    recipe, *rest = arguments(data, output, *options)
    printed = StringIO()
    with patch.dict(os.environ), ExitStack() as resources, redirect_stdout(printed), redirect_stderr(printed):
        for name in LAUNCH_VARIABLES:
            os.environ.pop(name, None)
        config = run_config(compose_recipe(recipe.removeprefix("recipe="), rest))
        assert build_trainer(config, resources).fit() == 0
    return printed.getvalue()


def run_until(data: Path, output: Path, update: int, seconds: float, number: signal.Signals, *options: str) -> int:
    """Send signal `number` some `seconds` after `update` was reported; returns the exit status."""
    with subprocess.Popen(
        command(data, output, *options), env=environment(), cwd=output.parent, stderr=subprocess.PIPE
    ) as process:
        end = time.monotonic() + 300
        while len(metrics(output)) < update and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(seconds)
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
    assert len(metrics(output)) >= update, errors.decode()[-3000:]
    return process.returncode


def metrics(output: Path, prefix: str = "train/") -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl that hold `prefix` values, without speeds and memory."""
    path = output / "run" / "metrics.jsonl"
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    chosen = [line for line in lines if any(name.startswith(prefix) for name in line)]
    return [{k: v for k, v in line.items() if not k.startswith(("speed/", "memory/"))} for line in chosen]


def checkpoints(output: Path) -> list[str]:
    """Names of the published checkpoints, oldest first."""
    return sorted(path.name for path in (output / "run" / "checkpoints").iterdir())
