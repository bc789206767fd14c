"""UniSpeech-SAT's training step in another project, for tools/benchmark.py; a peer has the name of its package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor, nn

from pretrain.bench.masked_prediction import TransformersPeer
from pretrain.method import Batch
from pretrain.weights.interop.speech_encoder import config_to_huggingface
from recipes.unispeech_sat.contrast import instance_logits, utterance_contrast
from recipes.unispeech_sat.method import UniSpeechSatConfig


class TransformersUniSpeechSat(TransformersPeer):
    """`transformers.UniSpeechSatModel` with the parts of `UniSpeechSatForPreTraining`, which computes no loss itself.

    The quantizer is theirs; the losses are ours, one matrix product for all logits of each.
    """

    def __init__(self, config: UniSpeechSatConfig) -> None:
        import transformers
        from transformers.models.unispeech_sat.modeling_unispeech_sat import UniSpeechSatGumbelVectorQuantizer

        values = config_to_huggingface(asdict(config.encoder)) | {
            "num_codevectors_per_group": config.latent_vars,
            "num_codevector_groups": config.latent_groups,
            "codevector_dim": config.latent_dim,
        }
        super().__init__(config, transformers.UniSpeechSatModel, transformers.UniSpeechSatConfig, values)
        width = config.encoder.encoder_embed_dim
        self.sat = config
        self.quantizer = UniSpeechSatGumbelVectorQuantizer(transformers.UniSpeechSatConfig(**values))
        nn.init.uniform_(self.quantizer.codevectors)
        self.quantizer.temperature = config.latent_temp[0]
        self.project_q = nn.Linear(config.latent_dim, config.final_dim)
        self.spk_proj = nn.Linear(width, config.final_dim)
        self.layer_norm_for_extract = nn.LayerNorm(width) if config.encoder.layer_norm_first else nn.Identity()

    def forward(self, batch: Batch) -> Tensor:
        """The loss of a batch without padding."""
        positions, instances = batch.extras["masked_positions"], batch.extras["instances"]
        output = self.model(batch.waveforms, mask_time_indices=batch.extras["mask"], output_hidden_states=True)
        state = output.hidden_states[self.sat.utterance_contrastive_layer]
        masked = self.layer_norm_for_extract(state.flatten(0, 1).index_select(0, positions))
        codes, perplexity = self.quantizer(masked[None])
        targets = self.project_q(codes[0])
        logits = instance_logits(self.spk_proj(masked), targets, instances, self.sat.logit_temp)
        rows = torch.div(positions, state.shape[1], rounding_mode="floor")
        entries = self.sat.latent_groups * self.sat.latent_vars
        added = self.sat.utterance_contrastive_weight * utterance_contrast(logits, rows, instances).loss
        added = added + self.sat.diversity_weight * (entries - perplexity) / entries
        return self.prediction_loss(batch, output.last_hidden_state) + added * batch.sample_size


REFERENCE_STEPS: dict[str, Callable[[UniSpeechSatConfig], nn.Module]] = {"transformers": TransformersUniSpeechSat}
