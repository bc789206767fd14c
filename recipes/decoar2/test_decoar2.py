"""DeCoAR 2.0's loss written out with torch's own functions, its masks, sizes and settings, and that it learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from learning import assert_learned
from recipe_checks import build, collate, count, on_meta, perturb, train_recipe, two_waveforms, value
from torch import Tensor

from pretrain.config import ConfigError
from pretrain.method import Batch, Progress
from recipes.decoar2.method import Decoar2Method


def written_out(method: Decoar2Method, batch: Batch) -> dict[str, Tensor]:
    """The terms per hidden frame, row by row without padding, with torch's own Gumbel-softmax."""
    config, quantizer, hidden, truth = method.config, method.quantizer, [], []
    for waveform, length, mask in zip(batch.waveforms, batch.lengths.tolist(), batch.extras["mask"], strict=True):
        features, _ = method.encoder.front_end(waveform[None, :length], None)
        chosen = mask[: features.shape[1]].nonzero().flatten().tolist()
        heard = features.clone()
        for frame in chosen:
            heard[0, frame] = method.mask_emb
        hidden.append(method.encoder.context(heard, None)[-1][0, chosen])
        truth.append(features[0, chosen])
    hidden, truth = torch.cat(hidden), torch.cat(truth)
    logits = quantizer.weight_proj(hidden).view(-1, config.latent_vars)
    choice = F.gumbel_softmax(logits, tau=quantizer.temperature, hard=True).view(len(hidden), config.latent_groups, -1)
    codebook = quantizer.vars.view(config.latent_groups, config.latent_vars, -1)
    codes = torch.cat([choice[:, group] @ codebook[group] for group in range(config.latent_groups)], dim=1)
    head = method.reconstruction
    predictions = head.fc2(head.fc1(codes).clamp(min=0))
    mean = logits.view(len(hidden), config.latent_groups, -1).softmax(-1).mean(0)
    used = sum(torch.exp(-(group * (group + 1e-7).log()).sum()) for group in mean)
    entries = config.latent_groups * config.latent_vars
    return {
        "loss_reconstruction": (predictions - truth).abs().mean(1).mean(),
        "loss_diversity": config.diversity_weight * (entries - used) / entries,
        "error_of_mean": truth.abs().mean(),
        "prob_perplexity": used,
    }


def test_loss_and_gradients_are_the_formulas_on_a_padded_batch() -> None:
    method = build("decoar2_tiny").train()
    perturb(method)
    batch = collate(method, *two_waveforms())
    assert batch.padded
    torch.manual_seed(5)
    output = method(batch)
    torch.manual_seed(5)
    expected = written_out(method, batch)
    for name, term in expected.items():
        assert value(output, name) == pytest.approx(term.item(), rel=1e-4), name
    total = expected["loss_reconstruction"] + expected["loss_diversity"]
    assert output.total(batch).item() == pytest.approx(batch.sample_size * total.item(), rel=1e-4)
    named = dict(method.named_parameters())
    names = [
        "mask_emb",
        "quantizer.vars",
        "quantizer.weight_proj.weight",
        "reconstruction.fc1.weight",
        "encoder.post_extract_proj.weight",
        "encoder.encoder.layers.0.fc1.weight",
    ]
    parameters = [named[name] for name in names]
    ours = torch.autograd.grad(output.total(batch) / batch.sample_size, parameters)
    theirs = torch.autograd.grad(total, parameters)
    for name, gradient, reference in zip(names, ours, theirs, strict=True):
        assert reference.norm() > 0, name
        assert (gradient - reference).norm() <= 1e-3 * reference.norm(), name


def test_hidden_frames_are_not_heard() -> None:
    method = build("decoar2_tiny").eval()
    waveforms, lengths = two_waveforms()
    batch = collate(method, waveforms[:1], lengths[:1])
    features, _ = method.encoder.front_end(batch.waveforms, None)
    mask = batch.extras["mask"]
    other = torch.where(mask.unsqueeze(2), torch.randn_like(features), features)
    with torch.no_grad():
        first, second = (method.predict(frames, None, batch)[0] for frames in (features, other))
        changed = method.predict(features + ~mask.unsqueeze(2), None, batch)[0]
    assert torch.equal(first, second)
    assert not torch.equal(first, changed)


def test_the_collator_names_hidden_and_copied_frames() -> None:
    method = build("decoar2")
    waveforms, lengths = torch.randn(2, 64_000), torch.tensor([64_000, 32_000])
    batch = collate(method, waveforms, lengths)
    mask, positions = batch.extras["mask"], batch.extras["masked_positions"]
    assert mask.shape == (2, 199)
    assert not mask[1, 99:].any()
    # 0.09 * 199 / 10 spans are fewer than the two that every row gets.
    assert mask.sum(1).tolist() == [20, 20]
    assert batch.sample_size == len(positions) == 40
    assert torch.equal(mask.flatten().nonzero().flatten(), positions)
    for position, copied in zip(positions.tolist(), batch.extras["copied_positions"].tolist(), strict=True):
        assert not mask.flatten()[copied]
        assert position // 199 == copied // 199
        # Nothing visible lies between the two, unless the row begins hidden.
        assert copied > position or mask.flatten()[copied + 1 : position].all()


def test_parameter_counts() -> None:
    method = on_meta("decoar2")
    assert count(method.encoder) == 89_837_696
    quantizer = 2 * 320 * 384 + 768 * 640 + 640
    head = 768 * 256 + 256 + 256 * 80 + 80
    assert count(method) - count(method.encoder) == 80 + quantizer + head


def test_temperature_and_dropped_layers_follow_from_the_update() -> None:
    method = build("decoar2_tiny", "method.encoder.encoder_layerdrop=0.5", "method.encoder.encoder_layers=6").train()
    method.before_step(Progress(10, 100, 0))
    assert method.quantizer.temperature == pytest.approx(0.999**10)
    skipped = list(method.encoder.encoder.skipped)
    assert 0 < sum(skipped) < 6
    method.before_step(Progress(11, 100, 0))
    assert method.encoder.encoder.skipped != skipped
    method.before_step(Progress(10, 100, 0))
    assert method.encoder.encoder.skipped == skipped


def test_a_truncated_encoder_has_the_same_lower_states() -> None:
    encoder = build("decoar2_tiny").encoder.eval()
    waveforms, lengths = two_waveforms()
    with torch.no_grad():
        states, _ = encoder(waveforms, lengths)
        lower, _ = encoder.truncated(1)(waveforms, lengths)
    assert len(lower) == 2
    assert all(torch.equal(a, b) for a, b in zip(lower, states, strict=False))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.latent_temp=[2.0,0.5]", "latent_temp"),
        ("method.latent_dim=95", "does not divide"),
        ("method.mask_prob=0", "mask_prob"),
        ("method.mask_min_space=-1", "mask_min_space"),
    ],
)
def test_settings_that_cannot_be(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("decoar2_tiny", override)


def test_figures_show_frames_and_bands() -> None:
    method = build("decoar2_tiny").eval()
    with torch.no_grad():
        figures = method.figures(collate(method, *two_waveforms()))
    assert [axis.get_title() for axis in figures["spectrograms"].axes] == ["true", "heard", "filled in"]
    assert len(figures["error_per_band"].axes[0].get_lines()) == 3


def test_it_learns_more_than_to_say_the_mean_with_many_codes(learning_seed: int, tmp_path: Path) -> None:
    scores = train_recipe(
        "decoar2_tiny",
        tmp_path,
        learning_seed,
        "optimizer.lr=5e-3",
        "schedule.total_updates=100",
        "trainer={validate_every:100,save_every:100,max_validation_batches:4}",
    )
    assert_learned(scores["validation/error_of_mean"], above=0.6)
    assert_learned(scores["validation/loss_reconstruction"], below=scores["validation/error_of_mean"])
    # Two groups of 64; collapsed, this would be near 2.
    assert_learned(scores["validation/prob_perplexity"], above=20)


@pytest.mark.slow
def test_it_learns_more_than_to_copy(learning_seed: int, tmp_path: Path) -> None:
    """Hidden spans of 100 ms: copying the frames beside the recipe's 60 ms is nearly right, and takes long to beat."""
    longer = ("schedule.total_updates=500", "trainer={validate_every:500,save_every:500}")
    options = ("method.mask_length=5", "optimizer.lr=5e-3", *longer)
    scores = train_recipe("decoar2_tiny", tmp_path, learning_seed, *options)
    assert_learned(scores["validation/loss_reconstruction"], below=scores["validation/error_of_copy"])
