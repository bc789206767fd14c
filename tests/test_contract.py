"""What every recipe owes: found in conf/recipe/, so that a new one is tested without a line here."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_python
from contract_run import figures, train
from recipe_checks import same_tensors
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from pretrain.config import CONF_DIR, compose_recipe, recipe_names, run_config, typed_method
from pretrain.data.loader import planned_reader
from pretrain.method import Encoder, Method
from pretrain.registry import load_method, method_names
from pretrain.training.precision import compare
from pretrain.training.schedule import build_schedule
from pretrain.training.setup import open_run
from pretrain.upstream import Upstream
from pretrain.world import World

TINY = [name for name in recipe_names() if name.endswith("_tiny")]
ALIASES = [name for name in recipe_names() if len((CONF_DIR / "recipe" / f"{name}.yaml").read_text().split("\n")) <= 3]


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_composes_types_and_builds(recipe: str) -> None:
    values = compose_recipe(recipe)
    values["data"]["dir"] = "somewhere"
    config = run_config(values)
    build_schedule(config.schedule)
    package = load_method(config.method["name"])
    method_config = typed_method(package.Method.Config, config.method)
    with torch.device("meta"):
        method: Method = package.Method(method_config)
    assert isinstance(method.encoder, Encoder)
    assert isinstance(method.encoder, package.Encoder)
    assert len(method.encoder.hidden_sizes) == len(method.encoder.downsample_rates)
    collator = package.Method.collator(method_config)
    assert collator.stride_samples >= 1
    assert config.crop.min_seconds * 16_000 >= collator.receptive_field_samples
    expected = config.expected.encoder_parameters
    assert recipe in TINY or expected is not None or not _is_published(recipe), "state expected.encoder_parameters"
    if expected is not None:
        assert sum(p.numel() for p in method.encoder.parameters()) == expected


def _is_published(recipe: str) -> bool:
    """Recipes of our own, for a corpus at hand, say so in their first comment."""
    return "of our own" not in (CONF_DIR / "recipe" / f"{recipe}.yaml").read_text()


@pytest.mark.parametrize("recipe", recipe_names())
def test_an_encoder_is_built_again_from_its_config(recipe: str) -> None:
    block = compose_recipe(recipe)["method"]
    package = load_method(block["name"])
    method_config = typed_method(package.Method.Config, block)
    with torch.device("meta"):
        encoder = package.Method(method_config).encoder
        again = package.Encoder.from_config(encoder.to_config())
    shapes = [{k: v.shape for k, v in e.state_dict().items()} for e in (encoder, again)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("recipe", ALIASES)
def test_an_alias_is_a_file_of_two_lines(recipe: str) -> None:
    first, second, end = (CONF_DIR / "recipe" / f"{recipe}.yaml").read_text().split("\n")
    assert first == "# @package _global_"
    match = re.fullmatch(r"defaults: \[(\w+)\]", second)
    assert match, second
    assert end == ""
    original, alias = compose_recipe(match[1]), compose_recipe(recipe)
    assert original.pop("recipe") != alias.pop("recipe")
    assert original == alias


# Published names that share another method's folder: the same network and loss on other data or with other heads.
FOLDERS = {
    "wav2vec 2.0": "wav2vec2",
    "XLS-R": "wav2vec2",
    "Modified CPC": "cpc",
    "Bidirectional CPC": "cpc",
    "vq-wav2vec": "wav2vec",
    "TERA": "mockingjay",
    "Audio ALBERT": "mockingjay",
    "VQ-APC": "apc",
    "Multi-target APC": "apc",
    "DeCoAR 2.0": "decoar2",
}


def folder_of(method: str) -> str:
    """The folder under recipes/ for a method's published name."""
    return FOLDERS.get(method) or re.sub(r"[^a-z0-9]+", "_", method.lower().replace("+", "_plus")).strip("_")


def test_every_published_name_of_a_method_that_is_here(shared_dir: Path) -> None:
    table = shared_dir / "recipes.tsv"
    if not table.is_file():
        pytest.skip(f"{table} is absent")
    with table.open() as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if folder_of(row["method"]) in method_names()]
    assert rows
    assert [row["recipe"] for row in rows if row["recipe"] not in recipe_names()] == []
    assert [row["recipe"] for row in rows if row["alias_of"] and row["recipe"] not in ALIASES] == []


def test_every_method_has_a_tiny_recipe() -> None:
    methods = {compose_recipe(name)["method"]["name"] for name in recipe_names()}
    assert {compose_recipe(name)["method"]["name"] for name in TINY} == methods


@pytest.fixture(scope="module")
def unbroken(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with an unbroken run of two updates of every tiny recipe, each made when it is first asked for.

    The runs that are compared with them lie beside them, so that labels of the sample are made once.
    """
    return tmp_path_factory.mktemp("unbroken")


def unbroken_run(folder: Path, recipe: str) -> Path:
    """The run of `recipe` in `folder`."""
    if not (folder / recipe).is_dir():
        train(recipe, folder, 2)
    return folder / recipe


@pytest.fixture(scope="module")
def two_rank_runs(unbroken: Path, request: pytest.FixtureRequest) -> str:
    """The suffix of runs of two updates of every tiny recipe whose test was chosen, on two ranks, all in one launch."""
    chosen = {item.callspec.params["recipe"] for item in request.session.items if "two_rank_runs" in item.fixturenames}
    script, suffix = str(ROOT / "tests" / "contract_run.py"), "_two_ranks"
    done = run_python([script, str(unbroken), suffix, *sorted(chosen)], ranks=2, timeout=1500)
    assert done.returncode == 0, done.stderr[-4000:]
    return suffix


@pytest.mark.xdist_group("contract")
def test_tests_of_one_group_run_in_one_worker(request: pytest.FixtureRequest) -> None:
    """Under `--dist loadgroup`; else each worker would make the runs that the tests of this group share."""
    assert not getattr(request.config.option, "loadgroup", False) or request.node.nodeid.endswith("@contract")


@pytest.mark.xdist_group("contract")
@pytest.mark.parametrize("recipe", TINY)
def test_a_resumed_run_is_the_unbroken_one_to_the_bit(recipe: str, unbroken: Path) -> None:
    """State that no checkpoint holds would show here: figures, weights and moments after 1 + 1 updates and after 2."""
    run, whole = unbroken / f"{recipe}_resumed", unbroken_run(unbroken, recipe)
    train(recipe, unbroken, 1, "_resumed")
    assert any(f"resuming from {run}/" in note for note in train(recipe, unbroken, 2, "_resumed"))
    assert figures(run).keys() == {1, 2}
    assert figures(run) == figures(whole)
    first, last = "step_00000001", "step_00000002"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [first, last]
    for file in ("model.safetensors", "optimizer-00000-of-00001.safetensors"):
        assert same_tensors(*(load_file(folder / "checkpoints" / last / file) for folder in (run, whole))), file
    # The second update moved the network, so the equalities are not those of initial weights.
    assert not same_tensors(*(load_file(run / "checkpoints" / step / "model.safetensors") for step in (first, last)))


@pytest.mark.xdist_group("contract")
@pytest.mark.parametrize("recipe", TINY)
def test_two_ranks_follow_one(recipe: str, unbroken: Path, two_rank_runs: str) -> None:
    """1 rank x 2 micro-batches and 2 ranks x 1 have the same losses, whatever the order of the sums."""
    mine, theirs = figures(unbroken / f"{recipe}{two_rank_runs}"), figures(unbroken_run(unbroken, recipe))
    for update in (1, 2):
        losses = {name for name in mine[update] if name.startswith("train/loss")} | {"train/gradient_norm"}
        for name in losses:
            expected = theirs[update][name]
            assert mine[update][name] == (expected and pytest.approx(expected, rel=1e-4, abs=1e-6)), name


@pytest.mark.xdist_group("contract")
@pytest.mark.parametrize("recipe", TINY)
def test_the_export_is_the_checkpoint(recipe: str, unbroken: Path) -> None:
    run = unbroken_run(unbroken, recipe)
    wavs, lengths = torch.randn(2, 16_000, generator=torch.Generator().manual_seed(0)), torch.tensor([16_000, 12_345])
    states = []
    for source in (run, run / "export", run / "checkpoints" / "step_00000002"):
        upstream = Upstream(recipe, path_or_url=str(source)).eval()
        with torch.no_grad():
            all_hs, all_lens = upstream(wavs, lengths)
        assert len(all_hs) == upstream.num_layers
        rates = upstream.downsample_rates
        assert [lens.tolist() for lens in all_lens] == [((lengths - 1) // rate + 1).tolist() for rate in rates]
        states.append(all_hs)
    for hs, export, step in zip(*states, strict=True):
        assert torch.isfinite(hs).all()
        assert torch.equal(hs, export)
        assert torch.equal(hs, step)


@pytest.mark.xdist_group("contract")
@pytest.mark.parametrize("recipe", TINY)
def test_the_loss_is_a_sum_over_units_and_the_work_is_counted(recipe: str, world: World, unbroken: Path) -> None:
    """The same utterance two and four times: the loss per unit stays, and the counted work is that of torch's counter.

    The counter sees no recurrent layer and sees grouped convolutions as full ones, so it is a coarse check.
    """
    config = run_config(compose_recipe(recipe, [f"output_dir={unbroken}"]))
    method_class, method_config, corpus = open_run(config)
    torch.manual_seed(0)
    method = method_class(method_config)
    method.begin(corpus.found)
    reader = planned_reader(config, corpus.train, method_class.collator(method_config), corpus.mix)
    once = reader.plan.small_micro_batch()
    twice = replace(once, rows=np.tile(once.rows, 2), copies=None if once.copies is None else np.tile(once.copies, 2))
    method.eval()
    losses = []
    for batch in (reader[once], reader[twice]):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            losses.append(float(method(batch).total(batch)) / batch.sample_size)
        counted, samples = counter.get_total_flops(), batch.waveforms.shape[1]
        # Forward alone; a backward costs twice as much.
        stated = method.training_flops(samples) * len(batch.rows) / 3
        assert 0.5 <= stated / counted <= 2, f"training_flops: {stated:g} forward, torch counts {counted:g}"
    assert losses[0] == pytest.approx(losses[1], rel=0.3)


@pytest.mark.xdist_group("contract")
@pytest.mark.parametrize("recipe", TINY)
def test_every_layer_is_right_in_bf16(recipe: str, world: World, unbroken: Path) -> None:
    """On equal inputs no layer differs from float32 by more than rounding; on any processor."""
    config = run_config(compose_recipe(recipe, [f"output_dir={unbroken}"]))
    method_class, method_config, corpus = open_run(config)
    torch.manual_seed(0)
    method = method_class(method_config)
    method.begin(corpus.found)
    reader = planned_reader(config, corpus.train, method_class.collator(method_config), corpus.mix)
    difference = compare(method, reader[reader.plan.small_micro_batch()], "bf16", world.device)
    assert difference.wrong_layer is None, difference
    assert difference.largest < 0.03, difference
