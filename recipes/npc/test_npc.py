"""NPC: s3prl's numbers, the blind spot, batch norm over an update, sizes, learning."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from learning import assert_learned
from recipe_checks import (
    build,
    collate,
    count,
    group,
    load_fixture,
    method_state,
    on_meta,
    perturb,
    train_recipe,
    two_waveforms,
    value,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pretrain.config import ConfigError, typed
from pretrain.features.cmvn import valid_mask
from pretrain.losses.reconstruction import l1_sum
from pretrain.models.batch_norm import update_running_statistics
from pretrain.weights.interop.types import TrainedMethod
from recipes.npc import interop
from recipes.npc.method import NpcConfig, NpcMethod
from recipes.npc.reference_steps import S3prlNpc

FIXTURES = Path(__file__).parent / "fixtures"
NO_DROPOUT = "method.encoder.dropout=0.0"
SMALL = (
    "method.encoder.hidden_size=32",
    "method.encoder.quantizer.codebook_sizes=[9,7]",
    "method.encoder.quantizer.code_dims=[20,12]",
)


class Official:
    """One fixture: what s3prl's pre-training computed, and our method with its weights. Its batch is padded."""

    def __init__(self) -> None:
        self.facts, self.tensors = load_fixture(FIXTURES, "npc_tiny")
        audio = {"feat_type": "fbank", "feat_dim": self.facts["feat_dim"]}
        config = {"model": {"paras": self.facts["config"]}, "data": {"audio": audio}}
        self.checkpoint = {"config": config, "model": group(self.tensors, "state")}
        imported = interop.from_pt(self.checkpoint)
        self.method = NpcMethod(typed(NpcConfig, {"name": "npc", "encoder": imported.encoder_config}))
        self.method.load_state_dict(method_state(imported))
        self.features, lengths = self.tensors["in.feat"], self.tensors["in.lengths"]
        self.noise = [self.tensors["in.gumbel_noise_0"], self.tensors["in.gumbel_noise_1"]]
        self.valid, self.frames = valid_mask(lengths, self.features.shape[1]).unsqueeze(2), int(lengths.sum())

    def loss(self, predicted: Tensor) -> Tensor:
        return l1_sum(predicted, self.features, self.valid) / self.features.shape[2] / self.frames


@pytest.fixture
def official() -> Official:
    return Official()


def test_a_training_pass_equals_s3prl(official: Official) -> None:
    method, tensors = official.method.train(), official.tensors
    torch.testing.assert_close(
        method.encoder.context(official.features)[-1], tensors["out.train.feature"], rtol=0, atol=5e-5
    )
    predicted, codes = method.predict(official.features, official.noise)
    torch.testing.assert_close(predicted, tensors["out.train.pred"], rtol=0, atol=5e-5)
    for index in range(2):
        assert torch.equal(codes[..., index], tensors[f"out.train.codes_{index}"])
    assert official.loss(predicted).item() == pytest.approx(official.facts["scalars"]["loss"], rel=1e-5)


def test_gradients_equal_s3prl(official: Official) -> None:
    official.loss(official.method.train().predict(official.features, official.noise).frames).backward()
    gradients = interop.to_theirs({name: p.grad for name, p in official.method.encoder.named_parameters()})
    gradients |= {name: p.grad for name, p in official.method.named_parameters() if name in interop.HEAD_KEYS}
    for name, expected in group(official.tensors, "grad").items():
        assert (gradients[name] - expected).norm() <= 1e-3 * expected.norm(), name
    norms, total = official.facts["grad_norms"], official.facts["scalars"]["grad_total_norm"]
    assert gradients.keys() == norms.keys()
    for name, norm in norms.items():
        # Below this the exact gradient is zero (biases before a batch norm) and what is stored is rounding.
        if norm > 1e-5 * total:
            assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-3), name
    # The taps of the blind spot are parameters without effect.
    assert (gradients["masked_convs.0.conv.weight"][:, :, 4:11] == 0).all()


def test_statistics_after_an_update_and_evaluation_equal_s3prl(official: Official) -> None:
    method, tensors = official.method.train(), official.tensors
    method.predict(official.features, official.noise)
    update_running_statistics(method, applied=True)
    state = method.encoder.state_dict()
    for name, expected in group(tensors, "out.train.bn").items():
        torch.testing.assert_close(state[name], expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        hidden_states = method.eval().encoder.context(official.features)
        predicted = method.predict(official.features).frames
    for block in range(3):
        expected = tensors[f"out.testing.unmasked_feat_{block}"]
        torch.testing.assert_close(hidden_states[2 * block], expected, rtol=0, atol=5e-5)
    torch.testing.assert_close(predicted, tensors["out.testing.pred"], rtol=0, atol=5e-5)
    assert official.loss(predicted).item() == pytest.approx(official.facts["scalars"]["loss_testing_eval_bn"], rel=1e-5)


def test_a_step_from_waveforms_equals_s3prls_step() -> None:
    """Front end, model and loss together; without the quantizer, whose noise each side draws for itself."""
    method = build("npc_360hr", "method.encoder.hidden_size=32", "method.encoder.quantizer=null", NO_DROPOUT).train()
    perturb(method)
    batch = collate(method, two_waveforms()[0], torch.tensor([27_200, 27_200]))
    peer = S3prlNpc(method.config)
    state = interop.to_s3prl(TrainedMethod("npc", {"encoder": method.encoder.to_config()}, method.state_dict()))
    peer.model.load_state_dict(state["model"])
    ours, theirs = method(batch).loss, peer(batch)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    gradients = torch.autograd.grad(ours, method.encoder.blocks[0].conv.weight)[0]
    expected = torch.autograd.grad(theirs, peer.model.blocks[0].conv.weight)[0]
    assert (gradients - expected).norm() <= 1e-3 * expected.norm()


def test_padding_is_not_scored() -> None:
    method = build("npc_360hr", *SMALL).eval()
    batch = collate(method, *two_waveforms())
    output = method(batch)
    features, counts = method.encoder.front_end(batch.waveforms, batch.lengths)
    predicted, codes = method.predict(features)
    rows = [(predicted[row, :n] - features[row, :n]).abs().mean(1).sum() for row, n in enumerate(counts.tolist())]
    assert batch.padded
    assert batch.sample_size == 168 + 98
    assert output.loss.item() == pytest.approx(sum(rows).item(), rel=1e-5)
    for index in range(2):
        used = torch.cat([codes[row, :n, index] for row, n in enumerate(counts.tolist())])
        assert torch.equal(output.metrics[f"codes_{index}"].counts, used.bincount(minlength=(9, 7)[index]).float())
    singles = [
        method(collate(method, batch.waveforms[i : i + 1, :n], batch.lengths[i : i + 1]))
        for i, n in enumerate(batch.lengths.tolist())
    ]
    for name in ("error_of_copy", "error_of_interpolation", "error_of_mean"):
        for part in (0, 1):
            total = sum(float(single.metrics[name][part]) for single in singles)
            assert float(output.metrics[name][part]) == pytest.approx(total, rel=1e-5), (name, part)


def test_neighbours_are_the_nearest_visible_frames() -> None:
    method = build("npc_360hr", *SMALL).eval()
    ramp = torch.arange(40.0).view(1, 40, 1).expand(1, 40, 80)
    errors = method._neighbour_errors(ramp, None)
    assert float(errors["error_of_copy"].total) == pytest.approx(3.0 * 34)
    assert float(errors["error_of_interpolation"].total) == 0
    assert errors["error_of_interpolation"].weight == 34


def reach(output: Tensor, features: Tensor, frame: int) -> list[int]:
    """Distances of the input frames on which (1, F, D) `output` at `frame` depends."""
    (gradient,) = torch.autograd.grad(output[0, frame].sum(), features, retain_graph=True)
    return (gradient[0].abs().sum(1).nonzero().flatten() - frame).tolist()


def test_blind_spot_and_receptive_field() -> None:
    method = build("npc_360hr", "method.encoder.quantizer=null", "method.encoder.hidden_size=32").eval()
    perturb(method)
    features = torch.randn(1, 60, 80, generator=torch.Generator().manual_seed(0)).requires_grad_()
    states = method.encoder.context(features)
    seen = [*range(-11, -2), *range(3, 12)]
    assert reach(states[-1], features, 30) == seen
    assert reach(method.postnet(states[-1]), features, 30) == seen
    for block in range(4):
        assert reach(states[2 * block], features, 30) == list(range(-block - 1, block + 2))
        masked = reach(states[2 * block + 1], features, 30)
        assert min(abs(distance) for distance in masked) == 3
        assert max(masked) == 7 + block + 1
    torch.testing.assert_close(states[-1], sum(states[1:-1:2]))


def test_two_micro_batches_move_the_statistics_once() -> None:
    """By the mean over the update's micro-batches, whichever rank they are on; a refused update moves nothing."""
    method = build("npc_360hr", *SMALL, NO_DROPOUT).train()
    waveforms, _ = two_waveforms()
    batches = [collate(method, waveforms[i : i + 1, :16_000], torch.tensor([16_000])) for i in range(2)]
    norm = method.encoder.blocks[0].bn1
    means = []
    for batch in batches:
        features, _ = method.encoder.front_end(batch.waveforms, None)
        block = method.encoder.blocks[0]
        means.append(block.conv(torch.nn.functional.pad(features, (0, 0, 1, 1))).mean((0, 1)).detach())
        method(batch)
    update_running_statistics(method, applied=False)
    assert (norm.running_mean == 0).all()
    for batch in batches:
        method(batch)
    update_running_statistics(method, applied=True)
    torch.testing.assert_close(norm.running_mean, 0.1 * (means[0] + means[1]) / 2, rtol=1e-4, atol=1e-6)
    assert norm.num_batches_tracked == 1


def test_bf16_follows_fp32() -> None:
    method = build("npc_360hr", *SMALL).eval()
    batch = collate(method, *two_waveforms())
    exact = method(batch).loss.item()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = method(batch).loss.item()
        output = method.train()(batch)
    output.loss.backward()
    assert rounded == pytest.approx(exact, rel=1e-2)
    assert output.loss.dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for p in method.parameters())


# Sizes and settings


def test_parameter_counts() -> None:
    """SUPERB's 19.38 M count the head; the encoder's own size is in the recipe."""
    method = on_meta("npc_960hr")
    assert count(method) == 19_380_560
    assert count(method) - count(method.encoder) == count(method.postnet) == 512 * 80 + 80
    assert count(on_meta("npc_360hr")) - count(method.encoder.quantizer) == 19_314_768
    assert method.encoder.hidden_sizes == [512] * 9


def test_flops_of_a_step() -> None:
    method = build("npc_360hr").train()
    batch = collate(method, two_waveforms()[0][:1, :16_000], torch.tensor([16_000]))
    with FlopCounterMode(display=False) as counter:
        method(batch).loss.backward()
    # The counter sees the filter bank's product too.
    assert counter.get_total_flops() == pytest.approx(method.training_flops(16_000), rel=0.03)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.encoder.kernel_size=13", "hidden whole by mask_size 5 after 4 blocks; make it at least 15"),
        ("method.encoder.mask_size=4", "mask_size odd"),
        ("method.encoder.hidden_size=256", "add up to 512"),
    ],
)
def test_settings_that_cannot_be(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("npc_360hr", override)


def test_learns_more_than_to_say_the_mean(learning_seed: int, tmp_path: Path) -> None:
    scores = train_recipe(
        "npc_tiny",
        tmp_path,
        learning_seed,
        "batch.micro_batches_per_step=1",
        "optimizer.lr=6e-3",
        "trainer.save_every=1000",
        "trainer.stop_after_updates=70",
        "trainer.validate_every=70",
        "trainer.max_validation_batches=3",
    )
    assert_learned(scores["validation/error_of_mean"], above=0.6)
    assert_learned(scores["validation/loss"], below=0.9 * scores["validation/error_of_mean"])
    # Each of two groups of 32 chooses among several codes; of one that is always chosen this would be 1.
    assert_learned(min(scores[f"validation/codes_{group}_perplexity"] for group in range(2)), above=1.8)


@pytest.mark.slow
def test_learns_more_than_to_copy(learning_seed: int, tmp_path: Path) -> None:
    scores = train_recipe("npc_tiny", tmp_path, learning_seed, "optimizer.lr=6e-3", "schedule.total_updates=300")
    assert_learned(scores["validation/loss"], below=scores["validation/error_of_copy"])


@pytest.mark.slow
def test_without_the_quantizer_it_beats_interpolation(learning_seed: int, tmp_path: Path) -> None:
    """Interpolating passes 80 numbers a frame; through the codes of the small recipe pass 10 bits.

    Nine hidden frames instead of five, since the frames on either side of five say nearly all of the middle one.
    """
    options = ["quantizer=null", "mask_size=9", "kernel_size=19"]
    training = ["optimizer.lr=6e-3", "schedule.total_updates=300", "trainer.validate_every=300"]
    encoder = (f"method.encoder.{option}" for option in options)
    scores = train_recipe("npc_tiny", tmp_path, learning_seed, *encoder, *training)
    assert_learned(scores["validation/loss"], below=scores["validation/error_of_interpolation"])


def test_figures_show_prediction_and_bands() -> None:
    method = build("npc_tiny").eval()
    with torch.no_grad():
        figures = method.figures(collate(method, *two_waveforms()))
    assert [len(figures[name].axes) for name in ("prediction", "band_error")] == [2, 1]
    assert value(method(collate(method, *two_waveforms())), "error_of_mean") > 0.5
