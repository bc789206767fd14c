"""DistilHuBERT against s3prl's numbers and model: states, predictions, loss, gradients; teachers; what it learns."""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import s3prl_compat  # noqa: F401  (must come before s3prl)
import torch
from learning import assert_learned
from recipe_checks import (
    build,
    count,
    group,
    hidden_states,
    load_fixture,
    method_state,
    on_meta,
    perturb,
    same_tensors,
    train_recipe,
    two_waveforms,
    value,
    write_exports,
)
from safetensors.torch import load_file
from torch import Tensor

from pretrain import Upstream
from pretrain.config import ConfigError, recipe_method_block, typed
from pretrain.errors import UserError
from pretrain.method import Batch, Example
from pretrain.models.speech_encoder import SpeechEncoder
from pretrain.models.teacher import TeacherConfig
from pretrain.weights.interop.speech_encoder import state_to_fairseq
from pretrain.weights.interop.types import InteropError, TrainedMethod
from recipes.distilhubert import interop
from recipes.distilhubert.method import DistilHubertConfig, DistilHubertMethod, head_loss
from recipes.distilhubert.reference_steps import S3prlDistiller

FIXTURES = Path(__file__).parent / "fixtures"


class Official:
    """s3prl's numbers of one training pass, and our method with s3prl's weights on s3prl's batch."""

    def __init__(self) -> None:
        self.facts, self.tensors = load_fixture(FIXTURES, "distilhubert_tiny")
        self.scalars = self.facts["scalars"]
        imported = interop.from_pt({"Config": {"distiller": self.facts["config"]}, "Distiller": self.state()})
        teacher = imported.encoder_config | {"encoder_layers": 4}
        values = {
            "name": "distilhubert",
            "encoder": imported.encoder_config,
            "teacher": {"method": "hubert", "encoder": teacher, "weights": None},
            "pred_layer_id": self.facts["config"]["pred_layer_id"],
            "cosine_loss": self.facts["config"]["cosine_loss"],
            "init_teacher_conv_layers": False,
            "init_teacher_encoder_layers": False,
        }
        self.method = DistilHubertMethod(typed(DistilHubertConfig, values)).train()
        missing, unexpected = self.method.load_state_dict(method_state(imported), strict=False)
        assert not unexpected
        assert all(name.startswith("teacher.") for name in missing)
        lengths = (~self.tensors["in.padding_mask"]).sum(1)
        self.batch = collate_rows(self.method, self.tensors["in.wav"], lengths)
        self.valid = self.tensors["out.keep_mask"].bool()
        self.targets = [self.tensors[f"in.teacher_hidden_{layer}"] for layer in values["pred_layer_id"]]

    def state(self) -> dict[str, Tensor]:
        return group(self.tensors, "state")


def collate_rows(method: DistilHubertMethod, waveforms: Tensor, lengths: Tensor) -> Batch:
    """The method's batch of (B, T) waveforms with (B,) lengths in samples."""
    examples = [
        Example(waveform[:length], row, 0, {}, np.random.default_rng(row))
        for row, (waveform, length) in enumerate(zip(waveforms, lengths.tolist(), strict=True))
    ]
    return method.collator(method.config)(examples)


@pytest.fixture(scope="module")
def official() -> Official:
    return Official()


def test_hidden_states_and_predictions(official: Official) -> None:
    method, tensors = official.method, official.tensors
    assert official.batch.padded
    features = method.encoder.features(official.batch.waveforms, official.batch.lengths)
    assert torch.equal(features.frame_lengths, official.valid.sum(1))
    torch.testing.assert_close(features.conv, tensors["out.feat"], rtol=0, atol=2e-5)
    states = method.encoder.context(features.projected, features.frame_lengths)
    # Of the padding too, which the loss counts.
    for index, state in enumerate(states):
        torch.testing.assert_close(state, tensors[f"out.hidden_{index}"], rtol=0, atol=5e-5)
    predictions = torch.stack(method.predictions(official.batch), 1)
    torch.testing.assert_close(predictions, tensors["out.pred"], rtol=0, atol=5e-5)


def test_loss_and_its_terms(official: Official) -> None:
    output, scalars = official.method.distil(official.batch, official.targets), official.scalars
    assert official.batch.sample_size == 2 * 49
    per_frame = output.total(official.batch).item() / official.batch.sample_size
    assert per_frame == pytest.approx(scalars["loss"], rel=1e-5)
    names = [name for name in scalars if name.startswith(("rec_", "sim_", "tar_norm_"))]
    assert len(names) == 8
    for name in names:
        assert value(output, name) == pytest.approx(scalars[name], rel=1e-5), name


def test_gradients_in_full_and_by_norm(official: Official) -> None:
    method = official.method
    method.zero_grad()
    output = method.distil(official.batch, official.targets)
    (output.total(official.batch) / official.batch.sample_size).backward()
    state = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    ours = interop.to_s3prl(trained(method, state))["Distiller"]
    for name, expected in group(official.tensors, "grad").items():
        assert (ours[name] - expected).norm() <= 1e-3 * expected.norm(), name
    norms, total = official.facts["grad_norms"], official.scalars["grad_total_norm"]
    assert ours.keys() == norms.keys()
    for name, norm in norms.items():
        # Below this the exact gradient is zero (key biases) and what is stored is rounding.
        if norm > 1e-5 * total:
            assert ours[name].norm().item() == pytest.approx(norm, rel=1e-3), name
    assert torch.nn.utils.get_total_norm(list(ours.values())).item() == pytest.approx(total, rel=1e-4)


def trained(method: DistilHubertMethod, state: dict[str, Tensor] | None = None) -> TrainedMethod:
    return TrainedMethod("distilhubert", asdict(method.config), method.state_dict() if state is None else state)


@pytest.fixture(scope="module")
def tiny() -> DistilHubertMethod:
    """The tiny recipe with every parameter off its initial value."""
    method = build("distilhubert_tiny")
    perturb(method)
    return method.eval()


def variant(method: DistilHubertMethod, seed: int = 0, **changes: Any) -> DistilHubertMethod:
    """A method with fresh weights whose configuration differs from that of `method` by `changes`."""
    torch.manual_seed(seed)
    return DistilHubertMethod(replace(method.config, **changes)).eval()


def batch_of(method: DistilHubertMethod, samples: int = 16_000, shorter: int | None = None) -> Batch:
    return collate_rows(method, *two_waveforms(samples, shorter or samples))


@pytest.mark.parametrize("shorter", [16_000, 11_300])
@pytest.mark.parametrize("layers", [[1, 2, 3], [3, 0], [2]])
def test_s3prls_model_computes_our_loss_from_our_weights(
    tiny: DistilHubertMethod, layers: list[int], shorter: int
) -> None:
    """Live: s3prl's `DistillerModel`, and the HuBERT that it ships as the teacher; a padded batch too."""
    method = variant(tiny, pred_layer_id=layers, cosine_loss=0.7)
    perturb(method)
    peer = S3prlDistiller(method.config).eval()
    peer.distiller.load_state_dict(interop.to_s3prl(trained(method))["Distiller"])
    teacher = cast(SpeechEncoder, method.teacher.network)
    missing, unexpected = peer.teacher.load_state_dict(
        state_to_fairseq(teacher.state_dict(), teacher.to_config()), strict=False
    )
    assert not unexpected
    assert {name.split(".")[0] for name in missing} <= {"final_proj", "label_embs_concat"}
    batch = batch_of(method, 16_000, shorter)
    with torch.no_grad():
        expected = peer(batch)
        output = method(batch)
    torch.testing.assert_close(output.total(batch), expected, rtol=1e-5, atol=0)


def test_a_constant_costs_what_loss_of_mean_says(tiny: DistilHubertMethod) -> None:
    """With heads that say the mean of the targets, whatever they hear, the loss is that of the mean."""
    method = variant(tiny)
    batch = batch_of(method)
    with torch.no_grad():
        method.heads.weight.zero_()
        targets = method.targets_of(batch.waveforms, None)
        method.heads.bias.copy_(torch.stack([target.mean((0, 1)) for target in targets]))
        output = method(batch)
    per_frame = output.total(batch).item() / batch.sample_size
    assert per_frame == pytest.approx(value(output, "loss_of_mean"), rel=1e-5)


def test_a_perfect_prediction_costs_the_least_cosine_term(tiny: DistilHubertMethod) -> None:
    targets = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    rec, sim = head_loss(targets, targets)
    assert rec.item() == 0
    assert sim.item() == pytest.approx(math.log1p(math.exp(-1)), rel=1e-6)  # 0.3133, at a cosine of 1


def test_published_sizes() -> None:
    """SUPERB's table has 23.49 M: without heads and teacher."""
    method = on_meta("distilhubert_base")
    assert count(method.encoder) == 23_491_200
    assert count(method.encoder) + count(method.heads) == 27_034_752
    groups = method.parameter_groups()
    assert sum(p.numel() for group in groups for p in group["params"]) == 27_034_752
    # s3prl decays all but biases: a norm's weight decays.
    by_name = {id(p): index for index, group in enumerate(groups) for p in group["params"]}
    decayed = {name for name, p in method.named_parameters() if by_name.get(id(p)) == 0}
    assert "encoder.encoder.layer_norm.weight" in decayed
    assert "encoder.encoder.layers.0.fc1.bias" not in decayed
    assert groups[1]["weight_decay"] == 0


def test_the_student_starts_as_its_teacher(tiny: DistilHubertMethod) -> None:
    method = variant(tiny)
    before = {name: tensor.clone() for name, tensor in method.encoder.state_dict().items()}
    teacher = method.teacher.network.state_dict()
    method.begin({})
    after = method.encoder.state_dict()
    copied = {name for name in after if torch.equal(after[name], teacher[name])}
    # s3prl does not copy the norm behind the positions; as fresh, it is equal anyway.
    expected = {name for name in after if not name.startswith("encoder.layer_norm.")}
    assert copied == expected | {"encoder.layer_norm.weight", "encoder.layer_norm.bias"}
    assert any(not torch.equal(after[name], before[name]) for name in after)
    neither = variant(tiny, init_teacher_conv_layers=False, init_teacher_encoder_layers=False)
    neither.begin({})
    assert all(torch.equal(tensor, before[name]) for name, tensor in neither.encoder.state_dict().items())


def test_the_norm_behind_the_positions_is_not_the_teachers(tiny: DistilHubertMethod) -> None:
    method = variant(tiny)
    perturb(method.teacher)
    method.begin({})
    weight = "encoder.layer_norm.weight"
    assert torch.equal(method.encoder.state_dict()[weight], torch.ones(96))
    assert not torch.equal(method.teacher.network.state_dict()[weight], torch.ones(96))


def test_the_teacher_is_as_in_use_and_takes_no_gradient(tiny: DistilHubertMethod) -> None:
    """No dropout, whatever the recipe of the teacher says; nothing is kept for a backward."""
    teacher = {**asdict(tiny.config)["teacher"], "weights": None}
    teacher["encoder"] |= {"dropout": 0.5, "encoder_layerdrop": 0.5}
    method = variant(tiny, teacher=TeacherConfig(**teacher)).train()
    batch = batch_of(method)
    first, second = (method.targets_of(batch.waveforms, None) for _ in range(2))
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(first, second, strict=True))
    method(batch).total(batch).backward()
    assert all(p.grad is None for p in method.teacher.parameters())
    assert all(p.grad is not None for name, p in method.named_parameters() if not name.startswith("teacher."))


@pytest.fixture(scope="module")
def taught(tiny: DistilHubertMethod, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A HuBERT in a run ("checkpoint"), and its exports by format."""
    method = build("hubert_tiny")
    perturb(method)
    return write_exports(tmp_path_factory.mktemp("hubert"), method)


@pytest.mark.parametrize("form", ["checkpoint", "native", "huggingface", "s3prl"])
def test_any_source_of_weights_is_a_teacher(tiny: DistilHubertMethod, taught: dict[str, Path], form: str) -> None:
    """Its shape comes from there too; targets are what `Upstream` gives."""
    config = replace(tiny.config, teacher=TeacherConfig("hubert", None, str(taught[form])))
    config = DistilHubertMethod.complete(config, None)
    method = DistilHubertMethod(config).eval()
    method.begin({})
    upstream = Upstream("hubert", str(taught[form])).eval()
    waveforms, lengths = two_waveforms(16_000, 16_000)
    states, _ = hidden_states(upstream, waveforms, lengths)
    for target, layer in zip(method.targets_of(waveforms, None), config.pred_layer_id, strict=True):
        torch.testing.assert_close(target, states[layer][:, : target.shape[1]], rtol=1e-5, atol=1e-5)
    assert torch.equal(method.encoder.encoder.layers[0].fc1.weight, upstream.encoder.encoder.layers[0].fc1.weight)


# Rates of 100 and 25 frames a second beside the student's 50, or 25 where its last convolution has twice the stride.
WIDER = [[64, 10, 5], [64, 3, 2], [64, 3, 2], [64, 3, 2], [64, 3, 2], [64, 2, 2], [64, 4, 4]]


@pytest.mark.parametrize(
    ("recipe", "layers", "step"), [("apc_tiny", [1, 2], 2), ("mockingjay_tiny", [0, 1], 2), ("wav2vec2_tiny", [1], 1)]
)
def test_methods_of_every_kind_teach(tiny: DistilHubertMethod, recipe: str, layers: list[int], step: int) -> None:
    """Of a teacher on filter banks, which has a frame every 10 ms, the student names every second one."""
    method = of_teacher(tiny, recipe, pred_layer_id=layers)
    assert method.step == step
    batch = batch_of(method)
    targets = method.targets_of(batch.waveforms, None)
    states, _ = method.teacher(batch.waveforms, None)
    for target, layer in zip(targets, layers, strict=True):
        assert torch.equal(target[:, 7], states[layer][:, 7 * step])
    output = method(batch)
    assert torch.isfinite(output.total(batch))
    assert method.training_flops(16_000) > method.encoder.training_flops(16_000)


def test_a_teacher_of_25_frames_needs_a_student_of_25(tiny: DistilHubertMethod) -> None:
    message = r"method\.teacher: makes 25 frames a second, the student 50; the teacher's rate must be a multiple"
    with pytest.raises(ConfigError, match=message):
        of_teacher(tiny, "mpc_tiny", pred_layer_id=[1])
    slower = replace(tiny.config.encoder, conv_feature_layers=WIDER)
    method = of_teacher(tiny, "mpc_tiny", pred_layer_id=[1], encoder=slower)
    batch = batch_of(method)
    assert torch.isfinite(method(batch).total(batch))


def of_teacher(tiny: DistilHubertMethod, recipe: str, **changes: Any) -> DistilHubertMethod:
    """A student, which starts from nothing, of the untrained network of a recipe."""
    block = recipe_method_block(recipe)
    teacher = TeacherConfig(block["name"], block["encoder"], None)
    nothing = {"init_teacher_conv_layers": False, "init_teacher_encoder_layers": False}
    return variant(tiny, teacher=teacher, **nothing, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pred_layer_id": [1, 4]}, r"method\.pred_layer_id: 4 is no hidden state of the teacher; give numbers from 0"),
        ({"pred_layer_id": [1, 1]}, r"method\.pred_layer_id: \[1, 1\]; list hidden states of the teacher, each"),
        ({"cosine_loss": -1.0}, r"method\.cosine_loss: -1 is negative"),
    ],
)
def test_impossible_configurations_say_why(tiny: DistilHubertMethod, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        variant(tiny, **changes)


def test_a_student_of_another_shape_cannot_start_from_the_teacher(tiny: DistilHubertMethod) -> None:
    longer = replace(tiny.config.encoder, encoder_layers=4)
    message = r"init_teacher_encoder_layers: encoder\.layers\.3\..*: absent in the teacher, \(.*\) in the student"
    with pytest.raises(ConfigError, match=message):
        variant(tiny, encoder=longer)
    assert variant(tiny, encoder=longer, init_teacher_encoder_layers=False)
    narrow = replace(tiny.config.encoder, encoder_embed_dim=48)
    message = (
        r"init_teacher_conv_layers: post_extract_proj\.weight: \(96, 64\) in the teacher, \(48, 64\) in the student"
    )
    with pytest.raises(ConfigError, match=message):
        variant(tiny, encoder=narrow)
    conformer = replace(tiny.config.encoder, layer_type="conformer", pos_enc_type="rope")
    with pytest.raises(ConfigError, match="layer_type: conformer; the student is a Transformer"):
        variant(tiny, encoder=conformer)


SIZES = (
    "{encoder_embed_dim:48,encoder_ffn_embed_dim:96,conv_feature_layers:"
    "[[24,10,5],[24,3,2],[24,3,2],[24,3,2],[24,3,2],[24,2,2],[24,2,2]]}"
)
SHORT = (
    f"method.encoder={SIZES}",
    "batch={seconds_per_micro_batch:4,micro_batches_per_step:1}",
    "crop.max_seconds=2.0",
    "trainer.save_every=1",
    "trainer.max_validation_batches=1",
    "trainer.validate_every=1",
)


def test_a_run_takes_its_teachers_shape_from_the_weights_and_resumes_without_them(tmp_path: Path) -> None:
    hubert = build("hubert_tiny", SHORT[0])
    perturb(hubert)
    weights = write_exports(tmp_path / "teacher", hubert)["native"]
    options = [*SHORT, f"method.teacher={{encoder:null,weights:{weights}}}"]
    train_recipe("distilhubert_tiny", tmp_path, 0, *options, "trainer.stop_after_updates=1")
    shutil.rmtree(weights)
    train_recipe("distilhubert_tiny", tmp_path, 0, *options, "trainer.stop_after_updates=2")
    run = tmp_path / "distilhubert_tiny"
    first, second = (load_file(run / "checkpoints" / f"step_{n:08d}" / "model.safetensors") for n in (1, 2))
    # The teacher is in the checkpoint as it was, and in no export.
    for name, tensor in hubert.encoder.state_dict().items():
        assert torch.equal(second[f"teacher.{name}"], tensor), name
    assert not same_tensors(first, second)
    exported = load_file(run / "export" / "encoder.safetensors")
    assert exported.keys() == {name.removeprefix("encoder.") for name in second if name.startswith("encoder.")}


def test_a_teacher_that_is_not_there_is_named(tiny: DistilHubertMethod) -> None:
    absent = replace(tiny.config, teacher=TeacherConfig("hubert", None, "outputs/absent"))
    with pytest.raises(InteropError, match="outputs/absent: no such file or directory; give a run"):
        DistilHubertMethod.complete(absent, None)
    with pytest.raises(InteropError, match="outputs/absent: no such file or directory; give a run"):
        variant(tiny, teacher=replace(absent.teacher, encoder=tiny.config.teacher.encoder)).begin({})
    with pytest.raises(
        UserError, match=r"method\.teacher\.encoder: missing; state the teacher's encoder, or its weights"
    ):
        DistilHubertMethod.complete(replace(tiny.config, teacher=TeacherConfig("hubert", None, None)), None)
    # A run that is resumed knows the shape.
    earlier = asdict(tiny.config)
    assert DistilHubertMethod.complete(absent, earlier).teacher.encoder == tiny.config.teacher.encoder


def test_it_learns_more_than_the_mean_of_its_targets(learning_seed: int, tmp_path: Path) -> None:
    """Seconds of training, of a smaller network and a teacher as small."""
    last = train_recipe(
        "distilhubert_tiny",
        tmp_path,
        learning_seed,
        f"method={{encoder:{SIZES},teacher:{{encoder:{SIZES}}}}}",
        "batch={seconds_per_micro_batch:8,micro_batches_per_step:1}",
        "crop.max_seconds=2.0",
        "optimizer.lr=5e-3",
        "schedule={warmup_updates:10,total_updates:60}",
        "trainer={log_every:100,max_validation_batches:3}",
    )
    assert_learned(last["validation/loss"], below=last["validation/loss_of_mean"])


@pytest.mark.slow
def test_the_tiny_recipe_as_it_is_learns(learning_seed: int, tmp_path: Path) -> None:
    last = train_recipe("distilhubert_tiny", tmp_path, learning_seed)
    assert_learned(last["validation/loss"], below=last["validation/loss_of_mean"])
