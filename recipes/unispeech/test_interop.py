"""UniSpeech checkpoints there and back, and the real clients."""

from __future__ import annotations

from pathlib import Path

import pytest
import s3prl_compat  # noqa: F401  (must come before s3prl)
import torch
import transformers
from recipe_checks import assert_same_states, hidden_states, perturb, same_tensors, two_waveforms, write_exports
from s3prl.nn import S3PRLUpstream

from pretrain import Upstream
from pretrain.config import compose_recipe, typed
from pretrain.method import TargetInfo
from pretrain.weights.interop.types import InteropError
from pretrain.weights.read import initialise, load_head, load_trained, read_weights
from recipes.unispeech import interop
from recipes.unispeech.method import TRANSCRIPT, UniSpeechConfig, UniSpeechMethod


def small() -> UniSpeechMethod:
    torch.manual_seed(1)
    config = typed(UniSpeechConfig, compose_recipe("unispeech_tiny")["method"], "method")
    method = UniSpeechMethod(UniSpeechMethod.fit_to_targets(config, {TRANSCRIPT: TargetInfo(3, names=("a", "b", "c"))}))
    perturb(method)
    return method


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint and its three exports, by format."""
    folder = tmp_path_factory.mktemp("unispeech")
    return write_exports(folder, small())


def test_the_ctc_head_travels_with_a_native_export(exports: dict[str, Path]) -> None:
    trained = small().ctc_proj
    assert trained is not None
    for source in (exports["native"], exports["checkpoint"]):
        head = load_head(source, "ctc_proj")
        assert not head.training
        assert same_tensors(head.state_dict(), trained.state_dict())
    assert (exports["native"] / "heads.safetensors").is_file()
    with pytest.raises(InteropError, match=r"export: holds no head 'ctc'; known: ctc_proj"):
        load_head(exports["native"], "ctc")


def test_s3prls_wav2vec2_client_agrees(exports: dict[str, Path]) -> None:
    ours, theirs = Upstream("unispeech", str(exports["native"])), S3PRLUpstream("wav2vec2_local", str(exports["s3prl"]))
    waveforms, _ = two_waveforms()
    for samples in (27_200, 16_079, 16_081, 800):
        assert_same_states(ours, theirs, waveforms[:1, :samples], torch.tensor([samples]))
    written = torch.load(exports["s3prl"], weights_only=True)["model_weight"]
    assert same_tensors(written, dict(theirs.upstream.model.state_dict()))


def test_transformers_class_loads_every_tensor_and_agrees(exports: dict[str, Path]) -> None:
    model, info = transformers.UniSpeechForPreTraining.from_pretrained(exports["huggingface"], output_loading_info=True)
    assert not any(info.values())
    assert model.config.num_ctc_classes == 7
    extractor = transformers.AutoFeatureExtractor.from_pretrained(exports["huggingface"])
    waveforms, lengths = two_waveforms()
    # Loud, because transformers adds 1e-7 to the variance that it divides by and fairseq 1e-5.
    audio = (10 * waveforms[0]).numpy()
    with torch.no_grad():
        inputs = extractor(audio, sampling_rate=16_000, return_tensors="pt")
        outputs = model.unispeech.eval()(**inputs, output_hidden_states=True)
    states, _ = hidden_states(Upstream("unispeech", str(exports["native"])), 10 * waveforms[:1], lengths[:1])
    expected = [*outputs.hidden_states[:-1], outputs.last_hidden_state]
    for state, reference in zip(states, expected, strict=True):
        frames = reference.shape[1]
        assert (state[:, :frames] - reference).abs().max() <= 1e-4 * reference.abs().max()


def test_a_method_starts_from_every_source(exports: dict[str, Path]) -> None:
    source = load_trained(exports["checkpoint"]).state
    for form in ("checkpoint", "huggingface", "native"):
        method = small()
        with torch.no_grad():
            for parameter in method.parameters():
                parameter.zero_()
        initialise(method, str(exports[form]), "reset" if form == "native" else "keep")
        for key, value in method.state_dict().items():
            assert torch.equal(value, source[key]) == (key.startswith("encoder.") or form != "native"), key


def test_the_official_layout_is_read() -> None:
    method = small()
    config = method.encoder.to_config()
    model, task = interop.speech_encoder.config_to_fairseq(config)
    weights = interop.speech_encoder.state_to_fairseq(method.encoder.state_dict(), config)
    heads = {key: value for key, value in method.state_dict().items() if not key.startswith("encoder.")}
    official = {f"w2v_encoder.w2v_model.{key}": value for key, value in weights.items()}
    for key, value in heads.items():
        official[f"w2v_encoder.{key.replace('ctc_proj', 'proj') if 'ctc' in key else 'w2v_model.' + key}"] = value
    args = model | task | {"arch": "unispeech", "transpose": True}
    imported = interop.from_pt({"args": args, "model": official})
    assert imported.encoder_config == config
    assert same_tensors(imported.encoder_state, dict(method.encoder.state_dict()))
    assert same_tensors(imported.head_state, heads)
    with pytest.raises(InteropError, match="transpose"):
        interop.from_pt({"args": args | {"transpose": False}, "model": official})
    with pytest.raises(InteropError, match="'hubert' is not a UniSpeech model"):
        interop.from_pt({"args": args | {"arch": "hubert"}, "model": official})


def test_an_encoder_alone_does_not_make_a_pre_training_model(exports: dict[str, Path]) -> None:
    trained = load_trained(exports["checkpoint"])
    trained.state.clear()
    with pytest.raises(InteropError, match="missing quantizer, project_q, final_proj"):
        interop.to_huggingface(trained)
    assert read_weights(exports["huggingface"]).method_name == "unispeech"
