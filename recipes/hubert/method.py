"""HuBERT: masked prediction of k-means labels, and nothing else.

Source: arXiv 2106.07447; `fairseq/models/hubert/hubert.py`, `fairseq/criterions/hubert_criterion.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.objectives.masked_prediction import MaskedPrediction, MaskedPredictionConfig


@dataclass
class HubertConfig(MaskedPredictionConfig):
    """Published hyper-parameters; see `MaskedPredictionConfig`."""


class HubertMethod(MaskedPrediction):
    """Encoder, heads and loss are those of `MaskedPrediction`, which the methods built on HuBERT share."""

    Config = HubertConfig
    config: HubertConfig
