"""Label generation beside the dump-then-cluster way: wall and CPU seconds, peak memory, disk, and the units' quality.

python tools/benchmark_labels.py data.dir=data/speech hours=1 output=outputs/benchmark_labels [alignments=phones.tsv]
python tools/benchmark_labels.py data.dir=... features=upstream checkpoint=outputs/iter1 layer=6 clusters=500 output=...

The peer does what facebookresearch/fairseq examples/hubert/simple_kmeans does, with the same features: all of them to
disk, all of train back into memory for scikit-learn's MiniBatchKMeans, then the labels from disk. Every way runs in a
process of its own, in turns.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pretrain.config import parse_cli, resolve_data_dir
from pretrain.data.manifest import Manifest, write_manifest
from pretrain.kmeans.assign import nearest_centroids
from pretrain.kmeans.features import SAMPLE_RATE, FeatureExtractor, FeatureSpec
from pretrain.kmeans.fit import FitOptions, fit_centroids
from pretrain.kmeans.generate import SPLITS, LabelData, LabelOptions, generate_labels
from pretrain.kmeans.model import make_extractor
from pretrain.kmeans.quality import Alignments, QualityCounter
from pretrain.kmeans.stream import WaveformStream
from pretrain.upstream import Upstream

PEER = "dump, then scikit-learn"
WAYS = {PEER: "", "streamed, scikit-learn": "sklearn", "streamed, faiss": "faiss"}


@dataclass
class BenchmarkOptions:
    """`hours` of train.tsv are labelled, and valid.tsv; `way` runs a single one in this process."""

    output: str
    data: LabelData
    features: str = "mfcc"
    clusters: int = 100
    checkpoint: str | None = None
    layer: int | None = None
    hours: float = 1.0
    repeats: int = 3
    alignments: str | None = None
    way: str | None = None


def compare_label_generation(options: BenchmarkOptions) -> list[dict[str, object]]:
    """Run every way `options.repeats` times, interleaved; one row of medians each, ratios against the dump."""
    work = Path(options.output)
    data_dir = _cut(resolve_data_dir(options.data.dir), work / "data", options.hours)
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(options.repeats):
        for way in WAYS:
            runs[way].append(_measure(options, way, data_dir, work / "labels"))
    rows = []
    for way, results in runs.items():
        medians = {name: median(result[name] for result in results) for name in results[0]}
        peer = median(result["wall_seconds"] for result in runs[PEER])
        rows.append({"way": way, **medians, "wall_ratio": medians["wall_seconds"] / peer})
    return rows


def _cut(source: Path, folder: Path, hours: float) -> Path:
    """Manifests of the first `hours` of train and of all of valid."""
    for split in SPLITS:
        manifest = Manifest.read(source / f"{split}.tsv")
        count = len(manifest)
        if split == "train":
            count = int(np.searchsorted(np.cumsum(manifest.lengths), hours * 3600 * SAMPLE_RATE)) + 1
        rows = [(manifest.relative_path(row), int(manifest.lengths[row])) for row in range(min(count, len(manifest)))]
        write_manifest(folder / f"{split}.tsv", manifest.root, rows)
    return folder


def _measure(options: BenchmarkOptions, way: str, data_dir: Path, labels: Path) -> dict[str, float]:
    """Run one way in a process of its own; its cost as the kernel counts it."""
    shutil.rmtree(labels, ignore_errors=True)
    single = replace(options, way=way, output=str(labels), data=replace(options.data, dir=str(data_dir)))
    values = asdict(single)
    values |= {f"data.{key}": value for key, value in values.pop("data").items()}
    arguments = [f"{key}={value}" for key, value in values.items() if value is not None]
    started = time.monotonic()
    child = subprocess.Popen([sys.executable, __file__, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"benchmark_labels.py: '{way}' ended with {child.returncode}; its message is above")
    result = {
        "wall_seconds": time.monotonic() - started,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_rss_gib": usage.ru_maxrss / 2**20,
        "disk_mib": sum(path.stat().st_size for path in labels.rglob("*") if path.is_file()) / 2**20,
    }
    if options.alignments:
        result["pnmi"] = _pnmi(labels / "valid.km", data_dir / "valid.tsv", Path(options.alignments), options)
    return result


def _pnmi(text: Path, manifest_path: Path, alignments_path: Path, options: BenchmarkOptions) -> float:
    manifest, alignments = Manifest.read(manifest_path), Alignments.read(alignments_path)
    counter = QualityCounter(alignments.inventory, options.clusters)
    rate_hz = _extractor(options).rate_hz
    for row, line in enumerate(text.read_text().splitlines()):
        units = np.array(line.split(), dtype=np.int64)
        if (utterance := alignments.find(manifest.utterance_id(row))) is not None:
            counter.add(alignments.frame_phones(utterance, len(units), rate_hz), units)
    return counter.report()["all_frames"]["pnmi"]


def _extractor(options: BenchmarkOptions) -> FeatureExtractor:
    if options.features != "upstream":
        return make_extractor(FeatureSpec(options.features))
    upstream = Upstream(None, options.checkpoint)
    return make_extractor(FeatureSpec("upstream", upstream.method_name, options.layer), upstream.encoder)


def _dump_then_cluster(options: BenchmarkOptions) -> None:
    """Features of every split to `{split}.f32`, train's back into memory for the fit, labels to `{split}.km`."""
    output, extractor = Path(options.output), _extractor(options)
    output.mkdir(parents=True)
    counts: dict[str, list[int]] = {}
    for split in SPLITS:
        manifest = Manifest.read(Path(options.data.dir) / f"{split}.tsv")
        stream = WaveformStream(manifest, options.data.max_bad_share, options.data.workers)
        counts[split] = []
        with (output / f"{split}.f32").open("wb") as file:
            for _, waveform in stream.read(range(len(manifest))):
                features = extractor.extract(waveform if waveform is not None else torch.zeros(0))
                file.write(features.numpy().tobytes())
                counts[split].append(len(features))
    points = np.fromfile(output / "train.f32", dtype=np.float32).reshape(-1, extractor.dim)
    centroids = fit_centroids(torch.from_numpy(points), FitOptions(options.clusters, backend="sklearn"))
    del points
    for split in SPLITS:
        features = np.memmap(output / f"{split}.f32", dtype=np.float32, mode="r").reshape(-1, extractor.dim)
        with (output / f"{split}.km").open("w") as file:
            for block in np.split(features, np.cumsum(counts[split])[:-1]):
                units, _ = nearest_centroids(torch.from_numpy(np.array(block)), centroids)
                file.write(" ".join(map(str, units.tolist())) + "\n")


def _run_single(options: BenchmarkOptions) -> None:
    if options.way == PEER:
        _dump_then_cluster(options)
        return
    generate_labels(
        LabelOptions(
            options.output,
            options.data,
            options.features,
            options.clusters,
            checkpoint=options.checkpoint,
            layer=options.layer,
            backend=WAYS[str(options.way)],
        )
    )


def main() -> None:
    """Compare, print a table, write benchmark.json; or, with `way`, run that one way."""
    options = parse_cli(BenchmarkOptions, sys.argv[1:], __doc__)
    if options.way is not None:
        _run_single(options)
        return
    rows = compare_label_generation(options)
    names = list(rows[0])
    print(" | ".join(names))
    for row in rows:
        print(" | ".join(f"{row[name]:.3g}" if isinstance(row[name], float) else str(row[name]) for name in names))
    (Path(options.output) / "benchmark.json").write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
