"""Continued pre-training: weights of every origin, in every method that shares their encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_checks import build, on_meta, perturb, write_checkpoint
from torch import Tensor

from pretrain.config import recipe_names
from pretrain.method import Method
from pretrain.weights.export import ExportConfig, export
from pretrain.weights.interop.files import read_json, write_json
from pretrain.weights.interop.types import InteropError
from pretrain.weights.read import initialise

# Methods with the shared speech encoder, tiny and of the same shape.
SHARED = {"hubert": "hubert_tiny", "wav2vec2": "wav2vec2_tiny"}


def trained(recipe: str, *overrides: str) -> Method:
    """A method whose parameters and statistics are off their initial values."""
    method = build(recipe, *overrides)
    perturb(method)
    for name, buffer in method.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.add_(torch.rand_like(buffer))
    return method


def encoder_state(method: Method) -> dict[str, Tensor]:
    return {key: value for key, value in method.state_dict().items() if key.startswith("encoder.")}


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [key for key in left if not torch.equal(left[key], right[key])] == []


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """A run, a native export, a Hugging Face directory and a dictionary in s3prl's or fairseq's form, by method."""
    found: dict[str, dict[str, Path]] = {}
    for name, recipe in SHARED.items():
        folder = tmp_path_factory.mktemp(name)
        step = write_checkpoint(folder / "run", trained(recipe))
        found[name] = {"run": folder / "run"}
        for form in ("native", "huggingface", "s3prl"):
            found[name][form] = folder / f"{form}.pt"
            export(ExportConfig(str(step), str(found[name][form]), form))
    return found


@pytest.mark.parametrize("form", ["run", "native", "huggingface", "s3prl"])
@pytest.mark.parametrize(("origin", "recipe"), [("hubert", "wav2vec2_tiny"), ("wav2vec2", "hubert_tiny")])
def test_a_method_starts_from_anothers_encoder(
    origin: str, recipe: str, form: str, sources: dict[str, dict[str, Path]]
) -> None:
    method = build(recipe)
    before = {key: value.clone() for key, value in method.state_dict().items() if not key.startswith("encoder.")}
    done = initialise(method, str(sources[origin][form]), "reset")
    assert str(sources[origin][form]) in done[0]
    assert done[-1] == f"head: {len(before)} tensors drawn anew"
    assert_equal(encoder_state(method), encoder_state(trained(SHARED[origin])))
    assert_equal({key: value for key, value in method.state_dict().items() if key in before}, before)


def test_anothers_heads_are_not_kept(sources: dict[str, dict[str, Path]]) -> None:
    with pytest.raises(InteropError, match=r"a checkpoint of 'wav2vec2', whose heads are not those of 'hubert'; set"):
        initialise(build("hubert_tiny"), str(sources["wav2vec2"]["run"]), "keep")


def test_options_without_tensors_are_the_recipes_and_are_named(sources: dict[str, dict[str, Path]]) -> None:
    method = build("hubert_tiny", "method.encoder.dropout=0.3", "method.encoder.normalize=true")
    done = initialise(method, str(sources["hubert"]["run"]), "keep")
    assert done[1] == (
        "the recipe's options of the encoder are used where they differ: dropout 0.0 there, 0.3 here, "
        "normalize False there, True here"
    )


def test_another_encoder_is_refused_by_its_method(sources: dict[str, dict[str, Path]]) -> None:
    method = build("cpc_tiny")
    with pytest.raises(InteropError, match=r"method: a checkpoint of 'hubert', not of 'cpc'; name a recipe of hubert"):
        initialise(method, str(sources["hubert"]["run"]), "reset")
    with pytest.raises(InteropError, match=r"model_type: 'hubert' is no model of cpc"):
        initialise(method, str(sources["hubert"]["huggingface"]), "reset")


@pytest.mark.parametrize(
    ("recipe", "field", "change"),
    [
        ("wav2vec2_tiny", "encoder_layers", "method.encoder.encoder_layers=2"),
        ("tera_tiny", "front_end.bins", "method.encoder.front_end.bins=40"),
        ("cpc_tiny", "context_frames", "method.encoder.context_frames=7"),
    ],
)
def test_the_first_option_that_matters_is_named(recipe: str, field: str, change: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", build(recipe))
    with pytest.raises(InteropError, match=rf"method\.encoder\.{field}: .* there, .* in the recipe; choose the recipe"):
        initialise(build(recipe, change), str(tmp_path / "run"), "reset")


@pytest.mark.parametrize("recipe", ["cpc_tiny", "wav2vec_tiny", "vq_wav2vec_tiny", "unispeech_tiny"])
def test_every_method_of_the_family_starts_from_its_own_run_and_export(recipe: str, tmp_path: Path) -> None:
    source = trained(recipe)
    step = write_checkpoint(tmp_path / "run", source)
    export(ExportConfig(str(step), str(tmp_path / "native"), "native"))
    method = build(recipe)
    initialise(method, str(tmp_path / "run"), "keep")
    assert_equal(dict(method.state_dict()), dict(source.state_dict()))
    method = build(recipe)
    initialise(method, str(tmp_path / "native"), "reset")
    assert_equal(encoder_state(method), encoder_state(source))


def test_statistics_travel_with_the_encoder(tmp_path: Path) -> None:
    source = trained("wav2vec2_conformer_tiny")
    statistics = [key for key in encoder_state(source) if "running_" in key]
    assert statistics
    step = write_checkpoint(tmp_path / "run", source)
    export(ExportConfig(str(step), str(tmp_path / "native"), "native"))
    for path in (tmp_path / "run", tmp_path / "native"):
        method = build("wav2vec2_conformer_tiny")
        initialise(method, str(path), "reset")
        assert_equal(encoder_state(method), encoder_state(source))


def test_weights_from_before_an_option_existed_get_its_default(sources: dict[str, dict[str, Path]]) -> None:
    config = read_json(sources["hubert"]["native"] / "config.json")
    assert config["encoder"].pop("layer_type") == "transformer"
    older = sources["hubert"]["native"].with_name("older")
    older.mkdir()
    (older / "encoder.safetensors").write_bytes((sources["hubert"]["native"] / "encoder.safetensors").read_bytes())
    write_json(older / "config.json", config)
    assert len(initialise(build("hubert_tiny"), str(older), "reset")) == 2


@pytest.mark.parametrize("recipe", [name for name in recipe_names() if name.endswith("_tiny")])
def test_free_options_exist(recipe: str) -> None:
    """A name that is spelt wrong would never apply."""
    encoder = on_meta(recipe).encoder
    for name in encoder.weight_independent_fields:
        value: Any = encoder.to_config()
        for part in name.split("."):
            # A block that this recipe leaves out has no options.
            assert value is None or part in value, name
            value = value and value[part]
