"""MPC's network and loss written out with torch's own modules, its masks, sizes and settings, and that it learns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from learning import assert_learned
from recipe_checks import (
    build,
    collate,
    count,
    loss_per_unit,
    on_meta,
    perturb,
    train_recipe,
    two_waveforms,
    value,
)
from torch import Tensor, nn

from pretrain.config import ConfigError
from pretrain.models.batch_norm import update_running_statistics
from recipes.mpc.method import MpcMethod, chunk_mask


def moved() -> MpcMethod:
    """A small network with every parameter and running statistic off its start."""
    method = build("mpc_tiny")
    perturb(method)
    method.train()(collate(method, *two_waveforms()))
    update_running_statistics(method, applied=True)
    return method.eval()


def written_out(method: MpcMethod, x: Tensor) -> list[Tensor]:
    """(1, 4 P, 40) frames through torch's convolutions, batch norm and encoder layers, to the hidden states."""
    config, front = method.config.encoder, method.encoder.subsampling
    image = x[:, None]
    for conv, norm in ((front.conv1, front.norm1), (front.conv2, front.norm2)):
        image = F.conv2d(F.pad(image, (0, 1, 0, 1)), conv.weight, stride=2)
        image = F.batch_norm(image, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-3)
        image = image.clamp(0, 6)
    hidden = (image.permute(0, 2, 3, 1).flatten(2) @ front.proj.weight.T + front.proj.bias).clamp(0, 6)
    dim = hidden.shape[2]
    angles = torch.arange(hidden.shape[1])[:, None] / 10_000 ** (torch.arange(0, dim, 2) / dim)
    states = [hidden + torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)]
    for ours in method.encoder.layers:
        layer = nn.TransformerEncoderLayer(
            dim, config.encoder_attention_heads, config.encoder_ffn_embed_dim, 0.0, "gelu", 1e-8, batch_first=True
        )
        theirs = {
            "self_attn.in_proj_weight": ours.self_attn.qkv_proj.weight,
            "self_attn.in_proj_bias": ours.self_attn.qkv_proj.bias,
            "self_attn.out_proj.weight": ours.self_attn.out_proj.weight,
            "self_attn.out_proj.bias": ours.self_attn.out_proj.bias,
        }
        pairs = (("linear1", ours.fc1), ("linear2", ours.fc2))
        pairs += (("norm1", ours.self_attn_layer_norm), ("norm2", ours.final_layer_norm))
        theirs |= {f"{name}.{kind}": getattr(part, kind) for name, part in pairs for kind in ("weight", "bias")}
        states.append(torch.func.functional_call(layer.train(), theirs, states[-1]))
    return states


def test_hidden_states_and_loss_are_the_formulas_on_a_padded_batch() -> None:
    method = moved()
    batch = collate(method, *two_waveforms())
    assert batch.padded
    total, mean, scored, parameters = 0.0, 0.0, 0, dict(method.named_parameters())
    states, counts = method.encoder(batch.waveforms, batch.lengths)
    # 168 and 98 frames, of which athena keeps whole fours.
    assert counts[0].tolist() == [42, 24]
    for row, length in enumerate(batch.lengths.tolist()):
        positions = int(counts[0][row])
        x = method.encoder.front_end(batch.waveforms[row : row + 1, :length], None)[0][:, : 4 * positions]
        for ours, expected in zip(states, written_out(method, x), strict=True):
            difference = (ours[row, :positions] - expected[0]).abs().max()
            assert difference <= 1e-4 * expected.abs().max()
        mask = batch.extras["mask"][row, : 4 * positions]
        predicted = method.final_layer(written_out(method, x * ~mask[:, None])[-1]).view(1, -1, 40)
        total = total + ((predicted - x).abs() * mask[:, None]).sum()
        mean += (x.abs() * mask[:, None]).sum()
        scored += int(mask.sum()) * 40
    output = method(batch)
    assert batch.sample_size == 42 + 24
    assert output.loss.item() == pytest.approx(total.item(), rel=1e-5)
    assert loss_per_unit(output, batch) == pytest.approx(total.item() / 66, rel=1e-5)
    assert value(output, "error") == pytest.approx(total.item() / scored, rel=1e-5)
    assert value(output, "error_of_mean") == pytest.approx(mean.item() / scored, rel=1e-5)
    names = ["final_layer.weight", "encoder.subsampling.conv1.weight", "encoder.layers.1.fc1.weight"]
    wanted = [parameters[name] for name in names]
    gradients = zip(names, torch.autograd.grad(output.loss, wanted), torch.autograd.grad(total, wanted), strict=True)
    for name, ours, theirs in gradients:
        assert theirs.norm() > 0, name
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm(), name


def test_a_waveform_has_the_same_states_alone_and_in_a_batch() -> None:
    encoder = moved().encoder
    waveforms, lengths = two_waveforms()
    with torch.no_grad():
        together, counts = encoder(waveforms, lengths)
        for row, length in enumerate(lengths.tolist()):
            alone, (count, *_) = encoder(waveforms[row : row + 1, :length], None)
            assert int(count) == int(counts[0][row])
            for state, single in zip(together, alone, strict=True):
                torch.testing.assert_close(state[row, : int(count)], single[0], rtol=1e-4, atol=2e-5)


def test_one_window_makes_one_position() -> None:
    encoder = moved().encoder
    with torch.no_grad():
        states, counts = encoder(torch.randn(1, 400), None)
    assert states[-1].shape == (1, 1, 64)
    assert counts[0].tolist() == [1]


def test_the_collator_hides_whole_positions() -> None:
    method = build("mpc")
    waveforms, lengths = torch.randn(2, 64_000), torch.tensor([64_000, 32_000])
    batch = collate(method, waveforms, lengths)
    mask = batch.extras["mask"]
    assert mask.shape == (2, 396)
    assert not mask[1, 196:].any()
    assert batch.sample_size == 99 + 49
    blocks = mask.view(2, 99, 4)
    assert torch.equal(blocks.all(2), blocks.any(2))
    assert torch.equal(batch.extras["masked_positions"], blocks[:, :, 0].flatten().nonzero().flatten())
    assert 0 < blocks[:, :, 0].sum() < 70
    hidden = mask.flatten().nonzero().flatten()
    for frame, copied in zip(hidden.tolist(), batch.extras["copied_frames"].tolist(), strict=True):
        assert not mask.flatten()[copied]
        assert frame // 396 == copied // 396


def test_longer_chunks_shrink_on_short_rows() -> None:
    method = build("mpc_tiny", "method.chunk_size=3", "method.keep_probability=0.85")
    lengths = {rows: torch.full((64,), rows * 640 + 240) for rows in (10, 200)}
    runs = {}
    for positions, samples in lengths.items():
        mask = collate(method, torch.zeros(64, int(samples[0])), samples).extras["mask"][:, ::4]
        thirds = mask[:, : positions // 3 * 3].view(64, -1, 3)
        runs[positions] = torch.equal(thirds.all(2), thirds.any(2))
    # 0.15 * 40 frames are less than a chunk of 12.
    assert runs == {10: False, 200: True}


def test_parameter_counts() -> None:
    method = on_meta("mpc")
    assert count(method) == 33_452_192
    assert count(method) - count(method.encoder) == 512 * 160 + 160
    wider = "method.encoder.encoder_ffn_embed_dim=2048"
    with torch.device("meta"):
        assert count(build("mpc", wider)) == 42_898_592


def test_a_truncated_encoder_has_the_same_lower_states() -> None:
    encoder = moved().encoder
    inputs = two_waveforms()
    with torch.no_grad():
        states, lower = encoder(*inputs)[0], encoder.truncated(1)(*inputs)[0]
    assert len(lower) == 2
    assert all(torch.equal(a, b) for a, b in zip(lower, states, strict=False))


@pytest.mark.parametrize("override", ["method.chunk_size=0", "method.keep_probability=1.0"])
def test_settings_that_cannot_be(override: str) -> None:
    with pytest.raises(ConfigError, match="chunk_size of at least 1"):
        build("mpc_tiny", override)


def test_figures_show_frames_and_bands() -> None:
    method = moved()
    with torch.no_grad():
        figures = method.figures(collate(method, *two_waveforms()))
    assert [axis.get_title() for axis in figures["spectrograms"].axes] == ["true", "heard", "filled in"]
    assert len(figures["error_per_band"].axes[0].get_lines()[0].get_ydata()) == 40


def test_it_learns_more_than_to_say_the_mean(learning_seed: int, tmp_path: Path) -> None:
    scores = train_recipe(
        "mpc_tiny",
        tmp_path,
        learning_seed,
        "schedule={warmup_updates:30,total_updates:100}",
        "trainer={validate_every:100,save_every:100,max_validation_batches:4}",
    )
    assert_learned(scores["validation/error"], below=scores["validation/error_of_mean"])


@pytest.mark.slow
def test_it_learns_more_than_to_copy(learning_seed: int, tmp_path: Path) -> None:
    """Shorter crops, in which attention finds the neighbours of a chunk sooner."""
    longer = ("schedule.total_updates=900", "trainer={validate_every:900,save_every:900}")
    options = ("crop.max_seconds=0.8", "optimizer.lr=4e-3", *longer)
    scores = train_recipe("mpc_tiny", tmp_path, learning_seed, *options)
    assert_learned(scores["validation/error"], below=scores["validation/error_of_copy"])


def test_chunks_are_hidden_whole_and_independently() -> None:
    masks = np.array([chunk_mask(np.random.default_rng(index), 398, 402, 4, 0.2) for index in range(2000)])
    assert masks.mean(0)[:396].mean() == pytest.approx(0.2, abs=0.003)
    assert not masks[:, 398:].any()
    blocks = masks[:, :396].reshape(2000, 99, 4)
    assert (blocks == blocks[:, :, :1]).all()
    assert np.corrcoef(blocks[:, 10, 0], blocks[:, 11, 0])[0, 1] == pytest.approx(0.0, abs=0.08)
