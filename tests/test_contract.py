"""What every recipe owes: found in conf/recipe/, so that a new one is tested without a line here."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from small_run import environment

from pretrain.config import CONF_DIR, compose_recipe, recipe_names, run_config, typed
from pretrain.method import Encoder, Method, load_method, method_names
from pretrain.training.schedule import build_schedule
from pretrain.upstream import Upstream

TINY = [name for name in recipe_names() if name.endswith("_tiny")]
ALIASES = [name for name in recipe_names() if len((CONF_DIR / "recipe" / f"{name}.yaml").read_text().split("\n")) <= 3]


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_composes_types_and_builds(recipe: str) -> None:
    config = run_config(compose_recipe(recipe, ["data.dir=somewhere"]))
    build_schedule(config.schedule)
    package = load_method(config.method["name"])
    method_config = typed(package.Method.Config, config.method, "method")
    with torch.device("meta"):
        method: Method = package.Method(method_config)
    assert isinstance(method.encoder, Encoder)
    assert isinstance(method.encoder, package.Encoder)
    assert len(method.encoder.hidden_sizes) == len(method.encoder.downsample_rates)
    collator = package.Method.collator(method_config)
    assert collator.stride_samples >= 1
    assert config.crop.min_seconds * 16_000 >= collator.receptive_field_samples
    assert method.training_flops(16_000) > 0
    expected = config.expected.encoder_parameters
    assert recipe in TINY or expected is not None or not _is_published(recipe), "state expected.encoder_parameters"
    if expected is not None:
        assert sum(p.numel() for p in method.encoder.parameters()) == expected


def _is_published(recipe: str) -> bool:
    """Recipes of our own, for a corpus at hand, say so in their first comment."""
    return "of our own" not in (CONF_DIR / "recipe" / f"{recipe}.yaml").read_text()


@pytest.mark.parametrize("recipe", recipe_names())
def test_an_encoder_is_built_again_from_its_config(recipe: str) -> None:
    package = load_method(compose_recipe(recipe)["method"]["name"])
    method_config = typed(package.Method.Config, compose_recipe(recipe)["method"], "method")
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


def train(recipe: str, output: Path, updates: int) -> str:
    """The recipe as it is, until `updates`; returns what was printed."""
    command = [sys.executable, str(ROOT / "pretrain" / "train.py"), f"recipe={recipe}", f"output_dir={output}"]
    command += [f"trainer.stop_after_updates={updates}", "trainer.max_validation_batches=1", "trainer.threads=1"]
    done = subprocess.run(
        command, cwd=output.parent, env=environment(), capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr + done.stdout


@pytest.mark.parametrize("recipe", TINY)
def test_a_tiny_recipe_trains_resumes_exports_and_reloads(recipe: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    train(recipe, output, 1)
    assert f"resuming from {output / recipe}" in train(recipe, output, 2)
    run = output / recipe
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step_00000001", "step_00000002"]
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
    first = Upstream(recipe, path_or_url=str(run / "checkpoints" / "step_00000001")).eval()
    with torch.no_grad():
        before, _ = first(wavs, lengths)
    for hs, export, step, earlier in zip(*states, before, strict=True):
        assert torch.isfinite(hs).all()
        assert torch.equal(hs, export)
        assert torch.equal(hs, step)
        # The second update moved the encoder, so the equalities are not those of untrained weights.
        assert not torch.equal(hs, earlier)
