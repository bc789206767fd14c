"""DistilHuBERT's files in other projects: official weights in, every layout there and back, the real clients."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import s3prl_compat  # noqa: F401  (must come before s3prl)
import torch
import transformers
from recipe_checks import (
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
from pretrain.weights.interop.files import read_huggingface, read_torch
from pretrain.weights.interop.types import InteropError, TrainedMethod
from pretrain.weights.read import initialise, read_weights
from recipes.distilhubert import interop
from recipes.distilhubert.method import DistilHubertMethod

FIXTURES = Path(__file__).parent / "fixtures"


def official() -> dict[str, Any]:
    """A checkpoint of s3prl's runner, without its optimiser."""
    facts, tensors = load_fixture(FIXTURES, "distilhubert_tiny")
    return {"Config": {"distiller": facts["config"]}, "Distiller": group(tensors, "state"), "Step": 1}


def trained(method: DistilHubertMethod) -> TrainedMethod:
    return TrainedMethod("distilhubert", asdict(method.config), method.state_dict())


@pytest.fixture(scope="module")
def tiny() -> DistilHubertMethod:
    """The tiny recipe with a student of two layers, every parameter off its initial value."""
    method = build("distilhubert_tiny", "method.encoder.encoder_layers=2")
    perturb(method)
    return method


@pytest.fixture(scope="module")
def exports(tiny: DistilHubertMethod, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint and its three exports, by format."""
    return write_exports(tmp_path_factory.mktemp("exports"), tiny)


def variant(method: DistilHubertMethod, **changes: Any) -> DistilHubertMethod:
    """A method with fresh weights whose configuration differs by `changes`."""
    return DistilHubertMethod(replace(method.config, **changes))


def test_s3prls_file_there_and_back(tiny: DistilHubertMethod) -> None:
    checkpoint = official()
    imported = interop.from_pt(checkpoint)
    assert {key.split(".")[0] for key in imported.head_state} == {"heads"}
    config = asdict(tiny.config) | {"encoder": imported.encoder_config, "pred_layer_id": [2, 4]}
    exported = interop.to_s3prl(TrainedMethod("distilhubert", config, method_state(imported)))
    assert same_tensors(exported["Distiller"], checkpoint["Distiller"])
    options, theirs = exported["Config"]["distiller"], checkpoint["Config"]["distiller"]
    for name in theirs.keys() - {"extractor_conv_feature_layers"}:
        assert options[name] == theirs[name], name
    again = interop.from_pt(exported)
    assert again.encoder_config == imported.encoder_config
    assert same_tensors(again.encoder_state, imported.encoder_state)
    assert same_tensors(again.head_state, imported.head_state)


@pytest.mark.parametrize("layers", [[1, 2, 3], [3]])
def test_s3prls_client_agrees(tiny: DistilHubertMethod, layers: list[int], tmp_path: Path) -> None:
    """Layer by layer. Its list begins with the frames before the positions and ends with the predictions."""
    method = variant(tiny, pred_layer_id=layers).eval()
    perturb(method)
    paths = write_exports(tmp_path, method)
    ours, theirs = Upstream("distilhubert", str(paths["native"])), S3PRLUpstream("distiller_local", str(paths["s3prl"]))
    waveforms, lengths = two_waveforms()
    model = theirs.upstream.model.model
    for inputs in (
        *((waveforms[:1, :samples], torch.tensor([samples])) for samples in (27_200, 16_079, 800)),
        (waveforms, lengths),
    ):
        (our_states, our_lengths), (states, frames) = hidden_states(ours, *inputs), hidden_states(theirs, *inputs)
        assert len(states) == len(our_states) + len(layers)
        count = states[0].shape[1]
        assert torch.equal(our_lengths[0], frames[0])
        with torch.no_grad():
            convolved = model.encoder.pos_conv(states[0].transpose(1, 2)).transpose(1, 2)
            first = model.encoder.layer_norm(states[0] + convolved)
            predictions = method.heads(our_states[-1])
        # What s3prl's client repeats at the end, where a frame is missing, has no true neighbours for a convolution.
        real = (int(inputs[1].max()) - 400) // 320 + 1
        assert_close(our_states[0][:, : real - 20], first[:, : real - 20])
        for state, reference in zip([*our_states[1:], *predictions], states[1:], strict=True):
            assert state.shape[1] == count
            assert_close(state, reference)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    if ours.numel():
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_transformers_class_loads_every_tensor_and_agrees(exports: dict[str, Path]) -> None:
    model, info = transformers.HubertModel.from_pretrained(exports["huggingface"], output_loading_info=True)
    assert not any(info.values())
    assert same_tensors(dict(model.state_dict()), read_huggingface(exports["huggingface"]).tensors)
    extractor = transformers.AutoFeatureExtractor.from_pretrained(exports["huggingface"])
    ours = Upstream("distilhubert", str(exports["native"]))
    waveforms, lengths = two_waveforms()
    for row in (0, 1):
        audio = waveforms[row, : lengths[row]]
        inputs = extractor([audio.numpy()], sampling_rate=16_000, return_tensors="pt")
        with torch.no_grad():
            expected = model.eval()(**inputs, output_hidden_states=True).hidden_states
        states, _ = hidden_states(ours, audio[None], lengths[row, None])
        assert len(states) == len(expected)
        for state, reference in zip(states, expected, strict=True):
            assert_close(state[:, : reference.shape[1]], reference)
    # A padded batch, with the mask that transformers does not ask for by itself.
    mask = (torch.arange(waveforms.shape[1]) < lengths[:, None]).long()
    with torch.no_grad():
        expected = model(waveforms, attention_mask=mask, output_hidden_states=True).hidden_states
    for state, reference in zip(hidden_states(ours, waveforms, lengths)[0], expected, strict=True):
        for row, samples in enumerate(lengths.tolist()):
            frames = (samples - 400) // 320 + 1
            assert_close(state[row, :frames], reference[row, :frames])


def test_a_folder_of_transformers_names_its_method(exports: dict[str, Path], tmp_path: Path) -> None:
    """One class serves HuBERT and DistilHuBERT; a model with a head, or with a mask embedding, is read too."""
    assert Upstream(None, str(exports["huggingface"])).method_name == "distilhubert"
    saved = read_weights(exports["checkpoint"])
    config = transformers.HubertConfig.from_pretrained(exports["huggingface"], mask_time_prob=0.05)
    model = transformers.HubertForCTC(config)
    assert model.hubert.masked_spec_embed is not None
    model.hubert.load_state_dict(read_huggingface(exports["huggingface"]).tensors, strict=False)
    model.save_pretrained(tmp_path / "ctc")
    imported = read_weights(tmp_path / "ctc")
    assert imported.method_name == "distilhubert"
    assert same_tensors(imported.encoder_state, saved.encoder_state)
    transformers.HubertModel(
        transformers.HubertConfig.from_pretrained(exports["huggingface"], feat_proj_layer_norm=True)
    ).save_pretrained(tmp_path / "hubert")
    assert read_weights(tmp_path / "hubert").method_name == "hubert"
    with pytest.raises(InteropError, match="feat_proj_layer_norm: True says that this is a HuBERT"):
        read_weights(tmp_path / "hubert", "distilhubert")
    with pytest.raises(InteropError, match="feat_proj_layer_norm"):
        read_weights(exports["huggingface"], "hubert")


@pytest.mark.parametrize("source", ["checkpoint", "s3prl"])
def test_training_goes_on_with_the_heads(tiny: DistilHubertMethod, exports: dict[str, Path], source: str) -> None:
    """From a run the teacher comes along; s3prl's file has none, and the recipe's is loaded in `begin`."""
    saved, method = read_weights(exports["checkpoint"]), variant(tiny)
    fresh = {name: tensor.clone() for name, tensor in method.teacher.state_dict().items()}
    initialise(method, str(exports[source]), "keep")
    method.begin({})
    state = method_state(saved)
    if source == "s3prl":
        state |= {f"teacher.{name}": tensor for name, tensor in fresh.items()}
    assert same_tensors(dict(method.state_dict()), state)


def test_training_goes_on_from_an_encoder_alone(tiny: DistilHubertMethod, exports: dict[str, Path]) -> None:
    """The student that was given stays, and does not start from the teacher again."""
    saved, method = read_weights(exports["checkpoint"]), variant(tiny)
    with pytest.raises(InteropError, match="so the head cannot be kept; set init_head=reset"):
        initialise(method, str(exports["huggingface"]), "keep")
    method = variant(tiny)
    initialise(method, str(exports["huggingface"]), "reset")
    method.begin({})
    assert same_tensors(dict(method.encoder.state_dict()), saved.encoder_state)


def test_exports_hold_no_teacher(exports: dict[str, Path]) -> None:
    assert any(name.startswith("teacher.") for name in read_weights(exports["checkpoint"]).head_state)
    assert not read_weights(exports["native"]).head_state
    names = read_torch(exports["s3prl"])["Distiller"].keys()
    assert {name.split(".")[0] for name in names} == {
        "feature_extractor",
        "post_extract_proj",
        "encoder",
        "output_layer",
    }


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("normalize", True, r"method\.encoder\.normalize: True has no counterpart in s3prl's distiller, only False"),
        ("conv_bias", True, r"method\.encoder\.conv_bias: True has no counterpart"),
        ("frame_length_rule", "fold", r"method\.encoder\.frame_length_rule: 'fold' has no counterpart"),
    ],
)
def test_what_s3prl_lacks_is_not_exported(tiny: DistilHubertMethod, field: str, value: Any, message: str) -> None:
    exported = trained(tiny)
    exported.config["encoder"][field] = value
    with pytest.raises(InteropError, match=message):
        interop.to_s3prl(exported)


@pytest.mark.parametrize(
    ("option", "value"), [("task_emb_type", "self-hidden"), ("attention_type", "dynamic"), ("out_layer_inter_dim", 7)]
)
def test_what_cannot_be_imported_says_why(option: str, value: Any) -> None:
    checkpoint = official()
    config = {"distiller": checkpoint["Config"]["distiller"] | {option: value}}
    with pytest.raises(InteropError, match=rf"Config\.distiller\.{option}: '?{value}'? is not supported, only"):
        interop.from_pt(checkpoint | {"Config": config})


def test_another_projects_file_is_refused() -> None:
    with pytest.raises(InteropError, match="keys model, cfg: no checkpoint of s3prl's distiller"):
        interop.from_pt({"model": {}, "cfg": {}})
