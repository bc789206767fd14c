"""What turns waveforms into codes: a method's encoder that has a codebook, or k-means on spectral features."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pretrain.config import encoder_config
from pretrain.data.labels import LabelError
from pretrain.labelling.kmeans.assign import nearest_centroids
from pretrain.labelling.kmeans.features import SAMPLE_RATE, FeatureSpec, SpectralFeatures
from pretrain.labelling.kmeans.model import KMeansModel
from pretrain.registry import load_method
from pretrain.weights.interop.files import read_json, read_safetensors
from pretrain.weights.read import load_strictly

KMEANS = "kmeans"  # in the place of a method's name
WINDOW_SAMPLES = 400  # of MFCC and log-mel
FOLDER = "tokenizer"  # of a token directory


class Tokenizer(Protocol):
    """An encoder with a codebook: `code_shape` is (groups, entries per group), `codes` maps (B, T) to (B, F, G)."""

    stride_samples: int
    receptive_field_samples: int
    code_shape: tuple[int, int]

    def codes(self, waveforms: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]: ...


@dataclass
class KMeansTokenizerConfig:
    """`features` is mfcc or logmel, `clusters` the number of codes."""

    features: str
    clusters: int


class KMeansTokenizer(nn.Module):
    """The clusters of MFCC or log-mel frames as codes, in one group."""

    centroids: Tensor

    def __init__(self, features: str, clusters: int) -> None:
        super().__init__()
        self.extractor = SpectralFeatures(FeatureSpec(features))
        self.register_buffer("centroids", torch.zeros(clusters, self.extractor.dim))
        self.stride_samples, self.receptive_field_samples = SAMPLE_RATE // self.extractor.rate_hz, WINDOW_SAMPLES
        self.code_shape = (1, clusters)

    @classmethod
    def of(cls, model: KMeansModel, origin: str) -> KMeansTokenizer:
        """The tokenizer of a fitted model. Raises LabelError for one on the features of a network."""
        if model.spec.kind == "upstream":
            raise LabelError(f"{origin}: clusters features of a network; only mfcc and logmel make tokens")
        tokenizer = cls(model.spec.kind, model.num_clusters)
        tokenizer.centroids.copy_(model.centroids)
        return tokenizer

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> KMeansTokenizer:
        values = encoder_config(KMeansTokenizerConfig, config)
        return cls(values.features, values.clusters)

    def to_config(self) -> dict[str, Any]:
        return {"features": self.extractor.spec.kind, "clusters": self.code_shape[1]}

    @torch.no_grad()
    def codes(self, waveforms: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, T) waveforms, T at least 400, to (B, F, 1) codes and frame counts (B,)."""
        rows = [nearest_centroids(self.extractor.extract(waveform), self.centroids)[0] for waveform in waveforms]
        codes = torch.stack(rows).unsqueeze(2)
        if lengths is None:
            return codes, torch.full((len(codes),), codes.shape[1], device=codes.device)
        return codes, ((lengths - WINDOW_SAMPLES) // self.stride_samples + 1).clamp(1, codes.shape[1])


def build_tokenizer(method: str, config: dict[str, Any]) -> Any:
    """A tokenizer with fresh weights: the encoder of a method, or of "kmeans"."""
    owner = KMeansTokenizer if method == KMEANS else load_method(method).Encoder
    return owner.from_config(config)


def tokenizer_of(directory: Path) -> tuple[str, dict[str, Any]]:
    """Method and config of the tokenizer in a token directory. Raises LabelError for labels that hold no tokens."""
    path = directory / FOLDER / "config.json"
    if not path.is_file():
        raise LabelError(
            f"{path}: missing, so {directory} holds labels but no tokens; make them with tools/make_tokens.py and give "
            "data.labels=<its output>"
        )
    content = read_json(path)
    if missing := [name for name in ("method", "encoder") if name not in content]:
        raise LabelError(f"{path}: {', '.join(missing)}: missing; copy the directory again, or make the tokens again")
    return content["method"], content["encoder"]


def load_tokenizer(tokenizer: nn.Module, directory: Path) -> None:
    """Load the weights in a token directory into a tokenizer of its config."""
    path = directory / FOLDER / "encoder.safetensors"
    load_strictly(tokenizer, read_safetensors(path), str(path))
