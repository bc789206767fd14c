"""Teachers: always in eval, averaged as written by hand at every ZeRO stage, resumed, never exported; frozen ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from recipe_checks import build, perturb, write_checkpoint
from safetensors.torch import load_file
from small_hubert import batch, small_method
from small_run import SMALL, write_data
from small_teacher import DIVIDED, UPDATES, ZERO, TaughtMethod, averaged, decay, plain_torch
from torch import Tensor, nn
from two_ranks import taught_run

from pretrain.config import compose_recipe, run_config
from pretrain.errors import UserError
from pretrain.method import Batch, Progress, StepOutput, TargetInfo
from pretrain.models.teacher import Teacher, TeacherConfig, frozen_teacher, linear_ramp, load_teacher
from pretrain.training.setup import build_trainer
from pretrain.training.trainer import Trainer
from pretrain.weights.export import ExportConfig, export
from pretrain.weights.interop.types import InteropError
from pretrain.world import World
from recipes.hubert.method import HubertConfig, HubertMethod

# With `--dist loadgroup` one worker launches the two ranks for all files that ask for them.
pytestmark = pytest.mark.xdist_group("two_ranks")


def network() -> nn.Module:
    """Layers with everything that an update must treat: a shared matrix, dropout, running statistics."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4))
    layers[3].weight = layers[0].weight
    return layers


def moved(module: nn.Module) -> nn.Module:
    """A copy with other weights and statistics."""
    other = copy.deepcopy(module).train()
    perturb(other)
    other(torch.randn(6, 4))
    return other


def test_a_teacher_is_always_in_eval_and_has_no_gradient() -> None:
    parent = nn.ModuleDict({"student": network()})
    parent["teacher"] = Teacher.copy_of(parent["student"])
    parent.train()
    assert all(module.training for module in parent["student"].modules())
    assert not any(module.training for module in parent["teacher"].modules())
    assert not any(parameter.requires_grad for parameter in parent["teacher"].parameters())
    x = torch.randn(6, 4, requires_grad=True)
    output = parent["teacher"](x)
    assert not output.requires_grad
    assert torch.equal(output, copy.deepcopy(parent["student"]).eval()(x))
    assert torch.equal(output, parent["teacher"](x))
    # The student trains on, and is nowhere the teacher's.
    assert all(parameter.requires_grad for parameter in parent["student"].parameters())


def test_weights_in_half_precision_become_float32() -> None:
    teacher = Teacher.copy_of(network().to(torch.bfloat16))
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999, 1.0])
def test_an_update_is_the_average_and_takes_the_students_statistics(share: float) -> None:
    teacher = Teacher.copy_of(network())
    student = moved(teacher.network)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    teacher.update(student, share)
    after, theirs = teacher.state_dict(), student.state_dict()
    for name, value in averaged(before, theirs, share).items():
        torch.testing.assert_close(after[name].double(), value.double(), rtol=0, atol=1e-6)
    exact = {0.0: theirs, 1.0: before}.get(share, {})
    assert [name for name in exact if "weight" in name and not torch.equal(after[name], exact[name])] == []
    assert torch.equal(after["1.running_var"], theirs["1.running_var"])
    assert int(after["1.num_batches_tracked"]) == 1


def test_parameters_that_are_copied_are_the_students() -> None:
    teacher = Teacher.copy_of(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    student = copy.deepcopy(teacher.network)
    perturb(student)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    teacher.update(student, 0.3, copied=("0.",))
    after, theirs = teacher.state_dict(), student.state_dict()
    for name, value in averaged(before, theirs, 0.3).items():
        expected = theirs[name].double() if name.startswith("0.") else value
        torch.testing.assert_close(after[name].double(), expected, rtol=0, atol=1e-6)


def test_a_teacher_starts_at_its_student_unless_a_checkpoint_brought_it() -> None:
    teacher = Teacher.copy_of(network())
    student, other = moved(teacher.network), moved(network())
    teacher.start_at(student)
    assert torch.equal(teacher.state_dict()["3.bias"], student.state_dict()["3.bias"])
    parent = nn.ModuleDict({"student": student, "teacher": teacher})
    # Weights of the student alone bring no teacher.
    parent.load_state_dict({f"student.{key}": value for key, value in other.state_dict().items()}, strict=False)
    teacher.start_at(student)
    assert torch.equal(teacher.state_dict()["3.bias"], student.state_dict()["3.bias"])
    kept = {f"teacher.{key}": value + 1 for key, value in other.state_dict().items()}
    parent.load_state_dict(kept, strict=False)
    teacher.start_at(student)
    assert torch.equal(teacher.state_dict()["3.bias"], kept["teacher.3.bias"])


def test_an_update_names_what_has_no_partner() -> None:
    teacher = Teacher.copy_of(network())
    with pytest.raises(UserError, match=r"teacher: 4\.bias, 4\.weight: not in teacher and student alike; give"):
        teacher.update(nn.Sequential(*network(), nn.Linear(4, 4)), 0.5)
    wider = network()
    wider[3] = nn.Linear(4, 5)
    with pytest.raises(UserError, match=r"teacher: 3\.bias, 3\.weight: not in"):
        teacher.update(wider, 0.5)


def test_a_state_dict_has_the_networks_own_names() -> None:
    """So a module that becomes a teacher's keeps its place in checkpoints."""
    parent = nn.ModuleDict({"teacher": Teacher(network())})
    bare = nn.ModuleDict({"teacher": moved(network())})
    assert list(parent.state_dict()) == list(bare.state_dict())
    parent.load_state_dict(bare.state_dict())
    parent["teacher"].load_state_dict(bare["teacher"].state_dict())
    for name, value in bare.state_dict().items():
        assert torch.equal(parent.state_dict()[name], value), name
    with pytest.raises(RuntimeError, match="Unexpected key"):
        parent.load_state_dict({**bare.state_dict(), "teacher.surplus": torch.zeros(1)})
    again = copy.deepcopy(parent)
    again.load_state_dict(parent.state_dict())


def test_the_ramp_is_data2vecs() -> None:
    values = [linear_ramp(update, 0.999, 0.9999, 30_000) for update in (0, 10_000, 29_999, 30_000, 400_000)]
    assert values == pytest.approx([0.999, 0.9993, 0.9999 - 3e-8, 0.9999, 0.9999], abs=1e-12)
    assert linear_ramp(0, 0.999, 0.9999, 0) == 0.9999


@pytest.fixture(scope="module")
def by_hand() -> list[dict[str, Tensor]]:
    return plain_torch()


def assert_taught(found: dict[str, Any], by_hand: list[dict[str, Tensor]]) -> None:
    """As plain torch after every update, and the same to the bit after a restart."""
    assert len(found["weights"]) == len(by_hand) == UPDATES
    for ours, theirs in zip(found["weights"], by_hand, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value.flatten().tolist(), rel=1e-5, abs=2e-6), name
    assert found["again"] == found["weights"][2:]
    assert_averaged([{name: torch.tensor(v) for name, v in state.items()} for state in found["weights"]])


def assert_averaged(weights: list[dict[str, Tensor]]) -> None:
    """The teacher after each update follows from the students of all updates, in float64."""
    teacher = {name: value.double().flatten() for name, value in TaughtMethod().encoder.state_dict().items()}
    for update, state in enumerate(weights):
        student = {name: state[f"encoder.{name}"].double().flatten() for name in teacher}
        teacher = averaged(teacher, student, decay(update + 1))
        for name, value in teacher.items():
            torch.testing.assert_close(state[f"teacher.{name}"].double().flatten(), value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("stage", ZERO)
def test_one_rank_teaches_as_plain_torch(
    stage: str, by_hand: list[dict[str, Tensor]], world: World, tmp_path: Path
) -> None:
    assert_taught(taught_run(tmp_path, ZERO[stage], "fp32", world), by_hand)


@pytest.mark.parametrize("stage", ZERO)
def test_two_ranks_teach_as_plain_torch(
    stage: str, by_hand: list[dict[str, Tensor]], two_ranks: dict[str, Any]
) -> None:
    assert two_ranks["ranks_agree"]
    assert_taught(two_ranks["taught"][stage], by_hand)


def test_a_teacher_stays_in_float32_under_bf16(by_hand: list[dict[str, Tensor]], world: World, tmp_path: Path) -> None:
    """An average in bf16 would be wrong by 2 ** -9 of each weight."""
    found = taught_run(tmp_path, DIVIDED, "bf16", world)
    weights = [{name: torch.tensor(value) for name, value in state.items()} for state in found["weights"]]
    assert_averaged(weights)
    assert weights[-1]["encoder.4.weight"].tolist() != by_hand[-1]["encoder.4.weight"].flatten().tolist()


@dataclass
class TaughtHubertConfig(HubertConfig):
    """HuBERT's, and a frozen teacher."""

    frozen: TeacherConfig


class TaughtHubert(HubertMethod):
    """HuBERT that follows two teachers of its encoder's shape as well, a moving average and a frozen one."""

    Config = TaughtHubertConfig
    config: TaughtHubertConfig

    def __init__(self, config: TaughtHubertConfig) -> None:
        super().__init__(config)
        self.average = Teacher.copy_of(self.encoder)
        self.frozen = frozen_teacher(config.frozen)

    def begin(self, found: dict[str, TargetInfo]) -> None:
        """Both get their weights."""
        self.average.start_at(self.encoder)
        load_teacher(self.frozen, self.config.frozen, "method.frozen")

    def forward(self, batch: Batch) -> StepOutput:
        """HuBERT's loss, and the squared distance of the last hidden state from either teacher's."""
        output = super().forward(batch)
        state = self.encoder(batch.waveforms, batch.lengths)[0][-1]
        targets = [teacher(batch.waveforms, batch.lengths)[0][-1] for teacher in (self.average, self.frozen)]
        return output._replace(loss=output.loss + sum((state - target).square().mean() for target in targets))

    def after_step(self, progress: Progress) -> None:
        """The moving average follows."""
        self.average.update(self.encoder, decay(progress.update))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def fit(data: Path, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Trainer]]:
    """Runs `TaughtHubert` in this process, in output folder `name` until `updates`; 0 only builds the run."""
    monkeypatch.setattr("pretrain.training.setup.load_method", lambda _: SimpleNamespace(Method=TaughtHubert))
    with ExitStack() as resources:

        def run(name: str, updates: int, frozen: TeacherConfig, *more: str) -> Trainer:
            places = [f"data.dir={data / 'data'}", f"data.labels={data / 'labels'}", f"output_dir={tmp_path}"]
            settings = [f"name={name}", f"trainer.stop_after_updates={updates or 1}", "trainer.save_every=1", *more]
            recipe, *small = SMALL
            options = [*small, *places, *settings, "data.workers=0"]
            values = compose_recipe(recipe.removeprefix("recipe="), options)
            values["method"]["frozen"] = {
                "method": frozen.method,
                "encoder": frozen.encoder or values["method"]["encoder"],
                "weights": frozen.weights,
            }
            trainer = build_trainer(run_config(values), resources)
            assert not updates or trainer.fit() == 0
            return trainer

        yield run


def test_a_run_with_teachers_resumes_without_their_files_and_exports_without_them(
    fit: Callable[..., Trainer], tmp_path: Path
) -> None:
    source = build("hubert_tiny", *[option for option in SMALL if option.startswith("method.encoder")])
    perturb(source)
    step = write_checkpoint(tmp_path / "source", source)
    export(ExportConfig(str(step), str(tmp_path / "teacher")))
    frozen = TeacherConfig("hubert", {}, str(tmp_path / "teacher"))
    fit("unbroken", 2, frozen)
    fit("broken", 1, frozen)
    weights_of_teacher = (tmp_path / "teacher" / "encoder.safetensors").read_bytes()
    (tmp_path / "teacher" / "encoder.safetensors").unlink()
    trainer = fit("broken", 2, frozen)
    assert any("resuming from" in note for note in trainer.run.notes)
    runs = [tmp_path / name / "checkpoints" / "step_00000002" for name in ("unbroken", "broken")]
    for name in ("model.safetensors", "optimizer-00000-of-00001.safetensors"):
        unbroken, broken = (load_file(run / name) for run in runs)
        assert unbroken.keys() == broken.keys()
        assert [key for key in unbroken if not torch.equal(unbroken[key], broken[key])] == []

    # Another run starts from its weights: a teacher that is kept is the trained one, else it starts at the student.
    (tmp_path / "teacher" / "encoder.safetensors").write_bytes(weights_of_teacher)
    trained = load_file(runs[0] / "model.safetensors")
    for head in ("keep", "reset"):
        start = fit(
            head, 0, frozen, f"init_from={tmp_path / 'unbroken'}", f"init_head={head}"
        ).engine.method.state_dict()
        source_of_average = "average." if head == "keep" else "encoder."
        for name in [key.removeprefix("average.") for key in start if key.startswith("average.")]:
            assert torch.equal(start[f"average.{name}"], trained[source_of_average + name]), (head, name)

    saved = [load_file(tmp_path / "unbroken" / "checkpoints" / f"step_{n:08d}" / "model.safetensors") for n in (1, 2)]
    encoders = [{key.removeprefix("encoder."): v for key, v in s.items() if key.startswith("encoder.")} for s in saved]
    for name, expected in averaged(
        {name: saved[0][f"average.{name}"] for name in encoders[0]}, encoders[1], decay(2)
    ).items():
        torch.testing.assert_close(saved[1][f"average.{name}"].double(), expected, rtol=0, atol=1e-6)
        assert torch.equal(saved[1][f"frozen.{name}"], source.encoder.state_dict()[name]), name
    # The first rate of a warm-up is zero, the second is not: the student has moved, and the average less.
    weight = "encoder.layers.0.fc1.weight"
    assert not torch.equal(saved[1][f"average.{weight}"], encoders[1][weight])
    assert load_file(tmp_path / "broken" / "export" / "encoder.safetensors").keys() == encoders[1].keys()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One HuBERT in every form that `read_weights` knows."""
    folder = tmp_path_factory.mktemp("sources")
    step = write_checkpoint(folder / "run", small_method())
    found = {"run": folder / "run"}
    for form in ("native", "huggingface", "s3prl"):
        found[form] = folder / f"{form}.pt"
        export(ExportConfig(str(step), str(found[form]), form))
    return found


@pytest.mark.parametrize("form", ["run", "native", "huggingface", "s3prl"])
def test_a_frozen_teacher_loads_from_any_source(form: str, sources: dict[str, Path]) -> None:
    encoder = small_method().encoder
    # Dropout is no tensor's business, and a teacher has none.
    config = TeacherConfig("hubert", {**encoder.to_config(), "dropout": 0.4}, str(sources[form]))
    teacher = frozen_teacher(config)
    load_teacher(teacher, config)
    teacher.train()
    for ours, theirs in zip(teacher(*batch())[0], encoder(*batch())[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert not ours.requires_grad


def test_a_frozen_teacher_of_another_kind_is_refused(sources: dict[str, Path]) -> None:
    config = TeacherConfig("hubert", small_method(encoder_layers=2).encoder.to_config(), str(sources["native"]))
    with pytest.raises(InteropError, match=r"native\.pt: method\.teacher\.encoder\.encoder_layers: 3 there, 2 in the"):
        load_teacher(frozen_teacher(config), config)
    other = replace(config, method="cpc", encoder=build("cpc_tiny").encoder.to_config())
    with pytest.raises(InteropError, match="a checkpoint of 'hubert', not of 'cpc'"):
        load_teacher(frozen_teacher(other), other)


def test_a_dry_run_counts_teachers_and_needs_no_file() -> None:
    method = small_method()
    frozen = TeacherConfig("hubert", method.encoder.to_config(), "absent")
    config = TaughtHubertConfig(**vars(method.config), frozen=frozen)
    with torch.device("meta"):
        taught = TaughtHubert(config)
    size = sum(parameter.numel() for parameter in method.encoder.parameters())
    trained = sum(parameter.numel() for parameter in method.parameters())
    assert sum(p.numel() for group in taught.parameter_groups() for p in group["params"]) == trained
    assert sum(p.numel() for p in taught.parameters()) == trained + 2 * size
