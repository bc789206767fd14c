"""Discrete BERT in s3prl: the unmodified client reads our two files and has our hidden states."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import s3prl_compat  # must come before s3prl
import torch
from recipe_checks import assert_same_states, two_waveforms, write_checkpoint
from s3prl.nn import S3PRLUpstream
from s3prl.util import download

from pretrain import Upstream
from pretrain.weights.export import ExportConfig, export
from pretrain.weights.interop.files import read_torch, write_torch
from pretrain.weights.interop.types import InteropError, TrainedMethod
from pretrain.weights.read import load_encoder
from recipes.discrete_bert import interop
from recipes.discrete_bert.reference_steps import small

# (quantizer, max_positions): the second string of 27,200 samples is longer than it may be.
CASES = {"kmeans": 256, "gumbel": 128}


@pytest.fixture(params=CASES)
def exported(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A run of ours and its export to s3prl, which the client takes for its downloads."""
    write_checkpoint(tmp_path / "run", small(request.param, CASES[request.param]))
    sentence = export(ExportConfig(str(tmp_path / "run"), str(tmp_path / "s3prl"), "s3prl"))
    assert "set_dir" in sentence
    monkeypatch.setattr(download, "_download_dir", tmp_path / "s3prl")
    return tmp_path / "run", tmp_path / "s3prl"


def test_the_client_has_our_hidden_states(exported: tuple[Path, Path]) -> None:
    run, files = exported
    urls = (interop.TOKENIZER_URL, interop.BERT_URL)
    assert {Path(s3prl_compat.url_cache_path(url)) for url in urls} == set(files.glob("*.pt"))
    ours, theirs = Upstream("discretebert", str(run)), S3PRLUpstream("discretebert")
    waveforms, lengths = two_waveforms()
    for samples in (27_200, 16_079, 16_080, 1_105, 800):
        assert_same_states(ours, theirs, waveforms[:1, :samples], torch.tensor([samples]))
    # The quantizer's norms see the padding in both, so a padded batch agrees as well; over two pieces of the string
    # only where both rows reach the second, beyond its end the client's row is not a number.
    for shorter in (27_200, 24_111) if ours.encoder.config.max_positions < 170 else (27_200, 16_079):
        rows = torch.tensor([27_200, shorter])
        padded = waveforms[:1].repeat(2, 1) * (torch.arange(27_200) < rows[:, None])
        assert_same_states(ours, theirs, padded, rows)
    assert ours.hidden_sizes == theirs.hidden_sizes
    assert list(ours.downsample_rates) == list(theirs.downsample_rates)
    for url, loaded in ((urls[0], theirs.upstream.frontend_model.vq_wav2vec.model), (urls[1], theirs.upstream.roberta)):
        saved, state = read_torch(files / interop.cache_name(url))["model_weight"], loaded.state_dict()
        assert saved.keys() == state.keys()
        assert all(torch.equal(saved[key], state[key]) for key in saved)
    assert lengths.tolist() == [27_200, 16_079]


def test_a_native_export_holds_both_networks(exported: tuple[Path, Path], tmp_path: Path) -> None:
    run, _ = exported
    export(ExportConfig(str(run), str(tmp_path / "native")))
    waveforms, lengths = two_waveforms()
    encoder = load_encoder(tmp_path / "native")
    assert not any(parameter.requires_grad for parameter in encoder.tokenizer.parameters())
    assert_same_states(Upstream("discretebert", str(tmp_path / "native")), Upstream(None, str(run)), waveforms, lengths)


def test_what_cannot_be_exported_says_why(tmp_path: Path) -> None:
    method = small(known=7)
    method.encoder.token_of_number.fill_(3)
    with pytest.raises(InteropError, match="0 tokens for a vocabulary of 12; export a run that was trained on"):
        interop.to_s3prl(TrainedMethod("discrete_bert", asdict(method.config), method.state_dict()))
    files = interop.to_s3prl(TrainedMethod("discrete_bert", asdict(small().config), small().state_dict())).files
    with pytest.raises(InteropError, match="a Namespace does not load weights-only"):
        write_torch(tmp_path / "bert.pt", files[interop.cache_name(interop.BERT_URL)])
