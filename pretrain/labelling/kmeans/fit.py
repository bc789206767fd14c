"""Sampling frames for k-means, and fitting it: faiss (Lloyd, k-means++; GPU if any) or scikit-learn's mini-batches."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import faiss
import numpy as np
import torch
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor

from pretrain.config import check_seed
from pretrain.errors import UserError
from pretrain.labelling.kmeans.features import SAMPLE_RATE, FeatureExtractor

BACKENDS = ("faiss", "sklearn")
FAISS_ITERATIONS = 100
FAISS_STOP = 1e-4  # relative gain of the objective below which Lloyd's iterations end


class FitError(UserError):
    """A fit that cannot be done: "<option>: <what is wrong>; <what to do>"."""


MAX_SEED = 2**31 - 1  # of faiss


@dataclass(frozen=True)
class FitOptions:
    """`fit_hours` of audio are sampled, and of their frames at most `max_points_per_cluster` times `clusters` kept.

    That bounds memory: 500 clusters of 768-dimensional frames take 1.5 GB. `starts` fits (scikit-learn:
    initialisations) are made and the best is kept; None is 1 for faiss and, as in fairseq, 20 for scikit-learn.
    """

    clusters: int
    backend: str = "faiss"
    fit_hours: float = 10.0
    max_points_per_cluster: int = 1000
    starts: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise FitError(f"backend: unknown '{self.backend}'; known: {', '.join(BACKENDS)}")
        for name in ("clusters", "fit_hours", "max_points_per_cluster", "starts"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise FitError(f"{name}: is {value}; give a positive number")
        check_seed(self.seed, MAX_SEED)


def sample_rows(lengths: np.ndarray, hours: float, seed: int) -> np.ndarray:
    """Rows drawn without replacement until their (N,) `lengths` in samples make up `hours`; ascending."""
    order = np.random.default_rng(seed).permutation(len(lengths))
    needed = np.searchsorted(np.cumsum(lengths[order]), hours * 3600 * SAMPLE_RATE) + 1
    return np.sort(order[:needed])


def keep_share(lengths: np.ndarray, rate_hz: int, options: FitOptions) -> float:
    """The share of frames to keep so that rows of these lengths give at most the wanted number of points."""
    frames = lengths.sum() * rate_hz / SAMPLE_RATE
    return min(1.0, options.clusters * options.max_points_per_cluster / frames)


def sample_points(
    extractor: FeatureExtractor,
    waveforms: Iterable[tuple[int, Tensor | None]],
    share: float,
    seed: int,
    device: torch.device,
) -> tuple[Tensor, dict[int, Tensor]]:
    """(n, D) float32 points on the CPU: of every row a random `share` of its frames, drawn from (seed, row).

    Since the draw depends on nothing else, the ranks' points joined in row order are those of a single rank. Where all
    frames are kept, the second result has the features of every row, as views of the points: they need not be
    computed again.
    """
    kept: dict[int, Tensor] = {}
    for row, waveform in waveforms:
        if waveform is None:
            continue
        features = extractor.extract(waveform.to(device))
        if share < 1:
            rng = np.random.default_rng([seed, row])
            count = int(len(features) * share + rng.random())
            chosen = np.sort(rng.choice(len(features), size=min(count, len(features)), replace=False))
            features = features[torch.from_numpy(chosen).to(device)]
        kept[row] = features.cpu()
    points = torch.cat([torch.empty(0, extractor.dim), *kept.values()])
    if share < 1:
        return points, {}
    return points, dict(zip(kept, points.split([len(features) for features in kept.values()]), strict=True))


def fit_centroids(points: Tensor, options: FitOptions) -> Tensor:
    """(n, D) float32 points to (K, D) float32 centroids.

    Raises FitError for fewer points than clusters or features that are not finite.
    """
    if len(points) < options.clusters:
        raise FitError(
            f"clusters: {options.clusters} cannot be fitted to {len(points)} frames; "
            "take fewer clusters, more audio, or raise fit_hours and max_points_per_cluster"
        )
    if not points.isfinite().all():
        raise FitError("features: not finite; is the checkpoint whole, and did its training stay finite?")
    fit = _fit_faiss if options.backend == "faiss" else _fit_sklearn
    return torch.from_numpy(fit(points.numpy(), options)).float()


def _fit_faiss(points: np.ndarray, options: FitOptions) -> np.ndarray:
    threads = faiss.omp_get_max_threads()
    # torchrun gives every rank one thread, and the others wait for this one: it may use theirs.
    faiss.omp_set_num_threads(min(os.cpu_count() or 1, threads * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    try:
        kmeans = faiss.Kmeans(
            points.shape[1],
            options.clusters,
            niter=FAISS_ITERATIONS,
            early_stop_threshold=FAISS_STOP,
            nredo=options.starts or 1,
            seed=options.seed,
            init_method=faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS,
            min_points_per_centroid=1,
            max_points_per_centroid=len(points),  # no sampling of its own: that was done above
            gpu=torch.cuda.is_available() and faiss.get_num_gpus() > 0,
        )
        kmeans.train(points)
    finally:
        faiss.omp_set_num_threads(threads)
    assert kmeans.centroids is not None  # it is trained
    return kmeans.centroids


def _fit_sklearn(points: np.ndarray, options: FitOptions) -> np.ndarray:
    """Settings of facebookresearch/fairseq examples/hubert/simple_kmeans/learn_kmeans.py."""
    kmeans = MiniBatchKMeans(
        n_clusters=options.clusters,
        init="k-means++",
        n_init=options.starts or 20,
        batch_size=10000,
        max_iter=100,
        tol=0.0,
        max_no_improvement=100,
        reassignment_ratio=0.0,
        init_size=None,
        compute_labels=False,
        random_state=options.seed,
    )
    return kmeans.fit(points).cluster_centers_
