"""Probes: frame labels in closed form, the classifier against scikit-learn, the report, and the tool end to end."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from learning import assert_learned
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from small_hubert import small_method

from pretrain.config import ConfigError, parse_cli
from pretrain.data.alignments import read_phones
from pretrain.data.manifest import write_manifest
from pretrain.errors import UserError
from pretrain.features.mfcc import mfcc39
from pretrain.labelling.kmeans.features import FeatureSpec
from pretrain.labelling.kmeans.model import KMeansModel, make_extractor
from pretrain.labelling.tokens.tokenizer import KMeansTokenizer
from pretrain.probe.classify import fit_and_predict
from pretrain.probe.collect import BASELINES, PhoneTask, baseline_features, baseline_source, collect, open_split
from pretrain.probe.options import DataOptions, ProbeOptions, data_dir, output_dir
from pretrain.probe.report import Report, Score, write_report
from pretrain.probe.run import run_probe
from pretrain.probe.units import codebook_scores, fitted_unit_score, travelling_unit_score, unit_score
from pretrain.weights.export import write_native

ROOT = Path(__file__).resolve().parent.parent
HEADER = "utt\tstart_s\tend_s\tphone\n"


def _frames(seed: int, rows: int = 8000, width: int = 24, classes: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping Gaussian classes; neighbouring features are correlated, and their scales differ 10,000 times."""
    rng = np.random.default_rng(seed)
    means = np.random.default_rng(99).normal(size=(classes, width))
    labels = rng.integers(classes, size=rows)
    features = means[labels] + 2.5 * rng.normal(size=(rows, width))
    features = (features + np.roll(features, 1, axis=1) / 2) * np.geomspace(0.01, 100, width) + 5
    return features.astype(np.float16), labels


def test_the_classifier_is_as_good_as_scikit_learns(learning_seed: int) -> None:
    features, labels = _frames(2 * learning_seed)
    scored, truth = _frames(2 * learning_seed + 1)
    ours = fit_and_predict([features], labels, np.arange(len(labels)) // 50, [scored], 8, seed=learning_seed)
    scaler = StandardScaler().fit(features.astype(np.float32))
    theirs = LogisticRegression(max_iter=1000).fit(scaler.transform(features.astype(np.float32)), labels)
    expected = theirs.predict(scaler.transform(scored.astype(np.float32)))
    accuracy, reference = (ours.predictions == truth).mean(), (expected == truth).mean()
    assert_learned(reference, above=0.5, below=0.95)
    assert_learned(reference - accuracy, below=0.005)
    assert ours.layer_weights == [1.0]


def test_the_weighted_sum_finds_the_layer_that_knows(learning_seed: int) -> None:
    features, labels = _frames(2 * learning_seed, rows=4000)
    scored, truth = _frames(2 * learning_seed + 1, rows=4000)
    rng = np.random.default_rng([5, learning_seed])
    noise, scored_noise = (rng.normal(size=features.shape).astype(np.float16) for _ in range(2))
    groups = np.arange(len(labels)) // 50
    mixed = fit_and_predict(
        [noise, features, noise[::-1].copy()], labels, groups, [scored_noise, scored, scored_noise], 8, learning_seed
    )
    alone = fit_and_predict([features], labels, groups, [scored], 8, learning_seed)
    assert_learned(mixed.layer_weights[1], above=0.8)
    assert sum(mixed.layer_weights) == pytest.approx(1, abs=1e-5)
    assert_learned((alone.predictions == truth).mean() - (mixed.predictions == truth).mean(), below=0.02)


def test_separable_classes_are_all_right_and_noise_is_at_chance() -> None:
    rng = np.random.default_rng(0)
    labels, truth = rng.integers(4, size=2000), rng.integers(4, size=2000)
    groups = np.arange(2000) // 20
    known = [np.eye(4, 6)[ids].astype(np.float16) for ids in (labels, truth)]
    assert (fit_and_predict([known[0]], labels, groups, [known[1]], 4, 0).predictions == truth).all()
    noise = [rng.normal(size=(2000, 6)).astype(np.float16) for _ in range(2)]
    assert (fit_and_predict([noise[0]], labels, groups, [noise[1]], 4, 0).predictions == truth).mean() < 0.32


def test_units_that_are_phones_and_units_that_are_nothing() -> None:
    phones = np.arange(3000) % 3
    perfect = unit_score("same", phones, phones, 3, {0}, 50)
    assert (perfect.phone_purity, perfect.cluster_purity) == (1, 1)
    assert perfect.pnmi == pytest.approx(1, abs=1e-5)
    assert (perfect.used, perfect.perplexity) == (3, pytest.approx(3))
    nothing = unit_score("none", np.zeros(3000, int), phones, 3, {0}, 50)
    assert nothing.speech_pnmi == pytest.approx(0, abs=1e-5)
    assert (nothing.used, nothing.perplexity) == (1, pytest.approx(1))


def _corpus(folder: Path, utterances: int = 12) -> None:
    """Two speakers whose tones of 300 and 2500 Hz are the phones; a quarter of each file is silence."""
    rng, phones, speakers = np.random.default_rng(0), [HEADER], ["utt\tspeaker\n"]
    rows: dict[str, list[tuple[str, int]]] = {"train": [], "valid": []}
    for i in range(utterances):
        loudness, wave = (0.05, 0.6)[i % 2], []
        for k, phone in enumerate(rng.permutation(["SIL", "lo", "hi", "lo"])):
            hertz = {"SIL": 0, "lo": 300, "hi": 2500}[phone]
            wave.append(np.sin(2 * np.pi * hertz * np.arange(4000) / 16000))
            phones.append(f"u{i}\t{k / 4}\t{(k + 1) / 4}\t{phone}\n")
        signal = loudness * np.concatenate(wave) + 1e-3 * rng.normal(size=16000)
        soundfile.write(folder / f"u{i}.flac", signal, 16000)
        speakers.append(f"u{i}\ts{i % 2}\n")
        rows["train" if i < utterances * 2 // 3 else "valid"].append((f"u{i}.flac", 16000))
    for split, listed in rows.items():
        write_manifest(folder / f"{split}.tsv", folder, listed)
    (folder / "phones.tsv").write_text("".join(phones))
    (folder / "utterances.tsv").write_text("".join(speakers))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tones")
    _corpus(folder)
    write_native("hubert", small_method().encoder, folder / "export")
    return folder


def _options(corpus: Path, **changes: object) -> ProbeOptions:
    values = {"upstream": str(corpus / "export"), "alignments": str(corpus / "phones.tsv"), "device": "cpu"}
    return ProbeOptions(**{**values, "data": DataOptions(str(corpus)), **changes})


def test_collect_keeps_frame_counts_labels_and_the_limit(corpus: Path) -> None:
    phones = read_phones(str(corpus / "phones.tsv"))
    split = open_split(corpus / "train.tsv", phones.utterances)
    layers = collect(baseline_source(3), split, PhoneTask(phones, frozenset(), 1.0, 0), "test")
    assert [layer.features.shape for layer in layers] == [(8 * 49, width) for width in (39, 80, 880)]
    # No SIL: 49 frames of which those with middles inside one quarter of the file go.
    silent = frozenset(phones.ids("SIL"))
    speech = collect(baseline_source(1), split, PhoneTask(phones, silent, 1.0, 0), "test")[0]
    assert not np.isin(speech.labels, list(silent)).any()
    assert len(speech.labels) == (layers[0].labels != next(iter(silent))).sum()
    half = collect(baseline_source(1), split, PhoneTask(phones, frozenset(), 0.5, 0), "test")[0]
    assert 0.35 < len(half.labels) / len(layers[0].labels) < 0.65
    assert open_split(corpus / "train.tsv", phones.utterances, max_hours=3 / 3600).hours == pytest.approx(3 / 3600)


def test_context_is_five_frames_of_ten_milliseconds() -> None:
    _, mel, context = baseline_features(torch.randn(16000))
    assert context.shape == (49, 880)
    torch.testing.assert_close(context[:, 400:480], mel)
    # Six frames of 10 ms are three of 20 ms, so the last context frame but one of frame 1 is frame 3's own.
    torch.testing.assert_close(context[1:-2, 720:800], mel[3:])


def test_phones_that_are_tones_are_recognised(learning_seed: int, corpus: Path) -> None:
    report = run_probe(_options(corpus, units_layer=3, clusters=6, seed=learning_seed))
    scores = {(score.kind, score.name): score for score in report.scores}
    assert set(scores) == {("baseline", name) for name in BASELINES} | {
        (kind, name)
        for kind in ("untrained", "upstream")
        for name in ("layer 0", "layer 1", "layer 2", "layer 3", "weighted sum")
    }
    mel = scores["baseline", "log-mel 80"]
    assert_learned(1 - mel.accuracy, below=0.1)
    assert_learned(1 - mel.majority, above=0.4)
    assert len(scores["upstream", "weighted sum"].layer_weights) == 4
    assert [unit.name for unit in report.units] == [
        "k-means fitted on MFCC-39",
        "k-means fitted on untrained, layer 3",
        "k-means fitted on upstream, layer 3",
    ]
    assert_learned(report.units[0].pnmi, above=0.4)
    again = run_probe(_options(corpus, layers="1", baselines=False, seed=learning_seed))
    assert [s for s in again.scores if s.name == "layer 1"] == [scores["upstream", "layer 1"]]


def test_units_that_travelled_are_scored_at_their_own_rate(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus / "export", tmp_path / "export")
    features = [mfcc39(torch.from_numpy(soundfile.read(corpus / f"u{i}.flac", dtype="float32")[0])) for i in range(8)]
    centroids = torch.cat(features)[::56]
    KMeansModel(centroids, make_extractor(FeatureSpec("mfcc"))).save(tmp_path / "export" / "kmeans")
    report = run_probe(_options(corpus, upstream=str(tmp_path / "export"), baselines=False, layers="0"))
    (unit,) = report.units
    # Four files of a second: 98 windows of 25 ms every 10 ms each.
    assert (unit.rate_hz, unit.clusters, unit.frames) == (100, len(centroids), 4 * 98)
    assert "(mfcc)" in unit.name
    assert unit.pnmi > 0.5


class TwoGroups(KMeansTokenizer):
    """The clusters as two groups: which row and which column of a table of four columns."""

    code_shape = (2, 4)

    def codes(self, waveforms: torch.Tensor, lengths: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        codes, counts = super().codes(waveforms, lengths)
        return torch.cat([codes // 4, codes % 4], dim=2), counts


def test_the_codes_of_a_codebook_are_scored_by_group_and_together(corpus: Path) -> None:
    phones = read_phones(str(corpus / "phones.tsv"))
    split = open_split(corpus / "valid.tsv", phones.utterances)
    features = [mfcc39(torch.from_numpy(soundfile.read(corpus / f"u{i}.flac", dtype="float32")[0])) for i in range(8)]
    centroids = torch.cat(features)[::56]
    kmeans = KMeansModel(centroids, make_extractor(FeatureSpec("mfcc")))
    device, task, silence = torch.device("cpu"), PhoneTask(phones, frozenset(), 1.0, 0), phones.ids("SIL")
    one = KMeansTokenizer.of(kmeans, "test")
    (single,) = codebook_scores(SimpleNamespace(encoder=one), split, task, silence, device)
    upstream = SimpleNamespace(
        kmeans=kmeans,
        units=lambda wavs, lengths: (torch.as_tensor(kmeans.units(wavs[0]))[None], torch.tensor([98])),
    )
    travelled = travelling_unit_score(upstream, split, task, silence, device)
    assert single == replace(travelled, name="codes, group 0")

    two = TwoGroups("mfcc", len(centroids))
    two.code_shape = (2, 4)
    two.centroids.copy_(centroids)
    rows, columns, together = codebook_scores(SimpleNamespace(encoder=two), split, task, silence, device)
    assert together == replace(single, name="codes of all groups", clusters=single.used)
    assert rows.used <= 4
    assert columns.used <= 4
    assert max(rows.pnmi, columns.pnmi) < together.pnmi


def test_speakers_that_differ_in_loudness_are_told_apart(learning_seed: int, corpus: Path) -> None:
    options = _options(corpus, task="utterance", labels=str(corpus / "utterances.tsv"), seed=learning_seed)
    report = run_probe(options)
    scores = {score.name: score for score in report.scores if score.kind == "baseline"}
    assert scores["log-mel 80"].accuracy == 1.0
    assert (scores["log-mel 80"].trained, scores["log-mel 80"].scored) == (8, 4)
    assert "accuracy, speech" not in report.markdown()
    assert output_dir(options) == corpus / "probe_speaker"


def test_the_report_is_written_whole(tmp_path: Path) -> None:
    score = Score("upstream", "layer 0", 4, 0.75, 0.5, 0.4, 100, 50, 9)
    report = Report("net", "phone", ["a", "b"], 1.0, 0.5, {}, [score])
    paths = write_report(report, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(path.name for path in paths)
    assert json.loads(paths[0].read_text())["scores"][0]["accuracy"] == 0.75
    assert "| **0.750**" in paths[1].read_text()
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_wrong_options_say_what_to_do(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="task: 'phones'"):
        _options(corpus, task="phones")
    with pytest.raises(ConfigError, match="numbers of 0 to 3"):
        run_probe(_options(corpus, layers="4"))
    with pytest.raises(ConfigError, match="units_layer"):
        run_probe(_options(corpus, layers="1", units_layer=2))
    with pytest.raises(ConfigError, match="does not tell its data"):
        data_dir(ProbeOptions(upstream=str(tmp_path)))
    with pytest.raises(ConfigError, match="alignments: missing"):
        run_probe(_options(corpus, alignments=""))
    (tmp_path / "phones.tsv").write_text(HEADER + "other\t0\t1\ta\n")
    with pytest.raises(UserError, match="no utterance has a label"):
        run_probe(_options(corpus, alignments=str(tmp_path / "phones.tsv")))
    layer = collect(baseline_source(1), *_speech(corpus), "test")[0]
    with pytest.raises(UserError, match="take fewer"):
        fitted_unit_score("x", layer, layer, 100_000, set(), 50, 0)


def _speech(corpus: Path) -> tuple:
    phones = read_phones(str(corpus / "phones.tsv"))
    return open_split(corpus / "valid.tsv", phones.utterances), PhoneTask(phones, frozenset(), 1.0, 0)


def test_the_data_of_a_run_is_found_through_its_checkpoint(corpus: Path, tmp_path: Path) -> None:
    step = tmp_path / "run" / "checkpoints" / "step_00000010"
    step.mkdir(parents=True)
    (step / "config.yaml").write_text(f"data: {{dir: {corpus}}}\n")
    for upstream in (tmp_path / "run", step, tmp_path / "run" / "export"):
        upstream.mkdir(exist_ok=True)
        options = ProbeOptions(upstream=str(upstream))
        assert data_dir(options) == corpus
        assert output_dir(options) == tmp_path / "run" / "probe"


def test_the_tool_probes_a_few_utterances_of_the_sample(corpus: Path, tmp_path: Path) -> None:
    command = [
        *(sys.executable, str(ROOT / "tools" / "probe.py"), f"upstream={corpus / 'export'}", "data.dir=sample"),
        *("layers=0,3", "max_train_hours=0.01", f"output={tmp_path}", "device=cpu", "baselines=false"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "| upstream, weighted sum |" in done.stdout
    found = json.loads((tmp_path / "probe.json").read_text())
    assert found["task"] == "phone"
    assert 0.005 < found["train_hours"] <= 0.01
    assert (tmp_path / "probe.png").stat().st_size > 5000


def test_a_mistyped_option_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean alignments"):
        parse_cli(ProbeOptions, ["upstream=x", "alignmnts=x"])
