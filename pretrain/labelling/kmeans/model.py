"""A fitted k-means model that travels: centroids, what they cluster, and the part of the encoder that makes it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pretrain.config import typed
from pretrain.errors import UserError
from pretrain.labelling.kmeans.assign import nearest_centroids
from pretrain.labelling.kmeans.features import FeatureExtractor, FeatureSpec, SpectralFeatures, UpstreamFeatures
from pretrain.method import Encoder
from pretrain.weights.export import write_native
from pretrain.weights.interop.files import write_safetensors
from pretrain.weights.read import load_encoder

FORMAT, VERSION = "headwater-kmeans", 1


class KMeansError(UserError):
    """A k-means directory that cannot be used: "<path>: <what is wrong>; <what to do>"."""


class KMeansModel:
    """(K, D) float32 `centroids` over the features that `extractor` makes of a waveform."""

    def __init__(self, centroids: Tensor, extractor: FeatureExtractor) -> None:
        """Raises KMeansError where the centroids are not as wide as the features."""
        if centroids.ndim != 2 or centroids.shape[1] != extractor.dim:
            raise KMeansError(f"centroids: {tuple(centroids.shape)} do not fit features of {extractor.dim} dimensions")
        self.centroids = centroids.float()
        self.extractor = extractor

    @property
    def spec(self) -> FeatureSpec:
        return self.extractor.spec

    @property
    def rate_hz(self) -> int:
        """Units per second."""
        return self.extractor.rate_hz

    @property
    def num_clusters(self) -> int:
        return len(self.centroids)

    @property
    def sha256(self) -> str:
        """Over the centroids and the description of the features: what binds labels to the model that made them."""
        digest = hashlib.sha256(json.dumps(asdict(self.spec), sort_keys=True).encode())
        digest.update(self.centroids.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def to(self, device: torch.device) -> KMeansModel:
        """Move centroids and encoder; returns itself."""
        self.centroids = self.centroids.to(device)
        if isinstance(self.extractor, UpstreamFeatures):
            self.extractor.encoder.to(device)
        return self

    def units(self, waveform: Tensor) -> Tensor:
        """(T,) float waveform at 16 kHz to (F,) int64 units; F = 0 below 25 ms. Runs where the waveform is."""
        self.to(waveform.device)
        return nearest_centroids(self.extractor.extract(waveform), self.centroids)[0]

    def save(self, directory: Path) -> None:
        """Write centroids.safetensors, encoder/ (a native export) where there is one, and last kmeans.json."""
        directory.mkdir(parents=True, exist_ok=True)
        write_safetensors(directory / "centroids.safetensors", {"centroids": self.centroids})
        if isinstance(self.extractor, UpstreamFeatures) and self.spec.method is not None:
            write_native(self.spec.method, self.extractor.encoder, directory / "encoder")
        description = {
            "format": FORMAT,
            "version": VERSION,
            "features": asdict(self.spec),
            "rate_hz": self.rate_hz,
            "num_clusters": self.num_clusters,
            "sha256": self.sha256,
        }
        (directory / "kmeans.json").write_text(json.dumps(description, indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path) -> KMeansModel:
        """Read what `save` wrote, on the CPU. Raises KMeansError for a directory that is not whole."""
        description = _description(directory / "kmeans.json")
        try:
            centroids = load_file(directory / "centroids.safetensors")["centroids"]
        except (OSError, SafetensorError, KeyError) as error:
            raise KMeansError(f"{directory}/centroids.safetensors: cannot be read ({error}); {REMEDY}") from None
        spec = typed(FeatureSpec, description["features"], f"{directory}/kmeans.json: features")
        encoder = load_encoder(directory / "encoder", spec.method) if spec.kind == "upstream" else None
        model = cls(centroids, make_extractor(spec, encoder))
        if model.sha256 != description["sha256"]:
            raise KMeansError(f"{directory}: the centroids are not those that kmeans.json describes; {REMEDY}")
        return model


REMEDY = "copy the directory again, or make the labels again"


def _description(path: Path) -> dict[str, Any]:
    try:
        description = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise KMeansError(f"{path}: cannot be read ({error}); {REMEDY}") from None
    if (
        not isinstance(description, dict)
        or description.get("format") != FORMAT
        or description.get("version") != VERSION
    ):
        raise KMeansError(f"{path}: is not version {VERSION} of {FORMAT}; {REMEDY}")
    if missing := [name for name in ("features", "sha256") if name not in description]:
        raise KMeansError(f"{path}: {', '.join(missing)}: missing; {REMEDY}")
    return description


def make_extractor(spec: FeatureSpec, encoder: Encoder | None = None) -> FeatureExtractor:
    """The extractor of `spec`; an upstream's uses only the layers of `encoder` that it needs.

    Raises FeatureError for a layer that the encoder does not have.
    """
    if spec.kind != "upstream":
        return SpectralFeatures(spec)
    if encoder is None:
        raise ValueError("features=upstream needs an encoder")
    extractor = UpstreamFeatures(spec, encoder)
    truncated = getattr(encoder, "truncated", None)
    if truncated is not None:
        return UpstreamFeatures(spec, truncated(extractor.layer))
    return extractor
