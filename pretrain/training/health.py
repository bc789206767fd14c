"""Says in plain words when a run is ill, and stops it when it cannot recover.

Works on the names that metrics carry by convention: `loss`, `accuracy*` and the `chance` that `accuracy` must beat,
`*_perplexity` of a histogram, `codes_<group>` of a codebook and its `prob_perplexity` summed over groups; and on the
roles that metrics state (`pretrain.method.Role`).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from pretrain.errors import UserError
from pretrain.method import Role

EARLY_UPDATES = 2000
# Contrastive methods need thousands of updates to leave chance behind with small batches; healthy runs have by then.
STUCK_UPDATES = 5000
TOO_GOOD_ACCURACY = 0.995
COLLAPSED_PERPLEXITY = 1.5
COLLAPSED_VARIANCE = 1e-4
# Metrics of these roles fall to zero (a perplexity to one) when every frame becomes alike; the sentence says what to
# change.
COLLAPSES: dict[Role, str] = {
    "target_variance": "the teacher's targets have collapsed; lower optimizer.lr or raise the EMA decay",
    "prediction_variance": "the network predicts the same for all frames; lower optimizer.lr, or enlarge the batch",
    "feature_variance": "the network gives every frame the same features; lower optimizer.lr, or enlarge the batch",
    "target_codes": (
        "the quantizer, which is not trained, gives nearly all frames the same code; its features must have mean 0 and "
        "deviation 1, so look at method.encoder.front_end.normalization and at the audio"
    ),
}
# Entries per group in use, below which a codebook is one vector; healthy runs dip to 5 or 10 at first.
COLLAPSED_CODES = 1.05
# Log intervals in a row in which a sign must hold before the run is stopped.
HOPELESS_INTERVALS = 3


class HopelessRun(UserError):
    """Training cannot recover; the message says what was seen and what to look at."""


@dataclass
class HealthMonitor:
    """Looks at every log interval's numbers; the same on all ranks, since the numbers are reduced."""

    clip_norm: float
    _streaks: dict[str, int] = field(default_factory=dict)

    def check(
        self,
        update: int,
        values: dict[str, float],
        roles: dict[str, Role] | None = None,
        minima: dict[str, float] | None = None,
    ) -> list[str]:
        """Sentences about this interval. `roles` and `minima` are those that metrics state, by name.

        Raises HopelessRun where a fatal sign has lasted.
        """
        fatal, warnings = self._fatal(values, roles or {}, minima or {}), self._warnings(update, values)
        self._streaks = {sign: self._streaks.get(sign, 0) + 1 for sign in fatal}
        for sign, sentence in fatal.items():
            if self._streaks[sign] >= HOPELESS_INTERVALS:
                raise HopelessRun(f"update {update}: {sentence}")
        return [*fatal.values(), *warnings]

    def _fatal(self, values: dict[str, float], roles: dict[str, Role], minima: dict[str, float]) -> dict[str, str]:
        signs = {}
        for name, value in values.items():
            if name.endswith("labels_perplexity") and value < COLLAPSED_PERPLEXITY:
                signs[name] = (
                    f"the training labels are nearly all the same ({name} {value:.2f}); look at the label files, their "
                    "dictionary and the k-means report"
                )
            elif name in roles and value < (minimum := minima.get(name, COLLAPSED_VARIANCE)):
                below = f", below {minimum:g}" if name in minima else ""
                signs[name] = f"{name} is {value:.2g}{below}: {COLLAPSES[roles[name]]}"
        if sentence := _collapsed_codebook(values):
            signs["prob_perplexity"] = sentence
        if not math.isfinite(values.get("loss", 0.0)):
            signs["loss"] = "the loss is not finite; lower optimizer.lr, or use precision=bf16 or fp32"
        return signs

    def _warnings(self, update: int, values: dict[str, float]) -> list[str]:
        lines = []
        for name, value in values.items():
            if name.startswith("accuracy") and value > TOO_GOOD_ACCURACY and update < EARLY_UPDATES:
                lines.append(f"{name} is {value:.3f} after {update} updates: too good; do targets leak into the input?")
            if name.endswith("predictions_perplexity") and value < COLLAPSED_PERPLEXITY and update > EARLY_UPDATES:
                lines.append(f"the network predicts one class ({name} {value:.2f}); its rate may be too high")
        accuracy, chance = values.get("accuracy", math.nan), values.get("chance", math.nan)
        if update > STUCK_UPDATES and accuracy < 1.5 * chance:
            lines.append(
                f"accuracy {accuracy:.3f} is that of guessing ({chance:.3f}) after {update} updates, so nothing is "
                "learned; lower optimizer.lr, or enlarge the batch"
            )
        norm = values.get("gradient_norm", 0.0)
        if self.clip_norm and norm > 100 * self.clip_norm:
            lines.append(f"the gradient norm is {norm:.3g}, {norm / self.clip_norm:.0f} times the clipping norm")
        return lines


def _collapsed_codebook(values: dict[str, float]) -> str | None:
    """A sentence where every group of the codebook has come down to one entry."""
    groups = sum(re.fullmatch(r"codes_\d+_perplexity", name) is not None for name in values)
    perplexity = values.get("prob_perplexity", math.inf)
    if perplexity >= COLLAPSED_CODES * groups:
        return None
    return (
        f"the codebook has collapsed to one entry per group (prob_perplexity {perplexity:.2f} of {groups} groups), so "
        f"targets are all alike and the accuracy, {values.get('accuracy', math.nan):.3f}, means nothing; lower "
        "optimizer.lr, enlarge the batch, or raise the weight of the diversity"
    )
