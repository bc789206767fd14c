"""WavLM's training step in another project, for tools/benchmark.py; a peer is named like the package it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

from torch import nn

from pretrain.bench.masked_prediction import TransformersPeer
from pretrain.weights.interop.speech_encoder import config_to_huggingface
from recipes.wavlm.method import WavLMConfig


class TransformersWavLM(TransformersPeer):
    """`transformers.WavLMModel` with projection and label embeddings; it has no class for pre-training."""

    def __init__(self, config: WavLMConfig) -> None:
        import transformers

        values = config_to_huggingface(asdict(config.encoder), position_bias=True)
        super().__init__(config, transformers.WavLMModel, transformers.WavLMConfig, values)


REFERENCE_STEPS: dict[str, Callable[[WavLMConfig], nn.Module]] = {"transformers": TransformersWavLM}
