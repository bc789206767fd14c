"""BEST-RQ: hear log-mel frames of which spans are noise, and say which code the quantizer gives what was there.

Source: arXiv 2202.01855; speechbrain `recipes/LibriSpeech/self-supervised-learning/BEST-RQ/train.py`.
Letters: P positions of four frames in a row, M hidden frames and N hidden positions of all rows, V codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.config import ConfigError
from pretrain.features.front_end import FeatureFrames
from pretrain.losses.masked_prediction import class_histogram, prediction_loss
from pretrain.method import Batch, Counts, Example, Method, Ratio, StepOutput
from pretrain.models.kernels import Linear
from pretrain.objectives.collate import stack_waveforms
from pretrain.objectives.masking import frames_at
from pretrain.objectives.unit_figure import unit_figure
from recipes.best_rq.encoder import SUBSAMPLING, BestRqEncoder, BestRqEncoderConfig
from recipes.best_rq.masks import MaskConfig, hidden_frames, whole
from recipes.best_rq.quantizer import RandomProjectionQuantizer

# Of the codes of an interval; even silence alone has more where features are normalised.
COLLAPSED_PERPLEXITY = 2.0


@dataclass
class BestRqConfig:
    """`mask` says which frames are hidden, `noise_std` is the deviation of the normal noise that replaces them.

    The codebook has `codebook_size` entries of `codebook_dim` dimensions.
    """

    name: str
    encoder: BestRqEncoderConfig
    mask: MaskConfig
    noise_std: float
    codebook_size: int
    codebook_dim: int

    def __post_init__(self) -> None:
        if self.noise_std < 0:
            raise ConfigError(f"method.noise_std: {self.noise_std} is no deviation; give 0 or more")


@dataclass(frozen=True)
class BestRqCollator(FeatureFrames):
    """Draws what is hidden, and the noise in its place; see `BestRqMethod` for what it puts into `extras`."""

    mask: MaskConfig
    noise_std: float

    @property
    def stride_samples(self) -> int:
        """Samples from one position to the next."""
        return SUBSAMPLING * self.front_end.stride_samples

    @property
    def fewest_frames(self) -> int:
        """Those behind two positions, so that one of them can be heard."""
        return 2 * SUBSAMPLING

    def __call__(self, examples: list[Example]) -> Batch:
        stacked = stack_waveforms(examples)
        frames = self._positions(stacked.waveforms.shape[1]) * SUBSAMPLING
        masks, noise = np.zeros((len(examples), frames), dtype=bool), []
        for mask, example in zip(masks, examples, strict=True):
            valid = self._positions(len(example.waveform)) * SUBSAMPLING
            mask[:valid] = hidden_frames(example.rng, self.mask, valid, SUBSAMPLING)
            shape = (int(mask.sum()), self.front_end.dim)
            noise.append(self.noise_std * example.rng.standard_normal(shape, dtype=np.float32))
        positions = np.flatnonzero(np.stack([whole(mask, SUBSAMPLING) for mask in masks]))
        extras = {
            "masked_frames": np.flatnonzero(masks),
            "noise": np.concatenate(noise),
            "masked_positions": positions,
        }
        return stacked.batch(len(positions), extras)

    def _positions(self, samples: int) -> int:
        """Positions of a waveform of `samples`, as the encoder counts them."""
        return max(1, self.front_end.frames(samples) // SUBSAMPLING)


class BestRqMethod(Method):
    """Encoder, frozen quantizer and linear classifier; the loss is cross-entropy at hidden positions.

    Targets are the codes of the features before anything is hidden, four frames at a time. Reads `batch.extras`:
    `masked_frames` (M,) flat frames b * 4 P + f that `noise` (M, bins) replaces; `masked_positions` (N,) flat positions
    b * P + p of which every frame is hidden.
    """

    Config = BestRqConfig
    config: BestRqConfig
    encoder: BestRqEncoder

    def __init__(self, config: BestRqConfig) -> None:
        super().__init__(config)
        self.encoder = BestRqEncoder(config.encoder)
        stacked = SUBSAMPLING * self.encoder.front_end.dim
        self.quantizer = RandomProjectionQuantizer(stacked, config.codebook_size, config.codebook_dim)
        self.final_proj = Linear(config.encoder.encoder_embed_dim, config.codebook_size)

    @classmethod
    def collator(cls, config: BestRqConfig) -> BestRqCollator:
        """The collator of this configuration."""
        return BestRqCollator(config.encoder.front_end, config.mask, config.noise_std)

    def codes(self, features: Tensor) -> Tensor:
        """(B, 4 P, bins) features to (B * P,) codes, four frames in a row at a time."""
        return self.quantizer(features.reshape(-1, SUBSAMPLING * features.shape[2]))

    def last_state(self, features: Tensor, positions: Tensor | None, batch: Batch) -> Tensor:
        """The encoder's output (B, P, D) for `features` of which the batch hides some."""
        extras = batch.extras
        heard = features.flatten(0, 1).index_copy(0, extras["masked_frames"], extras["noise"].to(features.dtype))
        return self.encoder.context(heard.view_as(features), positions)[-1]

    def forward(self, batch: Batch) -> StepOutput:
        """`accuracy_masked` and the use of the codebook, `codes_0`, are those of hidden positions."""
        features, positions = self.encoder.features(batch.waveforms, batch.lengths_if_padded)
        masked = batch.extras["masked_positions"]
        stacked = features.reshape(-1, SUBSAMPLING * features.shape[2])
        targets = self.quantizer(stacked.index_select(0, masked))
        logits = self.final_proj(frames_at(self.last_state(features, positions, batch), masked))
        loss, correct = prediction_loss(logits, targets)
        return StepOutput(
            loss,
            {
                "accuracy_masked": Ratio(correct.float(), masked.numel()),
                "codes_0": Counts(
                    class_histogram(targets, self.config.codebook_size), "target_codes", COLLAPSED_PERPLEXITY
                ),
                "predictions": Counts(class_histogram(logits.detach().argmax(-1), self.config.codebook_size)),
            },
        )

    def training_flops(self, samples: int) -> float:
        """Encoder, and classifier at the hidden positions; the quantizer is not trained."""
        count = samples / self.encoder.downsample_rates[0] * self.config.mask.share
        stacked = SUBSAMPLING * self.encoder.front_end.dim
        codes = 2.0 * count * self.config.codebook_dim * (stacked + self.config.codebook_size)
        head = 2.0 * count * self.final_proj.in_features * self.final_proj.out_features
        return self.encoder.training_flops(samples) + 3 * head + codes

    def figures(self, batch: Batch) -> dict[str, Any]:
        """The first utterance's spectrogram with the hidden positions, over their codes and those predicted."""
        features, positions = self.encoder.features(batch.waveforms, batch.lengths_if_padded)
        count = features.shape[1] // SUBSAMPLING if positions is None else int(positions[0])
        predicted = self.final_proj(self.last_state(features, positions, batch)[0]).argmax(dim=-1)[:count].cpu()
        mask = torch.zeros(count, dtype=torch.bool)
        masked = batch.extras["masked_positions"].cpu()
        mask[masked[masked < count]] = True
        codes = self.codes(features[:1, : SUBSAMPLING * count]).cpu()
        waveform = batch.waveforms[0, : int(batch.lengths[0])].cpu().float()
        return {"units": unit_figure(waveform, mask, torch.where(mask, codes, -1), predicted)}
