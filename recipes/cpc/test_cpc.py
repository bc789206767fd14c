"""CPC against what CPC_audio computed: hidden states, loss of every step, accuracy, gradients; negatives; sizes.

Largest relative differences when the fixtures were made: hidden states 6e-7 (6e-6 with batch statistics), losses 8e-8.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from learning import assert_learned
from recipe_checks import (
    build,
    count,
    group,
    load_fixture,
    loss_per_unit,
    method_state,
    on_meta,
    train_recipe,
    value,
)
from torch import Tensor, nn

from pretrain.config import ConfigError, compose_recipe, typed
from pretrain.method import Batch, Example, StepOutput
from recipes.cpc import interop
from recipes.cpc.encoder import CpcEncoder, reverse
from recipes.cpc.method import CpcConfig, CpcMethod
from recipes.cpc.norms import ChannelNorm, GroupNorm

FIXTURES = Path(__file__).parent / "fixtures"
# Modified CPC in evaluation mode, the model of 2018 with batch statistics, and a transformer as context network.
NAMES = ["modified", "original", "transformer_context"]


def official_checkpoint(facts: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What CPC_audio's trainer writes, its arguments under "config"."""
    state = group(tensors, "state")
    return {"config": facts["config"], **{name: group(state, name) for name in ("gEncoder", "cpcCriterion")}}


class Official:
    """One fixture: CPC_audio's numbers, and our method with its weights on its batch."""

    def __init__(self, name: str) -> None:
        self.facts, self.tensors = load_fixture(FIXTURES, name)
        config, shapes = self.facts["config"], self.facts["shapes"]
        imported = interop.from_pt(official_checkpoint(self.facts, self.tensors))
        narrow = {"context_heads": shapes["heads"], "context_ffn_dim": shapes["ffn_dim"], "dropout": 0.0}
        values = {
            "name": "cpc",
            "encoder": imported.encoder_config | narrow,
            "steps": config["nPredicts"],
            "negatives": config["negativeSamplingExt"],
            "negatives_from": "batch",
            "predictor": config["rnnMode"],
            "predictor_heads": shapes["heads"],
            "predictor_ffn_dim": shapes["ffn_dim"],
            "predictor_dropout": 0.0,
            "window_frames": shapes["frames"],
        }
        self.method = CpcMethod(typed(CpcConfig, values)).train(self.facts["mode"] == "train")
        self.method.load_state_dict(method_state(imported))
        self.batch = self._batch()

    def _batch(self) -> Batch:
        """Our collator's batch of the official waveforms, with the official negatives."""
        waveforms = self.tensors["in.wav"]
        batch = self.method.collator(self.method.config)(
            [Example(row, i, 0, {}, np.random.default_rng(i)) for i, row in enumerate(waveforms)]
        )
        batch.extras["negatives"] = self.tensors["in.negatives"].unsqueeze(0)
        return batch


@pytest.fixture(scope="module", params=NAMES)
def official(request: pytest.FixtureRequest) -> Official:
    return Official(request.param)


@pytest.fixture(scope="module")
def output(official: Official) -> StepOutput:
    """Our forward, with the gradients of loss / sample_size left on the parameters."""
    output = official.method(official.batch)
    (output.loss / official.batch.sample_size).backward()
    return output


def test_hidden_states_are_the_official_ones(official: Official) -> None:
    with torch.no_grad():
        states, _ = official.method.encoder(official.tensors["in.wav"], None)
    for state, name in zip(states, "zc", strict=True):
        torch.testing.assert_close(state, official.tensors[f"out.{name}"], rtol=1e-4, atol=2e-5)


def test_loss_and_accuracy_of_every_step(official: Official, output: StepOutput) -> None:
    losses, accuracy = official.tensors["out.losses"], official.tensors["out.accuracy"]
    assert loss_per_unit(output, official.batch) == pytest.approx(losses.sum().item(), rel=1e-5)
    for step, loss in enumerate(losses.tolist(), start=1):
        assert value(output, f"loss_step_{step}") == pytest.approx(loss, rel=1e-5)
    assert value(output, "accuracy") == pytest.approx(accuracy.mean().item())
    for step, share in enumerate(accuracy.tolist(), start=1):
        assert value(output, f"accuracy_step_{step}") == pytest.approx(share)


def test_gradients_in_full_and_by_norm(official: Official, output: StepOutput) -> None:
    """The importer turns official gradients into ours as it does weights; NaN marks those kept as a norm only."""
    norms, full = official.facts["grad_norms"], group(official.tensors, "grad")
    checkpoint = official_checkpoint(official.facts, official.tensors)
    for part in ("gEncoder", "cpcCriterion"):
        shapes = {key: checkpoint[part][key] for key in checkpoint[part] if f"{part}.{key}" in norms}
        checkpoint[part] = {
            key: full.get(f"{part}.{key}", torch.full_like(weight, torch.nan)) for key, weight in shapes.items()
        }
    imported = interop.from_pt(checkpoint)
    expected = method_state(imported)
    gradients = {name: parameter.grad for name, parameter in official.method.named_parameters()}
    total, compared = math.hypot(*norms.values()), 0
    for name, gradient in gradients.items():
        known = ~expected[name].isnan()
        compared += int(known.sum())
        # A bias before a batch norm has no gradient but rounding, hence the share of the total.
        assert (gradient - expected[name])[known].norm() <= 1e-3 * expected[name][known].norm() + 1e-5 * total, name
    assert compared == sum(tensor.numel() for tensor in full.values())
    for index, layer in enumerate(official.method.encoder.conv_layers):
        norm = layer.conv.weight.grad.norm().item()
        assert norm == pytest.approx(norms[f"gEncoder.gEncoder.conv{index}.weight"], rel=1e-3)
    assert torch.nn.utils.get_total_norm(list(gradients.values())).item() == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize(
    ("recipe", "encoder", "heads"),
    # Reference sheet, section 2; the heads of modified CPC are 12 transformers, those of the others matrices.
    [
        ("modified_cpc", 1_843_456, 15_813_120),
        ("cpc", 5_847_040, 12 * 256 * 512),
        ("bidir_cpc", 1_150_848 + 2 * 8_404_992, 2 * 12 * 512 * 512),
    ],
)
def test_published_sizes(recipe: str, encoder: int, heads: int) -> None:
    method = on_meta(recipe)
    assert count(method.encoder) == encoder
    assert count(method.predictors) == heads


def example(row: int, samples: int) -> Example:
    rng = np.random.default_rng(row)
    return Example(torch.from_numpy(0.1 * rng.standard_normal(samples, dtype=np.float32)), row, 0, {}, rng)


@pytest.mark.parametrize(("samples", "frames"), [(16_000, 100), (20_480, 128), (48_000, 300), (16_079, 100)])
def test_frames(samples: int, frames: int) -> None:
    encoder = build("cpc_tiny").encoder
    states, lengths = encoder(torch.zeros(1, samples), None)
    assert [state.shape[1] for state in states] == [frames] * 2
    assert [int(count) for count in lengths] == [frames] * 2
    assert encoder.config.frames(samples) == frames


def test_before_training_the_loss_is_that_of_a_uniform_guess() -> None:
    method = build("modified_cpc")
    with torch.no_grad():
        batch = method.collator(method.config)([example(row, 20_480) for row in range(4)])
        output = method(batch)
    for step in range(1, 13):
        assert value(output, f"loss_step_{step}") == pytest.approx(math.log(129), abs=0.02)
    assert loss_per_unit(output, batch) == pytest.approx(12 * math.log(129), abs=0.1)
    assert value(output, "accuracy") < 4 / 129


def test_a_network_without_variety_is_never_right() -> None:
    method = build("cpc_tiny")
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.zero_()
        output = method(method.collator(method.config)([example(row, 20_480) for row in range(2)]))
    assert value(output, "loss_step_1") == pytest.approx(math.log(33))
    assert value(output, "accuracy") == 0
    assert value(output, "latent_variance") == 0


@pytest.mark.parametrize("scope", ["batch", "window"])
def test_negatives_are_uniform_over_what_is_allowed(scope: str) -> None:
    """Chi-square: windows uniformly, in each every frame but the context's own time; padding never."""
    method = build("bidir_cpc_tiny", f"method.negatives_from={scope}", "method.negatives=4000", "method.steps=3")
    lengths = [1_280, 960, 1_600]
    batch = method.collator(method.config)([example(row, samples) for row, samples in enumerate(lengths)])
    frames, counts = 10, [8, 6, 10]
    assert batch.extras["negatives"].shape == (2, sum(counts) - 3 * 3, 4000)
    context = 0
    for row, own in enumerate(counts):
        for time in range(own - 3):
            assert batch.extras["targets"][context] == row * frames + time
            assert batch.extras["contexts"][context] == row * (frames - 3) + time
            windows = range(3) if scope == "batch" else [row]
            for drawn in batch.extras["negatives"][:, context]:
                expected = np.zeros(3 * frames)
                for window in windows:
                    allowed = [t for t in range(counts[window]) if t != time % counts[window]]
                    expected[[window * frames + t for t in allowed]] = 4000 / len(windows) / len(allowed)
                seen = np.bincount(drawn.numpy(), minlength=3 * frames)
                assert not seen[expected == 0].any()
                kept = expected > 0
                statistic = float(((seen - expected)[kept] ** 2 / expected[kept]).sum())
                # Four deviations above the mean of a chi-square with that many degrees of freedom.
                freedom = int(kept.sum()) - len(windows)
                assert statistic < freedom + 4 * math.sqrt(2 * freedom) + 4
            context += 1
    assert context == batch.sample_size


@pytest.mark.parametrize("recipe", ["cpc_tiny", "bidir_cpc_tiny"])
def test_a_padded_batch_scores_each_window_as_if_alone(recipe: str) -> None:
    """Hidden states and logits of every direction, with negatives of the own window."""
    norm = [] if recipe.startswith("bidir") else ["method.encoder.norm=channel"]
    method = build(recipe, "method.negatives_from=window", *norm)
    collator = method.collator(method.config)
    samples = [20_480, 12_800]
    together = collator([example(row, n) for row, n in enumerate(samples)])
    assert together.padded
    assert together.sample_size == 128 - 6 + 80 - 6
    with torch.no_grad():
        z, lengths = method.encoder.features(together.waveforms, together.lengths)
        readings = method.encoder.readings(z, lengths)
        padded = [method.logits(together, d, *pair) for d, pair in enumerate(readings)]
        first = 0
        for row, n in enumerate(samples):
            alone = collator([example(row, n)])
            assert not alone.padded
            z, _ = method.encoder.features(alone.waveforms, None)
            frames = n // 160
            assert lengths[row] == frames
            for direction, pair in enumerate(method.encoder.readings(z, None)):
                for mine, other in zip(pair, readings[direction], strict=True):
                    torch.testing.assert_close(mine[0], other[row, :frames], rtol=1e-4, atol=1e-5)
                # The same examples draw the same negatives, counted from another row.
                shifted = alone.extras["negatives"] + 128 * row
                rows = slice(first, first + alone.sample_size)
                assert torch.equal(shifted, together.extras["negatives"][:, rows])
                mine = method.logits(alone, direction, *pair)
                torch.testing.assert_close(mine, padded[direction][:, rows], rtol=1e-4, atol=1e-5)
            first += alone.sample_size


def test_the_backward_branch_reads_time_backwards() -> None:
    encoder = build("bidir_cpc_tiny").encoder.eval()
    z = torch.randn(2, 7, 48)
    lengths = torch.tensor([7, 4])
    flipped = reverse(z, lengths)
    assert torch.equal(flipped[0], z[0].flip(0))
    assert torch.equal(flipped[1], torch.cat([z[1, :4].flip(0), z[1, 4:]]))
    assert torch.equal(reverse(z, None), z.flip(1))
    waveforms = 0.1 * torch.randn(1, 20_480)
    with torch.no_grad():
        (_, before), _ = encoder(waveforms, None)
        later = waveforms.clone()
        later[:, 16_000:] += 0.1
        # Group norm spreads any change over the window: freeze its statistics by comparing context networks alone.
        z = encoder(waveforms, None)[0][0]
        changed = z.clone()
        changed[:, 100:] += 1
        contexts = []
        for sequence in (z, changed):
            (_, forward), (_, backward) = encoder.readings(sequence, None)
            contexts.append((forward, backward.flip(1)))
    assert torch.equal(contexts[0][0][:, :100], contexts[1][0][:, :100])
    assert not torch.equal(contexts[0][0][:, 100:], contexts[1][0][:, 100:])
    assert not torch.isclose(contexts[0][1][:, :100], contexts[1][1][:, :100]).all()
    assert torch.equal(before, torch.cat(contexts[0], dim=2))


def slow_group_norm(x: Tensor, norm: GroupNorm) -> Tensor:
    """`nn.GroupNorm` of one row (F, C)."""
    peer = nn.GroupNorm(norm.groups, x.shape[1])
    peer.load_state_dict(norm.state_dict())
    return peer(x.T[None])[0].T


def test_norms_are_torchs() -> None:
    torch.manual_seed(0)
    channel, grouped = ChannelNorm(12), GroupNorm(12, 3)
    for norm in (channel, grouped):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x = torch.randn(2, 9, 12)
    unbiased = (x - x.mean(2, keepdim=True)) / (x.var(2, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(channel(x), unbiased * channel.weight + channel.bias)
    torch.testing.assert_close(grouped(x, None)[0], slow_group_norm(x[0], grouped))
    valid = (torch.arange(9) < torch.tensor([[9], [5]])).unsqueeze(2)
    torch.testing.assert_close(grouped(x * valid, valid)[1, :5], slow_group_norm(x[1, :5], grouped))


def test_the_bidirectional_encoder_pads_as_tensorflow_does() -> None:
    """Convolutions with "same" padding, group norm and a clipped ReLU, written out."""
    encoder = build("bidir_cpc_tiny").encoder
    x = torch.randn(1, 3_200) * 0.1
    with torch.no_grad():
        z, _ = encoder.features(x, None)
        y = 32768.0 * x.unsqueeze(1)
        for layer in encoder.conv_layers:
            (kernel,), (stride,) = layer.conv.kernel_size, layer.conv.stride
            total = (math.ceil(y.shape[2] / stride) - 1) * stride + kernel - y.shape[2]
            y = F.conv1d(F.pad(y, (total // 2, total - total // 2)), layer.conv.weight, stride=stride)
            y = F.group_norm(y, 8, layer.norm.weight, layer.norm.bias).clamp(0, 5)
    assert z.shape == (1, 20, 48)
    torch.testing.assert_close(z, y.transpose(1, 2), rtol=1e-4, atol=1e-4)


def test_a_transformer_context_sees_no_further_than_it_learned() -> None:
    overrides = ["method.encoder.context=transformer", "method.encoder.context_frames=10", "method.encoder.dropout=0"]
    encoder: CpcEncoder = build("cpc_tiny", *overrides).encoder
    z = torch.randn(1, 40, 48)
    changed = z.clone()
    changed[:, 15] += 1
    with torch.no_grad():
        difference = (encoder.contexts[0](z) - encoder.contexts[0](changed)).abs().amax(2)[0]
    assert (difference[15:25] > 1e-4).all()
    assert not difference[:15].any()
    assert not difference[25:].any()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.predictor=transfomer"], r"method\.predictor: unknown kind 'transfomer'; did you mean transformer\?"),
        (["method.negatives_from=bach"], r"method\.negatives_from: unknown scope 'bach'; did you mean batch\?"),
        (["method.encoder.norm=chanel"], r"method\.encoder\.norm: unknown norm 'chanel'; did you mean channel\?"),
        (["method.encoder.norm=group"], r"method\.encoder\.norm_groups: state it"),
        (["method.encoder.context=ltsm"], r"method\.encoder\.context: unknown context network 'ltsm'"),
        (["method.encoder.context_dim=32"], r"method\.predictor=linear"),
        (["method.encoder.context=transformer", "method.encoder.context_dim=32"], r"keeps the width .*; set 48"),
        (["method.encoder.conv_layers=[[48,10,5]]"], r"method\.encoder\.conv_layers: state \[channels"),
        (["method.window_frames=6"], r"method\.window_frames: 6 frames leave none"),
        (["method.negatives=0"], r"method\.steps, method\.negatives: both must be positive"),
    ],
)
def test_wrong_settings_say_what_to_do(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        typed(CpcConfig, compose_recipe("cpc_tiny", overrides)["method"], "method")


def test_windows_longer_than_the_predictors_are_refused() -> None:
    method = build("cpc_tiny")
    with pytest.raises(ConfigError, match=r"crop\.max_seconds: windows of 129 frames, .* take 128; lower it"):
        method.collator(method.config)([example(0, 20_640)])


def test_a_window_shorter_than_the_steps_scores_nothing() -> None:
    method = build("cpc_tiny")
    batch = method.collator(method.config)([example(0, 800), example(1, 640)])
    assert batch.sample_size == 0
    assert method(batch).loss.item() == 0


@pytest.mark.parametrize(("recipe", "directions"), [("cpc_tiny", 1), ("bidir_cpc_tiny", 2)])
def test_it_learns_to_tell_the_future_from_other_frames(
    recipe: str, directions: int, learning_seed: int, tmp_path: Path
) -> None:
    last = train_recipe(
        recipe, tmp_path, learning_seed, "schedule.total_updates=100", "trainer.max_validation_batches=4"
    )
    chance = 33
    assert_learned(last["validation/loss"], below=6 * directions * math.log(chance))
    assert_learned(last["validation/accuracy"], above=2.5 / chance)
    assert_learned(last["validation/accuracy_step_1"], above=last["validation/accuracy_step_6"])
    assert_learned(last["validation/latent_variance"], above=0.05)
