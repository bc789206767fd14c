"""DeCoAR 2.0 files in s3prl's unmodified client, whose code fixes every size, and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import s3prl_compat  # noqa: F401  (must come before s3prl)
import torch
from recipe_checks import assert_same_states, build, method_state, perturb, two_waveforms, write_checkpoint
from s3prl.nn import S3PRLUpstream
from torch import Tensor

from pretrain import Upstream
from pretrain.weights.export import ExportConfig, export
from pretrain.weights.interop.types import InteropError, TrainedMethod
from recipes.decoar2 import interop


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint of ours in the published size, and its s3prl file."""
    folder = tmp_path_factory.mktemp("decoar2")
    method = build("decoar2")
    perturb(method, matrix_scale=0.01)
    checkpoint = write_checkpoint(folder / "run", method)
    export(ExportConfig(str(checkpoint), str(folder / "decoar2.pt"), "s3prl"))
    return checkpoint, folder / "decoar2.pt"


@pytest.fixture(scope="module")
def file(exported: tuple[Path, Path]) -> dict[str, Tensor]:
    return torch.load(exported[1], weights_only=True)["model"]


def test_equals_the_s3prl_client_and_every_tensor_is_ours(exported: tuple[Path, Path], file: dict[str, Tensor]) -> None:
    ours, theirs = Upstream("decoar2", str(exported[0])), S3PRLUpstream("decoar2_local", str(exported[1]))
    assert ours.num_layers == theirs.num_layers == 13
    assert list(ours.hidden_sizes) == list(theirs.hidden_sizes) == [768] * 13
    assert list(ours.downsample_rates) == list(theirs.downsample_rates) == [320] * 13
    # The client's loader is lenient: a tensor that the file lacks would keep its random start.
    for name, tensor in theirs.upstream.model.state_dict().items():
        assert torch.equal(tensor, file[name]), name
    waveforms, lengths = two_waveforms()
    assert_same_states(ours, theirs, waveforms[:1], lengths[:1])
    assert_same_states(ours, theirs, waveforms, lengths)


def test_there_and_back(exported: tuple[Path, Path], file: dict[str, Tensor]) -> None:
    imported = interop.from_pt({"model": file})
    state = method_state(imported)
    method = build("decoar2_tiny")
    assert imported.head_state.keys() == {key for key in method.state_dict() if not key.startswith("encoder.")}
    again = interop.to_s3prl(TrainedMethod("decoar2", {"encoder": imported.encoder_config}, state))["model"]
    assert again.keys() == file.keys()
    assert all(torch.equal(tensor, file[key]) for key, tensor in again.items())


def test_heads_of_other_code_stay_behind(file: dict[str, Tensor]) -> None:
    encoder = {key: tensor for key, tensor in file.items() if key.startswith(("encoder.", "post_extract_proj."))}
    theirs = {"mask_emb": torch.zeros(80), "vars": torch.zeros(512, 80), "weight_proj.bias": torch.zeros(512)}
    assert interop.from_pt({"model": encoder | theirs}).head_state == {}


def test_what_cannot_be_imported_or_exported_says_why() -> None:
    with pytest.raises(InteropError, match=r"not DeCoAR 2\.0's layout"):
        interop.from_pt({"model": {"forward_lstm.weight_ih_l0": torch.zeros(1)}})
    with pytest.raises(InteropError, match="not \\(768, 80\\)"):
        interop.from_pt({"model": {"post_extract_proj.weight": torch.zeros(96, 80)}})
    method = build("decoar2_tiny")
    small = TrainedMethod("decoar2", {"encoder": method.encoder.to_config()}, dict(method.state_dict()))
    with pytest.raises(InteropError, match=r"method\.encoder\.encoder_layers: 2 where s3prl"):
        interop.to_s3prl(small)
