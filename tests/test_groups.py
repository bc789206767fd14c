"""Speakers of rows: from a component of the path, from tables, and what is said where they are missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pretrain.config import ConfigError, compose_recipe, run_config
from pretrain.data.corpus import open_corpus
from pretrain.data.manifest import Manifest, write_manifest
from pretrain.data.speakers import speaker_groups

LIBRISPEECH = ["84/121123/84-121123-0000.flac", "1272/1/1272-1-0003.flac", "84/121550/84-121550-0001.flac"]


def manifest_of(folder: Path, paths: list[str]) -> Manifest:
    write_manifest(folder / "train.tsv", folder, [(path, 16_000) for path in paths])
    return Manifest.read(folder / "train.tsv")


@pytest.mark.parametrize(("place", "prefix"), [(0, ""), (-3, ""), (1, "train-clean-100/"), (-3, "train-clean-100/")])
def test_a_component_of_the_path(tmp_path: Path, place: int, prefix: str) -> None:
    manifest = manifest_of(tmp_path, [prefix + path for path in LIBRISPEECH])
    assert speaker_groups(place, manifest).tolist() == [0, 1, 0]


@pytest.mark.parametrize("place", [2, 5, -1, -4])
def test_a_component_that_is_not_there(tmp_path: Path, place: int) -> None:
    """The file's name is no speaker either."""
    manifest = manifest_of(tmp_path, LIBRISPEECH)
    with pytest.raises(ConfigError) as error:
        speaker_groups(place, manifest)
    assert str(error.value).startswith(
        f"data.speakers: {tmp_path}/train.tsv: 3 of 3 rows do not have a folder at place {place} of the path; "
    )
    assert "line 2: 84/121123/84-121123-0000.flac" in str(error.value)


@pytest.mark.parametrize(
    "table",
    [
        "utt\tspeaker\na/x\tanna\na/y\tbert\nb/z\tanna\nother\tx\n",
        "speaker\tn\tpath\r\nanna\t1\ta/x.wav\r\nbert\t2\ta/y.wav\r\nanna\t3\tb/z.wav\r\n",
        "client_id\tpath\tvoice\n7\ta/x.wav\tanna\n7\ta/y.wav\tbert\n7\tb/z.wav\tanna\n",
    ],
)
def test_tables(tmp_path: Path, table: str) -> None:
    manifest = manifest_of(tmp_path, ["a/x.wav", "a/y.wav", "b/z.wav"])
    (tmp_path / "speakers.tsv").write_text(table)
    assert speaker_groups(str(tmp_path / "speakers.tsv"), manifest).tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            "utt\tspeaker\na/x\tanna\n",
            r"2 of 3 rows do not have a speaker in .*\n  line 3: a/y\.wav\n  line 4: b/z\.wav",
        ),
        ("utt\tspeaker\na/x\t\na/y\tb\nb/z\tb\n", r"1 of 3 rows do not have a speaker in .*line 2: a/x\.wav"),
        ("utt\tspaeker\na/x\tanna\n", r"line 1: has no column speaker or voice or client_id; did you mean spaeker"),
        ("utt\tspeaker\na/x\n", r"line 2: has too few columns"),
        (None, r"cannot be read \(No such file"),
    ],
)
def test_tables_that_do_not_serve(tmp_path: Path, table: str | None, message: str) -> None:
    manifest = manifest_of(tmp_path, ["a/x.wav", "a/y.wav", "b/z.wav"])
    if table is not None:
        (tmp_path / "speakers.tsv").write_text(table)
    with pytest.raises(ConfigError, match=r"(?s)data\.speakers: .*" + message):
        speaker_groups(str(tmp_path / "speakers.tsv"), manifest)


@pytest.mark.parametrize("data", ["sample", "librispeech_960"])
def test_the_sample_knows_its_voices(tmp_path: Path, data: str) -> None:
    """Also where it stands in for another corpus, whose paths have the speaker elsewhere."""
    config = run_config(compose_recipe("hubert_tiny", [f"data={data}"]))
    corpus = open_corpus(config.data, [], tmp_path, by_speaker=True)
    assert corpus.valid is not None
    for split in (corpus.train, corpus.valid):
        assert split.groups is not None
        voices = [Path(split.manifest.path(row)).name.split("-")[0] for row in range(len(split.manifest))]
        assert len(set(voices)) == 12
        assert len(set(zip(voices, split.groups.tolist(), strict=True))) == 12 == len(np.unique(split.groups))


def test_speakers_must_be_known_where_batches_keep_to_them(tmp_path: Path) -> None:
    config = run_config(compose_recipe("hubert_tiny", ["data.speakers=null"]))
    with pytest.raises(ConfigError, match=r"data\.speakers: missing, and batch\.within=speaker"):
        open_corpus(config.data, [], tmp_path, by_speaker=True)
    with pytest.raises(ConfigError, match=r"batch\.within: 'speakers' is unknown; take speaker"):
        run_config(compose_recipe("hubert_tiny", ["batch.within=speakers"]))
