"""DeCoAR files in both of s3prl's unmodified entries, whose code fixes every size, and back."""

from __future__ import annotations

import re
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
from recipes.decoar import interop


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint of ours in the published size, and its s3prl file."""
    folder = tmp_path_factory.mktemp("decoar")
    method = build("decoar_layers")
    perturb(method, matrix_scale=0.01)
    checkpoint = write_checkpoint(folder / "run", method)
    export(ExportConfig(str(checkpoint), str(folder / "decoar.pt"), "s3prl"))
    return checkpoint, folder / "decoar.pt"


@pytest.fixture(scope="module")
def file(exported: tuple[Path, Path]) -> dict[str, Tensor]:
    return torch.load(exported[1], weights_only=True)["model"]


@pytest.mark.parametrize(
    ("entry", "layers", "states"), [("decoar_layers_local", "all", 4), ("decoar_local", "last", 1)]
)
def test_equals_the_s3prl_client_and_every_tensor_is_ours(
    exported: tuple[Path, Path], file: dict[str, Tensor], entry: str, layers: str, states: int
) -> None:
    ours = Upstream("decoar", str(exported[0]), extra_conf={"layers": layers})
    theirs = S3PRLUpstream(entry, str(exported[1]))
    assert ours.num_layers == theirs.num_layers == states
    assert list(ours.hidden_sizes) == list(theirs.hidden_sizes) == [2048] * states
    assert list(ours.downsample_rates) == list(theirs.downsample_rates) == [160] * states
    # The client's loader is lenient: a tensor that the file lacks would keep its random start.
    for name, tensor in theirs.upstream.model.state_dict().items():
        written = re.sub(r"_lstms\.(\d)\.(\w+_l)0", r"_lstm.\2\1", name)
        assert torch.equal(tensor, file[written]), name
    waveforms, lengths = two_waveforms(12_000, 8_079)
    assert_same_states(ours, theirs, waveforms[:1], lengths[:1])
    assert_same_states(ours, theirs, waveforms, lengths)


def test_there_and_back(exported: tuple[Path, Path], file: dict[str, Tensor]) -> None:
    imported = interop.from_pt({"model": file})
    state = method_state(imported)
    assert state.keys() == build("decoar_tiny", "method.encoder.num_layers=4").state_dict().keys()
    again = interop.to_s3prl(TrainedMethod("decoar", {"encoder": imported.encoder_config}, state))["model"]
    assert again.keys() == file.keys()
    assert {f"proj{n}.{i}.weight" for n in (1, 2) for i in range(18)} < file.keys()
    assert all(torch.equal(tensor, file[key]) for key, tensor in again.items())
    encoder = {key: tensor for key, tensor in file.items() if not key.startswith("proj")}
    assert interop.from_pt({"model": encoder}).head_state == {}


def test_what_cannot_be_imported_or_exported_says_why() -> None:
    with pytest.raises(InteropError, match="not DeCoAR's layout"):
        interop.from_pt({"model": {"post_extract_proj.weight": torch.zeros(768, 80)}})
    with pytest.raises(InteropError, match="not \\(4096, 1024\\)"):
        interop.from_pt({"model": {"forward_lstm.weight_ih_l0": torch.zeros(32, 8)}})
    method = build("decoar_tiny")
    small = TrainedMethod("decoar", {"encoder": method.encoder.to_config()}, dict(method.state_dict()))
    with pytest.raises(InteropError, match=r"method\.encoder\.hidden_size: \d+ where s3prl"):
        interop.to_s3prl(small)
