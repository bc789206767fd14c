"""Several corpora from the configuration to the run: joined rows, what is refused, resuming, two ranks."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_run import UPDATES, metrics, run, run_here, write_data
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.config import ConfigError, DataConfig, compose_recipe, run_config
from pretrain.data.audio import AudioError
from pretrain.data.corpus import Corpus, open_corpus
from pretrain.data.labels import LabelError, write_labels
from pretrain.data.manifest import Manifest, write_manifest
from pretrain.method import TargetSpec

OPTIONS = {"name": "corpora", "dir": None, "labels": None, "label_rate_hz": None, "workers": 0, "max_bad_share": 0.0}

LABELS, PHONES = TargetSpec("labels", "frames", 6), TargetSpec("phones", "symbols", column="phones")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpora a and b, of the same kind; b's files are told apart by their manifest's order."""
    folder = tmp_path_factory.mktemp("two")
    write_data(folder / "a")
    write_data(folder / "b")
    for split in ("train", "valid"):
        path = folder / "b" / "data" / f"{split}.tsv"
        rows = [line.split("\t") for line in path.read_text().splitlines()[1:]]
        write_manifest(path, folder / "b" / "data", [(name, int(samples)) for name, samples in rows[::-1]])
    relabel(folder / "b")
    return folder


def relabel(folder: Path, classes: int = 6, rate_hz: int = 100) -> None:
    """Labels that tell the row: class `row % classes` all through."""
    shutil.rmtree(folder / "labels", ignore_errors=True)
    splits = {}
    for split in ("train", "valid"):
        manifest = Manifest.read(folder / "data" / f"{split}.tsv")
        hop = 16_000 // rate_hz
        rows = [np.full((n - 400) // hop + 1, row % classes) for row, n in enumerate(manifest.lengths.tolist())]
        splits[split] = (manifest, rows)
    write_labels(folder / "labels", rate_hz, classes, splits)


def entry(folder: Path, tag: str, **more: Any) -> dict[str, Any]:
    return {"tag": tag, "dir": str(folder / tag / "data"), "labels": str(folder / tag / "labels"), **more}


def opened(folder: Path, *entries: dict[str, Any], classes: int = 1, **options: Any) -> Corpus:
    by_speaker = options.pop("by_speaker", False)
    specs = [LABELS] * classes + ([PHONES] if options.pop("with_transcripts", False) else [])
    entries = entries or (entry(folder, "a"), entry(folder, "b"))
    data = DataConfig(**OPTIONS | {"corpora": list(entries)} | options)
    return open_corpus(data, specs, folder, by_speaker=by_speaker)


def test_rows_are_numbered_through_the_manifests(two: Path) -> None:
    corpus = opened(two)
    manifest = corpus.train.manifest
    parts = [Manifest.read(two / tag / "data" / "train.tsv") for tag in ("a", "b")]
    assert len(manifest) == 32
    assert [manifest.path(row) for row in range(32)] == [part.path(row) for part in parts for row in range(16)]
    assert manifest.lengths.tolist() == [n for part in parts for n in part.lengths.tolist()]
    assert corpus.found["labels"].num_classes == 6
    for row in range(16, 32):
        assert set(corpus.train.targets["labels"].rows[row]) == {(row - 16) % 6}
    assert corpus.valid is not None
    assert len(corpus.valid.manifest) == 8
    assert len(pickle.dumps(manifest)) < 2_000
    assert pickle.loads(pickle.dumps(manifest)).path(20) == manifest.path(20)


def test_a_corpus_without_validation_is_left_out_of_it(two: Path, tmp_path: Path) -> None:
    shutil.copytree(two / "b", tmp_path / "b")
    (tmp_path / "b" / "data" / "valid.tsv").unlink()
    corpus = opened(two, entry(two, "a"), entry(tmp_path, "b"))
    assert corpus.valid is not None
    assert len(corpus.valid.manifest) == 4
    assert len(corpus.train.manifest) == 32


def test_what_identifies_a_run(two: Path) -> None:
    """Moving the corpora changes nothing; order, tags, weights and alpha do."""
    a, b = entry(two, "a"), entry(two, "b")
    shutil.copytree(two / "b" / "labels", two / "other", dirs_exist_ok=True)
    labels = np.load(two / "other" / "train.npy")
    np.save(two / "other" / "train.npy", (labels + 1) % 6)
    weighted = [{**a, "weight": 1}, {**b, "weight": 2}]
    identities = [
        opened(two).identity(),
        opened(two, b, a).identity(),
        opened(two, {**a, "tag": "x"}, b).identity(),
        opened(two, sampling_alpha=0.5).identity(),
        opened(two, *weighted).identity(),
        opened(two, {**weighted[0], "weight": 3}, weighted[1]).identity(),
        opened(two, a).identity(),
        opened(two, a, {**b, "labels": str(two / "other")}).identity(),
    ]
    assert len({json.dumps(identity) for identity in identities}) == len(identities)
    assert opened(two).identity() == identities[0] == opened(two, sampling_alpha=1.0).identity()
    assert json.loads(json.dumps(identities)) == identities


def test_speakers_of_two_corpora_are_different_people(two: Path, tmp_path: Path) -> None:
    for tag in ("a", "b"):
        for split in ("train", "valid"):
            lines = [f"{split}/{i}\tspeaker{i % 3}\n" for i in range(16)]
            (two / tag / "data" / f"{split}.speakers.tsv").write_text("utt\tspeaker\n" + "".join(lines))
    corpus = opened(two, by_speaker=True, speakers="{dir}/{split}.speakers.tsv")
    groups = corpus.train.groups
    assert groups is not None
    assert set(groups[:16]) == {0, 1, 2}
    assert set(groups[16:]) == {3, 4, 5}
    # b lists its files backwards: its row r is file 15 - r.
    assert [len(set(groups[16:][[15 - i for i in range(16) if i % 3 == k]])) for k in range(3)] == [1, 1, 1]
    assert opened(two).identity()["speakers"] is None
    assert corpus.identity()["speakers"] is not None


def test_a_part_may_be_transcribed(two: Path) -> None:
    (two / "a.tsv").write_text("utt\tphones\ntrain/3\tx y\nvalid/0\tz\n")
    corpus = opened(two, {**entry(two, "a"), "transcripts": str(two / "a.tsv")}, entry(two, "b"), with_transcripts=True)
    assert corpus.found["phones"].names == ("x", "y", "z")
    transcripts = corpus.train.targets["phones"].rows
    found = {row: ids.tolist() for row in range(32) if (ids := transcripts[row]) is not None}
    assert found == {3: [0, 1]}
    assert corpus.facts[1].startswith("phones: phones of 1 of 32 training utterances, 3 names")
    assert opened(two).identity()["transcripts"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dir": "somewhere"}, r"data\.dir: given together with data\.corpora"),
        ({"labels": "l"}, r"data\.labels: given together with data\.corpora"),
        ({"transcripts": "t"}, r"data\.transcripts: given together with data\.corpora"),
        ({"corpora": []}, r"data\.corpora: the tags are \[\]"),
        ({"corpora": [{"tag": "a", "dir": "x"}] * 2}, r"the tags are \['a', 'a'\]"),
        ({"corpora": [{"tag": "a", "dri": "x"}]}, r"data\.corpora\[0\]\.dri: no such option; did you mean dir"),
        ({"corpora": [{"tag": "a"}]}, r"data\.corpora\[0\]\.dir: missing"),
        ({"corpora": [{"tag": "a", "dir": "x", "weight": 1}, {"tag": "b", "dir": "x"}]}, r"weight: give every corpus"),
        ({"corpora": [{"tag": "a", "dir": "x", "weight": 0}]}, r"weight: give every corpus a positive one"),
        ({"corpora": [{"tag": "a", "dir": "x", "weight": 1}], "sampling_alpha": 0.5}, r"without data\.sampling_alpha"),
        ({"sampling_alpha": -1.0}, r"data\.sampling_alpha: -1 is no number from 0 on"),
        ({"corpora": [{"tag": "a", "dir": "x", "labels": 5}]}, r"data\.corpora: a: labels: 5 is no path"),
        ({"corpora": [{"tag": "a", "dir": ""}]}, r"data\.corpora\[0\]\.dir: empty"),
        ({"corpora": [{"tag": "a", "dir": "x", "weight": float("nan")}]}, r"weight: give every corpus a positive one"),
    ],
)
def test_wrong_lists_are_refused(changes: dict[str, Any], message: str) -> None:
    values = compose_recipe("hubert_tiny")
    data = {**values["data"], "dir": None, "transcripts": None, "corpora": [{"tag": "a", "dir": "x"}]}
    with pytest.raises(ConfigError, match=message):
        run_config({**values, "data": data | changes})


def test_data_corpora_wants_a_list() -> None:
    with pytest.raises(ConfigError, match=r"data\.corpora: the tags are \[\]; list at least one corpus"):
        run_config(compose_recipe("hubert_tiny", ["data=corpora"]))
    config = run_config(
        compose_recipe("hubert_tiny", ["data=corpora", "data.corpora=[{tag: en, dir: x, labels: [l, m]}]"])
    )
    assert [corpus.label_dirs() for corpus in config.data.corpora] == [[Path("l"), Path("m")]]


def test_corpora_that_do_not_fit_are_refused(two: Path, tmp_path: Path) -> None:
    a, b = entry(two, "a"), entry(two, "b")
    with pytest.raises(ConfigError, match=r"data\.corpora: b: dir: .*nowhere has no train\.tsv"):
        opened(two, a, {**b, "dir": "nowhere"})
    with pytest.raises(ConfigError, match=r"labels: the numbers of label sets differ \(a 1, b 2\)"):
        opened(two, a, {**b, "labels": [b["labels"]] * 2})
    with pytest.raises(ConfigError, match=r"data\.labels: missing; .*b/data"):
        opened(two, a, {**b, "labels": None})
    shutil.copytree(two / "b", tmp_path / "b")
    for change, message in (
        ({"classes": 7}, r"num_classes: is 7, but .*a/labels has 6"),
        ({"rate_hz": 50}, r"rate_hz: is 50, but"),
    ):
        relabel(tmp_path / "b", **change)
        with pytest.raises(LabelError, match=message + r".*kmeans="):
            opened(two, a, {**b, "labels": str(tmp_path / "b" / "labels")})
    relabel(tmp_path / "b")
    info = json.loads((tmp_path / "b" / "labels" / "labels.json").read_text())
    (tmp_path / "b" / "labels" / "labels.json").write_text(json.dumps(info | {"kmeans_sha256": "ff"}))
    with pytest.raises(LabelError, match=r"kmeans_sha256: is ff"):
        opened(two, a, {**b, "labels": str(tmp_path / "b" / "labels")})
    shutil.rmtree(tmp_path / "b" / "data" / "train")
    path = tmp_path / "b" / "data" / "train.tsv"
    path.write_text("\n".join([str(tmp_path / "b" / "data"), *path.read_text().splitlines()[1:]]) + "\n")
    with pytest.raises(AudioError, match=r"b/data/train\.tsv: lists files that do not exist"):
        opened(two, a, {**b, "dir": str(tmp_path / "b" / "data")})


def options(folder: Path, weights: tuple[int, int] = (1, 3)) -> list[str]:
    """The command line of a run on both, b three times as much as a."""
    pairs = zip("ab", weights, strict=True)
    listed = ",".join(
        f"{{tag:{tag},dir:{folder / tag / 'data'},labels:{folder / tag / 'labels'},weight:{w}}}" for tag, w in pairs
    )
    return ["data=corpora", "data.dir=null", "data.labels=null", f"data.corpora=[{listed}]", "data.workers=0"]


@pytest.fixture(scope="module")
def unbroken(two: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A whole run on both, and what it printed."""
    output = tmp_path_factory.mktemp("unbroken") / "out"
    return output, run_here(two, output, *options(two))


@pytest.mark.xdist_group("corpora")
def test_a_run_on_two_corpora_says_so_and_resumes(two: Path, unbroken: tuple[Path, str], tmp_path: Path) -> None:
    output, printed = unbroken
    assert "a: 0.00 h, of which an epoch takes 0.00 h (25." in printed
    assert "b: 0.00 h, of which an epoch takes 0.01 h (7" in printed
    assert len(metrics(output)) == UPDATES
    [shares] = metrics(output, "data/share")
    assert shares["data/share/b"] == pytest.approx(0.75, abs=0.03)
    events = EventAccumulator(str(output / "run" / "tensorboard")).Reload()
    assert events.Scalars("data/sampled_hours/b")[0].value > 2 * events.Scalars("data/sampled_hours/a")[0].value > 0

    run_here(two, tmp_path / "out", *options(two), "trainer.stop_after_updates=7")
    assert "resuming from" in run_here(two, tmp_path / "out", *options(two))
    assert metrics(tmp_path / "out") == metrics(output)


@pytest.mark.slow
@pytest.mark.xdist_group("corpora")
def test_two_ranks_follow_and_other_weights_do_not_resume(
    two: Path, unbroken: tuple[Path, str], tmp_path: Path
) -> None:
    run(two, tmp_path / "out", *options(two), ranks=2)
    for line, expected in zip(metrics(tmp_path / "out"), metrics(unbroken[0]), strict=True):
        assert line["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-5)
    refused = run(two, tmp_path / "out", *options(two, (1, 2)), status=1)
    assert "sampling: was {'alpha': 1.0, 'weights': [1.0, 3.0]}, is {'alpha': 1.0, 'weights': [1.0, 2.0]}" in refused
