"""The options of tools/probe.py, and what they default to when the upstream is a run of this project."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import yaml

from pretrain.config import ConfigError, check_seed
from pretrain.data.alignments import SILENCES, UNKNOWN
from pretrain.data.folders import SAMPLE_DIR, resolve_data_dir

TASKS = ("phone", "utterance")


@dataclass
class DataOptions:
    """`dir` holds train.tsv and valid.tsv; empty: the run's own; "sample": the embedded sample."""

    dir: str = ""


@dataclass
class ProbeOptions:
    """The command line of tools/probe.py. Several label files are separated by commas; 0 means no limit.

    `alignments` is for task=phone, `labels` and `column` for task=utterance. `silence` and `ignore` are comma-separated
    phones: no speech, and not to be trained or scored on. `units_layer` fits `clusters` k-means units on that layer.
    """

    upstream: str
    task: str = "phone"
    alignments: str = ""
    labels: str = ""
    column: str = "speaker"
    silence: str = ",".join(sorted(SILENCES))
    ignore: str = UNKNOWN
    data: DataOptions = field(default_factory=DataOptions)
    name: str = ""
    baselines: bool = True
    layers: str = "all"
    units_layer: int | None = None
    clusters: int = 100
    max_train_hours: float = 0.0
    max_frames: int = 300_000
    output: str = ""
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ConfigError(f"task: '{self.task}' is not one of {', '.join(TASKS)}")
        check_seed(self.seed)


def _run_data(upstream: Path) -> dict:
    """The `data` block of the run that `upstream` (run, checkpoint or export directory) belongs to; {} without one."""
    folders = (upstream, *(run / "checkpoints" / "step_*" for run in (upstream, upstream.parent)))
    found = [path for folder in folders for path in sorted(folder.parent.glob(f"{folder.name}/config.yaml"))]
    return (yaml.safe_load(found[-1].read_text(encoding="utf-8")) or {}).get("data") or {} if found else {}


def data_dir(options: ProbeOptions) -> Path:
    """The folder of manifests: `data.dir`, or the run's own. Raises ConfigError where neither is there."""
    directory = options.data.dir or _run_data(Path(options.upstream)).get("dir")
    if not directory:
        raise ConfigError(f"data.dir: {options.upstream} does not tell its data; give data.dir=<folder with train.tsv>")
    return resolve_data_dir(directory)


def label_file(options: ProbeOptions, directory: Path) -> str:
    """The task's TSV: the option, the run's `data.alignments`, or the embedded sample's. Raises ConfigError."""
    given: str | None
    given, option, sample = {
        "phone": (options.alignments, "alignments", "phones.tsv"),
        "utterance": (options.labels, "labels", "utterances.tsv"),
    }[options.task]
    if option == "alignments":
        given = given or _run_data(Path(options.upstream)).get("alignments")
    if given:
        return given
    if directory.resolve() == SAMPLE_DIR.resolve():
        return str(directory / sample)
    raise ConfigError(f"{option}: missing; give {option}=<TSV>, task={options.task} needs it")


def output_dir(options: ProbeOptions) -> Path:
    """`output`, or the folder `probe` (utterances: `probe_<column>`) in the run. Raises ConfigError if it has none."""
    if options.output:
        return Path(options.output)
    upstream = Path(options.upstream)
    if not upstream.is_dir():
        raise ConfigError(f"output: {options.upstream} is no directory to put the report in; give output=<folder>")
    run = upstream.parent if upstream.name == "export" else upstream
    # Not into a checkpoint's own folder: it is verified, rotated and deleted as a whole.
    run = upstream.parent.parent if upstream.parent.name == "checkpoints" else run
    return run / ("probe" if options.task == "phone" else f"probe_{options.column}")
