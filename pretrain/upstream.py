"""Waveforms to hidden states and units, with the interface of `s3prl.nn.S3PRLUpstream` (s3prl 0.4.18)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from pretrain.config import nearest, recipe_method_block, recipe_names
from pretrain.method import Encoder
from pretrain.registry import load_method, method_names
from pretrain.weights.interop.types import InteropError, errors_name
from pretrain.weights.read import load_strictly, read_weights

if TYPE_CHECKING:
    from pretrain.labelling.kmeans.model import KMeansModel

MIN_SAMPLES = 800  # 0.05 s: shorter batches are padded with zeros, as in s3prl


class Upstream(nn.Module):
    """A trained encoder behind one name.

    `encoder` is the network, `method_name` the method that trained it, `hidden_sizes` and `downsample_rates` (samples
    per frame) have one entry per hidden state. As in s3prl the module starts in train mode, where dropout is active:
    call `.eval()` before extracting features. Unlike s3prl's, it gives gradients to the convolutions as in training;
    `extra_conf={"feature_grad_mult": 0.0}` stops them.
    """

    encoder: Encoder

    def __init__(
        self,
        name: str | None,
        path_or_url: str | Path | None = None,
        refresh: bool = False,
        normalize: bool = False,
        extra_conf: dict[str, Any] | None = None,
        randomize: bool = False,
    ) -> None:
        """Load the weights behind `path_or_url`; every kind that `weights.read.read_weights` knows is accepted.

        `name` is a recipe or a method; None takes the method that the checkpoint names. `refresh` downloads an address
        again. `normalize` layer-normalises every hidden state. `extra_conf` replaces fields of the encoder's
        configuration. `randomize` keeps the architecture and draws fresh weights; it needs no path when `name` is a
        recipe. Raises InteropError (a ValueError) for an unknown name, unreadable weights or another method's.
        """
        super().__init__()
        self._kmeans_dir: Path | None = None
        self._kmeans: KMeansModel | None = None
        self.normalize = normalize
        if path_or_url is None:
            self.method_name, config = _untrained(name, randomize)
            _check_fields(config, extra_conf)
            with errors_name(f"name: {name}"):
                self.encoder = load_method(self.method_name).Encoder.from_config({**config, **(extra_conf or {})})
            return
        weights = read_weights(path_or_url, None if name is None else _method_of(name), refresh)
        self.method_name = weights.method_name
        _check_fields(weights.encoder_config, extra_conf)
        self.encoder = weights.build_encoder(extra_conf)
        if not randomize:
            load_strictly(self.encoder, weights.encoder_state, weights.origin)
            self._kmeans_dir = weights.kmeans_dir

    @property
    def num_layers(self) -> int:
        """Number of hidden states."""
        return len(self.hidden_sizes)

    @property
    def hidden_sizes(self) -> list[int]:
        """Width of every hidden state."""
        return self.encoder.hidden_sizes

    @property
    def downsample_rates(self) -> list[int]:
        """Samples per frame of every hidden state."""
        return self.encoder.downsample_rates

    @property
    def kmeans(self) -> Any:
        """The `KMeansModel` that travelled with the weights, None where none did."""
        return None if self._kmeans_dir is None else self._kmeans_model()

    def forward(self, wavs: Tensor, wavs_len: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Hidden states of a padded batch.

        `wavs` is (B, T) or (B, T, 1) float32 at 16 kHz, `wavs_len` (B,) samples. Returns [(B, F, D)] and [(B,)] with
        floor((n - 1) / rate) + 1 frames for n samples: where the network makes fewer, the last frame of the batch is
        repeated, where it makes more, they are cut. Raises ValueError for lengths that do not fit the batch.
        """
        wavs, longest = _checked(wavs, wavs_len)
        valid = torch.arange(longest, device=wavs.device) < wavs_len.to(wavs.device).unsqueeze(1)
        padding = max(0, MIN_SAMPLES - longest)
        wavs = F.pad(torch.where(valid, wavs[:, :longest], 0.0), (0, padding))
        states, _ = self.encoder(wavs, (wavs_len + padding).to(wavs.device))
        all_hs, all_lens = [], []
        for hidden, rate in zip(states, self.downsample_rates, strict=True):
            hidden = _match_length(hidden, (longest + padding - 1) // rate + 1)
            lens = torch.div(wavs_len - 1, rate, rounding_mode="floor") + 1
            hidden = hidden[:, : int(lens.max())]
            all_hs.append(F.layer_norm(hidden, hidden.shape[-1:]) if self.normalize else hidden)
            all_lens.append(lens)
        return all_hs, all_lens

    @torch.no_grad()
    def units(self, wavs: Tensor, wavs_len: Tensor) -> tuple[Tensor, Tensor]:
        """Discrete units of a padded batch, by the k-means model that travelled with the weights.

        Takes what `forward` takes; returns (B, F) int64 padded with -1, and (B,) counts. Every waveform goes through
        alone and unpadded, so the units equal those in the label files. Raises InteropError without such a model.
        """
        wavs, _ = _checked(wavs, wavs_len)
        kmeans = self._kmeans_model()
        rows = [torch.as_tensor(kmeans.units(wav[: int(length)])) for wav, length in zip(wavs, wavs_len, strict=True)]
        counts = torch.tensor([len(row) for row in rows], device=wavs_len.device)
        return pad_sequence(rows, batch_first=True, padding_value=-1).to(wavs.device), counts

    def _kmeans_model(self) -> KMeansModel:
        if self._kmeans_dir is None:
            raise InteropError(
                "units: no k-means model travelled with these weights; export the run with "
                "tools/export_checkpoint.py kmeans=<label directory>"
            )
        if self._kmeans is None:
            # Loaded on first use: it may bring an encoder of its own.
            from pretrain.labelling.kmeans.model import KMeansModel

            self._kmeans = KMeansModel.load(self._kmeans_dir)
        return self._kmeans


def _checked(wavs: Tensor, wavs_len: Tensor) -> tuple[Tensor, int]:
    """(B, T) waveforms and the longest length; raises ValueError where they do not fit."""
    if wavs.dim() == 3:
        wavs = wavs.squeeze(-1)
    if wavs.dim() != 2 or wavs_len.shape != wavs.shape[:1] or not len(wavs):
        raise ValueError(f"wavs {tuple(wavs.shape)}, wavs_len {tuple(wavs_len.shape)}: give (B, T) and (B,)")
    longest = int(wavs_len.max())
    if int(wavs_len.min()) < 1 or longest > wavs.shape[1]:
        raise ValueError(f"wavs_len: {wavs_len.tolist()} do not fit {wavs.shape[1]} samples; give 1 to that many")
    return wavs, longest


def _match_length(hidden: Tensor, frames: int) -> Tensor:
    """(B, F, D) to (B, frames, D): cut, or the last frame repeated."""
    missing = frames - hidden.shape[1]
    if missing > 0:
        return torch.cat([hidden, hidden[:, -1:].expand(-1, missing, -1)], dim=1)
    return hidden[:, :frames]


def _check_fields(config: dict[str, Any], extra_conf: dict[str, Any] | None) -> None:
    """Raise InteropError for a field of `extra_conf` that the encoder's `config` does not have."""
    for key in extra_conf or {}:
        if key not in config:
            raise InteropError(f"extra_conf: {key}: no field of this encoder; {nearest(key, list(config))}")


def _method_of(name: str) -> str:
    """The method of a recipe or method name; raises InteropError, with the nearest names, for any other."""
    if name in recipe_names():
        return recipe_method_block(name)["name"]
    if name in method_names():
        return name
    raise InteropError(f"name: no recipe or method '{name}'; {nearest(name, [*recipe_names(), *method_names()])}")


def _untrained(name: str | None, randomize: bool) -> tuple[str, dict[str, Any]]:
    """Method and encoder config of a recipe; raises InteropError unless it was asked for knowingly."""
    if name is None:
        raise InteropError("path_or_url: missing; give a run, an export, a Hugging Face folder or a .pt")
    method_name = _method_of(name)
    if not randomize:
        raise InteropError(
            f"path_or_url: missing; '{name}' names an architecture and no published weights belong to it: train it "
            f"with pretrain/train.py recipe={name} and give its run or export, give other weights of this method, or "
            "ask for an untrained network with randomize=True"
        )
    if name not in recipe_names():
        raise InteropError(f"name: '{name}' is no recipe, so its size is unknown; {nearest(name, recipe_names())}")
    return method_name, recipe_method_block(name)["encoder"]
