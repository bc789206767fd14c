"""Reading: the same batches for every number of workers, and files that cannot be read."""

from __future__ import annotations

import pickle
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from small_run import write_data

from pretrain.config import compose_recipe, typed
from pretrain.data.audio import AudioError
from pretrain.data.augment.augmenter import open_augmenter
from pretrain.data.augment.options import AugmentConfig, Babble, Mixing, Noise
from pretrain.data.labels import LabelSet
from pretrain.data.loader import MAX_REPLACEMENTS, MicroBatchReader, batches, check_files
from pretrain.data.manifest import Manifest
from pretrain.data.plan import MicroBatch, Plan, rank_share
from pretrain.data.targets import Target
from pretrain.method import Batch, CollatorDefaults, Example
from pretrain.objectives.collate import silent_waveforms
from recipes.hubert.method import HubertConfig, HubertMethod


def make_reader(folder: Path, seed: int = 3) -> MicroBatchReader:
    """The train split of `folder`, read as a HuBERT recipe would."""
    manifest = Manifest.read(folder / "data" / "train.tsv")
    collator = HubertMethod.collator(typed(HubertConfig, compose_recipe("hubert_tiny")["method"]))
    plan = Plan(
        manifest.lengths,
        min_seconds=0.5,
        max_seconds=1.0,
        seconds_per_micro_batch=2.5,
        stride_samples=320,
        receptive_field_samples=400,
        seed=seed,
    )
    targets = {"labels_0": Target("frames", LabelSet.open(folder / "labels", "train", manifest))}
    return MicroBatchReader(manifest, targets, plan, collator, seed)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def own_corpus(corpus: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(corpus, tmp_path / "copy")
    manifest = tmp_path / "copy" / "data" / "train.tsv"
    _, rows = manifest.read_text().split("\n", 1)
    manifest.write_text(f"{tmp_path / 'copy' / 'data'}\n{rows}")
    return tmp_path / "copy"


class Keep(CollatorDefaults):
    """A collator that keeps what it is given."""

    def __init__(self) -> None:
        self.examples: list[Example] = []

    def __call__(self, examples: list[Example]) -> Batch:
        self.examples = examples
        return Batch(torch.zeros(1), torch.zeros(1), 0, torch.zeros(1))


def read(reader: MicroBatchReader, count: int, workers: int, first_step: int = 0) -> list[Batch]:
    return list(islice(batches(reader, rank_share(reader.plan, first_step, 4, 0, 1), workers, False), count))


def same(left: Batch, right: Batch) -> bool:
    tensors = [{"waveforms": b.waveforms, "lengths": b.lengths, "rows": b.rows, **b.extras} for b in (left, right)]
    facts = [(b.sample_size, b.padded, b.problems) for b in (left, right)]
    return facts[0] == facts[1] and all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(corpus: Path, workers: int) -> None:
    reader = make_reader(corpus)
    # Two epochs and a part, so that the wrap is in it.
    count = 2 * reader.plan.batches_per_epoch + 3
    alone, shared = read(reader, count, 0), read(reader, count, workers)
    assert len(alone) == len(shared) == count
    assert all(same(left, right) for left, right in zip(alone, shared, strict=True))


def test_a_restart_reads_on_where_the_run_stood(corpus: Path) -> None:
    reader = make_reader(corpus)
    from_start, restarted = read(reader, 12, 0), read(make_reader(corpus), 4, 1, first_step=2)
    assert all(same(left, right) for left, right in zip(from_start[8:], restarted, strict=True))


def test_nothing_is_padded_and_every_row_comes_once(corpus: Path) -> None:
    reader = make_reader(corpus)
    read_batches = read(reader, reader.plan.batches_per_epoch, 0)
    assert not any(batch.padded for batch in read_batches)
    assert sorted(torch.cat([batch.rows for batch in read_batches]).tolist()) == reader.plan.rows.tolist()


def test_an_examples_randomness_follows_from_seed_epoch_and_row(corpus: Path) -> None:
    """Whatever else is in its batch: crop start and generator."""
    reader = make_reader(corpus)
    row = int(np.argmax(reader.manifest.lengths))

    def draw(epoch: int, with_rows: list[int], reader: MicroBatchReader = reader) -> tuple[int, float, np.ndarray]:
        reader.collator = kept = Keep()
        reader[MicroBatch(epoch, np.array(with_rows), 8_400)]
        example = next(e for e in kept.examples if e.row == row)
        return example.start, example.rng.random(), example.waveform.numpy()

    start, number, waveform = draw(0, [row])
    again = draw(0, [0, row, 2])
    assert again[:2] == (start, number)
    np.testing.assert_array_equal(again[2], waveform)
    others = [draw(epoch, [row]) for epoch in range(1, 6)]
    assert len({start, *(other[0] for other in others)}) > 2
    assert len({number, *(other[1] for other in others)}) == 6
    assert draw(0, [row], make_reader(corpus, seed=4))[1] != number
    # The crop is the file's, at the place that the example says, and on the frame grid.
    whole, _ = soundfile.read(reader.manifest.path(row), dtype="float32")
    np.testing.assert_array_equal(waveform, whole[start : start + 8_400])
    assert start % 320 == 0


def test_a_row_that_comes_again_is_cropped_and_masked_anew(corpus: Path) -> None:
    reader = make_reader(corpus)
    row = int(np.argmax(reader.manifest.lengths))
    reader.collator = kept = Keep()
    drawn = []
    for epoch in range(5):
        reader[MicroBatch(epoch, np.array([row, row, row]), 8_400, np.array([0, 1, 2]))]
        drawn += [(example.start, example.rng.random()) for example in kept.examples]
        reader[MicroBatch(epoch, np.array([row]), 8_400)]
        # The first time is what it was before rows could come again.
        assert (kept.examples[0].start, kept.examples[0].rng.random()) == drawn[-3]
        expected = np.random.default_rng([reader.seed, epoch, row])
        slack = int(reader.manifest.lengths[row]) - 8_400
        assert int(expected.integers(slack // 320 + 1)) * 320 == drawn[-3][0]
    assert len({number for _, number in drawn}) == 15
    assert len({start for start, _ in drawn}) > 5


def test_whole_utterances_are_read_to_their_end(corpus: Path) -> None:
    reader = make_reader(corpus)
    reader.plan = Plan(
        reader.manifest.lengths,
        min_seconds=0.5,
        max_seconds=1.2,
        seconds_per_micro_batch=4.0,
        stride_samples=320,
        receptive_field_samples=400,
        seed=3,
        whole=True,
    )
    transcripts = [np.array([row]) for row in range(len(reader.manifest))]
    reader.targets["phones"] = Target("symbols", transcripts)
    reader.targets["speaker"] = Target("class", transcripts)
    hubert, padded, cropped = reader.collator, 0, 0
    for index in range(reader.plan.batches_per_epoch):
        planned = reader.plan.micro_batch(index)
        reader.collator = kept = Keep()
        reader[planned]
        for row, example in zip(planned.rows.tolist(), kept.examples, strict=True):
            length = int(reader.manifest.lengths[row])
            assert len(example.waveform) == min(length, 19_200)
            assert example.start % 320 == 0
            if length > 19_200:
                cropped += 1
                assert example.targets["phones"] is None  # of a part of the words nobody knows the symbols
                assert example.targets["speaker"] is transcripts[row]
            else:
                assert example.start == 0
                assert example.targets["phones"] is transcripts[row]
        reader.collator = hubert
        batch = reader[planned]
        padded += batch.padded
        longest = int(np.minimum(reader.manifest.lengths[planned.rows], 19_200).max())
        assert batch.waveforms.shape == (len(planned.rows), longest)
    assert padded
    assert cropped


def with_noise(reader: MicroBatchReader, folder: Path) -> MicroBatchReader:
    """`reader` with noise, mixing and babble of its own corpus on nearly every example."""
    options = AugmentConfig(
        mixing=Mixing(0.6, [-5.0, 5.0]), babble=Babble(0.5, [5.0, 15.0], [1, 3]), noise=Noise(0.6, [0.0, 10.0])
    )
    reader.augmenter = open_augmenter(options, str(folder / "data" / "valid.tsv"), None, reader.manifest)
    return reader


def test_augmentation_alters_waveforms_and_nothing_else(corpus: Path) -> None:
    plain, noisy = make_reader(corpus), with_noise(make_reader(corpus), corpus)
    changed = []
    for left, right in zip(read(plain, 12, 0), read(noisy, 12, 0), strict=True):
        changed += (left.waveforms != right.waveforms).any(1).tolist()
        assert left.waveforms.shape == right.waveforms.shape
        assert right.waveforms.isfinite().all()
        left.waveforms = right.waveforms
        assert same(left, right)
    assert 0.6 < np.mean(changed) < 1


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_is_the_same_with_workers_and_after_a_restart(corpus: Path, workers: int) -> None:
    from_start = read(with_noise(make_reader(corpus), corpus), 12, 0)
    again = read(with_noise(make_reader(corpus), corpus), 12, workers)
    restarted = read(with_noise(make_reader(corpus), corpus), 4, workers, first_step=2)
    assert all(same(left, right) for left, right in zip(from_start, again, strict=True))
    assert all(same(left, right) for left, right in zip(from_start[8:], restarted, strict=True))
    other = read(with_noise(make_reader(corpus, seed=4), corpus), 12, 0)
    assert not any(torch.equal(left.waveforms, right.waveforms) for left, right in zip(other, again, strict=True))


class Clean(Keep):
    """A collator that asks for waveforms before augmentation too."""

    reads_clean_audio = True


def test_the_clean_waveform_is_there_where_it_is_asked_for(corpus: Path) -> None:
    plain, noisy = make_reader(corpus), with_noise(make_reader(corpus), corpus)
    planned, altered = plain.plan.micro_batch(0), 0
    plain.collator = expected = Keep()
    plain[planned]
    for reader in (plain, noisy):
        reader.collator = kept = Clean()
        reader[planned]
        for example, clean in zip(kept.examples, expected.examples, strict=True):
            assert clean.clean_waveform is None
            assert example.clean_waveform is not None
            assert torch.equal(example.clean_waveform, clean.waveform)
            altered += not torch.equal(example.waveform, clean.waveform)
            assert reader is noisy or not altered
    assert altered


class Pairs(Keep):
    """A collator that asks for two crops of every row."""

    crops_per_example = 2


def test_two_crops_of_every_row(corpus: Path) -> None:
    reader = make_reader(corpus)
    starts, numbers = [], []
    for epoch in range(4):
        longest = np.argsort(reader.manifest.lengths)[-3:]
        for copies in (None, np.array([1, 1, 1])):
            planned = MicroBatch(epoch, longest, 8_400, copies)
            reader.collator = single = Keep()
            reader[planned]
            reader.collator = pairs = Pairs()
            reader[planned]
            assert [e.row for e in pairs.examples] == np.repeat(longest, 2).tolist()
            for alone, first, second in zip(single.examples, pairs.examples[::2], pairs.examples[1::2], strict=True):
                assert first.start == alone.start
                assert torch.equal(first.waveform, alone.waveform)
                drawn = [example.rng.random() for example in (alone, first, second)]
                assert drawn[0] == drawn[1]
                numbers += drawn[1:]
                starts.append((first.start, second.start))
                whole, _ = soundfile.read(reader.manifest.path(second.row), dtype="float32")
                np.testing.assert_array_equal(second.waveform.numpy(), whole[second.start : second.start + 8_400])
                assert second.start % 320 == 0
    assert len(set(numbers)) == len(numbers) == 48
    assert np.mean([first != second for first, second in starts]) > 0.5


def test_the_crops_of_an_unreadable_row_are_replaced_together(own_corpus: Path) -> None:
    reader = make_reader(own_corpus)
    planned = reader.plan.micro_batch(0)
    bad = int(planned.rows[0])
    Path(reader.manifest.path(bad)).unlink()
    reader.collator = kept = Pairs()
    batch = reader[planned]
    rows = [example.row for example in kept.examples]
    assert rows[::2] == rows[1::2]
    assert bad not in rows
    assert len(rows) == 2 * len(planned.rows)
    assert all(problem.startswith(reader.manifest.path(bad)) for problem in batch.problems)


class LabelsOnly(Keep):
    """A collator that looks at labels alone."""

    reads_audio = False


def test_a_collator_of_labels_opens_no_file(own_corpus: Path) -> None:
    reader = make_reader(own_corpus)
    planned = reader.plan.micro_batch(0)
    reader.collator = heard = Keep()
    reader[planned]
    shutil.rmtree(own_corpus / "data" / "train")
    reader.collator = kept = LabelsOnly()
    assert reader[planned].problems == []
    for example, other in zip(kept.examples, heard.examples, strict=True):
        assert (example.row, example.start, len(example.waveform)) == (other.row, other.start, len(other.waveform))
        np.testing.assert_array_equal(example.targets["labels_0"], other.targets["labels_0"])
        assert not example.waveform.any()
        assert example.waveform.untyped_storage().nbytes() == 4
    waveforms, lengths, _, padded = silent_waveforms(kept.examples)
    assert (waveforms.shape, padded) == ((len(planned.rows), planned.crop_samples), False)
    assert lengths.tolist() == [planned.crop_samples] * len(planned.rows)
    assert waveforms.untyped_storage().nbytes() == 4


def test_crop_starts_reach_both_ends(corpus: Path) -> None:
    reader = make_reader(corpus)
    row = int(np.argmax(reader.manifest.lengths))
    crop = 8_400
    starts = {reader._example(MicroBatch(epoch, np.array([row]), crop), row).start for epoch in range(400)}
    assert starts == set(range(0, int(reader.manifest.lengths[row]) - crop + 1, 320))


HARM = {
    "gone": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:2000]),
    "noise": lambda path: path.write_bytes(b"\x07" * 5000),
    "nan": lambda path: soundfile.write(path, np.full(24_000, np.nan, np.float32), 16_000, subtype="FLOAT"),
    "short": lambda path: soundfile.write(path, np.zeros(100, np.float32), 16_000),
}


@pytest.mark.parametrize("kind", HARM)
def test_an_unreadable_file_is_replaced_and_reported(own_corpus: Path, kind: str) -> None:
    reader = make_reader(own_corpus)
    planned = reader.plan.micro_batch(0)
    bad = int(planned.rows[0])
    HARM[kind](Path(reader.manifest.path(bad)))
    batch = reader[planned]
    assert batch.waveforms.shape == (len(planned.rows), planned.crop_samples)
    assert bad not in batch.rows.tolist()
    assert batch.rows[1:].tolist() == planned.rows[1:].tolist()
    assert len(batch.problems) >= 1
    assert all(problem.startswith(f"{reader.manifest.path(bad)}: ") for problem in batch.problems)
    # The report travels through a worker as it does without one.
    [shared] = batches(reader, [planned], 1, False)
    assert same(batch, shared)


def test_a_replacement_takes_its_own_labels(own_corpus: Path) -> None:
    reader = make_reader(own_corpus)
    planned = reader.plan.micro_batch(0)
    Path(reader.manifest.path(int(planned.rows[0]))).unlink()
    reader.collator = kept = Keep()
    reader[planned]
    assert len(kept.examples) == len(planned.rows)
    for example in kept.examples:
        np.testing.assert_array_equal(example.targets["labels_0"], reader.targets["labels_0"].rows[example.row])


def test_a_corpus_that_cannot_be_read_at_all_stops(own_corpus: Path) -> None:
    reader = make_reader(own_corpus)
    for row in range(len(reader.manifest)):
        Path(reader.manifest.path(row)).unlink()
    with pytest.raises(AudioError, match=rf"and {MAX_REPLACEMENTS - 1} drawn in its place could not be read"):
        reader[reader.plan.micro_batch(0)]


def test_files_that_are_gone_are_refused_at_the_start(own_corpus: Path) -> None:
    manifest = Manifest.read(own_corpus / "data" / "train.tsv")
    check_files(manifest, "train")
    gone = manifest.path(3)
    Path(gone).unlink()
    with pytest.raises(AudioError, match=r"train\.tsv: lists files that do not exist") as error:
        check_files(manifest, "train")
    assert gone in str(error.value)
    assert manifest.path(4) not in str(error.value)


def test_what_a_worker_receives_is_small(corpus: Path) -> None:
    """Workers get numbers and paths: no audio, no labels, no network."""
    reader = make_reader(corpus)
    assert len(pickle.dumps(reader.collator)) < 1_000
    assert len(pickle.dumps(reader.targets)) < 2_000
