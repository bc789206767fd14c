"""Making a label directory: fit on a sample, then label every file as it streams by; no feature reaches the disk."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pretrain.data.alignments import UNKNOWN, Phones, match_utterance, read_phones
from pretrain.data.folders import resolve_data_dir
from pretrain.data.label_files import LabelWriter
from pretrain.data.manifest import Manifest
from pretrain.labelling.directory import LabelData, labels_of, publish, read_manifests, work_directory
from pretrain.labelling.kmeans.assign import nearest_centroids
from pretrain.labelling.kmeans.features import (
    MAX_CHUNK_SECONDS,
    SAMPLE_RATE,
    FeatureError,
    FeatureExtractor,
    FeatureSpec,
    feature_centres,
)
from pretrain.labelling.kmeans.fit import FitOptions, fit_centroids, keep_share, sample_points, sample_rows
from pretrain.labelling.kmeans.model import KMeansModel, make_extractor
from pretrain.labelling.kmeans.quality import QualityCounter
from pretrain.labelling.ranks import gather_rows, labelling_world, share_of
from pretrain.labelling.stream import WaveformStream, check_problems
from pretrain.upstream import Upstream
from pretrain.weights.export import find_kmeans
from pretrain.world import World


@dataclass
class LabelOptions:
    """`features` is mfcc, logmel or upstream (with `checkpoint` and `layer`; `upstream` names the method where the file
    does not). `kmeans` is a label directory whose centroids are used instead of fitting new ones. `alignments` is a
    phone table (utt, start_s, end_s, phone) for purity and PNMI in the report.
    """

    output: str
    data: LabelData
    features: str = "mfcc"
    clusters: int = 100
    checkpoint: str | None = None
    upstream: str | None = None
    layer: int | None = None
    kmeans: str | None = None
    backend: str = "faiss"
    fit_hours: float = 10.0
    max_points_per_cluster: int = 1000
    starts: int | None = None
    seed: int = 0
    max_chunk_seconds: float = MAX_CHUNK_SECONDS
    alignments: str | None = None
    overwrite: bool = False

    def fit_options(self) -> FitOptions:
        return FitOptions(
            self.clusters, self.backend, self.fit_hours, self.max_points_per_cluster, self.starts, self.seed
        )


@dataclass
class SplitTally:
    """What one rank saw while labelling its rows of a split."""

    rows: int
    samples: int
    used: np.ndarray
    squared_distance: float = 0.0
    problems: dict[int, str] = field(default_factory=dict)
    quality: QualityCounter | None = None

    def add(self, units: np.ndarray, distances: Tensor) -> None:
        """Count the (F,) units of one file and their squared distances to the centroids."""
        self.used += np.bincount(units, minlength=len(self.used))
        self.squared_distance += float(distances.double().sum())

    def merge(self, other: SplitTally) -> None:
        """Add another rank's."""
        self.rows += other.rows
        self.samples += other.samples
        self.used += other.used
        self.squared_distance += other.squared_distance
        self.problems.update(other.problems)
        if self.quality is not None and other.quality is not None:
            self.quality.merge(other.quality)

    def report(self) -> dict[str, Any]:
        """Inertia is the mean squared distance per frame; perplexity the exponential of the units' entropy."""
        frames = int(self.used.sum())
        share = self.used[self.used > 0] / max(1, frames)
        report: dict[str, Any] = {
            "rows": self.rows,
            "hours": self.samples / SAMPLE_RATE / 3600,
            "frames": frames,
            "inertia_per_frame": self.squared_distance / max(1, frames),
            "clusters_used": int(np.count_nonzero(self.used)),
            "perplexity": float(np.exp(-(share * np.log(share)).sum())),
            "unreadable": list(self.problems.values()),
        }
        if self.quality is not None and self.quality.utterances:
            report["quality"] = self.quality.report()
        return report


def generate_labels(options: LabelOptions) -> dict[str, Any]:
    """Fit (or load) a k-means model, label every split of `options.data.dir`, write the directory; returns the report.

    Runs alone or on all of torchrun's ranks, each of which extracts its share for the fit and labels a contiguous range
    of rows; the files do not depend on how many there are. The directory appears under its name only when complete.
    Raises LabelError for an output that exists, FeatureError and FitError for options that cannot be met, StreamError
    where too many files are unreadable.
    """
    started = time.monotonic()
    output = Path(options.output)
    manifests = read_manifests(resolve_data_dir(options.data.dir))
    phones = read_phones(options.alignments) if options.alignments else None
    with work_directory(output, options.overwrite) as (world, work):
        model, known, fit_report = _kmeans_model(options, manifests["train"], world)
        tallies = {}
        for split, manifest in manifests.items():
            stream = WaveformStream(manifest, options.data.max_bad_share, options.data.workers)
            known_here = known if split == "train" else {}
            tallies[split] = _label_split(split, stream, model, known_here, phones, work, world)
        report = {
            "features": asdict(model.spec),
            "checkpoint": options.checkpoint,
            "clusters": model.num_clusters,
            "rate_hz": model.rate_hz,
            "fit": fit_report,
            "splits": {split: tally.report() for split, tally in tallies.items()},
            "world_size": world.size,
            "wall_seconds": time.monotonic() - started,
            "peak_rss_gib_per_rank": world.gather(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20),
        }
        world.from_main(lambda: _publish(work, output, model, manifests, tallies, report))
    return report


def describe(report: dict[str, Any]) -> str:
    """The report in a few lines."""
    lines = [f"{report['clusters']} clusters, {report['rate_hz']} labels per second"]
    for split, values in report["splits"].items():
        lines.append(
            f"{split}: {values['rows']} files, {values['hours']:.2f} h, {values['frames']} labels, inertia "
            f"{values['inertia_per_frame']:.4g} per frame, {values['clusters_used']} clusters used, perplexity "
            f"{values['perplexity']:.1f}, {len(values['unreadable'])} files unreadable"
        )
        for frames, quality in values.get("quality", {}).items():
            if isinstance(quality, dict):
                lines.append(
                    f"{split}, {frames.replace('_', ' ')}: phone purity {quality['phone_purity']:.3f}, cluster purity "
                    f"{quality['cluster_purity']:.3f}, PNMI {quality['pnmi']:.3f}"
                )
    lines.append(f"{report['wall_seconds']:.1f} s, peak memory {max(report['peak_rss_gib_per_rank']):.2f} GiB per rank")
    return "\n".join(lines)


def ensure_mfcc_labels(data_dir: Path, output: Path, clusters: int = 100) -> Path:
    """Labels of k-means on MFCC for `data_dir` in `output`; made unless a directory of them is there already.

    Call it on all ranks. Returns `output`.
    """
    with labelling_world() as world:
        fresh = world.from_main(lambda: is_current(output, data_dir, clusters))
    if not fresh:
        options = LabelOptions(str(output), LabelData(str(data_dir)), clusters=clusters, overwrite=True)
        generate_labels(options)
    return output


def is_current(directory: Path, data_dir: Path, clusters: int) -> bool:
    """Whether `directory` holds complete labels of that many classes for the manifests of `data_dir` as they are."""
    info = labels_of(directory, data_dir)
    return info is not None and info.num_classes == clusters


def _kmeans_model(
    options: LabelOptions, train: Manifest, world: World
) -> tuple[KMeansModel, dict[int, Tensor], dict[str, Any] | None]:
    """The model, the features of this rank's rows as far as the fit kept them whole, and the report of the fit."""
    if options.kmeans is not None:
        if options.checkpoint is not None or options.layer is not None:
            raise FeatureError("kmeans: knows its own features; leave out checkpoint and layer")
        return KMeansModel.load(find_kmeans(Path(options.kmeans))).to(world.device), {}, None
    started = time.monotonic()
    fit_options = options.fit_options()
    extractor = _extractor(options, world)
    rows = sample_rows(train.lengths, options.fit_hours, options.seed)
    share = keep_share(train.lengths[rows], extractor.rate_hz, fit_options)
    mine = rows[list(share_of(world, train.lengths[rows]))]
    stream = WaveformStream(train, options.data.max_bad_share, options.data.workers)
    waveforms = stream.read(mine.tolist())
    progress = tqdm(waveforms, "sampling for k-means", len(mine), unit="file", disable=None if world.is_main else True)
    points, features = sample_points(extractor, progress, share, options.seed, world.device)
    joined = gather_rows(world, points)
    count = sum(world.gather(len(points)))
    extracted = time.monotonic()

    def fit() -> Tensor:
        assert joined is not None  # rank 0 has the rows
        return fit_centroids(joined, fit_options)

    centroids = world.from_main(fit)
    report = {
        **asdict(fit_options),
        "rows": len(rows),
        "points": count,
        "extraction_seconds": extracted - started,
        "fit_seconds": time.monotonic() - extracted,
    }
    return KMeansModel(centroids, extractor).to(world.device), features, report


def _extractor(options: LabelOptions, world: World) -> FeatureExtractor:
    if options.features != "upstream":
        for name in ("checkpoint", "upstream"):
            if getattr(options, name) is not None:
                raise FeatureError(f"{name}: features={options.features} uses none; did you mean features=upstream?")
        return make_extractor(FeatureSpec(options.features, layer=options.layer))
    if options.checkpoint is None:
        raise FeatureError("checkpoint: missing; give a run, an export, a Hugging Face folder or a .pt")
    upstream = Upstream(options.upstream, options.checkpoint)
    spec = FeatureSpec("upstream", upstream.method_name, options.layer, options.max_chunk_seconds)
    return make_extractor(spec, upstream.encoder.to(world.device))


def _label_split(
    split: str,
    stream: WaveformStream,
    model: KMeansModel,
    known: dict[int, Tensor],
    phones: Phones | None,
    work: Path,
    world: World,
) -> SplitTally:
    """Label this rank's rows into a shard; returns what all ranks saw. `known` are features that the fit computed."""
    manifest = stream.manifest
    rows = share_of(world, manifest.lengths)
    tally = SplitTally(
        len(rows),
        int(manifest.lengths[list(rows)].sum()),
        np.zeros(model.num_clusters, dtype=np.int64),
        quality=QualityCounter(phones.names, model.num_clusters) if phones else None,
    )
    writer = LabelWriter(work, split, model.num_clusters, shard=world.rank)
    features_of_rows = _features(rows, known, stream, model.extractor, world.device)
    for row, features in tqdm(
        features_of_rows, f"labelling {split}", len(rows), unit="file", disable=None if world.is_main else True
    ):
        if features is None:
            writer.write(np.empty(0, dtype=np.int64))
            continue
        units, distances = nearest_centroids(features, model.centroids)
        labels = units.cpu().numpy()
        writer.write(labels)
        tally.add(labels, distances)
        utterance = match_utterance(manifest.utterance_id(row), phones.utterances) if phones else None
        if phones and tally.quality and utterance is not None:
            centres = feature_centres(model.extractor, len(labels))
            tally.quality.add(phones.at(utterance, centres, phones.ids(UNKNOWN)), labels)
    writer.close()
    tally.problems = stream.problems
    first, *others = world.gather(tally)
    for other in others:
        first.merge(other)
    check_problems(first.problems, len(manifest), stream.max_bad_share)
    return first


def _features(
    rows: range, known: dict[int, Tensor], stream: WaveformStream, extractor: FeatureExtractor, device: torch.device
) -> Iterator[tuple[int, Tensor | None]]:
    """Each row with its (F, D) features on `device`, or None where its file could not be read."""
    others = stream.read([row for row in rows if row not in known])
    for row in rows:
        if row in known:
            yield row, known[row].to(device)
            continue
        _, waveform = next(others)
        yield row, None if waveform is None else extractor.extract(waveform.to(device))


def _publish(
    work: Path,
    output: Path,
    model: KMeansModel,
    manifests: dict[str, Manifest],
    tallies: dict[str, SplitTally],
    report: dict[str, Any],
) -> None:
    """Write the model and finish the directory; for one rank."""
    model.save(work / "kmeans")
    unreadable = {split: tally.problems for split, tally in tallies.items()}
    publish(work, output, manifests, unreadable, report, model.rate_hz, model.num_clusters, model.sha256)
