"""Training end to end, from audio files to updates: our trainer beside s3prl's expert with its own data loader."""

from __future__ import annotations

import csv
import importlib.util
import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from pretrain.bench.loader import LoaderData
from pretrain.bench.timing import Row, add_ratios, environment
from pretrain.bench.turns import Turn, TurnTaker
from pretrain.config import ConfigError, RunConfig, compose_recipe, run_config, typed_method
from pretrain.data.audio import SAMPLE_RATE
from pretrain.data.folders import resolve_data_dir
from pretrain.data.manifest import Manifest
from pretrain.registry import load_method, load_reference_steps

OURS, THEIRS = "headwater", "s3prl"
FRAMES_PER_SECOND = 100
BENCH = Path(__file__).resolve().parent
NOTE = (
    "Each trains in processes of its own, from the same files, with the recipe's network, dropouts, alterations, "
    "crops, optimiser and clipping: reading, features, forward, backward, update. They take turns, and whoever does "
    "not have one is stopped, workers included. Ours is the trainer as pretrain/train.py runs it, cropping a batch "
    "to its shortest row; s3prl's is its expert, data set and optimiser in the loop of its runner, which pads to the "
    "longest (audio is counted without padding), with soundfile in place of torchaudio.load, which today needs "
    "torchcodec. Seconds are per second of audio, medians of interleaved turns."
)


@dataclass
class PipelineOptions:
    """`utterances` an update, `updates` a turn, `workers` of the data loader (0: reading in the training process).

    `data.dir` holds train.tsv, of plain 16 kHz files.
    """

    task: str
    recipe: str = "tera_100hr"
    data: LoaderData = field(default_factory=LoaderData)
    utterances: int = 8
    updates: int = 6
    rounds: int = 5
    workers: int = 0
    threads: int = 1
    device: str = "auto"
    output: str | None = None


@dataclass(frozen=True)
class S3prlTraining:
    """What a method's `reference_steps.s3prl_training(config)` says of s3prl's pre-training of the same network.

    `upstream` is the folder in s3prl/pretrain; `upstream_config` its model's configuration, where `task` lacks
    `sequence_length`; `optimizer` the runner's block; `samples_per_timestep` what its `max_timestep` counts in;
    `lengths_item` the place of frame counts, or of a mask of frames, in its batches.
    """

    upstream: str
    upstream_config: dict[str, Any]
    optimizer: dict[str, Any]
    samples_per_timestep: int
    lengths_item: int


def measure_pipelines(options: PipelineOptions) -> dict[str, Any]:
    """Train in turns; returns environment, rows and absent peers. Raises ConfigError for a method without a peer."""
    device = _device(options)
    machine = environment(device) | {"threads": options.threads}
    data_dir = resolve_data_dir(options.data.dir)
    manifest = Manifest.read(data_dir / "train.tsv")
    config = run_config(compose_recipe(options.recipe))
    theirs = _their_training(config)
    threads = {"OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads)}
    turns: dict[str, list[Turn]] = {OURS: [], THEIRS: []}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        scratch = Path(folder)
        jobs = {
            OURS: (["-m", "pretrain.bench.our_turns"], _our_job(options, config, manifest, data_dir, scratch)),
            THEIRS: ([str(BENCH / "s3prl_turns.py")], _their_job(options, config, theirs, manifest, scratch, device)),
        }
        takers = {
            name: stack.enter_context(TurnTaker(command, job, scratch / f"{name}.log", _environment(threads)))
            for name, (command, job) in jobs.items()
        }
        for round_ in tqdm(range(1 + options.rounds), "rounds"):
            for name, taker in takers.items():
                turn = taker.take(options.updates)
                if round_:
                    turns[name].append(turn)
    rows = [_row(name, taken) for name, taken in turns.items()]
    add_ratios(rows, OURS)
    data = {"data": options.data.dir, "workers": options.workers, "precision": "fp32"}
    return {"task": "pipeline", "note": NOTE, "environment": machine | data, "rows": rows, "absent": {}}


def _row(name: str, turns: list[Turn]) -> Row:
    wall, cpu = (median(getattr(t, kind) / t.audio_seconds for t in turns) for kind in ("wall_seconds", "cpu_seconds"))
    return {
        "variant": name,
        "parameters_m": turns[0].parameters / 1e6,
        "audio_seconds_per_turn": median(turn.audio_seconds for turn in turns),
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "audio_seconds_per_second": 1 / wall,
    }


def _our_job(
    options: PipelineOptions, config: RunConfig, manifest: Manifest, data_dir: Path, scratch: Path
) -> dict[str, Any]:
    """The recipe with `utterances` cropped rows of mean length as its batch, on this data."""
    crop = config.crop
    kept = [length / SAMPLE_RATE for length in manifest.lengths if length >= crop.min_seconds * SAMPLE_RATE]
    if len(kept) < options.utterances:
        raise ConfigError(
            f"data.dir: {len(kept)} utterances of {data_dir} reach crop.min_seconds {crop.min_seconds:g}, fewer than "
            f"utterances={options.utterances}; give more data"
        )
    mean = sum(min(seconds, crop.max_seconds) for seconds in kept) / len(kept)
    overrides = [
        "data=custom",
        f"data.dir={data_dir}",
        f"data.workers={options.workers}",
        f"batch.seconds_per_micro_batch={mean * options.utterances:.2f}",
        "batch.micro_batches_per_step=1",
        f"output_dir={scratch}",
        "name=pipeline",
        "precision=fp32",
        f"trainer.threads={options.threads}",
        "trainer.memory_probe=false",
    ]
    return {"recipe": options.recipe, "overrides": overrides}


def _their_training(config: RunConfig) -> S3prlTraining:
    name = config.method["name"]
    describe: Callable[[Any], S3prlTraining] | None = getattr(load_reference_steps(name), "s3prl_training", None)
    if describe is None:
        raise ConfigError(
            f"recipe: s3prl's pre-training has no counterpart of {config.recipe}; take APC, NPC or TERA's family"
        )
    return describe(typed_method(load_method(name).Method.Config, config.method))


def _their_job(
    options: PipelineOptions,
    config: RunConfig,
    theirs: S3prlTraining,
    manifest: Manifest,
    scratch: Path,
    device: torch.device,
) -> dict[str, Any]:
    """The same data as a table of paths and lengths, with our crop in frames."""
    spec = importlib.util.find_spec(THEIRS)
    if spec is None or spec.origin is None or importlib.util.find_spec("pandas") is None:
        raise ConfigError(
            "s3prl: this task needs s3prl and pandas; `make test` installs both into .venv, or pip install .[test]"
        )
    with (scratch / "train.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_path", "length"])
        table.writerows((manifest.path(row), int(length)) for row, length in enumerate(manifest.lengths))
    task = theirs.upstream_config["task"] | {"sequence_length": round(config.crop.max_seconds * FRAMES_PER_SECOND)}
    shortest = round(config.crop.min_seconds * SAMPLE_RATE)
    return {
        "folder": str(Path(spec.origin).parent),
        "upstream": theirs.upstream,
        "upstream_config": theirs.upstream_config | {"task": task},
        "datarc": {
            "num_workers": options.workers,
            "train_batch_size": options.utterances,
            "max_timestep": -(shortest // theirs.samples_per_timestep),
            "libri_root": "/",
            "file_path": str(scratch),
            "sets": ["train"],
        },
        "optimizer": theirs.optimizer,
        "gradient_clipping": config.optimizer.clip_norm,
        "lengths_item": theirs.lengths_item,
        "device": str(device),
    }


def _device(options: PipelineOptions) -> torch.device:
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(automatic if options.device == "auto" else options.device)


def _environment(threads: dict[str, str]) -> dict[str, str]:
    """Our modules must be found from anywhere; s3prl's script takes its own folder before all others."""
    paths = [str(BENCH.parent.parent), os.environ.get("PYTHONPATH", "")]
    return threads | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
