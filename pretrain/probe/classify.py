"""Multinomial logistic regression on one layer, or on the learned weighted sum of several.

Features stay float16 in memory; each mini-batch is standardised with the training frames' mean and deviation, so the
classifier sees what scikit-learn's StandardScaler + LogisticRegression would see. Early stopping on held-out
utterances is the regularisation: features of many hundred dimensions would be fitted too closely otherwise.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pretrain.errors import UserError

HELD_OUT = 0.05
LEARNING_RATE = 0.01
# Each decay starts again from the best weights; three of them end at a rate of 1.6e-4, where nothing moves any more.
DECAY, DECAYS = 0.25, 3
# Nats by which an epoch must lower the held-out loss to be worth another one at the same rate.
LEAST_GAIN = 5e-4
MAX_EPOCHS = 40
BATCH, MIN_BATCH, MIN_STEPS = 1024, 32, 50


@dataclass(frozen=True)
class FitResult:
    """`predictions` (N,) class ids of the scored rows; `layer_weights` (L,) softmax weights, one layer: [1.0]."""

    predictions: np.ndarray
    layer_weights: list[float]
    epochs: int


class LinearProbe(nn.Module):
    """softmax(`mix`)-weighted sum of L standardised layers, then one linear map.

    The mixing weights are trained jointly with the classifier, as s3prl's Featurizer does (s3prl/nn/upstream.py).
    """

    means: Tensor
    scales: Tensor

    def __init__(self, means: Tensor, scales: Tensor, num_classes: int) -> None:
        """`means`, `scales`: (L, D) statistics of the training rows."""
        super().__init__()
        self.register_buffer("means", means)
        self.register_buffer("scales", scales)
        self.mix = nn.Parameter(torch.zeros(means.shape[0]))
        self.linear = nn.Linear(means.shape[1], num_classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """L tensors of (B, D) float16 to (B, C) logits."""
        weights = self.mix.softmax(0)
        layers = [
            (layer.float() - mean) * scale for layer, mean, scale in zip(features, self.means, self.scales, strict=True)
        ]
        mixed = sum(weight * layer for weight, layer in zip(weights, layers, strict=True)) if layers[1:] else layers[0]
        return self.linear(mixed)


def _statistics(layer: np.ndarray) -> tuple[Tensor, Tensor]:
    """(N, D) float16 to the (D,) mean and inverse deviation, in blocks, so that no float copy of the whole is made."""
    total, squares = np.zeros(layer.shape[1]), np.zeros(layer.shape[1])
    for start in range(0, len(layer), 16384):
        total += layer[start : start + 16384].sum(0, dtype=np.float64)
    mean = total / len(layer)
    for start in range(0, len(layer), 16384):
        squares += ((layer[start : start + 16384] - mean) ** 2).sum(0)
    deviation = np.sqrt(squares / len(layer))
    # A constant column carries nothing: it becomes zero instead of amplified rounding.
    scale = np.where(deviation > 1e-6, 1 / np.maximum(deviation, 1e-6), 0.0)
    return torch.from_numpy(mean).float(), torch.from_numpy(scale).float()


def _take(layers: Sequence[Tensor], rows: Tensor, device: torch.device) -> list[Tensor]:
    return [layer[rows].to(device) for layer in layers]


@torch.no_grad()
def _logits(probe: LinearProbe, layers: Sequence[Tensor], rows: Tensor, device: torch.device) -> Tensor:
    blocks = [probe(_take(layers, block, device)).cpu() for block in rows.split(8192)]
    return torch.cat(blocks) if blocks else torch.empty(0, probe.linear.out_features)


def _held_out_rows(groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(N,) bool: about one row in twenty, whole utterances, because neighbouring frames are near copies."""
    names = rng.permutation(np.unique(groups))
    return np.isin(groups, names[: max(1, round(HELD_OUT * len(names)))])


def _train(
    probe: LinearProbe, layers: list[Tensor], labels: Tensor, held_out: np.ndarray, rng: np.random.Generator
) -> int:
    """Adam, the rate quartered whenever the held-out loss stops falling; leaves the best weights in `probe`."""
    device = labels.device
    train_rows, check_rows = np.flatnonzero(~held_out), torch.from_numpy(np.flatnonzero(held_out))
    batch = int(np.clip(len(train_rows) // MIN_STEPS, MIN_BATCH, BATCH))
    optimizer = torch.optim.Adam(probe.parameters(), lr=LEARNING_RATE)
    best, best_state, decays, epoch = float("inf"), copy.deepcopy(probe.state_dict()), 0, 0
    check_labels = labels[check_rows].cpu()
    while epoch < MAX_EPOCHS and decays <= DECAYS:
        for rows in torch.from_numpy(rng.permutation(train_rows)).split(batch):
            loss = cross_entropy(probe(_take(layers, rows, device)), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        epoch += 1
        held_out_loss = cross_entropy(_logits(probe, layers, check_rows, device), check_labels).item()
        gain = best - held_out_loss
        if gain > 0:
            best, best_state = held_out_loss, copy.deepcopy(probe.state_dict())
        if gain > LEAST_GAIN:
            continue
        decays += 1
        probe.load_state_dict(best_state)
        optimizer = torch.optim.Adam(probe.parameters(), lr=LEARNING_RATE * DECAY**decays)
    probe.load_state_dict(best_state)
    return epoch


def fit_and_predict(
    train: Sequence[np.ndarray],
    labels: np.ndarray,
    groups: np.ndarray,
    scored: Sequence[np.ndarray],
    num_classes: int,
    seed: int,
    device: torch.device | str = "cpu",
) -> FitResult:
    """Train on `train`, L arrays of (N, D) float16, with `labels` (N,) int64 and `groups` (N,) utterance numbers.

    `scored` are L arrays of (M, D); with L > 1 the layers are mixed with learned softmax weights and must have one
    width. A twentieth of the utterances decides when the rate falls and which weights are kept.
    Raises UserError where fewer than two utterances are there to be split.
    """
    if len(np.unique(groups)) < 2:
        raise UserError("max_train_hours: the probe needs at least two labelled utterances; add data or raise it")
    rng, device = np.random.default_rng(seed), torch.device(device)
    means, scales = zip(*map(_statistics, train), strict=True)
    probe = LinearProbe(torch.stack(means), torch.stack(scales), num_classes).to(device)
    layers = [torch.from_numpy(layer) for layer in train]
    epochs = _train(probe, layers, torch.from_numpy(labels).to(device), _held_out_rows(groups, rng), rng)
    rows = torch.arange(len(scored[0]))
    logits = _logits(probe, [torch.from_numpy(layer) for layer in scored], rows, device)
    return FitResult(logits.argmax(1).numpy(), probe.mix.detach().softmax(0).tolist(), epochs)
