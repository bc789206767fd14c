"""Token directories: codes become numbers in fairseq's order, whatever the ranks and the lengths of the files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import s3prl_compat  # noqa: F401  (must come before s3prl)
import torch
from audio_maker import babble, write_corpus
from conftest import ROOT, run_python
from recipe_checks import build, write_checkpoint
from s3prl.upstream.roberta.dictionary import Dictionary
from torch import Tensor

from pretrain.data.audio import read_audio
from pretrain.data.labels import LabelError, LabelSet
from pretrain.data.manifest import Manifest, write_manifest
from pretrain.labelling.kmeans.features import FeatureSpec
from pretrain.labelling.kmeans.generate import LabelData
from pretrain.labelling.kmeans.model import KMeansModel, make_extractor
from pretrain.labelling.tokens.dictionary import TokenDictionary, code_numbers
from pretrain.labelling.tokens.generate import (
    TokenOptions,
    describe,
    ensure_kmeans_tokens,
    generate_tokens,
    utterance_codes,
)
from pretrain.labelling.tokens.tokenizer import KMeansTokenizer, build_tokenizer, load_tokenizer, tokenizer_of
from pretrain.weights.read import load_encoder

GROUPS, ENTRIES = 2, 4
LENGTHS = {"train": [16_000, 24_001, 30_333], "valid": [20_000, 12_345]}
SMALL = [
    "method.encoder.conv_feature_layers=[[8,10,5],[8,8,4],[8,4,2],[8,4,2],[8,4,2]]",
    "method.encoder.conv_aggregator_layers=[[8,2]]",
    f"method.encoder.quantizer.vq_vars={ENTRIES}",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for split, samples in LENGTHS.items():
        lengths = {f"{split}/{index}.wav": count for index, count in enumerate(samples)}
        write_corpus(folder, lengths)
        write_manifest(folder / f"{split}.tsv", folder, lengths.items())
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a vq-wav2vec."""
    folder = tmp_path_factory.mktemp("runs") / "vq"
    write_checkpoint(folder, build("vq_wav2vec_kmeans", *SMALL))
    return folder


@pytest.fixture(scope="module")
def tokens(corpus: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("tokens") / "made"
    report = generate_tokens(TokenOptions(str(output), LabelData(str(corpus)), checkpoint=str(run)))
    assert f"{report['tokens']} tokens in the dictionary, 100 per second" in describe(report)
    return output


def symbols_of(corpus: Path, run: Path, split: str) -> list[list[str]]:
    """The codes of every file as text, one file at a time."""
    encoder, rows = load_encoder(run).eval(), []
    for index, samples in enumerate(LENGTHS[split]):
        waveform = torch.from_numpy(read_audio(str(corpus / split / f"{index}.wav"), 0, samples))
        rows.append(["-".join(map(str, pair)) for pair in encoder.codes(waveform[None], None)[0][0].tolist()])
    return rows


def test_tokens_are_fairseqs_numbers_of_the_codes(corpus: Path, run: Path, tokens: Path) -> None:
    theirs = Dictionary()
    texts = {split: symbols_of(corpus, run, split) for split in LENGTHS}
    for symbol in (symbol for row in texts["train"] for symbol in row):
        theirs.add_symbol(symbol)
    theirs.finalize(padding_factor=1)
    lines = [line.split() for line in (tokens / "dict.txt").read_text().splitlines()]
    assert [(symbol, int(count)) for symbol, count in lines] == list(
        zip(theirs.symbols[4:], theirs.count[4:], strict=True)
    )
    assert len(lines) > 2
    for split, rows in texts.items():
        labels = LabelSet.open(tokens, split, Manifest.read(corpus / f"{split}.tsv"))
        assert (labels.rate_hz, labels.num_classes) == (100, len(lines) + 1)
        for row, symbols in enumerate(rows):
            # Classes begin with <unk>, which is fairseq's 3.
            assert (labels[row] + 3).tolist() == [theirs.index(symbol) for symbol in symbols]
            assert len(labels[row]) == (LENGTHS[split][row] - 465) // 160 + 1


def test_ties_come_in_the_order_of_their_text() -> None:
    counts = np.zeros(400, dtype=np.int64)
    counts[[19, 3, 11, 40, 7]] = [2, 2, 9, 2, 1]
    dictionary = TokenDictionary.from_counts(counts, 2, 20)
    assert dictionary.text() == "0-11 9\n0-19 2\n0-3 2\n2-0 2\n0-7 1\n"
    assert dictionary.class_of_number()[[11, 19, 3, 40, 7, 0]].tolist() == [1, 2, 3, 4, 5, 0]
    assert code_numbers(torch.tensor([[1, 2, 3], [0, 0, 1]]), 10).tolist() == [123, 1]


def test_the_tokenizer_travels(run: Path, tokens: Path) -> None:
    method, config = tokenizer_of(tokens)
    tokenizer = build_tokenizer(method, config)
    load_tokenizer(tokenizer, tokens)
    original = load_encoder(run)
    assert method == "wav2vec"
    mine, its = tokenizer.state_dict(), original.state_dict()
    assert mine.keys() == its.keys()
    assert all(torch.equal(mine[key], its[key]) for key in its)


def test_two_ranks_write_the_same_files(corpus: Path, run: Path, tokens: Path, tmp_path: Path) -> None:
    tool = ["tools/make_tokens.py", f"checkpoint={run}", f"data.dir={corpus}", f"output={tmp_path / 'two'}"]
    done = run_python(tool, ranks=2, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "written to" in done.stdout
    names = [f"{split}.{suffix}" for split in LENGTHS for suffix in ("npy", "offsets.npy", "km")]
    for name in [*names, "dict.txt", "labels.json", "tokenizer/encoder.safetensors"]:
        assert (tmp_path / "two" / name).read_bytes() == (tokens / name).read_bytes(), name
    one, two = (json.loads((folder / "report.json").read_text()) for folder in (tokens, tmp_path / "two"))
    assert one["splits"] == two["splits"]
    assert (one["world_size"], two["world_size"]) == (1, 2)


def test_more_data_with_the_same_dictionary(corpus: Path, tokens: Path, tmp_path: Path) -> None:
    """A combination that the first training split lacks is unknown."""
    first = json.loads((tokens / "labels.json").read_text())
    lines = (tokens / "dict.txt").read_text().splitlines()
    poorer = tmp_path / "poorer"
    poorer.mkdir()
    (poorer / "tokenizer").symlink_to(tokens / "tokenizer")
    (poorer / "dict.txt").write_text("\n".join(lines[:2]) + "\n")
    options = TokenOptions(str(tmp_path / "again"), LabelData(str(corpus)), tokens=str(poorer))
    report = generate_tokens(options)
    before, after = (np.load(folder / "train.npy") for folder in (tokens, tmp_path / "again"))
    assert np.array_equal(after, np.where(before <= 2, before, 0))
    assert report["splits"]["train"]["unknown_share"] == pytest.approx((before > 2).mean())
    again = json.loads((tmp_path / "again" / "labels.json").read_text())
    assert (again["num_classes"], first["num_classes"]) == (3, len(lines) + 1)
    # What binds a run to its labels tells the two apart.
    assert again["kmeans_sha256"] != first["kmeans_sha256"]
    with pytest.raises(LabelError, match="exists already"):
        generate_tokens(options)


def test_a_long_file_has_the_frames_of_the_whole(run: Path) -> None:
    encoder = load_encoder(run).eval()
    waveform = torch.from_numpy(babble(50_000, 3))
    whole, seen = utterance_codes(encoder, waveform), []

    class Pieces:
        stride_samples, receptive_field_samples, code_shape = 160, 465, (GROUPS, ENTRIES)

        def codes(self, waveforms: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
            seen.append(waveforms[0])
            return encoder.codes(waveforms, lengths)

    assert utterance_codes(Pieces(), waveform, max_samples=20_000).shape == whole.shape == (310, GROUPS)
    # Three, equal but for the last: 104 frames each, and what the windows reach beyond; together they are the file.
    assert [len(piece) for piece in seen] == [103 * 160 + 465] * 2 + [50_000 - 2 * 104 * 160]
    assert torch.equal(torch.cat([seen[0][: 104 * 160], seen[1][: 104 * 160], seen[2]]), waveform)
    assert utterance_codes(encoder, waveform[:464]).shape == (0, GROUPS)


def test_kmeans_gives_codes_as_it_gives_units() -> None:
    model = KMeansModel(
        torch.randn(7, 39, generator=torch.Generator().manual_seed(0)), make_extractor(FeatureSpec("mfcc"))
    )
    tokenizer = KMeansTokenizer.of(model, "labels")
    waveforms = torch.stack([torch.from_numpy(babble(16_079, seed)) for seed in range(2)])
    codes, lengths = tokenizer.codes(waveforms, None)
    assert tokenizer.code_shape == (1, 7)
    assert lengths.tolist() == [98, 98]
    for row, waveform in zip(codes, waveforms, strict=True):
        assert torch.equal(row[:, 0], model.units(waveform))
    again = build_tokenizer("kmeans", tokenizer.to_config())
    again.load_state_dict(tokenizer.state_dict())
    assert torch.equal(again.codes(waveforms, None)[0], codes)


def test_kmeans_tokens_are_made_once(corpus: Path, tmp_path: Path) -> None:
    output = ensure_kmeans_tokens(corpus, tmp_path, clusters=5)
    made = (output / "labels.json").stat().st_mtime_ns
    assert ensure_kmeans_tokens(corpus, tmp_path, clusters=5) == output
    assert (output / "labels.json").stat().st_mtime_ns == made
    labels = np.load(tmp_path / "sample_mfcc5" / "train.npy")
    lines = [line.split()[0] for line in (output / "dict.txt").read_text().splitlines()]
    assert [lines[label - 1] for label in np.load(output / "train.npy")] == [str(unit) for unit in labels]


def test_what_cannot_be_tokenized_says_why(corpus: Path, run: Path, tokens: Path, tmp_path: Path) -> None:
    data = LabelData(str(corpus))
    with pytest.raises(LabelError, match="checkpoint, kmeans, tokens: 2 are given; give one of them"):
        generate_tokens(TokenOptions(str(tmp_path / "out"), data, checkpoint=str(run), tokens=str(tokens)))
    plain = tmp_path / "plain"
    write_checkpoint(plain, build("wav2vec_tiny"))
    with pytest.raises(LabelError, match=r"wav2vec: its encoder has no codebook; give a trained vq-wav2vec"):
        generate_tokens(TokenOptions(str(tmp_path / "out"), data, checkpoint=str(plain)))
    assert not list(tmp_path.glob("*out*"))
    (tmp_path / "dict.txt").write_text("0-1 5\n0-4 2\n")
    with pytest.raises(LabelError, match=r"line 2: '0-4' is not 2 codes below 4"):
        TokenDictionary.read(tmp_path, GROUPS, ENTRIES)
    (tmp_path / "dict.txt").write_text("a b c\n")
    with pytest.raises(LabelError, match=r"line 1: 'a b c' is not 'i-j count'"):
        TokenDictionary.read(tmp_path, GROUPS, ENTRIES)
    with pytest.raises(LabelError, match="holds no tokens"):
        TokenDictionary.read(corpus, GROUPS, ENTRIES)
