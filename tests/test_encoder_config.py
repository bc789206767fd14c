"""Encoder configurations from files: what is refused, and how the error names it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_hubert import small_method

from pretrain.config import (
    MAX_LAYERS,
    MAX_SIZE,
    ConfigError,
    compose_recipe,
    encoder_config,
    recipe_method_block,
    typed_method,
)
from pretrain.errors import UserError
from pretrain.features.front_end import FrontEndConfig
from pretrain.models.speech_config import SpeechEncoderConfig
from pretrain.models.speech_encoder import SpeechEncoder
from pretrain.registry import load_method
from pretrain.upstream import Upstream
from pretrain.weights.export import write_native
from pretrain.weights.interop.files import write_huggingface
from pretrain.weights.interop.types import InteropError, TrainedMethod
from recipes.hubert.interop import to_huggingface
from recipes.hubert.method import HubertConfig


def plain(**changes: Any) -> dict[str, Any]:
    """The plain configuration of a small HuBERT's encoder."""
    return small_method().encoder.to_config() | changes


def test_a_right_one_is_built_with_defaults_for_what_it_lacks() -> None:
    values = plain()
    del values["pos_enc_type"]
    config = encoder_config(SpeechEncoderConfig, values)
    assert config == small_method().encoder.config
    assert encoder_config(SpeechEncoderConfig, plain(encoder_layers=0)).encoder_layers == 0


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("encoder_layers", "three", "three"),
        ("encoder_layers", 2.5, "2.5"),
        ("encoder_layers", True, "True"),
        ("encoder_layers", None, "None"),
        ("encoder_layers", -1, f"-1 is out of range; give 0 to {MAX_LAYERS}"),
        ("encoder_layers", MAX_LAYERS + 1, f"give 0 to {MAX_LAYERS}"),
        ("encoder_embed_dim", 0, f"0 is out of range; give 1 to {MAX_SIZE}"),
        ("encoder_embed_dim", "-8", "-8 is out of range"),
        ("encoder_ffn_embed_dim", 10**15, "out of range"),
        ("encoder_attention_heads", 0, "out of range"),
        ("conv_pos_groups", -4, "out of range"),
        ("conv_feature_layers", [], "0 entries"),
        ("conv_feature_layers", [[32, 10, 5]] * (MAX_LAYERS + 1), f"{MAX_LAYERS + 1} entries"),
        ("conv_feature_layers", 512, "512"),
        ("dropout", 1.0, "no probability"),
        ("encoder_layerdrop", -0.1, "no probability"),
        ("feature_grad_mult", float("nan"), "nan is not a finite number"),
        ("layer_norm_first", [], "not a valid bool"),
        ("extractor_mode", {"a": 1}, "{'a': 1}"),
    ],
)
def test_a_wrong_value_is_refused_by_field_and_value(field: str, value: object, problem: str) -> None:
    with pytest.raises(ConfigError, match=rf"^encoder\.{field}.*: .*{problem}"):
        SpeechEncoder.from_config(plain(**{field: value}))


def test_a_wrong_entry_of_a_list_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^encoder\.conv_feature_layers\[1\]\[2\]: 0 is out of range"):
        SpeechEncoder.from_config(plain(conv_feature_layers=[[32, 10, 5], [32, 3, 0]]))
    with pytest.raises(ConfigError, match=r"^encoder\.conv_feature_layers\[0\]: .*'ten'"):
        SpeechEncoder.from_config(plain(conv_feature_layers=[[32, "ten", 5]]))


def test_unknown_and_missing_fields_are_named() -> None:
    with pytest.raises(ConfigError, match=r"^encoder\.encoder_layer: no such option; did you mean encoder_layers"):
        SpeechEncoder.from_config(plain(encoder_layer=3))
    values = plain()
    del values["encoder_embed_dim"]
    with pytest.raises(ConfigError, match=r"^encoder\.encoder_embed_dim: missing"):
        SpeechEncoder.from_config(values)
    with pytest.raises(ConfigError, match=r"^encoder: \[1\] is not a mapping"):
        SpeechEncoder.from_config([1])  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["${oc.env:HOME}", "${encoder_layers}", "a\\${oc.env:HOME}", "${ unfinished"])
def test_an_interpolation_is_text(text: str) -> None:
    with pytest.raises(UserError) as caught:
        SpeechEncoder.from_config(plain(extractor_mode=text))
    assert f"unknown mode '{text}'" in str(caught.value)
    with pytest.raises(ConfigError, match=r"^encoder\.encoder_layers"):
        SpeechEncoder.from_config(plain(encoder_layers="${encoder_attention_heads}"))


def test_bounds_reach_nested_blocks_and_metadata_allows_zero() -> None:
    values = {
        "kind": "fbank",
        "bins": 80,
        "window": "hamming",
        "low_hz": 20.0,
        "deltas": 0,
        "level_db": None,
        "frame_step": 1,
        "cmvn": True,
    }
    assert encoder_config(FrontEndConfig, values).deltas == 0
    with pytest.raises(ConfigError, match=r"^encoder\.front_end\.deltas: -1 is out of range; give 0"):
        encoder_config(FrontEndConfig, values | {"deltas": -1}, "encoder.front_end")


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small HuBERT as a native export and as a Hugging Face directory."""
    folder = tmp_path_factory.mktemp("exports")
    method = small_method()
    write_native("hubert", method.encoder, folder / "native")
    config = {"name": "hubert", "encoder": method.encoder.to_config()}
    write_huggingface(
        folder / "huggingface", to_huggingface(TrainedMethod("hubert", config, dict(method.state_dict())))
    )
    return {name: folder / name for name in ("native", "huggingface")}


def changed(source: Path, target: Path, block: str | None, changes: dict[str, Any]) -> Path:
    """A copy of an export whose config.json has `changes` in its `block`; None takes a field away."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    inside = config if block is None else config[block]
    inside |= changes
    for name in [name for name, value in changes.items() if value is None]:
        del inside[name]
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("kind", "changes", "problem"),
    [
        ("native", {"encoder_layers": "many"}, r"encoder\.encoder_layers: .*many"),
        ("native", {"encoder_layers": -2}, r"encoder\.encoder_layers: -2 is out of range"),
        ("native", {"encoder_embed_dim": 10**12}, r"encoder\.encoder_embed_dim: 10{12} is out of range"),
        ("native", {"encoder_embed_dim": None}, r"encoder\.encoder_embed_dim: missing"),
        ("native", {"encoder_embed_dims": 8}, r"encoder\.encoder_embed_dims: no such option; did you mean"),
        ("native", {"encoder_attention_heads": 7}, r"encoder\.encoder_attention_heads: 7 does not divide"),
        ("native", {"extractor_mode": "${oc.env:HOME}"}, r"extractor_mode: unknown mode '\$\{oc\.env:HOME\}'"),
        ("huggingface", {"num_hidden_layers": "many"}, r"encoder\.encoder_layers: .*many"),
        ("huggingface", {"hidden_size": -48}, r"encoder\.encoder_embed_dim: -48 is out of range"),
        ("huggingface", {"conv_dim": 512}, "conv_dim, conv_kernel, conv_stride: .*512"),
        ("huggingface", {"conv_kernel": [10, 3]}, "give three lists of one length"),
        ("huggingface", {"feat_extract_norm": "batch"}, "feat_extract_norm: 'batch' is not supported, only group and"),
        ("huggingface", {"feat_extract_norm": ["${x}"]}, "its configuration makes no network|not supported"),
    ],
)
def test_a_wrong_config_json_names_file_and_field(
    kind: str, changes: dict[str, Any], problem: str, exports: dict[str, Path], tmp_path: Path
) -> None:
    path = changed(exports[kind], tmp_path / "wrong", "encoder" if kind == "native" else None, changes)
    with pytest.raises(InteropError, match=rf"^{re.escape(str(path))}/config\.json: .*{problem}"):
        Upstream(None, path)


@pytest.mark.parametrize("name", ["method", "encoder"])
def test_an_export_without_its_parts_is_refused(name: str, exports: dict[str, Path], tmp_path: Path) -> None:
    path = changed(exports["native"], tmp_path / "wrong", None, {name: None})
    with pytest.raises(InteropError, match=rf"config\.json: {name}: missing"):
        Upstream(None, path)


def test_the_weights_of_an_export_are_those_that_its_config_json_lists(
    exports: dict[str, Path], tmp_path: Path
) -> None:
    path = shutil.copytree(exports["native"], tmp_path / "native")
    Upstream(None, path)
    weights = path / "encoder.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:])
    with pytest.raises(InteropError, match=r"encoder\.safetensors: its content is not the one that config\.json lists"):
        Upstream(None, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "files"}))
    Upstream(None, path)
    weights.unlink()
    with pytest.raises(InteropError, match=r"encoder\.safetensors: not a complete safetensors file .*copy or download"):
        Upstream(None, path)


def test_an_interop_error_is_a_value_error(exports: dict[str, Path]) -> None:
    """As s3prl's users expect of an upstream that cannot be built."""
    with pytest.raises(ValueError, match="no recipe or method"):
        Upstream("no_such_recipe", exports["native"])
    with pytest.raises(UserError, match="no such file"):
        Upstream(None, exports["native"] / "absent")
    with pytest.raises(InteropError, match=r"encoder\.encoder_layers: -1 is out of range"):
        Upstream("hubert", exports["native"], extra_conf={"encoder_layers": -1})


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("method.encoder.extractor_mode=x", r"method\.encoder\.extractor_mode: unknown mode 'x'; use default or layer"),
        ("method.encoder.frame_length_rule=x", r"method\.encoder\.frame_length_rule: unknown rule 'x'; use fold or"),
        ("method.encoder.encoder_attention_heads=0", r"method\.encoder\.encoder_attention_heads: 0 is out of range"),
        ("method.encoder.encoder_layers=-1", r"method\.encoder\.encoder_layers: -1 is out of range"),
    ],
)
def test_a_wrong_option_of_a_recipes_encoder_is_a_user_error(option: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        typed_method(HubertConfig, compose_recipe("hubert_tiny", [option])["method"])


@pytest.mark.parametrize(
    ("recipe", "option", "value", "least"),
    [
        ("hubert_tiny", "final_dim", 0, 1),
        ("hubert_tiny", "mask_length", 0, 1),
        ("hubert_tiny", "mask_min_spans", -1, 0),
        ("wav2vec2_tiny", "latent_vars", 0, 1),
        ("wav2vec2_tiny", "latent_groups", 0, 1),
        ("unispeech_tiny", "latent_dim", -2, 1),
        ("decoar_tiny", "reconstruction_dim", 0, 1),
        ("decoar2_tiny", "mask_min_space", -1, 0),
        ("cpc_tiny", "predictor_heads", 0, 1),
        ("wav2vec_tiny", "prediction_steps", 0, 1),
        ("data2vec_tiny", "ema_anneal_end_step", -1, 0),
        ("mpc_tiny", "chunk_size", 0, 1),
    ],
)
def test_the_sizes_of_a_methods_heads_are_bounded(recipe: str, option: str, value: int, least: int) -> None:
    block = recipe_method_block(recipe)
    cls = load_method(block["name"]).Method.Config
    typed_method(cls, block)
    with pytest.raises(ConfigError, match=rf"^method\.{option}: {value} must be at least {least}$"):
        typed_method(cls, block | {option: value})
