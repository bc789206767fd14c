"""data2vec checkpoints of other projects: official weights in, every layout there and back, the real clients."""

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

from pretrain import Upstream
from pretrain.method import Method
from pretrain.weights.interop.files import read_huggingface, read_torch
from pretrain.weights.interop.types import InteropError, TrainedMethod
from pretrain.weights.read import initialise, read_weights
from recipes.data2vec import interop

FIXTURES = Path(__file__).parent / "fixtures"


def official() -> dict[str, Any]:
    """A fairseq checkpoint dictionary, teacher included."""
    facts, tensors = load_fixture(FIXTURES, "data2vec_tiny")
    state = {key: tensor for key, tensor in group(tensors, "state").items() if not key.startswith("_ema.")}
    model = facts["config"] | {"_name": "data2vec_audio"}
    return {
        "cfg": {"model": model, "task": {"normalize": True}},
        "model": {**state, "_ema": group(tensors, "state._ema")},
    }


def trained(method: Method) -> TrainedMethod:
    return TrainedMethod("data2vec", asdict(method.config), method.state_dict())


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint and its three exports, by format."""
    folder = tmp_path_factory.mktemp("exports")
    method = build("data2vec_tiny")
    perturb(method)
    return write_exports(folder, method)


def test_fairseq_there_and_back() -> None:
    checkpoint = official()
    imported = interop.from_pt(checkpoint)
    assert {key.split(".")[0] for key in imported.head_state} == {"final_proj", "teacher"}
    values = {**asdict(build("data2vec_tiny").config), "encoder": imported.encoder_config}
    exported = interop.to_s3prl(TrainedMethod("data2vec", values, method_state(imported)))
    theirs, ours = dict(checkpoint["model"]), dict(exported["model_weight"])
    assert same_tensors(ours.pop("_ema"), theirs.pop("_ema"))
    assert same_tensors(ours, theirs)
    again = interop.from_pt(exported)
    assert again.encoder_config == imported.encoder_config
    assert same_tensors(again.encoder_state, imported.encoder_state)
    assert same_tensors(again.head_state, imported.head_state)


def test_a_teacher_of_the_whole_model_is_left_out() -> None:
    checkpoint = official()
    whole = {key: tensor for key, tensor in checkpoint["model"].items() if key != "_ema"}
    imported = interop.from_pt({**checkpoint, "model": {**whole, "_ema": whole}})
    assert imported.head_state.keys() == set(interop.HEAD_KEYS)


def test_s3prls_client_agrees(exports: dict[str, Path]) -> None:
    ours, theirs = Upstream("data2vec", str(exports["native"])), S3PRLUpstream("data2vec_local", str(exports["s3prl"]))
    waveforms, lengths = two_waveforms()
    for samples in (27_200, 16_079, 16_081, 800):
        assert_same_states(ours, theirs, waveforms[:1, :samples], torch.tensor([samples]))
    assert_same_states(ours, theirs, waveforms, lengths)
    assert ours.num_layers == theirs.num_layers
    assert ours.hidden_sizes == theirs.hidden_sizes
    assert list(ours.downsample_rates) == list(theirs.downsample_rates)


def test_s3prls_model_holds_exactly_our_tensors(exports: dict[str, Path]) -> None:
    written = read_torch(exports["s3prl"])["model_weight"]
    kept = {key: tensor for key, tensor in written.items() if key not in ("_ema", *interop.HEAD_KEYS)}
    loaded = S3PRLUpstream("data2vec_local", str(exports["s3prl"])).upstream.model.state_dict()
    assert same_tensors(kept, dict(loaded))


def test_transformers_class_loads_every_tensor_and_agrees(exports: dict[str, Path]) -> None:
    model, info = transformers.Data2VecAudioModel.from_pretrained(exports["huggingface"], output_loading_info=True)
    assert not any(info.values())
    assert same_tensors(dict(model.state_dict()), read_huggingface(exports["huggingface"]).tensors)
    extractor = transformers.AutoFeatureExtractor.from_pretrained(exports["huggingface"])
    ours = Upstream("data2vec", str(exports["native"]))
    waveforms, lengths = two_waveforms()
    # Loud, because transformers adds 1e-7 to the variance that it divides by and fairseq 1e-5.
    waveforms = 10 * waveforms
    for rows in ([0], [1], [0, 1]):
        audio = [waveforms[row, : lengths[row]].numpy() for row in rows]
        inputs = extractor(audio, sampling_rate=16_000, padding=True, return_tensors="pt")
        with torch.no_grad():
            expected = model.eval()(**inputs, output_hidden_states=True).hidden_states
        states, _ = hidden_states(ours, waveforms[rows, : int(lengths[rows].max())], lengths[rows])
        for state, reference in zip(states, expected, strict=True):
            for index, row in enumerate(rows):
                frames = (int(lengths[row]) - 400) // 320 + 1
                difference = (state[index, :frames] - reference[index, :frames]).abs().max()
                assert difference <= 1e-4 * reference[index, :frames].abs().max()


@pytest.mark.parametrize("source", ["checkpoint", "s3prl"])
def test_training_goes_on_with_head_and_teacher(exports: dict[str, Path], source: str) -> None:
    saved, method = read_weights(exports["checkpoint"]), build("data2vec_tiny")
    done = initialise(method, str(exports[source]), "keep")
    assert done[-1] == f"head: {len(saved.head_state)} tensors kept"
    method.begin({})
    assert same_tensors(dict(method.state_dict()), method_state(saved))


def test_training_goes_on_from_a_folder_without_a_teacher(exports: dict[str, Path]) -> None:
    saved, method = read_weights(exports["checkpoint"]), build("data2vec_tiny")
    with pytest.raises(InteropError, match="so the head cannot be kept; set init_head=reset"):
        initialise(method, str(exports["huggingface"]), "keep")
    initialise(method, str(exports["huggingface"]), "reset")
    method.begin({})
    assert same_tensors(dict(method.encoder.state_dict()), saved.encoder_state)
    student = method.encoder.encoder.state_dict()
    assert same_tensors(dict(method.teacher.state_dict()), dict(student))
    # transformers keeps regularisation and shape as well.
    assert read_weights(exports["huggingface"]).encoder_config == saved.encoder_config


@pytest.mark.parametrize(("kernel", "depth"), [(19, 5), (4, 2)])
def test_a_fine_tuned_transformers_model_gives_its_encoder(kernel: int, depth: int, tmp_path: Path) -> None:
    config = transformers.Data2VecAudioConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        conv_dim=[32] * 7,
        num_conv_pos_embedding_groups=4,
        conv_pos_kernel_size=kernel,
        num_conv_pos_embeddings=depth,
    )
    torch.manual_seed(0)
    model = transformers.Data2VecAudioForCTC(config).eval()
    perturb(model)
    model.save_pretrained(tmp_path)
    imported = interop.from_huggingface(read_huggingface(tmp_path))
    assert not imported.head_state
    encoder = build("data2vec_tiny").encoder.from_config(imported.encoder_config | {"normalize": False})
    encoder.load_state_dict(imported.encoder_state)
    waveforms, lengths = two_waveforms(8_000, 5_377)
    attention_mask = (torch.arange(8_000) < lengths[:, None]).long()
    with torch.no_grad():
        outputs = model.data2vec_audio(waveforms, attention_mask=attention_mask, output_hidden_states=True)
    states, counts = hidden_states(encoder, waveforms, lengths)
    for state, reference in zip(states, outputs.hidden_states, strict=True):
        for row, count in enumerate(counts[0].tolist()):
            difference = (state[row, :count] - reference[row, :count]).abs().max()
            assert difference <= 1e-4 * reference[row, :count].abs().max()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.encoder.layer_norm_first=true", r"method\.encoder\.layer_norm_first: True has no counterpart"),
        ("method.encoder.extractor_mode=default", r"method\.encoder\.extractor_mode: 'default' has no counterpart"),
        ("method.encoder.pos_conv_depth=1", r"method\.encoder\.pos_conv_depth: 1 .*has several positional"),
    ],
)
def test_what_transformers_lacks_is_not_exported(override: str, message: str) -> None:
    with pytest.raises(InteropError, match=message):
        interop.to_huggingface(trained(build("data2vec_tiny", override)))


def test_what_cannot_be_imported_says_why() -> None:
    checkpoint = official()
    model, task = checkpoint["cfg"]["model"], checkpoint["cfg"]["task"]
    with pytest.raises(InteropError, match=r"'hubert' is not a data2vec model"):
        interop.from_pt({**checkpoint, "cfg": {"model": model | {"_name": "hubert"}}})
    weight = {key: tensor for key, tensor in checkpoint["model"].items() if key != "_ema"}
    with pytest.raises(InteropError, match="_ema: missing, so this is no data2vec checkpoint"):
        interop.from_pt({"model_cfg": model, "task_cfg": task, "model_weight": weight})
    for field, value in (("conv_pos_kernel_size", 2), ("num_conv_pos_embeddings", 1)):
        written = interop.to_huggingface(trained(build("data2vec_tiny")))
        written.config[field] = value
        with pytest.raises(InteropError, match=r"config\.json: num_conv_pos_embeddings, conv_pos_kernel_size: "):
            interop.from_huggingface(written)
