"""speechbrain's `model.ckpt` through `Upstream` and `init_from`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from recipe_checks import load_fixture, two_waveforms

from pretrain import Upstream
from pretrain.config import compose_recipe, typed_method
from pretrain.weights.interop.types import InteropError
from pretrain.weights.read import initialise
from recipes.best_rq.encoder import BestRqEncoder
from recipes.best_rq.interop import from_pt
from recipes.best_rq.method import BestRqConfig, BestRqMethod

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What speechbrain's checkpointer writes of the network."""
    tensors = load_fixture(FIXTURES, "speechbrain_tiny")[1]
    path = tmp_path_factory.mktemp("speechbrain") / "model.ckpt"
    torch.save({key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}, path)
    return path


def test_the_file_is_an_upstream(file: Path) -> None:
    upstream = Upstream("best_rq", file).eval()
    assert isinstance(upstream.encoder, BestRqEncoder)
    assert upstream.downsample_rates == [640] * 3
    assert upstream.hidden_sizes == [24] * 3
    imported = from_pt(torch.load(file))
    state = upstream.encoder.state_dict()
    assert state.keys() == imported.encoder_state.keys()
    assert all(torch.equal(state[key], value) for key, value in imported.encoder_state.items())
    with torch.no_grad():
        states, lengths = upstream(*two_waveforms(16_000, 9_000))
    assert [tuple(state.shape) for state in states] == [(2, 25, 24)] * 3
    assert lengths[0].tolist() == [25, 15]


def test_a_run_starts_from_the_file(file: Path) -> None:
    config = typed_method(BestRqConfig, compose_recipe("best_rq_tiny")["method"])
    small = BestRqEncoder.from_config(from_pt(torch.load(file)).encoder_config).config
    method = BestRqMethod(replace(config, encoder=replace(small, dropout=0.0)))
    before = method.quantizer.codebook.clone()
    assert "encoder: " in " ".join(initialise(method, str(file), "reset"))
    expected = from_pt(torch.load(file)).encoder_state
    assert all(torch.equal(value, expected[key]) for key, value in method.encoder.state_dict().items())
    assert torch.equal(method.quantizer.codebook, before)
    # Quantizer and classifier lie in other files there.
    with pytest.raises(InteropError, match="init_head=reset"):
        initialise(method, str(file), "keep")


def test_another_file_is_refused(tmp_path: Path) -> None:
    torch.save({"w.weight": torch.zeros(2)}, tmp_path / "linear.ckpt")
    with pytest.raises(InteropError, match=r"linear\.ckpt: keys w\.weight.* not the model\.ckpt of speechbrain"):
        Upstream("best_rq", tmp_path / "linear.ckpt")
