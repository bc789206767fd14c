"""Mockingjay, TERA and Audio ALBERT against what s3prl's pre-training computed, and the method's own promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import s3prl_compat  # noqa: F401  (must come before s3prl)
import torch
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
    two_waveforms,
    value,
    write_checkpoint,
)
from torch import Tensor

from pretrain import Upstream
from pretrain.config import ConfigError, typed
from pretrain.data.alignments import frame_centres
from pretrain.method import Batch, Example, StepOutput
from pretrain.objectives.figures import band_errors
from pretrain.probe.collect import upstream_source
from pretrain.weights.interop.speech_encoder import split_qkv
from recipes.mockingjay import interop
from recipes.mockingjay.method import MockingjayConfig, MockingjayMethod
from recipes.mockingjay.reference_steps import REFERENCE_STEPS

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = ["mockingjay_tiny", "tera_tiny", "audio_albert_tiny"]
FRONT_END = {"kind": "log_mel", "frame_step": 1, "normalization": {"kind": "utterance"}, "level_db": -25.0}


class Official:
    """One fixture: s3prl's numbers, and our method with its weights; features and alteration are given."""

    def __init__(self, name: str) -> None:
        self.facts, self.tensors = load_fixture(FIXTURES, name)
        self.scalars: dict[str, float] = self.facts["scalars"]
        self.method = self._method()
        self.lengths = torch.tensor(self.facts["lengths"])

    def _method(self) -> MockingjayMethod:
        task, bands = self.facts["task"], self.tensors["in.spec"].shape[2]
        audio = interop.audio_config(FRONT_END | {"bins": bands}, None)
        state = group(self.tensors, "state")
        checkpoint = {name: group(state, name) for name in ("Transformer", "SpecHead")}
        checkpoint |= {"Config": {}, "Upstream_Config": {"transformer": self.facts["config"], "audio": audio}}
        imported = interop.from_pt(checkpoint)
        alteration = {name: task[name] for name in interop._TASK}
        alteration |= {"zero_share": 0.8, "replace_share": 0.1, "noise_std": 0.2}
        values = {"name": "mockingjay", "encoder": imported.encoder_config, "target": None, "alteration": alteration}
        method = MockingjayMethod(typed(MockingjayConfig, values))
        method.load_state_dict(method_state(imported))
        return method.train()

    def batch(self) -> Batch:
        """s3prl's label mask in our terms: frames scored whole, and one block of bands per row."""
        label = self.tensors["in.mask_label"].bool()
        mask = label.all(2)
        bands = [
            (row & ~whole[:, None]).any(0).nonzero().flatten().tolist() for row, whole in zip(label, mask, strict=True)
        ]
        extras = {
            "mask": mask,
            "band": torch.tensor([(band[0], band[-1] + 1) if band else (0, 0) for band in bands]),
            "scored_positions": label.any(2).flatten().nonzero().flatten(),
            "copied_positions": label.any(2).flatten().nonzero().flatten(),
        }
        rows = torch.arange(len(label))
        return Batch(torch.zeros(len(label), 1), self.lengths, int(label.sum()), rows, extras=extras)


@pytest.fixture(scope="module", params=NAMES)
def official(request: pytest.FixtureRequest) -> Official:
    return Official(request.param)


@pytest.fixture(scope="module")
def output(official: Official) -> StepOutput:
    """Our forward on their altered input, with the gradients of the mean loss left on the parameters."""
    tensors, batch = official.tensors, official.batch()
    output = official.method.reconstruct(tensors["in.spec_masked"], tensors["in.spec_target"], official.lengths, batch)
    (output.loss / batch.sample_size).backward()
    return output


def test_the_loss_is_s3prls(official: Official, output: StepOutput) -> None:
    assert official.batch().sample_size == official.scalars["masked_elements"]
    assert loss_per_unit(output, official.batch()) == pytest.approx(official.scalars["loss"], rel=1e-5)
    label = official.tensors["in.mask_label"].bool()
    assert value(output, "error_of_mean") == pytest.approx(
        official.tensors["in.spec_target"][label].abs().mean().item(), rel=1e-5
    )


def test_hidden_states_and_predictions_of_the_altered_input(official: Official) -> None:
    with torch.no_grad():
        states = official.method.encoder.context(official.tensors["in.spec_masked"], official.lengths)
        predictions = official.method.spec_head(states[-1])
    valid = torch.arange(states[0].shape[1]) < official.lengths[:, None]
    assert len(states) == official.facts["config"]["num_hidden_layers"] + 1
    for index, state in enumerate(states):
        reference = official.tensors[f"out.masked.hidden_{index}"]
        torch.testing.assert_close(state[valid], reference[valid], rtol=0, atol=5e-5)
    torch.testing.assert_close(predictions[valid], official.tensors["out.pred"][valid], rtol=0, atol=5e-5)


def test_gradients_in_full_and_by_norm(official: Official, output: StepOutput) -> None:
    gradients = their_names({name: p.grad for name, p in official.method.named_parameters()})
    full = group(official.tensors, "grad")
    assert full
    for name, expected in full.items():
        assert (gradients[name] - expected).norm() <= 1e-3 * expected.norm(), name
    norms, total = official.facts["grad_norms"], official.scalars["grad_total_norm"]
    assert gradients.keys() == norms.keys()
    for name, norm in norms.items():
        # Below this the exact gradient is zero (key biases) and what is stored is rounding.
        if norm > 1e-5 * total:
            assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-3), name


def their_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by our names to s3prl's, the shared layer once."""
    encoder = {name.removeprefix("encoder."): t for name, t in tensors.items() if name.startswith("encoder.")}
    head = {name: tensor for name, tensor in tensors.items() if name.startswith("spec_head.")}
    named = {f"Transformer.{k}": t for k, t in interop.ENCODER_KEYS.to_theirs(split_qkv(encoder)).items()}
    return named | {f"SpecHead.{key}": tensor for key, tensor in interop.HEAD_KEYS.to_theirs(head).items()}


# Reference sheet, section 0: s3prl's models counted, the upstream alone and with the pre-training head.
SIZES = {
    "mockingjay": (85_118_208, 85_864_905),
    "mockingjay_100hr": (21_327_360, 21_981_008),
    "tera": (21_327_360, 21_981_008),
    "tera_fbankBase_T_F_AdamW_b32_200k_100hr": (21_450_240, 22_226_928),
    "audio_albert": (7_151_616, 7_805_264),
}


@pytest.mark.parametrize("recipe", SIZES)
def test_published_sizes(recipe: str) -> None:
    method = on_meta(recipe)
    assert (count(method.encoder), count(method)) == SIZES[recipe]


@pytest.mark.parametrize("recipe", SIZES)
def test_every_parameter_is_in_one_group_and_only_matrices_decay(recipe: str) -> None:
    method = on_meta(recipe)
    decayed, free = method.parameter_groups()
    assert {id(p) for p in (*decayed["params"], *free["params"])} == {id(p) for p in method.parameters()}
    assert "weight_decay" not in decayed
    assert free["weight_decay"] == 0.0
    names = {id(p): name for name, p in method.named_parameters()}
    assert all("bias" in names[id(p)] or "norm" in names[id(p)] for p in free["params"])
    assert not any("bias" in names[id(p)] or "norm" in names[id(p)] for p in decayed["params"])


def example(row: int, samples: int, epoch: int = 0) -> Example:
    noise = np.random.default_rng(row).standard_normal(samples, dtype=np.float32)
    return Example(torch.from_numpy(0.1 * noise), row, 0, {}, np.random.default_rng([epoch, row]))


def collate(method: MockingjayMethod, *samples: int, epoch: int = 0) -> Batch:
    collator = method.collator(method.config)
    return collator([example(row, length, epoch) for row, length in enumerate(samples)])


TERA_ALL = ("method.alteration.mask_frequency=0.2", "method.alteration.noise_proportion=0.15")
AXES = {
    "time": (),
    "frequency": ("method.alteration.mask_proportion=0", "method.alteration.mask_frequency=0.2"),
    "magnitude": ("method.alteration.mask_proportion=0", "method.alteration.noise_proportion=0.5"),
    "all": TERA_ALL,
    "linear target": ("method.target={kind:log_linear,level_db:-25.0,frame_step:1,normalization:{kind:utterance}}",),
    "filter banks": (
        "method.encoder.front_end={kind:fbank,window:povey,low_hz:20.0,deltas:2,level_db:null}",
        *TERA_ALL,
    ),
}


@pytest.mark.parametrize("axes", AXES)
def test_a_step_scores_what_was_altered_and_padding_never(axes: str) -> None:
    method = build("mockingjay_tiny", *AXES[axes]).train()
    batch = collate(method, 32_000, 24_000)
    assert batch.padded
    output = method(batch)
    (output.loss / batch.sample_size).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in method.parameters())
    frames = method.encoder.front_end.frames(32_000)
    real = method.encoder.front_end.frames(24_000)
    positions = batch.extras["scored_positions"]
    assert positions.max() < frames + real
    assert 0 < batch.sample_size <= (frames + real) * method.target_dim
    assert value(output, "error") == pytest.approx(loss_per_unit(output, batch))
    if axes == "all":
        parts = output.metrics["error_frames"].total + output.metrics["error_bands"].total
        assert parts.item() == pytest.approx(output.loss.item(), rel=1e-5)


def test_the_alteration_differs_from_epoch_to_epoch() -> None:
    method = build("mockingjay_tiny")
    first, again, other = (collate(method, 32_000, epoch=epoch).extras["mask"] for epoch in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_loss_is_that_of_the_written_out_formula() -> None:
    """Means over elements, by the definition, from what the public parts return."""
    method = build("tera_tiny", "method.alteration.noise_proportion=0").train()
    batch = collate(method, 32_000, 24_000, 24_000)
    with torch.no_grad():
        features, targets, frame_lengths = method.features(batch)
        altered = features.clone()
        label = torch.zeros_like(features, dtype=torch.bool)
        for row in range(3):
            first, last = batch.extras["band"][row]
            frames = features.shape[1]
            altered[row] = features[row][batch.extras["source"][row] - row * frames]
            altered[row, batch.extras["zeroed"][row]] = 0.0
            altered[row, :, first:last] = 0.0
            label[row, batch.extras["mask"][row]] = True
            label[row, : frame_lengths[row], first:last] = True
        predictions = method.spec_head(method.encoder.context(altered, frame_lengths)[-1])
        expected = (predictions - targets).abs()[label]
        output = method(batch)
    assert batch.sample_size == label.sum() == len(expected)
    assert output.loss.item() == pytest.approx(expected.sum().item(), rel=1e-5)


def test_a_padded_row_gives_the_states_of_the_waveform_alone() -> None:
    encoder = build("mockingjay_tiny").encoder.eval()
    waveforms, lengths = two_waveforms()
    with torch.no_grad():
        states, frame_lengths = encoder(waveforms, lengths)
        alone, _ = encoder(waveforms[1:, : lengths[1]], None)
    for state, single in zip(states, alone, strict=True):
        torch.testing.assert_close(state[1, : frame_lengths[0][1]], single[0], rtol=0, atol=5e-5)


def test_positions_go_on_beyond_any_table() -> None:
    positions = build("mockingjay_tiny").encoder.positions
    cpu = torch.device("cpu")
    first = positions(10, cpu).clone()
    assert torch.equal(positions(30_000, cpu)[:10], first)
    column = torch.arange(96)
    angle = 29_999 / 10_000 ** (2 * (column // 2).double() / 96)
    expected = torch.where(column % 2 == 0, angle.sin(), angle.cos())
    torch.testing.assert_close(positions(30_000, cpu)[-1], expected.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("recipe", ["mockingjay_tiny", "audio_albert_tiny"])
def test_fewer_layers_and_checkpointed_activations_change_nothing(recipe: str) -> None:
    encoder = build(recipe).encoder.eval()
    waveforms, lengths = two_waveforms()
    with torch.no_grad():
        states, _ = encoder(waveforms, lengths)
        for layer in (0, 1):
            fewer, _ = encoder.truncated(layer)(waveforms, lengths)
            assert len(fewer) == layer + 1
            torch.testing.assert_close(fewer[-1], states[layer], rtol=0, atol=0)
    gradients = []
    for checkpoint_activations in (False, True):
        if checkpoint_activations:
            encoder.checkpoint_activations()
        encoder.zero_grad()
        encoder(waveforms, lengths)[0][-1].square().sum().backward()
        gradients.append([p.grad.clone() for p in encoder.parameters()])
    for kept, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, checkpointed)


@pytest.mark.parametrize(("axes", "centre"), [("time", 0), ("filter banks", 200)])
def test_the_probe_knows_where_frames_lie(axes: str, centre: int, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, build("mockingjay_tiny", *AXES[axes]))
    source = upstream_source(Upstream("mockingjay_tiny", str(tmp_path)), torch.device("cpu"), [0, 1])
    # A click of one sample is loudest in the frames around it.
    click = torch.zeros(16_000)
    click[8_000] = 1.0
    front_end = build("mockingjay_tiny", *AXES[axes]).encoder.front_end
    loud = front_end(click[None], None)[0][0, :, :80].mean(1)
    centres = frame_centres(len(loud), source.strides[0], source.first_centres[0])
    assert centres[0] == centre
    assert abs(centres[loud > loud.max() - 0.5].mean() - 8_000) <= 80


def test_figures_show_every_stage_and_the_error_per_band() -> None:
    method = build("tera_tiny").eval()
    with torch.no_grad():
        figures = method.figures(collate(method, 32_000, 24_000))
    assert [axis.get_title() for axis in figures["spectrograms"].axes] == ["heard", "altered", "predicted", "true"]
    lines = figures["error_per_band"].axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["prediction", "mean"]
    assert all(len(line.get_ydata()) == 80 for line in lines)


def test_band_errors_are_means_over_the_marked_elements() -> None:
    predictions, targets = torch.tensor([[1.0, 5.0], [3.0, 1.0]]), torch.zeros(2, 2)
    assert band_errors(predictions, targets).tolist() == [2.0, 3.0]
    assert band_errors(predictions, targets, torch.tensor([[True, True], [False, True]])).tolist() == [1.0, 3.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((*AXES["linear target"], "method.alteration.mask_frequency=0.2"), "hidden bands of 80 name none"),
        (
            (
                "method.target={kind:fbank,bins:80,window:povey,low_hz:20.0,deltas:0,frame_step:1,"
                "normalization:{kind:utterance}}",
            ),
            "other frames than",
        ),
    ],
)
def test_targets_that_do_not_fit_say_so(options: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("mockingjay_tiny", *options)


@pytest.mark.parametrize("recipe", ["mockingjay_tiny", "tera_tiny", "audio_albert_tiny"])
def test_the_benchmarks_peer_computes_the_same_loss(recipe: str) -> None:
    ours = build(recipe, "method.alteration.noise_proportion=0").train()
    theirs: Any = REFERENCE_STEPS["s3prl"](ours.config).train()
    state = their_names(ours.state_dict())
    encoder = group(state, "Transformer")
    if ours.config.encoder.share_layer:
        shared = group(encoder, "encoder.layer.0")
        encoder |= {f"encoder.layer.1.{key}": tensor for key, tensor in shared.items()}
    theirs.model.load_state_dict(encoder)
    theirs.head.load_state_dict(group(state, "SpecHead"))
    batch = collate(ours, 32_000, 32_000)
    with torch.no_grad():
        assert theirs(batch).item() == pytest.approx(ours(batch).loss.item(), rel=1e-4)


TINY = ["mockingjay_tiny", "tera_tiny", "audio_albert_tiny"]


@pytest.mark.parametrize("recipe", TINY)
def test_it_learns_more_than_to_say_the_mean(recipe: str, learning_seed: int, tmp_path: Path) -> None:
    """Half a second of context, in which attention finds the neighbours of a hidden frame sooner."""
    shorter = (
        "crop={min_seconds:0.5,max_seconds:0.5}",
        "schedule={warmup_updates:40,total_updates:150}",
        "trainer={validate_every:150,save_every:150,max_validation_batches:6}",
    )
    last = train_recipe(recipe, tmp_path, learning_seed, *shorter)
    # Of the same hidden elements: normalised features have mean 0.
    assert_learned(last["validation/loss"], below=last["validation/error_of_mean"])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", TINY)
def test_it_learns_more_than_to_copy(recipe: str, learning_seed: int, tmp_path: Path) -> None:
    """Spans of 12 frames: of the recipe's 7 the frame before the span says so much that little is left to gain."""
    spans = "method.alteration={mask_consecutive_min:12,mask_consecutive_max:12}"
    longer = ("schedule.total_updates=400", "trainer={validate_every:400,save_every:400}")
    last = train_recipe(recipe, tmp_path, learning_seed, spans, *longer)
    # Of the frames hidden whole the one before the span is the best neighbour.
    assert_learned(last["validation/error_frames"], below=last["validation/error_frames_of_copy"])
    assert_learned(last["validation/loss"], below=last["validation/error_of_mean"])
