"""Encoder configurations from files: what is refused, and how the error names it."""

from __future__ import annotations

from typing import Any

import pytest
from small_hubert import small_method

from pretrain.config import MAX_LAYERS, MAX_SIZE, ConfigError, encoder_config
from pretrain.errors import UserError
from pretrain.features.front_end import FrontEndConfig
from pretrain.models.speech_config import SpeechEncoderConfig
from pretrain.models.speech_encoder import SpeechEncoder


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
