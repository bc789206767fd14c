"""Label generation: streamed, beside dumping all features to disk and clustering them afterwards.

The peer does what `simple_kmeans` of fairseq's examples/hubert does, but reads audio and finds the nearest centroid
with our code: what differs is the way, not the parts.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from pretrain.bench.timing import Row, add_ratios, cost_of, environment, in_fresh_process, peak_resident_gb
from pretrain.config import ConfigError
from pretrain.data.alignments import UNKNOWN, match_utterance, read_phones
from pretrain.data.folders import resolve_data_dir
from pretrain.data.manifest import Manifest, write_manifest
from pretrain.labelling.kmeans.assign import nearest_centroids
from pretrain.labelling.kmeans.features import SAMPLE_RATE, FeatureExtractor, FeatureSpec, feature_centres
from pretrain.labelling.kmeans.fit import FitOptions, fit_centroids
from pretrain.labelling.kmeans.generate import LabelData, LabelOptions, generate_labels
from pretrain.labelling.kmeans.model import make_extractor
from pretrain.labelling.kmeans.quality import QualityCounter
from pretrain.labelling.stream import WaveformStream
from pretrain.upstream import Upstream

PEER = "dump, then scikit-learn"
STREAMED = {"headwater, faiss": "faiss", "headwater, scikit-learn": "sklearn"}
OURS = "headwater, faiss"  # the default backend
NOTE = (
    "Each way runs in a process of its own, in turns; its imports are in the peak but not in the time. All three read "
    "audio and find the nearest centroid with the same code. Inertia is the mean squared distance per frame; medians "
    "of the rounds."
)


@dataclass
class LabelBenchOptions:
    """The first `hours` of train.tsv are labelled; `features`, `clusters`, `checkpoint` and `layer` as in
    tools/kmeans_labels.py. `alignments` is a phone table (utt, start_s, end_s, phone) for PNMI of the units.
    """

    task: str
    data: LabelData = field(default_factory=lambda: LabelData("sample"))
    features: str = "mfcc"
    clusters: int = 100
    checkpoint: str | None = None
    layer: int | None = None
    hours: float = 1.0
    rounds: int = 3
    alignments: str | None = None
    output: str | None = None

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.hours <= 0:
            raise ConfigError("rounds, hours: both must be positive")


def measure_labels(options: LabelBenchOptions) -> dict[str, Any]:
    """Label the same audio in every way, `options.rounds` times in turns; environment and one row of medians each."""
    machine = environment(torch.device("cpu"))
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in (*STREAMED, PEER)}
    with tempfile.TemporaryDirectory() as folder:
        data_dir = Path(folder) / "data"
        manifest = _cut(resolve_data_dir(options.data.dir), data_dir, options.hours)
        for index in tqdm(range(options.rounds), "rounds"):
            for number, (way, results) in enumerate(runs.items()):
                output = Path(folder) / f"labels{index}{number}"
                results.append(in_fresh_process(run_way, options, way, data_dir, output))
    rows: list[Row] = []
    for way, results in runs.items():
        rows.append({"variant": way, **{name: median(run[name] for run in results) for name in results[0]}})
    add_ratios(rows, OURS)
    audio = {
        "data": options.data.dir,
        "files": len(manifest),
        "hours": round(manifest.lengths.sum() / SAMPLE_RATE / 3600, 3),
    }
    work = {"features": options.features, "clusters": options.clusters, "layer": options.layer}
    return {"task": "labels", "note": NOTE, "environment": machine | audio | work, "rows": rows, "absent": {}}


def run_way(options: LabelBenchOptions, way: str, data_dir: Path, output: Path) -> dict[str, float]:
    """Label once, in this process: wall and CPU seconds, peak memory, bytes left on disk, quality of the units."""
    work = partial(_stream, STREAMED[way]) if way in STREAMED else _dump
    imports_gb = peak_resident_gb()
    cost, inertia = cost_of(partial(work, options, data_dir, output))
    result = {
        "wall_seconds": cost.wall_seconds,
        "cpu_seconds": cost.cpu_seconds,
        "imports_gb": imports_gb,
        "peak_gb": peak_resident_gb(),
        "disk_mb": sum(path.stat().st_size for path in output.rglob("*") if path.is_file()) / 1e6,
        "inertia": inertia,
    }
    if options.alignments:
        result["pnmi"] = _pnmi(options, Manifest.read(data_dir / "train.tsv"), output / "train.km")
    return result


def _cut(source: Path, folder: Path, hours: float) -> Manifest:
    """Write a manifest of the first `hours` of train.tsv to `folder`."""
    manifest = Manifest.read(source / "train.tsv")
    count = int(np.searchsorted(np.cumsum(manifest.lengths), hours * 3600 * SAMPLE_RATE)) + 1
    rows = [(manifest.relative_path(row), int(manifest.lengths[row])) for row in range(min(count, len(manifest)))]
    folder.mkdir(parents=True)
    write_manifest(folder / "train.tsv", manifest.root, rows)
    return Manifest.read(folder / "train.tsv")


def _stream(backend: str, options: LabelBenchOptions, data_dir: Path, output: Path) -> float:
    """Labels by tools/kmeans_labels.py's own function; returns their inertia."""
    report = generate_labels(
        LabelOptions(
            output=str(output),
            data=replace(options.data, dir=str(data_dir)),
            features=options.features,
            clusters=options.clusters,
            checkpoint=options.checkpoint,
            layer=options.layer,
            backend=backend,
        )
    )
    return report["splits"]["train"]["inertia_per_frame"]


def _dump(options: LabelBenchOptions, data_dir: Path, output: Path) -> float:
    """All features to disk, all back into memory for the fit, labels from the features on disk; the inertia."""
    output.mkdir(parents=True)
    extractor, manifest = _extractor(options), Manifest.read(data_dir / "train.tsv")
    stream = WaveformStream(manifest, options.data.max_bad_share, options.data.workers)
    counts = []
    with (output / "train.f32").open("wb") as file:
        for _, waveform in stream.read(range(len(manifest))):
            features = extractor.extract(waveform if waveform is not None else torch.zeros(0)).numpy()
            file.write(features.tobytes())
            counts.append(len(features))
    points = np.fromfile(output / "train.f32", dtype=np.float32).reshape(-1, extractor.dim)
    centroids = fit_centroids(torch.from_numpy(points), FitOptions(options.clusters, backend="sklearn"))
    del points
    dumped = np.memmap(output / "train.f32", dtype=np.float32, mode="r").reshape(-1, extractor.dim)
    squared_distance = 0.0
    with (output / "train.km").open("w") as file:
        for features in np.split(dumped, np.cumsum(counts)[:-1]):
            units, distances = nearest_centroids(torch.from_numpy(np.array(features)), centroids)
            squared_distance += float(distances.double().sum())
            file.write(" ".join(map(str, units.tolist())) + "\n")
    return squared_distance / len(dumped)


def _extractor(options: LabelBenchOptions) -> FeatureExtractor:
    if options.features != "upstream":
        return make_extractor(FeatureSpec(options.features))
    upstream = Upstream(None, options.checkpoint)
    return make_extractor(FeatureSpec("upstream", upstream.method_name, options.layer), upstream.encoder)


def _pnmi(options: LabelBenchOptions, manifest: Manifest, labels: Path) -> float:
    """Phone-normalised mutual information of a .km file's units, over all frames of aligned utterances."""
    phones = read_phones(str(options.alignments))
    counter = QualityCounter(phones.names, options.clusters)
    extractor = _extractor(options)
    for row, line in enumerate(labels.read_text().splitlines()):
        units = np.array(line.split(), dtype=np.int64)
        if (utterance := match_utterance(manifest.utterance_id(row), phones.utterances)) is not None:
            centres = feature_centres(extractor, len(units))
            counter.add(phones.at(utterance, centres, phones.ids(UNKNOWN)), units)
    return counter.report()["all_frames"]["pnmi"]
