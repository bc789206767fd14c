"""wav2vec 2.0 checkpoints of other projects: official weights in, every layout there and back, the real clients."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import s3prl_compat  # noqa: F401  (must come before s3prl)
import torch
import transformers
from recipe_checks import (
    assert_same_states,
    build,
    group,
    hidden_states,
    load_fixture,
    method_state,
    perturb,
    same_tensors,
    two_waveforms,
    write_exports,
)
from s3prl.nn import S3PRLUpstream
from torch import Tensor

from pretrain import Upstream
from pretrain.weights.interop.files import read_huggingface, write_huggingface
from pretrain.weights.interop.types import InteropError, TrainedMethod
from pretrain.weights.read import initialise, read_weights
from recipes.wav2vec2 import interop

FIXTURES = Path(__file__).parent / "fixtures"
LL60K = (
    "method.encoder.extractor_mode=layer_norm",
    "method.encoder.conv_bias=true",
    "method.encoder.layer_norm_first=true",
    "method.encoder.normalize=true",
)
FORMS = {"base": (), "ll60k": LL60K}


def official() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A fairseq checkpoint dictionary, and what fairseq computed with it."""
    facts, tensors = load_fixture(FIXTURES, "wav2vec2_tiny")
    return {"cfg": {"model": facts["config"], "task": {"normalize": False}}, "model": group(tensors, "state")}, tensors


@pytest.fixture(scope="module", params=FORMS)
def exports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint and its three exports, by format."""
    folder = tmp_path_factory.mktemp(request.param)
    method = build("wav2vec2_tiny", *FORMS[request.param])
    perturb(method)
    return write_exports(folder, method)


def test_official_weights_give_the_official_hidden_states() -> None:
    checkpoint, tensors = official()
    imported = interop.from_pt(checkpoint)
    encoder = build("wav2vec2_tiny").encoder.from_config(imported.encoder_config)
    encoder.load_state_dict(imported.encoder_state)
    lengths = (~tensors["in.padding_mask"]).sum(1)
    states, frame_lengths = hidden_states(encoder, tensors["in.wav"], lengths)
    valid = ~tensors["out.frame_padding_mask"]
    assert torch.equal(frame_lengths[0], valid.sum(1))
    for index, state in enumerate(states):
        torch.testing.assert_close(state[valid], tensors[f"out.features.hidden_{index}"][valid], rtol=0, atol=5e-5)


def test_fairseq_there_and_back() -> None:
    checkpoint, _ = official()
    imported = interop.from_pt(checkpoint)
    model = checkpoint["cfg"]["model"]
    config = {**model, "encoder": imported.encoder_config, "latent_dim": 12, "mask_prob": 0.65, "mask_length": 10}
    state = method_state(imported)
    exported = interop.to_s3prl(TrainedMethod("wav2vec2", config, state))
    assert same_tensors(exported["model_weight"], checkpoint["model"])
    again = interop.from_pt(exported)
    assert again.encoder_config == imported.encoder_config
    assert same_tensors(again.encoder_state, imported.encoder_state)
    assert same_tensors(again.head_state, imported.head_state)
    flat = model | {"arch": "wav2vec2", "normalize": True}
    old = interop.from_pt({"args": flat, "model": checkpoint["model"]})
    assert old.encoder_config == imported.encoder_config | {"normalize": True}


def test_s3prls_client_agrees(exports: dict[str, Path]) -> None:
    ours, theirs = Upstream("wav2vec2", str(exports["native"])), S3PRLUpstream("wav2vec2_local", str(exports["s3prl"]))
    waveforms, lengths = two_waveforms()
    for samples in (27_200, 16_079, 16_081, 800, 100):
        assert_same_states(ours, theirs, waveforms[:1, :samples], torch.tensor([samples]))
    assert_same_states(ours, theirs, waveforms, lengths)
    assert ours.num_layers == theirs.num_layers
    assert ours.hidden_sizes == theirs.hidden_sizes
    assert list(ours.downsample_rates) == list(theirs.downsample_rates)


def test_s3prls_model_holds_exactly_our_tensors(exports: dict[str, Path]) -> None:
    written = torch.load(exports["s3prl"], weights_only=True)["model_weight"]
    loaded = S3PRLUpstream("wav2vec2_local", str(exports["s3prl"])).upstream.model.state_dict()
    assert same_tensors(written, dict(loaded))


def test_transformers_classes_load_every_tensor_and_agree(exports: dict[str, Path]) -> None:
    pretraining, info = transformers.Wav2Vec2ForPreTraining.from_pretrained(
        exports["huggingface"], output_loading_info=True
    )
    assert not any(info.values())
    assert same_tensors(dict(pretraining.state_dict()), read_huggingface(exports["huggingface"]).tensors)
    base = transformers.Wav2Vec2Model.from_pretrained(exports["huggingface"]).eval()
    extractor = transformers.AutoFeatureExtractor.from_pretrained(exports["huggingface"])
    ours = Upstream("wav2vec2", str(exports["native"]))
    waveforms, lengths = two_waveforms()
    # Loud, because transformers adds 1e-7 to the variance that it divides by and fairseq 1e-5.
    waveforms = 10 * waveforms
    # Group norm sees padding, and transformers then takes no mask: compare singles.
    for rows in [[0], [1], [0, 1]] if base.config.feat_extract_norm == "layer" else [[0], [1]]:
        audio = [waveforms[row, : lengths[row]].numpy() for row in rows]
        inputs = extractor(audio, sampling_rate=16_000, padding=True, return_tensors="pt")
        with torch.no_grad():
            outputs = base(**inputs, output_hidden_states=True)
        # Before the final layer norm in transformers' list, after it in s3prl's and ours.
        expected = [*outputs.hidden_states[:-1], outputs.last_hidden_state]
        states, _ = hidden_states(ours, waveforms[rows, : int(lengths[rows].max())], lengths[rows])
        for state, reference in zip(states, expected, strict=True):
            for index, row in enumerate(rows):
                frames = (int(lengths[row]) - 400) // 320 + 1
                difference = (state[index, :frames] - reference[index, :frames]).abs().max()
                assert difference <= 1e-4 * reference[index, :frames].abs().max()


def test_training_goes_on_from_every_export_that_keeps_the_heads(exports: dict[str, Path]) -> None:
    trained = read_weights(exports["checkpoint"])
    form = LL60K if trained.encoder_config["normalize"] else ()
    for source in ("checkpoint", "s3prl", "huggingface"):
        method = build("wav2vec2_tiny", *form)
        done = initialise(method, str(exports[source]), "keep")
        assert done[-1] == f"head: {len(trained.head_state)} tensors kept"
        expected = method_state(trained)
        assert same_tensors(dict(method.state_dict()), expected)
    # transformers keeps regularisation and shape as well.
    config = read_weights(exports["huggingface"]).encoder_config
    assert config == trained.encoder_config | {"feature_grad_mult": 1.0}


def test_a_fine_tuned_transformers_model_gives_its_encoder(tmp_path: Path) -> None:
    config = transformers.Wav2Vec2Config(
        hidden_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=96,
        conv_dim=[32] * 7,
        num_conv_pos_embedding_groups=4,
    )
    transformers.Wav2Vec2ForCTC(config).save_pretrained(tmp_path)
    imported = interop.from_huggingface(read_huggingface(tmp_path))
    assert not imported.head_state
    encoder = build("wav2vec2_tiny").encoder.from_config(imported.encoder_config)
    encoder.load_state_dict(imported.encoder_state)


def test_an_encoder_alone_cannot_be_exported() -> None:
    method = build("wav2vec2_tiny")
    state = {key: value for key, value in method.state_dict().items() if key.startswith("encoder.")}
    trained = TrainedMethod("wav2vec2", asdict(method.config), state)
    for function in (interop.to_s3prl, interop.to_huggingface):
        with pytest.raises(InteropError, match="missing quantizer, project_q, final_proj"):
            function(trained)


def test_what_cannot_be_imported_says_why() -> None:
    checkpoint, _ = official()
    model = checkpoint["cfg"]["model"]
    for name, value in (("target_glu", True), ("quantizer_depth", 2)):
        with pytest.raises(InteropError, match=f"{name}: {value}"):
            interop.from_pt({**checkpoint, "cfg": {"model": model | {name: value}}})
    with pytest.raises(InteropError, match=r"'hubert' is not a wav2vec 2\.0 model"):
        interop.from_pt({**checkpoint, "cfg": {"model": model | {"_name": "hubert"}}})
    with pytest.raises(InteropError, match="dictionaries_symbols"):
        interop.from_pt({"model_cfg": model, "task_cfg": {}, "model_weight": {}, "dictionaries_symbols": []})
    with pytest.raises(InteropError, match="neither fairseq's"):
        interop.from_pt({"state_dict": {}})


def test_transformers_there_and_back(tmp_path: Path) -> None:
    method = build("wav2vec2_tiny")
    written = interop.to_huggingface(TrainedMethod("wav2vec2", asdict(method.config), method.state_dict()))
    write_huggingface(tmp_path / "ours", written)
    again = interop.from_huggingface(read_huggingface(tmp_path / "ours"))
    assert same_tensors(again.encoder_state, dict(method.encoder.state_dict()))
    theirs = transformers.Wav2Vec2ForPreTraining.from_pretrained(tmp_path / "ours").config
    names = {"num_codevectors_per_group": 40, "codevector_dim": 64, "proj_codevector_dim": 64, "num_negatives": 50}
    assert {name: getattr(theirs, name) for name in names} == names
