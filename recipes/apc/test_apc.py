"""APC, VQ-APC and multi-target APC: s3prl's numbers, causality, the auxiliary objective, sizes, learning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from conftest import ROOT
from learning import assert_learned
from recipe_checks import (
    build,
    collate,
    count,
    group,
    load_fixture,
    loss_per_unit,
    method_state,
    on_meta,
    perturb,
    train_recipe,
    two_waveforms,
    value,
)
from torch import Tensor

from pretrain.config import ConfigError, typed
from pretrain.errors import UserError
from pretrain.method import Batch, StepOutput
from recipes.apc import interop
from recipes.apc.method import ApcConfig, ApcMethod
from recipes.apc.reference_steps import S3prlApc

FIXTURES = Path(__file__).parent / "fixtures"
SAMPLE = ROOT / "pretrain" / "data" / "sample"
NO_DROPOUT = "method.encoder.dropout=0.0"
SMALL = ("method.encoder.hidden_size=48", NO_DROPOUT)


class Official:
    """One fixture: what s3prl's pre-training computed, and our method with its weights. Its batch is padded."""

    def __init__(self, name: str) -> None:
        self.facts, self.tensors = load_fixture(FIXTURES, name)
        audio = {"feat_type": "fbank", "feat_dim": self.facts["feat_dim"]}
        config = {"model": {"paras": self.facts["config"]}, "data": {"audio": audio}}
        imported = interop.from_pt({"config": config, "model": group(self.tensors, "state")})
        self.shift = self.facts["n_future"]
        values = {"name": "apc", "encoder": imported.encoder_config, "time_shift": self.shift, "past": None}
        self.method = ApcMethod(typed(ApcConfig, values))
        self.method.load_state_dict(method_state(imported))
        self.noise = [self.tensors["in.gumbel_noise_0"]] if "vq" in name else None
        self.target = self.tensors["in.feat"][:, self.shift :]

    def predict(self, train: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        features, lengths = self.tensors["in.feat"], self.tensors["in.lengths"] - self.shift
        return self.method.train(train).predict(features[:, : -self.shift], lengths, self.noise if train else None)


@pytest.fixture(scope="module", params=["apc_tiny", "vq_apc_tiny"])
def official(request: pytest.FixtureRequest) -> Official:
    return Official(request.param)


def test_hidden_states_predictions_and_codes_equal_s3prl(official: Official) -> None:
    hidden, frames, codes = official.predict(train=True)
    torch.testing.assert_close(hidden, official.tensors["out.train.feature"], rtol=0, atol=5e-5)
    torch.testing.assert_close(frames, official.tensors["out.train.pred"], rtol=0, atol=5e-5)
    if codes is not None:
        assert torch.equal(codes[..., 0], official.tensors["out.train.codes_0"])
        frames = official.predict(train=False)[1]
        torch.testing.assert_close(frames, official.tensors["out.testing.pred"], rtol=0, atol=5e-5)
        loss = F.l1_loss(frames, official.target).item()
        assert loss == pytest.approx(official.facts["scalars"]["loss_testing"], rel=1e-5)


def test_loss_and_gradients_equal_s3prl(official: Official) -> None:
    """With s3prl's mean over the whole batch, padding included, computed here from our predictions."""
    loss = F.l1_loss(official.predict(train=True)[1], official.target)
    assert loss.item() == pytest.approx(official.facts["scalars"]["loss"], rel=1e-5)
    official.method.zero_grad()
    loss.backward()
    ours = {name: p.grad for name, p in official.method.encoder.named_parameters()}
    gradients = interop.turn_codebooks(interop.TABLE.to_theirs(ours))
    gradients |= {name: p.grad for name, p in official.method.named_parameters() if name in interop.HEAD_KEYS}
    for name, expected in group(official.tensors, "grad").items():
        assert (gradients[name] - expected).norm() <= 1e-3 * expected.norm(), name
    norms = official.facts["grad_norms"]
    assert gradients.keys() == norms.keys()
    for name, norm in norms.items():
        assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-3), name


def test_a_step_from_waveforms_equals_s3prls_step() -> None:
    """Front end, model, shift and loss together; s3prl's front end and model are its own."""
    method = build("apc_360hr", *SMALL).train()
    perturb(method)
    batch = collate(method, two_waveforms()[0], torch.tensor([27_200, 27_200]))
    peer = S3prlApc(method.config)
    state = interop.TABLE.to_theirs(dict(method.encoder.state_dict()))
    peer.model.load_state_dict(state | {key: method.state_dict()[key] for key in interop.HEAD_KEYS})
    ours, theirs = method(batch).total(batch), peer(batch)
    assert batch.sample_size == 2 * (168 - 5)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    gradients = torch.autograd.grad(ours, method.encoder.rnn_layers[0].weight_hh_l0)[0]
    expected = torch.autograd.grad(theirs, peer.model.rnn_layers[0].weight_hh_l0)[0]
    assert (gradients - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.parametrize("recipe", ["apc_360hr", "vq_apc_360hr"])
def test_padding_is_not_scored(recipe: str) -> None:
    codes = ("method.encoder.quantizer.code_dims=[48]",) if recipe.startswith("vq") else ()
    method = build(recipe, *SMALL, *codes).eval()
    waveforms, lengths = two_waveforms()
    both = collate(method, waveforms, lengths)
    singles = [collate(method, waveforms[i : i + 1, :n], lengths[i : i + 1]) for i, n in enumerate(lengths.tolist())]
    outputs = [method(batch) for batch in (both, *singles)]
    assert both.padded
    assert both.sample_size == sum(batch.sample_size for batch in singles) == 163 + 93
    assert outputs[0].loss.item() == pytest.approx(sum(o.loss.item() for o in outputs[1:]), rel=1e-5)
    for name in ("error_of_copy", "error_of_mean"):
        totals = [o.metrics[name].total.item() for o in outputs]
        assert totals[0] == pytest.approx(sum(totals[1:]), rel=1e-5)
    if codes:
        used = [o.metrics["codes_0"].counts for o in outputs]
        assert torch.equal(used[0], used[1] + used[2])
        assert used[0].sum() == both.sample_size


def test_a_prediction_does_not_see_the_future() -> None:
    method = build("apc_360hr", *SMALL).eval()
    features = torch.randn(1, 60, 80, generator=torch.Generator().manual_seed(0))
    changed = features.clone()
    changed[:, 31:] += 1.0
    before, after = (method.predict(x, None).frames[0] for x in (features, changed))
    assert torch.equal(before[:31], after[:31])
    assert not torch.isclose(before[31:], after[31:]).all(-1).any()
    # Frame 30 does reach all later ones.
    changed = features.clone()
    changed[:, 30] += 1.0
    difference = (method.predict(changed, None).frames[0] - before).abs().amax(-1)
    assert (difference[:30] == 0).all()
    assert (difference[30:] > 0).all()


def test_bf16_follows_fp32() -> None:
    method = build("vq_apc_360hr", *SMALL, "method.encoder.quantizer.code_dims=[48]").eval()
    batch = collate(method, *two_waveforms())
    exact = method(batch).total(batch).item()
    with torch.autocast("cpu", torch.bfloat16):
        output = method.train()(batch)
        rounded = method.eval()(batch).loss.item()
    output.total(batch).backward()
    assert output.total(batch).dtype == torch.float32
    assert rounded == pytest.approx(exact, rel=1e-2)
    assert all(torch.isfinite(p.grad).all() for p in method.parameters())


# Multi-target APC


def past_method(weight: float = 0.5) -> ApcMethod:
    return build("apc_multi_target", *SMALL, f"method.past.weight={weight}")


def test_anchors_have_a_past_and_their_share() -> None:
    method = past_method()
    waveforms, lengths = two_waveforms()
    first, again = collate(method, waveforms, lengths), collate(method, waveforms, lengths)
    rows, frames = first.extras["anchor_rows"], first.extras["anchor_frames"]
    assert torch.equal(frames, again.extras["anchor_frames"])
    for row, scored in enumerate((163, 93)):
        mine = frames[rows == row]
        assert len(mine) == len(mine.unique()) == round(0.15 * (scored - 14))
        assert mine.min() >= 14
        assert mine.max() < scored
    # A row without a past has no anchors, and one with a single frame of it has one.
    for samples, expected in ((400 + 160 * 18, 0), (400 + 160 * 19, 1)):
        batch = collate(method, waveforms[:1, :samples], torch.tensor([samples]))
        assert len(batch.extras["anchor_frames"]) == expected
    assert method.collator(method.config).receptive_field_samples == 400 + 160 * 19


def test_the_loss_adds_what_the_second_gru_says_of_the_past() -> None:
    method = past_method().train()
    perturb(method)
    batch = collate(method, *two_waveforms())
    output = method(batch)
    features, lengths = method.encoder.front_end(batch.waveforms, batch.lengths)
    hidden = method.predict(features[:, :-5], lengths - 5).hidden
    errors = []
    for row, frame in zip(batch.extras["anchor_rows"].tolist(), batch.extras["anchor_frames"].tolist(), strict=True):
        start = frame - 14
        states, _ = method.past.rnn(features[row : row + 1, start : start + 7], hidden[row, frame].view(1, 1, -1))
        errors.append((method.past.postnet(states)[0] - features[row, start + 5 : start + 12]).abs().mean())
    past = torch.stack(errors).mean().item()
    assert value(output, "loss_past") == pytest.approx(past, rel=1e-5)
    assert loss_per_unit(output, batch) == pytest.approx(value(output, "loss_future") + 0.5 * past, rel=1e-5)
    # The past reaches the first GRU, through the states of the anchors.
    without = past_method(weight=1e-9).train()
    without.load_state_dict(method.state_dict())
    gradients = [
        torch.autograd.grad(m(batch).total(batch), m.encoder.rnn_layers[0].weight_hh_l0)[0] for m in (method, without)
    ]
    assert (gradients[0] - gradients[1]).norm() > 1e-3 * gradients[1].norm()


def test_without_an_anchor_the_past_counts_nothing() -> None:
    method = past_method()
    batch = collate(method, two_waveforms()[0][:, :2000], torch.tensor([2000, 2000]))
    output = method(batch)
    assert value(output, "loss_past") == 0
    assert loss_per_unit(output, batch) == pytest.approx(value(output, "loss_future"), rel=1e-6)
    assert loss_per_unit(output, batch) > 0


# Sizes and settings


@pytest.mark.parametrize(
    ("recipe", "with_head"),
    # SUPERB's 4.11 M and 4.63 M count the head; the encoder's own size is in the recipe.
    [("apc_360hr", 4_105_296), ("vq_apc_960hr", 4_630_096)],
)
def test_parameter_counts(recipe: str, with_head: int) -> None:
    method = on_meta(recipe)
    assert count(method) == with_head
    assert count(method) - count(method.encoder) == count(method.postnet) == 512 * 80 + 80


def test_vq_apc_with_the_codes_of_the_papers_example() -> None:
    assert count(build("vq_apc_360hr", "method.encoder.quantizer.codebook_sizes=[128]")) == 4_236_496


@pytest.mark.parametrize(
    ("recipe", "override", "message"),
    [
        ("apc_360hr", "method.time_shift=0", "time_shift"),
        ("vq_apc_360hr", "method.encoder.quantizer.code_dims=[256]", "add up to 256"),
        ("vq_apc_360hr", "method.encoder.quantizer.code_dims=[256,256]", "one entry of each per group"),
        ("vq_apc_360hr", "method.encoder.quantizer.temperature=0", "temperature"),
        ("apc_multi_target", "method.past.length=15", "past"),
        ("apc_multi_target", "method.past.anchor_share=0", "anchor_share"),
    ],
)
def test_settings_that_cannot_be(recipe: str, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(recipe, override)


# Learning


def sample_batches(method: ApcMethod, number: int, seed: int) -> list[Batch]:
    """Batches of sixteen seconds of the embedded sample."""
    rng = np.random.default_rng(seed)
    files = [path for path in sorted((SAMPLE / "audio").glob("*.ogg")) if soundfile.info(path).frames >= 16_000]
    batches = []
    for _ in range(number):
        cut = [soundfile.read(files[i], 16_000, dtype="float32")[0] for i in rng.integers(len(files), size=16)]
        batches.append(collate(method, torch.from_numpy(np.stack(cut)), torch.full((16,), 16_000)))
    return batches


def learn(method: ApcMethod, batches: list[Batch], rate: float = 8e-3) -> StepOutput:
    """One update per batch but the last, which is scored."""
    optimizer = torch.optim.AdamW(method.train().parameters(), lr=rate, weight_decay=0.0)
    for batch in batches[:-1]:
        optimizer.zero_grad()
        (method(batch).total(batch) / batch.sample_size).backward()
        torch.nn.utils.clip_grad_norm_(method.parameters(), 5.0)
        optimizer.step()
    return method.eval()(batches[-1])


def test_learns_more_than_to_copy_or_to_say_the_mean(learning_seed: int, tmp_path: Path) -> None:
    scores = train_recipe(
        "apc_tiny",
        tmp_path,
        learning_seed,
        "batch.micro_batches_per_step=1",
        "trainer.save_every=1000",
        "trainer.stop_after_updates=40",
        "trainer.validate_every=40",
        "trainer.max_validation_batches=3",
    )
    trivial = min(scores["validation/error_of_copy"], scores["validation/error_of_mean"])
    assert_learned(trivial, above=0.6)
    assert_learned(scores["validation/loss"], below=trivial)


def test_vq_apc_learns_with_many_codes(learning_seed: int) -> None:
    method = build("vq_apc_tiny", seed=learning_seed)
    # With a rate of 8e-3 some seeds stay with two codes.
    output = learn(method, sample_batches(method, 91, learning_seed), rate=4e-3)
    trivial = min(value(output, "error_of_copy"), value(output, "error_of_mean"))
    assert_learned(value(output, "error"), below=trivial)
    share = output.metrics["codes_0"].counts / output.metrics["codes_0"].counts.sum()
    assert_learned(torch.exp(torch.special.entr(share).sum()).item(), above=2.5)


def test_multi_target_apc_learns_both_objectives(learning_seed: int) -> None:
    past = "method.past={weight: 0.5, anchor_share: 0.15, offset: 14, length: 7}"
    method = build("apc_tiny", past, seed=learning_seed)
    output = learn(method, sample_batches(method, 31, learning_seed))
    assert_learned(value(output, "loss_future"), below=value(output, "error_of_mean"))
    # The segment lies in what the state has seen, and the prediction reaches beyond its own input.
    assert_learned(value(output, "loss_past"), below=value(output, "error_of_mean"))


def test_codes_of_an_encoder() -> None:
    method = build("vq_apc_360hr", *SMALL, "method.encoder.quantizer.code_dims=[48]").eval()
    waveforms, lengths = two_waveforms()
    codes, counts = method.encoder.codes(waveforms, lengths)
    features, _ = method.encoder.front_end(waveforms[:1], None)
    assert counts.tolist() == [168, 98]
    assert method.encoder.code_shape == (1, 512)
    assert torch.equal(codes[0], method.predict(features, None).codes[0])
    with pytest.raises(UserError, match="there are no codes"):
        build("apc_360hr", *SMALL).encoder.codes(waveforms, lengths)


def test_figures_show_prediction_and_bands() -> None:
    method = build("apc_tiny").eval()
    with torch.no_grad():
        figures = method.figures(collate(method, *two_waveforms()))
    assert [len(figures[name].axes) for name in ("prediction", "band_error")] == [3, 1]
