"""Label directories: what is written is what is read, and every directory that does not fit the audio is refused."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from pretrain.data.audio import AudioError
from pretrain.data.label_files import LabelWriter, merge_shards
from pretrain.data.labels import LabelError, LabelInfoFile, LabelSet, SplitInfo, publish_labels, write_labels
from pretrain.data.manifest import Manifest, write_manifest

CLASSES = 20
LENGTHS = [16000, 24001, 33333, 8000]


def hundred_hz(samples: int) -> int:
    return (samples - 400) // 160 + 1


def make_manifest(folder: Path, lengths: list[int] = LENGTHS, prefix: str = "a") -> Manifest:
    path = folder / "train.tsv"
    write_manifest(path, folder / "audio", [(f"{prefix}/{i}.wav", n) for i, n in enumerate(lengths)])
    return Manifest.read(path)


def make_rows(lengths: list[int] = LENGTHS, classes: int = CLASSES) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, classes, size=hundred_hz(n)) for n in lengths]


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return make_manifest(tmp_path)


@pytest.fixture
def labels_dir(tmp_path: Path, manifest: Manifest) -> Path:
    directory = tmp_path / "labels"
    write_labels(directory, 100, CLASSES, {"train": (manifest, make_rows())})
    return directory


@pytest.fixture
def fairseq_dir(tmp_path: Path, manifest: Manifest) -> Path:
    """What fairseq's own tools leave: text and dictionary, written here without our code."""
    directory = tmp_path / "fairseq"
    directory.mkdir()
    lines = [" ".join(map(str, row)) for row in make_rows()]
    (directory / "train.km").write_text("\n".join(lines) + "\n")
    (directory / "dict.km.txt").write_text("".join(f"{k} 1\n" for k in range(CLASSES)))
    return directory


def test_rows_come_back_and_the_text_is_fairseqs(labels_dir: Path, manifest: Manifest) -> None:
    label_set = LabelSet.open(labels_dir, "train", manifest)
    assert (label_set.rate_hz, label_set.num_classes, len(label_set)) == (100, CLASSES, len(LENGTHS))
    lines = (labels_dir / "train.km").read_text().splitlines()
    for row, expected in enumerate(make_rows()):
        np.testing.assert_array_equal(label_set[row], expected)
        assert list(map(int, lines[row].split())) == expected.tolist()
    assert (labels_dir / "dict.km.txt").read_text().split("\n")[:2] == ["0 1", "1 1"]


def test_labels_are_memory_mapped_and_pickling_does_not_copy_them(tmp_path: Path) -> None:
    lengths = [160000] * 50
    manifest = make_manifest(tmp_path, lengths)
    write_labels(tmp_path / "long", 100, CLASSES, {"train": (manifest, make_rows(lengths))})
    label_set = LabelSet.open(tmp_path / "long", "train", manifest)
    assert isinstance(label_set[0].base, np.memmap)
    pickled = pickle.dumps(label_set)
    assert len(pickled) < 5000 < 2 * label_set.counts().sum()
    np.testing.assert_array_equal(pickle.loads(pickled)[7], label_set[7])


@pytest.mark.parametrize(("classes", "dtype"), [(32767, np.int16), (32768, np.int32), (70000, np.int32)])
def test_the_smallest_type_that_holds_the_classes(
    tmp_path: Path, manifest: Manifest, classes: int, dtype: type
) -> None:
    rows = make_rows(classes=classes)
    rows[0][0] = classes - 1
    write_labels(tmp_path / "wide", 100, classes, {"train": (manifest, rows)})
    row = LabelSet.open(tmp_path / "wide", "train", manifest)[0]
    assert row.dtype == dtype
    assert row[0] == classes - 1


def test_shards_are_joined_in_rank_order(tmp_path: Path, labels_dir: Path) -> None:
    directory = tmp_path / "sharded"
    directory.mkdir()
    rows = make_rows()
    for rank, part in enumerate((rows[:1], rows[1:3], [], rows[3:])):
        writer = LabelWriter(directory, "train", CLASSES, shard=rank)
        for row in part:
            writer.write(row)
        writer.close()
    assert not list(directory.glob("train.*"))
    merge_shards(directory, "train", CLASSES, range(4))
    for name in ("train.km", "train.npy", "train.offsets.npy"):
        assert (directory / name).read_bytes() == (labels_dir / name).read_bytes()
    assert sorted(p.name for p in directory.iterdir()) == ["train.km", "train.npy", "train.offsets.npy"]


def test_a_fairseq_directory_is_parsed_once(fairseq_dir: Path, manifest: Manifest) -> None:
    label_set = LabelSet.open(fairseq_dir, "train", manifest, rate_hz=100)
    np.testing.assert_array_equal(label_set[2], make_rows()[2])
    parsed = (fairseq_dir / "train.npy").stat().st_mtime_ns
    LabelSet.open(fairseq_dir, "train", manifest, rate_hz=100)
    assert (fairseq_dir / "train.npy").stat().st_mtime_ns == parsed


def test_labels_without_a_kmeans_model_are_told_apart_by_their_content(
    labels_dir: Path, fairseq_dir: Path, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows()
    rows[-1] = (rows[-1] + 1) % CLASSES
    write_labels(tmp_path / "others", 100, CLASSES, {"train": (manifest, rows)})
    moved = shutil.copytree(labels_dir, tmp_path / "moved")

    def fingerprints(*places: Path) -> list[str]:
        return [LabelSet.open(place, "train", manifest, 100).fingerprint() for place in places]

    same, text, copied, others = fingerprints(labels_dir, fairseq_dir, moved, tmp_path / "others")
    assert same == text == copied != others
    assert len(same) == 64
    # Of labels that are too many to be read whole, the last block is among those that are.
    monkeypatch.setattr("pretrain.data.labels.FINGERPRINT_BYTES", 64)
    monkeypatch.setattr("pretrain.data.labels.FINGERPRINT_BLOCKS", 4)
    sampled, text, others = fingerprints(labels_dir, fairseq_dir, tmp_path / "others")
    assert sampled == text
    assert len({same, sampled, others}) == 3
    info = json.loads((moved / "labels.json").read_text())
    (moved / "labels.json").write_text(json.dumps(info | {"kmeans_sha256": "ab"}))
    assert fingerprints(moved) == ["ab"]


def test_a_fairseq_directory_whose_text_changed_is_parsed_again(fairseq_dir: Path, manifest: Manifest) -> None:
    LabelSet.open(fairseq_dir, "train", manifest, rate_hz=100)
    text = (fairseq_dir / "train.km").read_text()
    (fairseq_dir / "train.km").write_text("19 19" + text[text.index(" ", text.index(" ") + 1) :])
    assert LabelSet.open(fairseq_dir, "train", manifest, rate_hz=100)[0][:2].tolist() == [19, 19]


def test_a_fairseq_directory_needs_a_rate_and_a_dictionary(fairseq_dir: Path, manifest: Manifest) -> None:
    with pytest.raises(LabelError, match="label_rate_hz"):
        LabelSet.open(fairseq_dir, "train", manifest)
    (fairseq_dir / "dict.km.txt").write_text("")
    with pytest.raises(LabelError, match=r"dict\.km\.txt: has 0 symbols"):
        LabelSet.open(fairseq_dir, "train", manifest, rate_hz=100)
    (fairseq_dir / "dict.km.txt").unlink()
    with pytest.raises(LabelError, match=r"dict\.km\.txt: is missing"):
        LabelSet.open(fairseq_dir, "train", manifest, rate_hz=100)


@pytest.mark.parametrize(
    ("token", "message"), [("x", "line 2"), ("20", "line 2: class 20"), ("-1", "line 2: class -1")]
)
def test_a_bad_token_is_reported_with_its_line(fairseq_dir: Path, manifest: Manifest, token: str, message: str) -> None:
    lines = (fairseq_dir / "train.km").read_text().splitlines()
    lines[1] = f"{token} {lines[1]}"
    (fairseq_dir / "train.km").write_text("\n".join(lines) + "\n")
    with pytest.raises(LabelError, match=message):
        LabelSet.open(fairseq_dir, "train", manifest, rate_hz=100)
    assert not (fairseq_dir / "train.npy").exists()


def test_missing_files_are_named(labels_dir: Path, manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(LabelError, match=r"nowhere/train\.km: is missing"):
        LabelSet.open(tmp_path / "nowhere", "train", manifest, rate_hz=100)
    with pytest.raises(LabelError, match="has no 'valid', only train"):
        LabelSet.open(labels_dir, "valid", manifest)
    (labels_dir / "train.npy").unlink()
    with pytest.raises(LabelError, match=r"train\.npy: cannot be read"):
        LabelSet.open(labels_dir, "train", manifest)


def test_another_number_of_rows_is_refused(labels_dir: Path, fairseq_dir: Path, tmp_path: Path) -> None:
    longer = make_manifest(tmp_path / "longer", [*LENGTHS, 16000])
    with pytest.raises(LabelError, match=r"train has 4 lines, but train\.tsv has 5"):
        LabelSet.open(labels_dir, "train", longer)
    with pytest.raises(LabelError, match=r"train\.km: has 4 lines, but train.tsv has 5"):
        LabelSet.open(fairseq_dir, "train", longer, rate_hz=100)


def test_labels_of_another_manifest_are_refused(labels_dir: Path, tmp_path: Path) -> None:
    other = make_manifest(tmp_path / "other", prefix="b")
    with pytest.raises(LabelError, match="other paths, lengths or order"):
        LabelSet.open(labels_dir, "train", other)


def test_a_moved_corpus_keeps_its_labels(labels_dir: Path, tmp_path: Path) -> None:
    moved = make_manifest(tmp_path / "elsewhere")
    np.testing.assert_array_equal(LabelSet.open(labels_dir, "train", moved)[0], make_rows()[0])


def test_a_wrong_rate_is_refused(labels_dir: Path, fairseq_dir: Path, manifest: Manifest) -> None:
    with pytest.raises(LabelError, match="have 100 per second, not 50"):
        LabelSet.open(labels_dir, "train", manifest, rate_hz=50)
    with pytest.raises(LabelError, match=r"4 of 4 lines .* at 50 labels per second \(on average the file has 9\d"):
        LabelSet.open(fairseq_dir, "train", manifest, rate_hz=50)
    with pytest.raises(LabelError, match="does not divide"):
        LabelSet.open(fairseq_dir, "train", manifest, rate_hz=60)


def test_a_truncated_line_is_listed(fairseq_dir: Path, manifest: Manifest) -> None:
    lines = (fairseq_dir / "train.km").read_text().splitlines()
    lines[2] = " ".join(lines[2].split()[:-2])
    (fairseq_dir / "train.km").write_text("\n".join(lines) + "\n")
    with pytest.raises(LabelError, match=r"1 of 4 lines[\s\S]*line 3 \(a/2.wav\): 204 labels .* expected 205 to 210"):
        LabelSet.open(fairseq_dir, "train", manifest, rate_hz=100)


def test_shifted_lines_are_listed_at_most_ten(tmp_path: Path) -> None:
    lengths = [16000 + 1600 * i for i in range(30)]
    manifest = make_manifest(tmp_path, lengths)
    rows = make_rows(lengths)
    write_labels(tmp_path / "labels", 100, CLASSES, {"train": (manifest, rows[1:] + rows[:1])})
    with pytest.raises(LabelError, match="30 of 30 lines") as caught:
        LabelSet.open(tmp_path / "labels", "train", manifest)
    assert str(caught.value).count("\n  line ") == 10


@pytest.mark.parametrize("wrong", [-1, CLASSES])
def test_a_class_out_of_range_names_its_line(labels_dir: Path, manifest: Manifest, wrong: int) -> None:
    labels = np.load(labels_dir / "train.npy")
    labels[hundred_hz(LENGTHS[0]) + hundred_hz(LENGTHS[1])] = wrong
    np.save(labels_dir / "train.npy", labels)
    with pytest.raises(LabelError, match=rf"line 3 \(a/2.wav\) has class {wrong}, but there are 20"):
        LabelSet.open(labels_dir, "train", manifest)
    with pytest.raises(ValueError, match=f"class {wrong}"):
        write_labels(labels_dir / "new", 100, CLASSES, {"train": (manifest, [np.array([wrong])])})


@pytest.mark.parametrize("rate_hz", [50, 100])
def test_accepted_counts_at_the_borders(tmp_path: Path, rate_hz: int) -> None:
    hop, samples = 16000 // rate_hz, 33333
    manifest = make_manifest(tmp_path, [samples])
    least, greatest = (samples - 400) // hop, -(-samples // hop) + 1
    for count in (least - 1, least, greatest, greatest + 1):
        directory = tmp_path / str(count)
        write_labels(directory, rate_hz, CLASSES, {"train": (manifest, [np.zeros(count, dtype=int)])})
        if least <= count <= greatest:
            assert len(LabelSet.open(directory, "train", manifest)[0]) == count
        else:
            with pytest.raises(LabelError, match=f"expected {least} to {greatest}"):
                LabelSet.open(directory, "train", manifest)


def test_a_cut_array_is_refused(labels_dir: Path, manifest: Manifest) -> None:
    np.save(labels_dir / "train.npy", np.load(labels_dir / "train.npy")[:-5])
    with pytest.raises(LabelError, match=r"does not belong to train\.npy"):
        LabelSet.open(labels_dir, "train", manifest)
    content = (labels_dir / "train.npy").read_bytes()
    (labels_dir / "train.npy").write_bytes(content[: len(content) // 2])
    with pytest.raises(LabelError, match=r"train\.npy: cannot be read"):
        LabelSet.open(labels_dir, "train", manifest)


def test_a_damaged_labels_json_is_refused(labels_dir: Path, manifest: Manifest) -> None:
    values = json.loads((labels_dir / "labels.json").read_text())
    (labels_dir / "labels.json").write_text(json.dumps({k: v for k, v in values.items() if k != "rate_hz"}))
    with pytest.raises(LabelError, match=r"labels\.json: cannot be understood"):
        LabelSet.open(labels_dir, "train", manifest)


def test_only_rows_that_were_unreadable_may_be_empty(labels_dir: Path, manifest: Manifest, tmp_path: Path) -> None:
    rows = make_rows()
    rows[1] = np.array([], dtype=int)
    directory = tmp_path / "gap"
    write_labels(directory, 100, CLASSES, {"train": (manifest, rows)})
    with pytest.raises(LabelError, match=r"line 2 \(a/1.wav\): 0 labels"):
        LabelSet.open(directory, "train", manifest)
    split = SplitInfo(len(manifest), manifest.fingerprint(), unlabelled=[1])
    publish_labels(directory, LabelInfoFile(100, CLASSES, "", {"train": split}))
    label_set = LabelSet.open(directory, "train", manifest)
    assert label_set.unlabelled.tolist() == [1]
    with pytest.raises(AudioError, match=r"a/1\.wav: has no labels"):
        label_set[1]
    shutil.copy(directory / "labels.json", labels_dir / "labels.json")
    with pytest.raises(LabelError, match=r"line 2 \(a/1.wav\): 148 labels"):
        LabelSet.open(labels_dir, "train", manifest)
