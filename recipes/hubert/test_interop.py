"""HuBERT's checkpoints of other projects: official weights in, and every layout there and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_checks import method_state, same_tensors
from safetensors.torch import load_file
from torch import Tensor
from transformers import HubertConfig as TheirConfig
from transformers import HubertForCTC, HubertModel

from pretrain.models.speech_encoder import SpeechEncoder
from pretrain.weights.interop.files import read_huggingface, write_huggingface
from pretrain.weights.interop.types import Imported, InteropError, TrainedMethod
from recipes.hubert import interop

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = ["hubert_tiny_postln", "hubert_tiny_preln_2dict"]


def official(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A fairseq checkpoint dictionary, and what fairseq computed with it."""
    facts, tensors = json.loads((FIXTURES / f"{name}.json").read_text()), load_file(FIXTURES / f"{name}.safetensors")
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    return {"cfg": {"model": facts["config"], "task": {"normalize": False}}, "model": state}, tensors


def trained(imported: Imported, checkpoint: dict[str, Any], num_classes: list[int]) -> TrainedMethod:
    """The imported weights as a checkpoint of ours."""
    model = checkpoint["cfg"]["model"]
    config = {
        "encoder": imported.encoder_config,
        "num_classes": num_classes,
        "label_rates_hz": [int(model["label_rate"])] * len(num_classes),
        "mask_prob": 0.8,
        "mask_length": 10,
        **{name: model[name] for name in ("final_dim", "untie_final_proj", "logit_temp")},
    }
    return TrainedMethod("hubert", config, method_state(imported))


@pytest.mark.parametrize("name", NAMES)
def test_official_weights_give_the_official_hidden_states(name: str) -> None:
    checkpoint, tensors = official(name)
    imported = interop.from_pt(checkpoint)
    encoder = SpeechEncoder.from_config(imported.encoder_config).eval()
    encoder.load_state_dict(imported.encoder_state)
    lengths = (~tensors["in.padding_mask"]).sum(1)
    with torch.no_grad():
        states, frame_lengths = encoder(tensors["in.wav"], lengths)
    valid = ~tensors["out.frame_padding_mask"]
    assert torch.equal(frame_lengths[0], valid.sum(1))
    expected = [tensors[f"out.features.hidden_{index}"] for index in range(3)] + [tensors["out.features.x"]]
    for state, reference in zip(states, expected, strict=True):
        torch.testing.assert_close(state[valid], reference[valid], rtol=0, atol=5e-5)


@pytest.mark.parametrize(("name", "rows"), [(NAMES[0], [19]), (NAMES[1], [9, 15])])
def test_fairseq_there_and_back(name: str, rows: list[int]) -> None:
    checkpoint, _ = official(name)
    imported = interop.from_pt(checkpoint)
    exported = interop.to_s3prl(trained(imported, checkpoint, rows))
    assert same_tensors(exported["model_weight"], checkpoint["model"])
    # Four special symbols precede the clusters, and every row of the table has its symbol.
    assert [len(symbols) for symbols in exported["dictionaries_symbols"]] == [count + 4 for count in rows]
    assert sum(count + 4 for count in rows) == len(checkpoint["model"]["label_embs_concat"])
    again = interop.from_pt(exported)
    assert again.encoder_config == imported.encoder_config
    assert same_tensors(again.encoder_state, imported.encoder_state)
    assert same_tensors(again.head_state, imported.head_state)


def test_a_checkpoint_from_before_fairseqs_cfg() -> None:
    checkpoint, _ = official(NAMES[0])
    flat = checkpoint["cfg"]["model"] | {"arch": "hubert", "normalize": True}
    imported = interop.from_pt({"args": flat, "model": checkpoint["model"]})
    assert imported.encoder_config == interop.from_pt(checkpoint).encoder_config | {"normalize": True}


@pytest.mark.parametrize("large", [False, True])
def test_transformers_there_and_back(large: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = TheirConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        conv_dim=[32] * 7,
        conv_bias=large,
        feat_extract_norm="layer" if large else "group",
        do_stable_layer_norm=large,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        layerdrop=0.03,
        feat_proj_dropout=0.07,
        activation_dropout=0.02,
    )
    theirs = HubertModel(config)
    theirs.save_pretrained(tmp_path / "theirs")
    imported = interop.from_huggingface(read_huggingface(tmp_path / "theirs"))
    state = {f"encoder.{key}": value for key, value in imported.encoder_state.items()}
    exported = interop.to_huggingface(TrainedMethod("hubert", {"encoder": imported.encoder_config}, state))
    assert same_tensors(exported.tensors, dict(theirs.state_dict()))
    write_huggingface(tmp_path / "ours", exported)
    again = HubertModel.from_pretrained(tmp_path / "ours")
    # Regularisation and shape return as they were; masking is switched off on purpose.
    for key in exported.config:
        if key not in ("apply_spec_augment", "final_dropout", "dtype", "architectures"):
            kept, original = getattr(again.config, key), getattr(theirs.config, key)
            assert kept == (list(original) if isinstance(original, tuple) else original), key
    assert interop.from_huggingface(read_huggingface(tmp_path / "ours")).encoder_config == imported.encoder_config


def test_a_fine_tuned_transformers_model_gives_its_base(tmp_path: Path) -> None:
    config = TheirConfig(hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96)
    config.update({"conv_dim": [32] * 7, "mask_time_prob": 0.0, "num_conv_pos_embedding_groups": 4})
    HubertForCTC(config).save_pretrained(tmp_path)
    imported = interop.from_huggingface(read_huggingface(tmp_path))
    encoder = SpeechEncoder.from_config(imported.encoder_config)
    encoder.load_state_dict(imported.encoder_state)
    assert imported.encoder_state["mask_emb"].shape == (48,)


def test_what_cannot_be_imported_says_why() -> None:
    checkpoint, _ = official(NAMES[0])
    model = checkpoint["cfg"]["model"]
    with pytest.raises(InteropError, match="target_glu"):
        interop.from_pt({**checkpoint, "cfg": {"model": model | {"target_glu": True}}})
    with pytest.raises(InteropError, match="layer_type: 'conformer'"):
        interop.from_pt({**checkpoint, "cfg": {"model": model | {"layer_type": "conformer"}}})
    with pytest.raises(InteropError, match="'wav2vec2' is not a HuBERT model"):
        interop.from_pt({**checkpoint, "cfg": {"model": model | {"_name": "wav2vec2"}}})
    with pytest.raises(InteropError, match="dictionaries_symbols"):
        interop.from_pt({"model_cfg": model, "task_cfg": {}, "model_weight": checkpoint["model"]})
    surplus = checkpoint["model"] | {"_ema.mask_emb": torch.zeros(24)}
    with pytest.raises(InteropError, match=r"_ema\.mask_emb"):
        interop.from_pt({**checkpoint, "model": surplus})
    with pytest.raises(InteropError, match="neither fairseq's"):
        interop.from_pt({"state_dict": {}})
