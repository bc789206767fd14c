"""What training steps of other projects need for masked prediction: a head where they have none, labels, the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import ConfigError
from pretrain.losses.masked_prediction import cosine_logits
from pretrain.method import Batch
from pretrain.objectives.masked_prediction import DICTIONARY_SPECIALS, MaskedPredictionConfig


class TransformersPeer(nn.Module):
    """A base model of transformers with our head: one matrix product at the masked frames."""

    def __init__(
        self,
        config: MaskedPredictionConfig,
        model_class: Callable[[Any], nn.Module],
        config_class: Callable[..., Any],
        values: dict[str, Any],
    ) -> None:
        """`values` are what `config_to_huggingface` gives for the encoder."""
        super().__init__()
        self.config = config
        self.model = model_class(config_class(**values | {"apply_spec_augment": True, "layerdrop": 0.0}))
        self.final_proj = nn.Linear(config.encoder.encoder_embed_dim, config.final_dim)
        self.label_embs_concat = nn.Parameter(torch.empty(class_count(config), config.final_dim).uniform_())
        self._conv = torch.empty(0)
        self.model.get_submodule("feature_extractor").register_forward_hook(self._keep_conv)

    def _keep_conv(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._conv = output  # the model does not return what the feature penalty needs

    def forward(self, batch: Batch) -> Tensor:
        """The loss of a batch without padding."""
        hidden = self.model(batch.waveforms, mask_time_indices=batch.extras["mask"]).last_hidden_state
        return self.prediction_loss(batch, hidden)

    def prediction_loss(self, batch: Batch, hidden: Tensor) -> Tensor:
        """Masked prediction from (B, F, D) last hidden states, and the penalty on the features of this forward."""
        scored = hidden.flatten(0, 1).index_select(0, batch.extras["masked_positions"])
        logits = cosine_logits(self.final_proj(scored), self.label_embs_concat, self.config.logit_temp)
        penalty = self._conv.float().square().mean()
        return summed_loss(logits, batch.extras["masked_labels"][0] + DICTIONARY_SPECIALS, penalty, batch, self.config)


def class_count(config: MaskedPredictionConfig) -> int:
    """Rows of the label embeddings. Raises ConfigError for several label sets, which not all peers know."""
    if len(config.num_classes) != 1:
        raise ConfigError("method.num_classes: the peers train on one label set; benchmark a recipe that has one")
    return config.num_classes[0] + DICTIONARY_SPECIALS


def dictionary_labels(batch: Batch) -> Tensor:
    """(B, F) dictionary entries of all frames."""
    mask = batch.extras["mask"]
    labels = torch.zeros(mask.numel(), dtype=torch.int64, device=mask.device)
    for kind in ("masked", "unmasked"):
        labels[batch.extras[f"{kind}_positions"]] = batch.extras[f"{kind}_labels"][0]
    return labels.view(mask.shape) + DICTIONARY_SPECIALS


def summed_loss(
    logits: Tensor, targets: Tensor, penalty: Tensor, batch: Batch, config: MaskedPredictionConfig
) -> Tensor:
    """Cross-entropy of the masked frames plus the feature penalty, summed over the batch's units."""
    cross_entropy = F.cross_entropy(logits.float(), targets, reduction="sum")
    return cross_entropy + config.feature_penalty_weight * penalty * batch.sample_size
