"""Activation checkpointing of the speech encoder: the same numbers, fewer tensors kept, nothing changed elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from recipe_checks import two_waveforms
from torch import Tensor

from pretrain.errors import UserError
from pretrain.method import Encoder
from pretrain.models.batch_norm import update_running_statistics
from pretrain.models.speech_config import SpeechEncoderConfig
from pretrain.models.speech_encoder import SpeechEncoder

LAYERS = [("transformer", "abs"), ("transformer", "gated_bias"), ("conformer", "rel_pos"), ("conformer", "rope")]


def make(layer_type: str, pos_enc_type: str, **changes: Any) -> SpeechEncoder:
    values = {
        "extractor_mode": "layer_norm",
        "conv_feature_layers": [[32, 10, 5], *[[32, 3, 2]] * 4, *[[32, 2, 2]] * 2],
        "conv_bias": True,
        "encoder_layers": 3,
        "encoder_embed_dim": 48,
        "encoder_ffn_embed_dim": 96,
        "encoder_attention_heads": 4,
        "layer_norm_first": True,
        "conv_pos": 16,
        "conv_pos_groups": 4,
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "activation_dropout": 0.1,
        "dropout_input": 0.1,
        "encoder_layerdrop": 0.3,
        "feature_grad_mult": 0.5,
        "normalize": False,
        "frame_length_rule": "conv",
        "layer_type": layer_type,
        "pos_enc_type": pos_enc_type,
    }
    torch.manual_seed(0)
    return SpeechEncoder(SpeechEncoderConfig(**(values | changes))).train()


def step(encoder: SpeechEncoder) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and every gradient of one update, and where the batch norms stand after it."""
    encoder.draw_layerdrop(np.random.default_rng(1))
    waveforms, lengths = two_waveforms(8000, 5377)
    torch.manual_seed(2)
    conv, projected, frame_lengths = encoder.features(waveforms, lengths)
    mask = torch.arange(projected.shape[1]).expand(2, -1) % 5 == 0
    states = encoder.context(projected, frame_lengths, mask)
    loss = states[-1].square().sum() + states[1].sum() + conv.square().mean()
    loss.backward()
    update_running_statistics(encoder, applied=True)
    gradients = {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}
    return loss.detach(), gradients | dict(encoder.named_buffers())


@contextmanager
def kept_numbers() -> Iterator[list[int]]:
    """Sizes of the tensors that autograd keeps meanwhile."""
    sizes: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield sizes


@pytest.mark.parametrize(("layer_type", "pos_enc_type"), LAYERS)
def test_losses_and_gradients_are_the_same(layer_type: str, pos_enc_type: str) -> None:
    """Dropout and LayerDrop included, to the bit; the running statistics count a repeated forward as one."""
    plain, recomputing = make(layer_type, pos_enc_type), make(layer_type, pos_enc_type)
    recomputing.checkpoint_activations()
    (loss, numbers), (same_loss, same_numbers) = step(plain), step(recomputing)
    assert torch.equal(loss, same_loss)
    assert numbers.keys() == same_numbers.keys()
    assert {"mask_emb", "feature_extractor.conv_layers.0.conv.weight"} < numbers.keys()
    for name, number in numbers.items():
        torch.testing.assert_close(number, same_numbers[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("layer_type", "pos_enc_type"), LAYERS)
def test_far_less_is_kept(layer_type: str, pos_enc_type: str) -> None:
    waveforms, _ = two_waveforms(8000, 5377)
    totals = []
    for checkpoint_activations in (False, True):
        encoder = make(layer_type, pos_enc_type)
        if checkpoint_activations:
            encoder.checkpoint_activations()
        with kept_numbers() as sizes:
            encoder(waveforms, None)
        totals.append(sum(sizes))
    assert totals[1] < 0.1 * totals[0]


def test_nothing_is_repeated_without_gradients() -> None:
    encoder = make("transformer", "abs", feature_grad_mult=0.0)
    encoder.checkpoint_activations()
    calls = []
    encoder.feature_extractor.register_forward_hook(lambda *_: calls.append("convolutions"))
    encoder.encoder.layers[0].register_forward_hook(lambda *_: calls.append("layer"))
    encoder.draw_layerdrop(np.random.default_rng(0))
    waveforms, _ = two_waveforms(8000, 5377)
    with torch.no_grad():
        encoder.eval()(waveforms, None)
    assert calls == ["convolutions", "layer"]
    encoder.train()
    encoder(waveforms, None)[0][-1].sum().backward()
    # Frozen convolutions have no backward to repeat them for.
    assert calls[2:].count("convolutions") == 1


def test_layers_are_compiled_inside() -> None:
    """`aot_eager` traces forward and backward like the default backend and needs no compiler."""
    changes = {"dropout": 0.0, "dropout_input": 0.0, "encoder_layers": 2, "encoder_layerdrop": 0.0}
    plain, compiled = (make("conformer", "rel_pos", **changes) for _ in range(2))
    compiled.checkpoint_activations()
    for region in (compiled.feature_extractor, compiled.encoder.layers[1]):
        region.compile(dynamic=False, backend="aot_eager")
    (loss, numbers), (same_loss, same_numbers) = step(plain), step(compiled)
    torch.testing.assert_close(loss, same_loss)
    for name, number in numbers.items():
        torch.testing.assert_close(number, same_numbers[name], rtol=1e-4, atol=1e-4)


def test_an_encoder_that_cannot_says_so() -> None:
    with pytest.raises(UserError, match=r"trainer\.checkpoint_activations: Encoder has no"):
        Encoder().checkpoint_activations()
