"""Transcripts: tables and dictionaries read and checked, symbol ids by row, and a method that asks for them."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from small_run import SMALL

from pretrain.config import ConfigError, compose_recipe, run_config
from pretrain.data.corpus import Corpus, open_corpus
from pretrain.data.manifest import Manifest, write_manifest
from pretrain.data.utterance_targets import (
    TableTargets,
    TargetError,
    UtteranceTable,
    make_dictionary,
    read_dictionary,
    write_dictionary,
)
from pretrain.method import Example, TargetInfo, TargetSpec
from pretrain.objectives.masked_units import MaskedUnitsCollator
from pretrain.training.setup import build_trainer
from pretrain.world import World
from recipes.hubert.method import HubertConfig, HubertMethod

PHONES = TargetSpec("phones", "symbols", column="phones")
TABLE = "utt\tphones\na/x\tb a b\na/y\t\nb/z\tc a\n"


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    write_manifest(tmp_path / "train.tsv", tmp_path, [(f"{name}.wav", 16_000) for name in ("a/w", "a/x", "a/y", "b/z")])
    return Manifest.read(tmp_path / "train.tsv")


def table_of(folder: Path, text: str = TABLE) -> UtteranceTable:
    (folder / "t.tsv").write_text(text)
    return UtteranceTable(folder / "t.tsv", "symbols", "phones")


def test_ids_by_row(tmp_path: Path, manifest: Manifest) -> None:
    """Rows that the table lacks, and rows without symbols, are unlabelled."""
    table = table_of(tmp_path)
    table.check_utterances([manifest])
    transcripts = TableTargets(table, manifest, ["c", "b", "a"])
    rows = [transcripts[row] for row in range(4)]
    assert [None if row is None else row.tolist() for row in rows] == [None, [1, 2, 1], None, [0, 2]]
    assert rows[1] is not None
    assert rows[1].dtype == np.int64
    assert transcripts.labelled().tolist() == [False, True, False, True]
    assert transcripts.fingerprint() == TableTargets(table, manifest, ["c", "b", "a"]).fingerprint()
    assert transcripts.fingerprint() != TableTargets(table, manifest, ["b", "c", "a"]).fingerprint()


def test_a_dictionary_is_made_in_fairseqs_order_and_reads_back(tmp_path: Path, manifest: Manifest) -> None:
    symbols = make_dictionary(table_of(tmp_path).rows(manifest))
    assert symbols == ["a", "b", "c"]  # twice, twice, once
    write_dictionary(tmp_path / "dict.txt", symbols)
    assert read_dictionary(tmp_path / "dict.txt", "symbols") == symbols
    (tmp_path / "fairseq.txt").write_text("a 2\nb 2\n\nc 1 #fairseq:overwrite\n")
    assert read_dictionary(tmp_path / "fairseq.txt", "symbols") == symbols


def test_classes_and_tags_may_hold_blanks(tmp_path: Path, manifest: Manifest) -> None:
    (tmp_path / "t.tsv").write_text("utt\tsound\na/x\tMale speech, Church bell\na/y\tChurch bell\n")
    table = UtteranceTable(tmp_path / "t.tsv", "tags", "sound")
    names = make_dictionary(table.rows(manifest))
    assert names == ["Church bell", "Male speech"]
    write_dictionary(tmp_path / "dict.txt", names)
    assert read_dictionary(tmp_path / "dict.txt", "tags") == read_dictionary(tmp_path / "dict.txt", "class") == names
    rows = [TableTargets(table, manifest, names)[row] for row in range(4)]
    assert [None if row is None else row.tolist() for row in rows] == [None, [1, 1], [1, 0], None]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a/x\tb a b\n", r"t\.tsv: line 1: has no column utt; .*name these between tabs: utt, phones"),
        ("utt\tphones\na/x\n", r"t\.tsv: line 2: has too few columns: phones is missing"),
        ("utt\tphones\na/x\ta\na/x\tb\n", r"t\.tsv: line 3: 'a/x' stands in line 2 already"),
        ("utt\tphones\na/x\ta\n\nb\tb\n", r"t\.tsv: line 3: has too few columns"),
    ],
)
def test_tables_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        table_of(tmp_path, text)


def test_what_does_not_belong_together_is_named(tmp_path: Path, manifest: Manifest) -> None:
    with pytest.raises(TargetError, match=r"t\.tsv: line 4: 'c' is not one of the 2 names of .*known: a, b\)"):
        TableTargets(table_of(tmp_path), manifest, ["a", "b"])
    with pytest.raises(TargetError, match=r"'ts' is not one of the 2 names of .*did you mean tsh"):
        TableTargets(table_of(tmp_path, "utt\tphones\na/x\tts\n"), manifest, ["tsh", "a"])
    stray = table_of(tmp_path, TABLE + "c/v\ta\na/x.wav\ta\n")
    with pytest.raises(TargetError) as error:
        stray.check_utterances([manifest])
    assert "2 of 5 utterances are not in" in str(error.value)
    assert "line 5: c/v\n  line 6: a/x.wav" in str(error.value)
    with pytest.raises(TargetError, match=r"missing\.tsv: cannot be read"):
        UtteranceTable(tmp_path / "missing.tsv", "symbols", "phones")
    for text, message in (("a\nb\na\n", "'a' comes more than once"), ("\n", "is empty")):
        (tmp_path / "dict.txt").write_text(text)
        with pytest.raises(TargetError, match=rf"dict\.txt: {message}"):
            read_dictionary(tmp_path / "dict.txt", "symbols")


def open_sample(folder: Path, *options: str) -> Corpus:
    data = run_config(compose_recipe("hubert_tiny", list(options))).data
    return open_corpus(data, [PHONES], folder)


def test_the_sample_is_transcribed(tmp_path: Path) -> None:
    corpus = open_sample(tmp_path)
    symbols = corpus.found["phones"].names
    assert 30 <= len(symbols) <= 80
    assert corpus.valid is not None
    for split in (corpus.train, corpus.valid):
        for row in range(len(split.manifest)):
            ids = split.targets["phones"].rows[row]
            assert ids is not None
            # Phones last 30 to 300 ms.
            assert 0.03 < int(split.manifest.lengths[row]) / 16_000 / len(ids) < 0.3
    assert corpus.facts == [
        f"phones: phones of 203 of 203 training utterances, {len(symbols)} names "
        "(data.dictionary was not given: numbered from the tables)"
    ]
    (tmp_path / "dict.txt").write_text("\n".join(sorted(symbols)))
    given = open_sample(tmp_path, f"data.dictionary={tmp_path}/dict.txt")
    assert list(given.found["phones"].names) == sorted(symbols)
    assert given.identity()["transcripts"] != corpus.identity()["transcripts"]


def test_transcripts_must_be_there_where_they_are_needed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.transcripts: missing, and this recipe trains on them"):
        open_sample(tmp_path, "data.transcripts=null")
    (tmp_path / "none.tsv").write_text("utt\tphones\n")
    with pytest.raises(TargetError, match=r"none\.tsv: no training utterance has a 'phones'"):
        open_sample(tmp_path, f"data.transcripts={tmp_path}/none.tsv")


@dataclass
class SpellingConfig(HubertConfig):
    symbols: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class SpellingCollator(MaskedUnitsCollator):
    """Refuses to go on where whole utterances come without their transcripts."""

    def __call__(self, examples: list[Example]) -> Any:
        assert all(example.targets["phones"] is not None and len(example.targets["phones"]) for example in examples)
        return super().__call__(examples)


class Spelling(HubertMethod):
    """HuBERT that asks for transcripts, and looks whether they come."""

    Config = SpellingConfig

    @classmethod
    def targets(cls, config: Any) -> list[TargetSpec]:
        return [*super().targets(config), PHONES]

    @classmethod
    def fit_to_targets(cls, config: Any, found: dict[str, TargetInfo]) -> Any:
        symbols = found["phones"].names
        return replace(super().fit_to_targets(config, {"labels_0": found["labels_0"]}), symbols=list(symbols))

    @classmethod
    def collator(cls, config: Any) -> SpellingCollator:
        return SpellingCollator(**vars(HubertMethod.collator(config)))


def test_a_method_gets_transcripts_and_its_symbols_stay_with_the_checkpoint(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.training.setup.load_method", lambda name: SimpleNamespace(Method=Spelling))
    places = [f"output_dir={tmp_path / 'out'}", "name=run", "data.workers=0", "trainer.memory_probe=false"]
    options = [*SMALL[1:], *places]
    with ExitStack() as resources, pytest.raises(ConfigError, match=r"crop\.whole: is false, but this recipe"):
        build_trainer(run_config(compose_recipe("hubert_tiny", options)), resources)
    options += ["crop={whole:true,min_seconds:0.7,max_seconds:20.0}", "batch.seconds_per_micro_batch=20.0"]
    with ExitStack() as resources:
        trainer = build_trainer(run_config(compose_recipe("hubert_tiny", options)), resources)
        batches = [trainer.reader[trainer.reader.plan.micro_batch(index)] for index in range(10)]
    assert not any(batch.problems for batch in batches)
    assert any(batch.padded for batch in batches)
    symbols = trainer.engine.method.config.symbols
    assert trainer.run.resolved["method"]["symbols"] == symbols == trainer.state.identity["method"]["symbols"]
    assert read_dictionary(tmp_path / "out" / "run" / "dict.phones.txt", "symbols") == symbols
    assert json.loads(json.dumps(trainer.state.identity)) == trainer.state.identity
    assert yaml.safe_load(yaml.safe_dump(trainer.run.resolved)) == trainer.run.resolved
