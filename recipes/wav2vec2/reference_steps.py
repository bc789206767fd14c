"""wav2vec 2.0's training step in other projects, for tools/benchmark.py; a peer is named like the package it needs.

Each takes our configuration and our batch and returns its own summed loss, plus the penalty on the features where it
has none. Masks and negatives are the batch's; Gumbel noise is drawn by each, by transformers for all frames.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.method import Batch
from pretrain.weights.interop.speech_encoder import config_to_fairseq, config_to_huggingface
from recipes.wav2vec2.method import Wav2Vec2Config


class TransformersWav2Vec2(nn.Module):
    """`transformers.Wav2Vec2ForPreTraining`."""

    def __init__(self, config: Wav2Vec2Config) -> None:
        import transformers

        super().__init__()
        values = config_to_huggingface(asdict(config.encoder)) | {
            "apply_spec_augment": True,
            "layerdrop": 0.0,
            "num_codevectors_per_group": config.latent_vars,
            "num_codevector_groups": config.latent_groups,
            "codevector_dim": config.latent_dim,
            "proj_codevector_dim": config.final_dim,
            "contrastive_logits_temperature": config.logit_temp,
            "num_negatives": config.num_negatives,
            "diversity_loss_weight": config.diversity_weight,
            "feat_quantizer_dropout": config.dropout_features,
        }
        self.config = config
        self.model = transformers.Wav2Vec2ForPreTraining(transformers.Wav2Vec2Config(**values))
        self.model.set_gumbel_temperature(config.latent_temp[0])  # type: ignore[arg-type]  # the stub says int
        self._conv = torch.empty(0)
        self.model.wav2vec2.feature_extractor.register_forward_hook(self._keep_conv)

    def _keep_conv(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._conv = output  # the model does not return what the feature penalty needs

    def forward(self, batch: Batch) -> Tensor:
        """The loss of a batch without padding."""
        mask = batch.extras["mask"]
        indices = mask.new_zeros(mask.numel(), self.config.num_negatives, dtype=torch.int64)
        indices[batch.extras["masked_positions"]] = _negative_positions(batch).flatten(0, 1)
        output = self.model(
            batch.waveforms, mask_time_indices=mask, sampled_negative_indices=indices.view(*mask.shape, -1)
        )
        penalty = self._conv.float().square().mean()
        return output.loss + self.config.feature_penalty_weight * penalty * batch.sample_size


class FairseqWav2Vec2(nn.Module):
    """fairseq's `Wav2Vec2Model` with the loss of its `wav2vec` criterion; `fairseq-fixed` runs on today's Python."""

    def __init__(self, config: Wav2Vec2Config) -> None:
        from fairseq.models.wav2vec import wav2vec2

        super().__init__()
        fields = ("final_dim", "latent_vars", "latent_groups", "latent_dim", "num_negatives", "logit_temp")
        values = config_to_fairseq(asdict(config.encoder))[0] | {name: getattr(config, name) for name in fields}
        values |= {"dropout_features": config.dropout_features, "quantize_targets": True, "encoder_layerdrop": 0.0}
        values["latent_temp"] = tuple(config.latent_temp)
        self.config = config
        self.model = wav2vec2.Wav2Vec2Model(wav2vec2.Wav2Vec2Config(**values))

    def forward(self, batch: Batch) -> Tensor:
        """The loss of a batch without padding."""
        mask, negatives = batch.extras["mask"], batch.extras["negatives"]
        rows, masked, _ = negatives.shape
        indices = negatives + masked * torch.arange(rows, device=negatives.device)[:, None, None]
        self.model.apply_mask = lambda x, padding_mask, **_: self._apply_mask(x, mask)
        self.model.sample_negatives = lambda y, num, padding_count=None: _copied(y, indices)
        output = self.model(batch.waveforms)
        logits = self.model.get_logits(output).float()
        loss = F.cross_entropy(logits, self.model.get_targets(None, output), reduction="sum")
        weights = (self.config.diversity_weight, self.config.feature_penalty_weight)
        for weight, extra in zip(weights, self.model.get_extra_losses(output), strict=True):
            loss = loss + weight * extra.float() * batch.sample_size
        return loss

    def _apply_mask(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """What fairseq does with the mask that it would draw here; the cast lets it run under autocast."""
        x[mask] = self.model.mask_emb.to(x.dtype)
        return x, mask


def _negative_positions(batch: Batch) -> Tensor:
    """(B, K, N) positions of the negatives among the frames of all rows."""
    negatives = batch.extras["negatives"]
    positions = batch.extras["masked_positions"].view(negatives.shape[:2])
    return positions.gather(1, negatives.flatten(1)).view(negatives.shape)


def _copied(y: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """What fairseq makes of the indices that it would draw here: (N, B, K, D) copies of targets."""
    vectors = y.reshape(-1, y.shape[-1])[indices.flatten()]
    return vectors.view(*indices.shape, -1).permute(2, 0, 1, 3), indices


REFERENCE_STEPS: dict[str, Callable[[Wav2Vec2Config], nn.Module]] = {
    "transformers": TransformersWav2Vec2,
    "fairseq": FairseqWav2Vec2,
}
