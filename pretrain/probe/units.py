"""Units against phones: an upstream's codebook, the k-means model that travelled with it, and k-means fitted here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import numpy as np
import torch
from sklearn.cluster import MiniBatchKMeans

from pretrain.data.alignments import first_centre_samples, frame_centres
from pretrain.data.audio import SAMPLE_RATE
from pretrain.errors import UserError
from pretrain.labelling.kmeans.features import feature_centres
from pretrain.labelling.kmeans.quality import unit_quality
from pretrain.labelling.tokens.tokenizer import Tokenizer
from pretrain.probe.collect import Layer, PhoneTask, Split
from pretrain.probe.report import UnitScore
from pretrain.upstream import Upstream

INITIALISATIONS = 5
BLOCK_ROWS = 16384


def unit_score(
    name: str, units: np.ndarray, phones: np.ndarray, clusters: int, silence: frozenset[int], rate_hz: float
) -> UnitScore:
    """Quality of `units` (N,) against phone ids `phones` (N,), over all frames and over those of no `silence`."""
    joint = np.zeros((int(phones.max()) + 1, clusters), dtype=np.int64)
    np.add.at(joint, (phones, units), 1)
    speech = unit_quality(np.delete(joint, [phone for phone in silence if phone < len(joint)], axis=0))
    everything = unit_quality(joint)
    counts = joint.sum(0)
    shares = counts[counts > 0] / counts.sum()
    return UnitScore(
        name=name,
        clusters=clusters,
        rate_hz=rate_hz,
        frames=everything.frames,
        used=len(shares),
        perplexity=float(np.exp(-(shares * np.log(shares)).sum())),
        phone_purity=everything.phone_purity,
        cluster_purity=everything.cluster_purity,
        pnmi=everything.pnmi,
        speech_phone_purity=speech.phone_purity,
        speech_cluster_purity=speech.cluster_purity,
        speech_pnmi=speech.pnmi,
    )


def fitted_unit_score(
    name: str, train: Layer, valid: Layer, clusters: int, silence: frozenset[int], rate_hz: float, seed: int
) -> UnitScore:
    """Fit k-means on the training rows of one layer, score its units on the validation rows.

    fairseq's settings (examples/hubert/simple_kmeans/learn_kmeans.py), with 5 initialisations instead of 20.
    Raises UserError where there are fewer rows than clusters.
    """
    if len(train.features) < clusters:
        raise UserError(
            f"clusters: {clusters} clusters need as many frames, here are {len(train.features)}; take fewer"
        )
    kmeans = MiniBatchKMeans(
        clusters,
        batch_size=10000,
        max_iter=100,
        tol=0.0,
        max_no_improvement=100,
        n_init=INITIALISATIONS,
        reassignment_ratio=0.0,
        compute_labels=False,
        random_state=seed,
    )
    kmeans.fit(train.features.astype(np.float32))
    starts = range(0, len(valid.features), BLOCK_ROWS)
    blocks = [kmeans.predict(valid.features[start : start + BLOCK_ROWS].astype(np.float32)) for start in starts]
    return unit_score(name, np.concatenate(blocks), valid.labels, clusters, silence, rate_hz)


def travelling_unit_score(
    upstream: Upstream, split: Split, task: PhoneTask, silence: frozenset[int], device: torch.device
) -> UnitScore:
    """Score the units of the k-means model that travelled with `upstream` on every utterance of `split`."""
    kmeans = upstream.kmeans
    units, phones = _aligned(upstream.units, split, task, partial(feature_centres, kmeans.extractor), device)
    layer = "" if kmeans.spec.layer is None else f", layer {kmeans.spec.layer}"
    return unit_score(
        f"k-means that made the labels ({kmeans.spec.kind}{layer})",
        units,
        phones,
        kmeans.num_clusters,
        silence,
        kmeans.rate_hz,
    )


def codebook_scores(
    upstream: Upstream, split: Split, task: PhoneTask, silence: frozenset[int], device: torch.device
) -> list[UnitScore]:
    """Score the codes of each group of the encoder's codebook, and all groups' codes of a frame taken together.

    Nothing for an encoder without a codebook. Together, the clusters are the combinations that appear.
    """
    encoder = upstream.encoder
    try:
        groups, entries = getattr(encoder, "code_shape", (0, 0))
    except UserError:  # of a network that can have a codebook, but has none
        groups = 0
    if not groups:
        return []
    encoder.eval().to(device)
    tokenizer = cast(Tokenizer, encoder)
    stride = tokenizer.stride_samples
    centres = partial(frame_centres, stride_samples=stride, first_centre_samples=first_centre_samples(encoder, stride))
    codes, phones = _aligned(tokenizer.codes, split, task, centres, device)
    rate_hz = SAMPLE_RATE / stride
    scores = [
        unit_score(f"codes, group {group}", codes[:, group], phones, entries, silence, rate_hz)
        for group in range(groups)
    ]
    if groups > 1:
        found, together = np.unique(codes, axis=0, return_inverse=True)
        scores.append(unit_score("codes of all groups", together, phones, len(found), silence, rate_hz))
    return scores


def _aligned(
    units_of: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    split: Split,
    task: PhoneTask,
    centres_of: Callable[[int], np.ndarray],
    device: torch.device,
) -> tuple[np.ndarray, np.ndarray]:
    """Units (N, ...) of the labelled frames of `split`, and their phones (N,); `centres_of`: of so many frames."""
    units, phones = [], []
    for row, key, waveform in split.waveforms("units"):
        found, lengths = units_of(waveform.unsqueeze(0).to(device), torch.tensor([len(waveform)], device=device))
        found = found[0, : int(lengths[0])].cpu()
        kept, ids = task.label(row, key, found, centres_of(len(found)))
        units.append(kept.numpy())
        phones.append(ids)
    return np.concatenate(units), np.concatenate(phones)
