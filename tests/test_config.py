"""Strict configuration: every wrong option is refused with its name, the nearest names and the fix."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache, reduce
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from small_run import environment

from pretrain.config import (
    BatchConfig,
    ConfigError,
    check_overrides,
    compose_recipe,
    parse_cli,
    recipe_method_block,
    recipe_names,
    run_config,
    run_tool,
    save_yaml,
)
from pretrain.data.folders import resolve_data_dir
from pretrain.errors import UserError
from pretrain.training.schedule import build_schedule

composed = cache(compose_recipe)
TINY = composed("hubert_tiny")
NAN, INFINITY = float("nan"), float("inf")


def tiny(**changes: Any) -> dict[str, Any]:
    """hubert_tiny as plain data, with keys of the top level replaced."""
    return TINY | changes


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_is_a_complete_configuration(recipe: str) -> None:
    values = composed(recipe)
    config = run_config(values | {"data": values["data"] | {"dir": "somewhere"}})
    assert config.recipe == recipe
    assert config.run_dir == Path("outputs") / recipe
    assert config.batch.seconds_per_micro_batch >= config.crop.max_seconds


def test_the_name_decides_the_run_folder() -> None:
    assert run_config(tiny(name="iter1", output_dir="/data/out")).run_dir == Path("/data/out/iter1")


def test_overrides_reach_the_configuration() -> None:
    options = ["optimizer.lr=0.5", "data=librispeech_960", "trainer.compile=true", "deepspeed=zero3"]
    config = run_config(compose_recipe("hubert_tiny", options))
    assert config.optimizer.lr == 0.5
    assert config.data.name == "librispeech_960"
    assert config.trainer.compile is True
    assert config.deepspeed == {"zero_optimization": {"stage": 3}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipe=hubert_bse"], r"recipe: unknown recipe 'hubert_bse'; did you mean hubert_base"),
        (["recipe=zzz"], r"recipe: unknown recipe 'zzz'; known: .*hubert"),
        ([], r"recipe: missing; say recipe=<name>; known: .*hubert"),
        (["optimizer.lr=1"], r"recipe: missing"),
        (["recipe=hubert_tiny", "optimizer.lrr=1"], r"optimizer\.lrr: no such option; did you mean optimizer\.lr"),
        (["recipe=hubert_tiny", "+optimizer.lrr=1"], r"optimizer\.lrr: no such option; did you mean optimizer\.lr"),
        (["recipe=hubert_tiny", "++optimizer.lrr=1"], r"optimizer\.lrr: no such option"),
        (
            ["recipe=hubert_tiny", "method.encoder.layer_tipe=x"],
            r"layer_tipe: no such option; did you mean method\.enc.*layer_type",
        ),
        (["recipe=hubert_tiny", "method.mask_lenght=5"], r"did you mean method\.mask_length"),
        (["recipe=hubert_tiny", "batchsize=5"], r"batchsize: no such option; did you mean batch"),
        (["recipe=hubert_tiny", "data=libri"], r"data: there is no conf/data/libri\.yaml; did you mean librilight"),
        (["recipe=hubert_tiny", "deepspeed=zero9"], r"deepspeed: there is no conf/deepspeed/zero9\.yaml; did you mean"),
        (["recipe=hubert_tiny", "deepspeed=null"], r"deepspeed: there is no conf/deepspeed/null\.yaml; known: zero0"),
        (["recipe=hubert_tiny", "name=a=b"], r"name: Hydra cannot read the value a=b .*\"name='a=b'\""),
    ],
)
def test_wrong_arguments_are_refused_with_the_nearest_names(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_overrides(arguments)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("batch=[1,2]", r"Error merging override batch=\[1,2\]: Cannot merge DictConfig with ListConfig; correct it"),
        ("name=${nonexistent}", r"^name: Interpolation key 'nonexistent' not found; correct it on the command line"),
        ("hydra.foo=1", r"Could not override 'hydra\.foo': Key 'foo' not in 'HydraConf'; correct it"),
    ],
)
def test_hydras_own_errors_become_sentences(argument: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose_recipe("hubert_tiny", [argument])


def test_right_arguments_pass() -> None:
    arguments = ["recipe=hubert_tiny", "data=custom", "data.dir=/x", "name='a=b'", "hydra.verbose=true", "--cfg", "job"]
    more = ["~data.labels", "trainer.profile=true"]
    assert check_overrides([*arguments, *more]) == [*arguments, *more]
    assert check_overrides([arguments[0], "+seed=1", "++seed=2"]) == [arguments[0], "seed=1", "seed=2"]
    zero = "deepspeed.zero_optimization.overlap_comm=true"
    assert check_overrides([arguments[0], zero])[1:] == [f"++{zero}"]


@pytest.mark.parametrize("prefix", ["", "+", "++"])
@pytest.mark.parametrize(
    ("recipe", "option", "value"),
    [
        ("hubert_tiny", "method.encoder.layer_type", "conformer"),
        ("apc_tiny", "method.encoder.quantizer.temperature", 0.5),  # the recipe's quantizer is null
        ("hubert_tiny", "schedule.end_factor", 0.25),
        ("hubert_tiny", "schedule.power", 2),
        ("hubert_tiny", "deepspeed.zero_optimization.overlap_comm", True),
    ],
)
def test_an_option_with_a_default_in_a_dataclass_can_be_set(
    recipe: str, option: str, value: object, prefix: str
) -> None:
    values = compose_recipe(recipe, [f"{prefix}{option}={value}"])
    assert reduce(lambda block, name: block[name], option.split("."), values) == value


def test_options_of_a_schedule_that_the_command_line_chooses() -> None:
    options = ["schedule.name=polynomial", "schedule.power=2", "schedule.end_factor=0.5"]
    schedule = build_schedule(compose_recipe("hubert_tiny", options)["schedule"])
    # 0.5 + 0.5 (1 - 1/2) ** 2, half way from the end of the warm-up to the end.
    half_way = (schedule.warmup_updates + schedule.total_updates) // 2
    assert schedule.factor(half_way) == pytest.approx(0.625, abs=0.01)
    with pytest.raises(ConfigError, match=r"schedule\.powr: no such option; did you mean schedule\.power"):
        compose_recipe("hubert_tiny", ["schedule.name=polynomial", "schedule.powr=2"])
    with pytest.raises(ConfigError, match=r"schedule\.hold_updates: no such option"):
        compose_recipe("hubert_tiny", ["schedule.name=polynomial", "schedule.hold_updates=2"])
    with pytest.raises(ConfigError, match=r"schedule\.name: unknown schedule 'cosin'; did you mean cosine"):
        compose_recipe("hubert_tiny", ["schedule.name=cosin", "schedule.end_factor=2"])


@pytest.mark.parametrize("recipe", recipe_names())
def test_the_method_block_read_without_hydra_is_hydras(recipe: str) -> None:
    ours, hydras = recipe_method_block(recipe), composed(recipe)["method"]
    assert ours == hydras
    # As text too: 1 and 1.0, 1e-4 and '1e-4' would pass for the same above, or not, by what YAML makes of them.
    assert yaml.safe_dump(ours) == yaml.safe_dump(hydras)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimiser": {}}, r"optimiser: no such option; did you mean optimizer"),
        (
            {"trainer": tiny()["trainer"] | {"log_evry": 1}},
            r"trainer\.log_evry: no such option; did you mean .*log_every",
        ),
        ({"trainer": tiny()["trainer"] | {"log_every": 0}}, r"trainer\.log_every: 0 is not a positive number"),
        ({"batch": {"seconds_per_micro_batch": 5.0}}, r"batch\.micro_batches_per_step: missing"),
        ({"batch": {"seconds_per_micro_batch": "x", "micro_batches_per_step": 1}}, r"batch\.seconds_per_micro_batch"),
        ({"batch": {"seconds_per_micro_batch": -1.0, "micro_batches_per_step": 1}}, r"batch: .* positive"),
        (
            {"crop": {"min_seconds": 3.0, "max_seconds": 2.0}},
            r"crop: need 0 < min_seconds <= max_seconds, not 3\.0",
        ),
        (
            {"optimizer": TINY["optimizer"] | {"name": "sgd"}},
            r"optimizer\.name: unknown optimiser 'sgd'; known: adam, adamw",
        ),
        ({"optimizer": TINY["optimizer"] | {"lr": -1.0}}, r"optimizer\.lr: -1; give 0 or a positive number"),
        ({"optimizer": TINY["optimizer"] | {"lr": math.nan}}, r"optimizer\.lr: nan; give 0 or a positive number"),
        ({"optimizer": TINY["optimizer"] | {"clip_norm": math.inf}}, r"optimizer\.clip_norm: inf; give 0"),
        ({"optimizer": TINY["optimizer"] | {"eps": 0.0}}, r"optimizer\.eps: 0; give a positive number"),
        ({"optimizer": TINY["optimizer"] | {"betas": [0.9]}}, r"optimizer\.betas: \[0\.9\]; give two numbers"),
        ({"optimizer": TINY["optimizer"] | {"betas": [0.9, 1.0]}}, r"optimizer\.betas: \[0\.9, 1\.0\]; give two"),
        ({"precision": "fp8"}, r"precision: 'fp8' is not one of auto, fp32, bf16, fp16"),
        ({"init_head": "drop"}, r"init_head: 'drop' is not one of keep, reset"),
        ({"method": {}}, r"method\.name: missing; choose a recipe"),
        ({"method": {"name": None}}, r"method\.name: None is no name"),
        ({"method": {"name": [1]}}, r"method\.name: \[1\] is no name"),
        ({"seed": -1}, r"seed: -1 is out of range; give 0 to 9223372036854775807"),
        ({"seed": 10**23}, r"seed: 1"),
        ({"name": ".."}, r"name: '\.\.' is no name of a folder"),
        ({"name": "a/b"}, r"name: 'a/b' is no name of a folder; .* output_dir"),
        ({"name": ""}, r"name: empty; give a value, or leave the option out"),
        ({"init_from": ""}, r"init_from: empty"),
        ({"output_dir": ""}, r"output_dir: empty"),
        *[({"data": TINY["data"] | {key: ""}}, rf"data\.{key}: empty") for key in ("dir", "labels", "noise", "rirs")],
        ({"data": TINY["data"] | {"labels": 5}}, r"data\.labels: 5 is no path"),
        ({"data": TINY["data"] | {"labels": [1, None]}}, r"data\.labels: \[1, None\] is no path"),
        ({"data": TINY["data"] | {"labels": [""]}}, r"data\.labels: \[''\] is no path"),
        ({"data": TINY["data"] | {"workers": -1}}, r"data\.workers: -1 is negative; 0 reads"),
        ({"data": TINY["data"] | {"speakers": [1]}}, r"data\.speakers: \[1\] is neither a place in the path"),
        ({"data": TINY["data"] | {"max_bad_share": NAN}}, r"data\.max_bad_share: nan is no share"),
        *[
            ({"data": TINY["data"] | {"sampling_alpha": value}}, rf"data\.sampling_alpha: {value:g} is no number")
            for value in (-1.0, NAN, INFINITY)
        ],
        ({"data": TINY["data"] | {"corpora": 5}}, r"data\.corpora: 5 is no list; give"),
        *[
            ({"batch": {"seconds_per_micro_batch": value, "micro_batches_per_step": 1}}, r"batch: .* finite")
            for value in (NAN, INFINITY)
        ],
        *[
            ({"crop": {"min_seconds": 1.0, "max_seconds": value}}, r"crop: need .* not 1\.0, .* finite")
            for value in (NAN, INFINITY)
        ],
        *[
            ({"trainer": TINY["trainer"] | {key: value}}, rf"trainer\.{key}: {value} is not a positive number")
            for key, value in (
                *(("stop_after_updates", 0), ("stop_after_updates", -3), ("threads", 0), ("max_failed_steps", 0)),
                ("save_minutes", NAN),
            )
        ],
        ({"deepspeed": {"zero_optimization": None}}, r"deepspeed\.zero_optimization: None is no block; give"),
        ({"trainer": 5}, r"trainer: 5 is no block of options; give them as \{option: value"),
        ({"augment": [1]}, r"^augment: \[1\] is no block of options"),
        ({"schedule": {"name": [1]}}, r"schedule\.name: \[1\] is no name"),
        ({"schedule": {}}, r"schedule\.name: missing; state it in the recipe"),
        ({"deepspeed": {}}, r"deepspeed\.zero_optimization: None is no block; give"),
        *[
            (
                {"deepspeed": {"zero_optimization": {"stage": value}}},
                rf"zero_optimization\.stage: {value!r} is no stage",
            )
            for value in (5, "two", True, None)
        ],
    ],
)
def test_wrong_values_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_config(tiny(**changes))


def test_what_a_recipe_left_open_is_named() -> None:
    with pytest.raises(ConfigError, match=r"data\.dir: missing; state it"):
        run_config(compose_recipe("hubert_tiny", ["data=custom"]))


def test_a_world_size_that_does_not_divide_the_batch_lists_those_that_do() -> None:
    batch = BatchConfig(seconds_per_micro_batch=87.5, micro_batches_per_step=12)
    assert [batch.accumulation(n) for n in (1, 2, 3, 4, 6, 12)] == [12, 6, 4, 3, 2, 1]
    for wrong in (5, 8, 24):
        with pytest.raises(ConfigError) as error:
            batch.accumulation(wrong)
        assert f"12 micro-batches cannot be shared by {wrong} ranks" in str(error.value)
        assert "run on 1, 2, 3, 4, 6, 12 ranks" in str(error.value)
        assert "1050 seconds" in str(error.value)


def test_label_directories_may_be_none_one_or_many() -> None:
    data = TINY["data"]
    for labels, expected in ((None, []), ("a", [Path("a")]), (["a", "b"], [Path("a"), Path("b")])):
        assert run_config(tiny(data=data | {"labels": labels})).data.label_dirs() == expected


def test_the_sample_and_folders_of_manifests(tmp_path: Path) -> None:
    assert (resolve_data_dir("sample") / "train.tsv").is_file()
    with pytest.raises(ConfigError, match=r"data\.dir: .* has no train\.tsv; run python tools/prepare_manifest\.py"):
        resolve_data_dir(str(tmp_path))
    (tmp_path / "train.tsv").touch()
    assert resolve_data_dir(str(tmp_path)) == tmp_path


def test_a_saved_configuration_reads_back(tmp_path: Path) -> None:
    values = tiny(name="Bäume")
    save_yaml(values, tmp_path / "config.yaml")
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == values


@dataclass
class Inner:
    """A nested block."""

    dir: str
    parts: list[int] = field(default_factory=lambda: [1, 2])


@dataclass
class Tool:
    """A tool's options."""

    data: Inner
    clusters: int
    output: str = "out"
    ratio: float = 0.5
    name: str | None = None
    table: str = ""


def test_a_tools_arguments_are_typed() -> None:
    tool = parse_cli(Tool, ["data.dir=/x", "clusters=100", "ratio=1", "data.parts=[3]", "table="])
    assert tool == Tool(Inner("/x", [3]), 100, "out", 1.0, None, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["clusters=1", "data.dir=x", "cluster=2"], r"cluster: no such option; did you mean clusters"),
        (["clusters=1", "data.dri=x"], r"data\.dri: no such option; did you mean dir"),
        (["clusters=many", "data.dir=x"], r"clusters"),
        (["clusters=1"], r"data.*: missing"),
        (["data.dir=x"], r"clusters: missing"),
        (["clusters=1", "data.dir="], r"data\.dir: empty; give a value"),
        (["clusters=1", "data.dir=x", "name="], r"name: empty"),
        (["clusters=1", "data.dir=x", "output="], r"output: empty"),
        (["clusters", "1"], r"clusters: arguments have the form key=value; --help lists the keys"),
    ],
)
def test_a_tools_wrong_arguments_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_cli(Tool, arguments)


def test_every_tool_ends_a_users_error_in_one_form(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(arguments: list[str]) -> None:
        raise UserError(f"clusters: {arguments} are too many; take fewer")

    monkeypatch.setattr(sys, "argv", ["tools/any.py", "clusters=9"])
    with pytest.raises(SystemExit) as end:
        run_tool(fail)
    # Python prints a message in place of a status to standard error, and leaves with 1.
    assert end.value.code == "error: clusters: ['clusters=9'] are too many; take fewer"
    for path in (ROOT / "tools").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        if "parse_cli(" in text:
            assert text.endswith('if __name__ == "__main__":\n    run_tool(main)\n'), path
            assert "SystemExit" not in text, path
            assert "sys.exit" not in text, path


def test_a_tools_help_lists_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_cli(Tool, ["--help"], "Does things.")
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Does things.")
    for line in (r"data.dir", r"data.parts", "clusters", "required", "default 0.5", "default [1, 2]"):
        assert line in printed


def train_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "pretrain" / "train.py"), *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=200)


def test_the_entry_point_prints_a_recipe_and_refuses_wrong_ones() -> None:
    printed = train_script("recipe=hubert_tiny", "optimizer.lr=0.25", "--cfg", "job")
    assert printed.returncode == 0, printed.stderr
    values = yaml.safe_load(printed.stdout)
    assert values["optimizer"]["lr"] == 0.25
    assert values["method"]["name"] == "hubert"
    refused = train_script("recipe=hubert_tiny", "+optimizer.lrr=1")
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: optimizer.lrr: no such option; did you mean optimizer.lr")
    assert "Traceback" not in refused.stderr
