"""The whole HuBERT pipeline on the embedded sample, in a few minutes: python tools/demo.py

Two iterations of the recipe hubert_demo: labels, training, labels again, training again, exports, phone probe. Every
command is printed before it runs, so that it can be repeated with other options. The last lines compare the trained
network with the same one untrained; where training did not help they say so, and the exit status is 1. The sample is
synthetic speech: the figures say that the parts work together, no more.

Everything is written to `output`, counted from the repository's root: outputs/demo, which is made anew each time, or a
folder that is not there yet. `precision` and `seed` are those of the training; `updates` is the length of the first
iteration, and the second takes half as many: fewer end sooner, and more go further.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from pretrain.config import PRECISIONS, ROOT, ConfigError, check_seed, parse_cli, run_tool
from pretrain.errors import UserError
from pretrain.probe.report import BASELINE, UNTRAINED, UPSTREAM

DEFAULT_OUTPUT = "outputs/demo"
SAMPLE = Path("pretrain/data/sample")
MAX_RANKS = 2  # hubert_demo has two micro-batches in an update
LAYER = 2  # whose units the second iteration predicts
CLUSTERS = 100
MIN_UPDATES = 200  # half of them must be more than the warm-up of hubert_demo, 50


@dataclass
class DemoOptions:
    """The command line of tools/demo.py; see the text at the head of the file."""

    output: str = DEFAULT_OUTPUT
    precision: str = "auto"
    seed: int = 1337
    updates: int = 800

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision: '{self.precision}' is not one of {', '.join(PRECISIONS)}")
        check_seed(self.seed)
        if self.updates < MIN_UPDATES:
            raise ConfigError(f"updates: {self.updates} are too few; take at least {MIN_UPDATES}")


def commands(options: DemoOptions, ranks: int) -> list[str]:
    """The command lines of the pipeline, in order, for a shell in the repository's root."""
    folder = options.output
    torchrun = f"torchrun --standalone --nproc_per_node {ranks}"
    data, phones = f"data.dir={folder}/data", f"alignments={SAMPLE}/phones.tsv"
    settings = f"precision={options.precision} seed={options.seed} output_dir={folder}"
    train = f"{torchrun} pretrain/train.py recipe=hubert_demo {settings} data=custom {data}"
    labels = f"{torchrun} tools/kmeans_labels.py clusters={CLUSTERS} {data} {phones}"
    export = f"python tools/export_checkpoint.py checkpoint={folder}/iter2"
    return [
        f"python tools/prepare_manifest.py audio_dir={SAMPLE} output={folder}/data valid_percent=10",
        f"{labels} features=mfcc output={folder}/labels1",
        f"{train} data.labels={folder}/labels1 name=iter1 schedule.total_updates={options.updates}",
        f"{labels} features=upstream checkpoint={folder}/iter1 layer={LAYER} output={folder}/labels2",
        # The second goes on from the weights of the first, with half its updates: minutes are too few to begin anew.
        f"{train} data.labels={folder}/labels2 name=iter2 init_from={folder}/iter1 init_head=reset "
        f"schedule.total_updates={options.updates // 2}",
        f"{export} format=s3prl output={folder}/hubert.pt",
        f"{export} format=huggingface output={folder}/huggingface",
        f"python tools/probe.py upstream={folder}/iter2 task=phone {phones}",
    ]


def run(command: str, number: str) -> None:
    """Print one command and run it with this environment's programs. Raises UserError where it fails."""
    print(f"\n[{number}] $ {command}", flush=True)
    programs = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    started = time.monotonic()
    status = subprocess.run(shlex.split(command), cwd=ROOT, env={**threads, **os.environ, **programs}).returncode
    if status:
        raise UserError(f"this command ended with status {status}: {command}")
    print(f"[{number}] {time.monotonic() - started:.0f} s", flush=True)


def places(folder: str) -> str:
    """Where everything is."""
    checkpoint = sorted((ROOT / folder / "iter2" / "checkpoints").iterdir())[-1].name
    return f"""
Checkpoint             {folder}/iter2/checkpoints/{checkpoint}
Export, native         {folder}/iter2/export
Export, s3prl          {folder}/hubert.pt
Export, Hugging Face   {folder}/huggingface
TensorBoard            tensorboard --logdir {folder}
Probe                  {folder}/iter2/probe (table above, probe.json, probe.png)"""


def unit_quality(labels: Path) -> float:
    """PNMI of a label set's units with the phones of the validation part."""
    report = json.loads((labels / "report.json").read_text(encoding="utf-8"))
    return report["splits"]["valid"]["quality"]["all_frames"]["pnmi"]


def best_layer(probe: dict[str, Any], kind: str) -> dict[str, Any]:
    """The score of the best single layer of the untrained network or of the trained one, from a probe.json."""
    layers = [score for score in probe["scores"] if score["kind"] == kind and score["layer_weights"] is None]
    return max(layers, key=lambda score: score["accuracy"])


def comparison(probe: dict[str, Any], units: dict[str, float]) -> str:
    """The figures of a probe.json side by side, and the PNMI of `units` by the name of what was clustered."""
    trained, untrained = best_layer(probe, UPSTREAM), best_layer(probe, UNTRAINED)
    inputs = [score for score in probe["scores"] if score["kind"] == BASELINE]
    accuracies = {
        f"trained network, {trained['name']}": trained["accuracy"],
        f"untrained network, {untrained['name']}": untrained["accuracy"],
        **{score["name"]: score["accuracy"] for score in inputs},
    }
    width = max(map(len, [*accuracies, *units]))
    lines = ["Share of frames of held-out utterances whose phone a linear probe names:"]
    lines += [f"  {name:<{width}}  {value:.3f}" for name, value in accuracies.items()]
    lines += ["Agreement of units with the phones of the same utterances, PNMI (0 none, 1 full):"]
    lines += [f"  {name:<{width}}  {value:.3f}" for name, value in units.items()]
    return "\n".join([*lines, "The sample is synthetic speech: no figure here says anything about real speech."])


def improved(probe: dict[str, Any]) -> bool:
    """Whether the best layer of the trained network is above the best one of the untrained network."""
    return best_layer(probe, UPSTREAM)["accuracy"] > best_layer(probe, UNTRAINED)["accuracy"]


def verdict(probe: dict[str, Any]) -> str:
    """One sentence on what training changed, and what to do where it did not help."""
    after, before = best_layer(probe, UPSTREAM)["accuracy"], best_layer(probe, UNTRAINED)["accuracy"]
    if improved(probe):
        return f"Training raised the phone accuracy of the best layer from {before:.3f} (untrained) to {after:.3f}."
    return (
        f"TRAINING DID NOT HELP: the best layer has a phone accuracy of {after:.3f}, untrained it has {before:.3f}. "
        "Something is wrong: see whether precision=fp32 does better, and please report it."
    )


def prepare(options: DemoOptions) -> None:
    """Remove an earlier demo from the default folder. Raises UserError where another folder is there already."""
    folder = ROOT / options.output
    if options.output == DEFAULT_OUTPUT:
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists():
        raise UserError(f"output: {options.output} is there already; name a folder that is not")


def main(arguments: list[str]) -> None:
    """Run every command, then say where the results are and what training changed.

    Raises UserError where a command fails, and where the trained network is no better than the untrained one.
    """
    started = time.monotonic()
    options = parse_cli(DemoOptions, arguments, __doc__)
    prepare(options)
    # Two ranks show the distributed path; on one GPU there can be only one.
    ranks = min(MAX_RANKS, torch.cuda.device_count() or len(os.sched_getaffinity(0)))
    lines = commands(options, ranks)
    for index, command in enumerate(lines, start=1):
        run(command, f"{index}/{len(lines)}")
    folder = ROOT / options.output
    probe = json.loads((folder / "iter2" / "probe" / "probe.json").read_text(encoding="utf-8"))
    units = {
        f"{CLUSTERS} units of MFCC (iteration 1 learns them)": unit_quality(folder / "labels1"),
        f"{CLUSTERS} units of iteration 1, layer {LAYER} (iteration 2 learns them)": unit_quality(folder / "labels2"),
    }
    print(places(options.output), comparison(probe, units), sep="\n\n")
    print(f"\nThe demo took {time.monotonic() - started:.0f} s.")
    if not improved(probe):
        raise UserError(verdict(probe))
    print(verdict(probe))


if __name__ == "__main__":
    run_tool(main)
