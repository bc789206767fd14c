"""The whole HuBERT pipeline on the embedded sample, in a few minutes: python tools/demo.py

Two iterations of the recipe hubert_tiny: labels, training, labels again, training again, exports, phone probe. Every
command is printed before it runs, so that it can be repeated with other options. Everything is written to outputs/demo,
which is made anew each time. The sample is synthetic speech: the figures say that the parts work together, no more.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path("outputs/demo")
SAMPLE = Path("pretrain/data/sample")
MAX_RANKS = 2  # hubert_tiny has two micro-batches in an update


def commands(ranks: int) -> list[str]:
    """The command lines of the pipeline, in order, for a shell in the repository's root."""
    torchrun = f"torchrun --standalone --nproc_per_node {ranks}"
    data, phones = f"data.dir={FOLDER}/data", f"alignments={SAMPLE}/phones.tsv"
    train = f"{torchrun} pretrain/train.py recipe=hubert_tiny data=custom {data}"
    labels = f"{torchrun} tools/kmeans_labels.py clusters=100 {data} {phones}"
    export = f"python tools/export_checkpoint.py checkpoint={FOLDER}/iter2"
    return [
        f"python tools/prepare_manifest.py audio_dir={SAMPLE} output={FOLDER}/data valid_percent=10",
        f"{labels} features=mfcc output={FOLDER}/labels1",
        f"{train} data.labels={FOLDER}/labels1 name=demo/iter1",
        f"{labels} features=upstream checkpoint={FOLDER}/iter1 layer=2 output={FOLDER}/labels2",
        f"{train} data.labels={FOLDER}/labels2 name=demo/iter2",
        f"{export} format=s3prl output={FOLDER}/hubert_tiny.pt",
        f"{export} format=huggingface output={FOLDER}/huggingface",
        f"python tools/probe.py upstream={FOLDER}/iter2 task=phone {phones}",
    ]


def run(command: str, number: str) -> None:
    """Print one command and run it with this environment's programs. Raises SystemExit where it fails."""
    print(f"\n[{number}] $ {command}", flush=True)
    programs = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    started = time.monotonic()
    status = subprocess.run(shlex.split(command), cwd=ROOT, env={**threads, **os.environ, **programs}).returncode
    if status:
        raise SystemExit(f"error: this command ended with status {status}: {command}")
    print(f"[{number}] {time.monotonic() - started:.0f} s", flush=True)


def unit_line(labels: Path, name: str) -> str:
    """How well a label set's units agree with the phones of the validation part."""
    report = json.loads((labels / "report.json").read_text())
    quality = report["splits"]["valid"]["quality"]["all_frames"]
    figures = ", ".join(f"{key.replace('_', ' ')} {quality[key]:.3f}" for key in ("phone_purity", "cluster_purity"))
    return f"  {report['clusters']} units of {name}: PNMI {quality['pnmi']:.3f}, {figures}"


def summary() -> str:
    """Where everything is, and the units' quality."""
    checkpoint = sorted((ROOT / FOLDER / "iter2" / "checkpoints").iterdir())[-1].relative_to(ROOT)
    return f"""
Checkpoint             {checkpoint}
Export, native         {FOLDER}/iter2/export
Export, s3prl          {FOLDER}/hubert_tiny.pt
Export, Hugging Face   {FOLDER}/huggingface
TensorBoard            tensorboard --logdir {FOLDER}
Probe                  {FOLDER}/iter2/probe (table above, probe.json, probe.png)
Unit quality on validation, all frames:
{unit_line(ROOT / FOLDER / "labels1", "MFCC")}
{unit_line(ROOT / FOLDER / "labels2", "iteration 1, layer 2")}"""


def main() -> None:
    """Run every command, then say where the results are."""
    started = time.monotonic()
    # Two ranks show the distributed path; on one GPU there can be only one.
    ranks = min(MAX_RANKS, torch.cuda.device_count() or len(os.sched_getaffinity(0)))
    shutil.rmtree(ROOT / FOLDER, ignore_errors=True)
    lines = commands(ranks)
    for index, command in enumerate(lines, start=1):
        run(command, f"{index}/{len(lines)}")
    print(summary())
    print(f"The demo took {time.monotonic() - started:.0f} s.")


if __name__ == "__main__":
    main()
