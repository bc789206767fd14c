"""HuBERT's training step in other projects, for tools/benchmark.py; a peer is named like the package it needs.

Each takes our configuration and our batch and returns the summed loss: cross-entropy at the masked frames plus the
feature penalty. fairseq and torchaudio compute their logits as they ship them, unmasked frames included (their recipes
leave `skip_nomask` off); transformers has no head, so it gets ours: one matrix product at the masked frames.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor, nn

from pretrain.bench.masked_prediction import TransformersPeer, class_count, dictionary_labels, summed_loss
from pretrain.config import ConfigError
from pretrain.method import Batch
from pretrain.weights.interop.speech_encoder import config_to_fairseq, config_to_huggingface
from recipes.hubert.method import HubertConfig


class TransformersHubert(TransformersPeer):
    """`transformers.HubertModel` with projection and label embeddings."""

    def __init__(self, config: HubertConfig) -> None:
        import transformers

        values = config_to_huggingface(asdict(config.encoder))
        super().__init__(config, transformers.HubertModel, transformers.HubertConfig, values)


class GivenMask(nn.Module):
    """Takes the place of torchaudio's mask generator: the batch's mask instead of one drawn in the forward pass."""

    def __init__(self, mask_embedding: nn.Parameter) -> None:
        super().__init__()
        self.mask_embedding = mask_embedding
        self.mask = torch.empty(0)

    def forward(self, x: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        x[self.mask] = self.mask_embedding.to(x.dtype)
        return x, self.mask


class TorchaudioHubert(nn.Module):
    """`torchaudio.models.hubert_pretrain_model`, which `hubert_pretrain_base` calls with the sizes of Base."""

    def __init__(self, config: HubertConfig) -> None:
        import torchaudio

        super().__init__()
        encoder = config.encoder
        self.config = config
        self.model = torchaudio.models.hubert_pretrain_model(
            extractor_mode="group_norm" if encoder.extractor_mode == "default" else encoder.extractor_mode,
            extractor_conv_layer_config=[tuple(layer) for layer in encoder.conv_feature_layers],
            extractor_conv_bias=encoder.conv_bias,
            encoder_embed_dim=encoder.encoder_embed_dim,
            encoder_projection_dropout=encoder.dropout_input,
            encoder_pos_conv_kernel=encoder.conv_pos,
            encoder_pos_conv_groups=encoder.conv_pos_groups,
            encoder_num_layers=encoder.encoder_layers,
            encoder_num_heads=encoder.encoder_attention_heads,
            encoder_attention_dropout=encoder.attention_dropout,
            encoder_ff_interm_features=encoder.encoder_ffn_embed_dim,
            encoder_ff_interm_dropout=encoder.activation_dropout,
            encoder_dropout=encoder.dropout,
            encoder_layer_norm_first=encoder.layer_norm_first,
            encoder_layer_drop=0.0,
            mask_prob=config.mask_prob,
            mask_selection="static",
            mask_other=0.0,
            mask_length=config.mask_length,
            no_mask_overlap=False,
            mask_min_space=1,
            mask_channel_prob=0.0,
            mask_channel_selection="static",
            mask_channel_other=0.0,
            mask_channel_length=10,
            no_mask_channel_overlap=False,
            mask_channel_min_space=1,
            skip_masked=False,
            skip_nomask=False,
            num_classes=class_count(config),
            final_dim=config.final_dim,
            feature_grad_mult=encoder.feature_grad_mult if encoder.feature_grad_mult < 1 else None,
        )
        self.model.mask_generator = GivenMask(self.model.mask_generator.mask_embedding)

    def forward(self, batch: Batch) -> Tensor:
        """The loss of a batch without padding."""
        self.model.mask_generator.mask = batch.extras["mask"]
        masked, _, penalty = self.model(batch.waveforms, dictionary_labels(batch))
        return summed_loss(masked, _positive_first(masked), penalty, batch, self.config)


class FairseqHubert(nn.Module):
    """fairseq's `HubertModel`; the package `fairseq-fixed` runs on today's Python."""

    def __init__(self, config: HubertConfig) -> None:
        from fairseq.data import Dictionary
        from fairseq.models.hubert import hubert
        from fairseq.tasks.hubert_pretraining import HubertPretrainingConfig

        super().__init__()
        model, task = config_to_fairseq(asdict(config.encoder))
        values = model | {
            "label_rate": float(config.label_rates_hz[0]),
            "final_dim": config.final_dim,
            "untie_final_proj": config.untie_final_proj,
            "logit_temp": config.logit_temp,
            "encoder_layerdrop": 0.0,
        }
        dictionary = Dictionary()
        for index in range(config.num_classes[0]):
            dictionary.add_symbol(str(index))
        self.config = config
        self.model = hubert.HubertModel(hubert.HubertConfig(**values), HubertPretrainingConfig(**task), [dictionary])
        if len(dictionary) != class_count(config):
            raise ConfigError(
                f"num_classes: fairseq's dictionary has {len(dictionary)} entries, ours {class_count(config)}"
            )

    def forward(self, batch: Batch) -> Tensor:
        """The loss of a batch without padding."""
        self.model.apply_mask = lambda x, padding_mask, targets: self._apply_mask(x, batch.extras["mask"])
        padding = torch.zeros_like(batch.waveforms, dtype=torch.bool)
        output = self.model(batch.waveforms, target_list=[dictionary_labels(batch)], padding_mask=padding)
        masked = output["logit_m_list"][0]
        return summed_loss(masked, _positive_first(masked), output["features_pen"], batch, self.config)

    def _apply_mask(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """What fairseq does with the mask that it would draw here; the cast lets it run under autocast."""
        x[mask] = self.model.mask_emb.to(x.dtype)
        return x, mask


def _positive_first(logits: Tensor) -> Tensor:
    """Targets of logits whose first column is the right class."""
    return torch.zeros(len(logits), dtype=torch.int64, device=logits.device)


REFERENCE_STEPS: dict[str, Callable[[HubertConfig], nn.Module]] = {
    "transformers": TransformersHubert,
    "torchaudio": TorchaudioHubert,
    "fairseq": FairseqHubert,
}
