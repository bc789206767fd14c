"""A HuBERT small enough for tests, with every parameter off its initial value, as a checkpoint on disk."""

from __future__ import annotations

from typing import Any

import torch

from pretrain.config import typed
from recipes.hubert.method import HubertConfig, HubertMethod

# The two published architectures: Base, and Large with the normalised input that it was trained on.
KINDS = ("group_norm_post_ln", "layer_norm_pre_ln")


def small_method(kind: str = KINDS[0], **encoder_changes: Any) -> HubertMethod:
    """Conv 32, Transformer 3 x 48, two label sets of 10 and 7 clusters."""
    large = kind == KINDS[1]
    encoder = {
        "extractor_mode": "layer_norm" if large else "default",
        "conv_feature_layers": [[32, 10, 5], *[[32, 3, 2]] * 4, *[[32, 2, 2]] * 2],
        "conv_bias": large,
        "encoder_layers": 3,
        "encoder_embed_dim": 48,
        "encoder_ffn_embed_dim": 96,
        "encoder_attention_heads": 4,
        "layer_norm_first": large,
        "conv_pos": 16,
        "conv_pos_groups": 4,
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "activation_dropout": 0.0,
        "dropout_input": 0.1,
        "encoder_layerdrop": 0.05,
        "feature_grad_mult": 0.1,
        "normalize": large,
        "frame_length_rule": "fold",
    }
    values = {
        "name": "hubert",
        "encoder": encoder | encoder_changes,
        "final_dim": 12,
        "untie_final_proj": True,
        "num_classes": [10, 7],
        "label_rates_hz": [50, 50],
        "mask_prob": 0.8,
        "mask_length": 10,
        "mask_min_spans": 2,
        "logit_temp": 0.1,
        "pred_masked_weight": 1.0,
        "pred_nomask_weight": 0.0,
        "feature_penalty_weight": 10.0,
    }
    torch.manual_seed(0)
    method = HubertMethod(typed(HubertConfig, values))
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() == 1 else 0.05))
    return method.eval()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Two waveforms (2, 21000) of 21,000 and 12,345 samples, zero after their ends, and their lengths."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([21000, 12345])
    waveforms = 0.1 * torch.randn(2, 21000, generator=generator) + 0.02
    return waveforms * (torch.arange(21000) < lengths[:, None]), lengths
