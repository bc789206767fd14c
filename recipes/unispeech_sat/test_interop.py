"""UniSpeech-SAT checkpoints of other projects: every layout there and back, and the real clients."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import s3prl_compat  # noqa: F401  (must come before s3prl)
import torch
import transformers
from recipe_checks import (
    assert_same_states,
    build,
    hidden_states,
    method_state,
    perturb,
    same_tensors,
    two_waveforms,
    write_exports,
)
from s3prl.nn import S3PRLUpstream

from pretrain import Upstream
from pretrain.method import Method
from pretrain.weights.interop.files import read_huggingface, read_torch
from pretrain.weights.interop.types import InteropError, TrainedMethod
from pretrain.weights.read import initialise, read_weights
from recipes.unispeech_sat import interop

LARGE = ("method.encoder.layer_norm_first=true", "method.encoder.extractor_mode=layer_norm")
NORMALIZED = "method.encoder.normalize=true"


def small(*overrides: str, seed: int = 0) -> Method:
    made = build("unispeech_sat_tiny", *overrides, seed=seed)
    perturb(made)
    return made


@pytest.fixture(scope="module", params=[(), LARGE], ids=["post-norm", "pre-norm"])
def method(request: pytest.FixtureRequest) -> Method:
    return small(*request.param)


@pytest.fixture(scope="module")
def exports(method: Method, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint and its three exports, by format."""
    return write_exports(tmp_path_factory.mktemp("exports"), method)


def trained(method: Method) -> TrainedMethod:
    return TrainedMethod("unispeech_sat", asdict(method.config), method.state_dict())


def test_s3prls_client_agrees_and_holds_exactly_our_tensors(exports: dict[str, Path]) -> None:
    ours = Upstream("unispeech_sat", str(exports["native"]))
    theirs = S3PRLUpstream("unispeech_sat_local", str(exports["s3prl"]))
    waveforms, lengths = two_waveforms()
    for samples in (27_200, 16_079, 800):
        assert_same_states(ours, theirs, waveforms[:1, :samples], torch.tensor([samples]))
    assert_same_states(ours, theirs, waveforms, lengths)
    assert ours.num_layers == theirs.num_layers
    assert ours.hidden_sizes == theirs.hidden_sizes
    assert list(ours.downsample_rates) == list(theirs.downsample_rates)
    written = read_torch(exports["s3prl"])
    assert written.keys() == {"cfg", "model"}
    assert same_tensors(written["model"], dict(theirs.upstream.model.state_dict()))


def test_transformers_classes_load_every_tensor_and_agree(exports: dict[str, Path]) -> None:
    folder = exports["huggingface"]
    model, info = transformers.UniSpeechSatForPreTraining.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert same_tensors(dict(model.state_dict()), read_huggingface(folder).tensors)
    base, info = transformers.UniSpeechSatModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    ours = Upstream("unispeech_sat", str(exports["native"]))
    waveforms, _ = two_waveforms()
    inputs = extractor(waveforms[0].numpy(), sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        output = base.eval()(**inputs, output_hidden_states=True)
    states, _ = hidden_states(ours, waveforms[:1], torch.tensor([27_200]))
    for state, reference in zip(states, [*output.hidden_states[:-1], output.last_hidden_state], strict=True):
        # An upstream repeats the last frame so that there are as many as s3prl counts.
        assert (state[:, : reference.shape[1]] - reference).abs().max() <= 1e-4 * reference.abs().max()


def test_transformers_there_and_back(method: Method) -> None:
    exported = interop.to_huggingface(trained(method))
    assert exported.config["architectures"] == ["UniSpeechSatForPreTraining"]
    imported = interop.from_huggingface(exported)
    # What transformers has no field for takes its neutral value.
    assert imported.encoder_config == method.encoder.to_config() | {"frame_length_rule": "conv"}
    assert same_tensors(method_state(imported), dict(method.state_dict()))


def test_a_fine_tuned_model_of_transformers_gives_its_encoder(method: Method, tmp_path: Path) -> None:
    exported = interop.to_huggingface(trained(method))
    config = transformers.UniSpeechSatConfig(**exported.config)
    transformers.UniSpeechSatForCTC(config).save_pretrained(tmp_path)
    weights = read_weights(tmp_path)
    assert weights.method_name == "unispeech_sat"
    assert weights.encoder_state.keys() == method.encoder.state_dict().keys()
    assert not weights.head_state


def test_the_official_layouts_there_and_back(method: Method) -> None:
    """The one that s3prl reads, without heads, and that of the training code, with them."""
    released = interop.to_s3prl(trained(method))
    imported = interop.from_pt(released)
    assert imported.encoder_config == method.encoder.to_config()
    assert same_tensors(imported.encoder_state, dict(method.encoder.state_dict()))
    assert not imported.head_state
    cfg, head = dict(released["cfg"]), trained(method).head_state()
    task = {"normalize": cfg.pop("normalize")}
    norm = "layer_norm_for_extract"
    official = {f"encoder.{key}" if key.startswith(norm) else key: value for key, value in head.items()}
    theirs = {"cfg": {"model": cfg | {"_name": "unispeech_sat"}, "task": task}, "model": released["model"] | official}
    imported = interop.from_pt(theirs)
    assert imported.encoder_config == method.encoder.to_config()
    assert same_tensors(method_state(imported), dict(method.state_dict()))


def test_training_goes_on_from_every_source(exports: dict[str, Path], method: Method) -> None:
    first = method.config.encoder.layer_norm_first
    for source in ("checkpoint", "huggingface", "native", "s3prl"):
        other = build("unispeech_sat_tiny", *(LARGE if first else ()), seed=1)
        if source in ("native", "s3prl"):
            with pytest.raises(InteropError, match="so the head cannot be kept; set init_head=reset"):
                initialise(other, str(exports[source]), "keep")
            initialise(other, str(exports[source]), "reset")
            assert same_tensors(dict(other.encoder.state_dict()), dict(method.encoder.state_dict()))
        else:
            initialise(other, str(exports[source]), "keep")
            assert same_tensors(dict(other.state_dict()), dict(method.state_dict()))


def test_what_transformers_class_cannot_hold_leaves_the_encoder() -> None:
    method = small("method.latent_dim=32")
    exported = interop.to_huggingface(trained(method))
    assert exported.config["architectures"] == ["UniSpeechSatModel"]
    imported = interop.from_huggingface(exported)
    assert same_tensors(imported.encoder_state, dict(method.encoder.state_dict()))
    assert not imported.head_state


def test_a_normalised_waveform_is_written_down() -> None:
    method = small(NORMALIZED)
    assert interop.to_s3prl(trained(method))["cfg"]["normalize"] is True
    assert interop.to_huggingface(trained(method)).preprocessor["do_normalize"] is True


def test_what_cannot_be_imported_says_why() -> None:
    released = interop.to_s3prl(trained(small()))
    for change, message in (
        ({"target_glu": True}, "target_glu: True is not supported"),
        ({"expand_attention_head_size": 48}, "expand_attention_head_size: 48 is not supported"),
        ({"_name": "unispeech"}, "'unispeech' is not a UniSpeech-SAT model"),
    ):
        with pytest.raises(InteropError, match=message):
            interop.from_pt({**released, "cfg": released["cfg"] | change})
    with pytest.raises(InteropError, match="model_weight: s3prl's layout of another model"):
        interop.from_pt({"model_cfg": {}, "task_cfg": {}, "model_weight": {}})
