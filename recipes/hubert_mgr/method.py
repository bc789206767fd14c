"""HuBERT-MGR: HuBERT trained further on speech with MUSAN noise, Gaussian noise and reverberation.

The labels are those of the clean speech. A domain classifier learns from the last hidden states how an utterance was
distorted, and its gradient is reversed before it reaches the encoder, which so learns to hide it.

Sources: arXiv 2203.16104, of which abstract and introduction could be read (domain adversarial training with one domain
for all distortions or one for each); its authors' code for distillation, nobel861017/distort-robust-distilSSL,
`superb/pretrain/dat_runner.py` (the encoder's loss is the task's less `lamb` times the domain's) and
`superb/pretrain/distiller/distortion_config.yaml`; arXiv 1409.7495 for the gradient reversal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import ConfigError
from pretrain.data.augment.options import AugmentConfig
from pretrain.method import Batch, Example, Ratio, StepOutput
from pretrain.models.speech_encoder import ScaleGradient
from pretrain.objectives.masked_prediction import MaskedPrediction, MaskedPredictionConfig
from pretrain.objectives.masked_units import MaskedUnitsCollator

CLEAN = 0  # the first domain
STAGES = [f.name for f in fields(AugmentConfig) if f.name != "exclusive"]


@dataclass
class HubertMGRConfig(MaskedPredictionConfig):
    """HuBERT's hyper-parameters, and those of the domain classifier.

    `domains` lists the domains beside clean speech, each as the stages of `augment` that make it: one list with all
    stages is the paper's binary setting, a list for each stage its multi-domain setting. An utterance that stages of
    several domains have altered belongs to the first of them. `reversal_weight` is the factor on the reversed gradient
    (the authors' `lamb`); 0 trains the classifier and leaves the encoder to masked prediction. `domain_dim` is the
    width of the classifier's hidden layer.
    """

    domains: list[list[str]]
    domain_dim: int
    reversal_weight: float

    def __post_init__(self) -> None:
        super().__post_init__()
        named = [stage for domain in self.domains for stage in domain]
        if not self.domains or not all(self.domains):
            raise ConfigError("method.domains: a domain without stages; list the stages of augment, such as [[noise]]")
        if unknown := [stage for stage in named if stage not in STAGES]:
            raise ConfigError(f"method.domains: {unknown[0]!r} is no stage of augment; known: {', '.join(STAGES)}")
        if len(set(named)) < len(named):
            raise ConfigError(f"method.domains: {self.domains} names a stage twice; put each into one domain")
        if self.reversal_weight < 0:
            raise ConfigError(
                f"method.reversal_weight: {self.reversal_weight:g} is negative, which would teach the encoder to tell "
                "domains apart; give 0 or more"
            )


@dataclass(frozen=True)
class DomainsCollator(MaskedUnitsCollator):
    """As `MaskedUnitsCollator`, with `extras["domains"]` (B,) int64: 0 is clean, d the d-th of `domains`."""

    domains: tuple[tuple[str, ...], ...]

    def __call__(self, examples: list[Example]) -> Batch:
        batch = super().__call__(examples)
        batch.extras["domains"] = torch.tensor([self._domain(example.altered_by) for example in examples])
        batch.other_sizes["domains"] = len(examples)
        return batch

    def _domain(self, stages: Sequence[str]) -> int:
        """The domain of an utterance that `stages` have altered. Raises ConfigError for a stage of no domain."""
        for stage in stages:
            if not any(stage in domain for domain in self.domains):
                raise ConfigError(
                    f"augment.{stage}: alters utterances, but method.domains does not name it; add it to a domain, or "
                    f"set augment.{stage} to null"
                )
        made = (place for place, domain in enumerate(self.domains, start=1) if set(domain) & set(stages))
        return next(made, CLEAN)


class HubertMGRMethod(MaskedPrediction):
    """Masked prediction as HuBERT's, and the cross-entropy of the domain classifier, summed over utterances.

    Reads `batch.extras["domains"]` (B,) beside those of `MaskedPrediction`. `accuracy_domain` is the share of the
    utterances whose domain the classifier tells; the encoder should bring it down to the share of the commonest domain.
    Validation speech is clean, so `loss_domain` and `accuracy_domain` only mean something in training.
    """

    Config = HubertMGRConfig
    config: HubertMGRConfig
    # Weights for `init_from`, a HuBERT's, lack it.
    separate_parts = ("domain_classifier",)

    def __init__(self, config: HubertMGRConfig) -> None:
        super().__init__(config)
        width = config.encoder.encoder_embed_dim
        self.domain_classifier = nn.Sequential(
            nn.Linear(width, config.domain_dim), nn.ReLU(), nn.Linear(config.domain_dim, 1 + len(config.domains))
        )

    @classmethod
    def collator(cls, config: MaskedPredictionConfig) -> DomainsCollator:
        """The collator of this configuration."""
        assert isinstance(config, HubertMGRConfig)
        options = vars(super().collator(config))
        return DomainsCollator(**options, domains=tuple(tuple(domain) for domain in config.domains))

    def forward(self, batch: Batch) -> StepOutput:
        """HuBERT's loss over masked frames, and under `other_losses` that of the domains, in nats per utterance."""
        features, hidden_states = self.encode(batch)
        output = self.prediction(batch, features, hidden_states[-1])
        domains = batch.extras["domains"]
        logits = self.domain_logits(hidden_states[-1], features.frame_lengths)
        loss = F.cross_entropy(logits.float(), domains, reduction="sum")
        metrics = {
            **output.metrics,
            "loss_domain": Ratio(loss.detach(), len(domains)),
            "accuracy_domain": Ratio((logits.argmax(-1) == domains).float().sum(), len(domains)),
        }
        return output._replace(metrics=metrics, other_losses={"domains": loss})

    def domain_logits(self, hidden: Tensor, frame_lengths: Tensor | None) -> Tensor:
        """(B, 1 + domains) from (B, F, D) hidden states: the mean over each row's frames, its gradient reversed."""
        if frame_lengths is None:
            mean = hidden.mean(1)
        else:
            counted = torch.arange(hidden.shape[1], device=hidden.device) < frame_lengths[:, None]
            mean = (hidden.float() * counted[:, :, None]).sum(1) / counted.sum(1, keepdim=True)
        return self.domain_classifier(ScaleGradient.apply(mean, -self.config.reversal_weight))

    def training_flops(self, samples: int) -> float:
        """HuBERT's, and those of the classifier at one vector of an utterance."""
        weights = sum(layer.weight.numel() for layer in self.domain_classifier if isinstance(layer, nn.Linear))
        return super().training_flops(samples) + 3 * 2 * weights
