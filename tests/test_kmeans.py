"""K-means labels: assignment, fit, the model that travels, and label directories that do not depend on the ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from audio_maker import babble, write_corpus
from learning import assert_learned
from recipe_checks import write_checkpoint
from sklearn.cluster import KMeans
from small_hubert import KINDS, small_method
from torch import Tensor, distributed
from transformers import HubertConfig, HubertModel

from pretrain.data.audio import read_audio
from pretrain.data.labels import LabelError, LabelSet
from pretrain.data.manifest import Manifest, write_manifest
from pretrain.errors import UserError
from pretrain.features.mfcc import mfcc39
from pretrain.labelling.kmeans.assign import nearest_centroids
from pretrain.labelling.kmeans.features import FeatureError, FeatureSpec, UpstreamFeatures
from pretrain.labelling.kmeans.fit import FitError, FitOptions, fit_centroids, sample_points, sample_rows
from pretrain.labelling.kmeans.generate import LabelData, LabelOptions, ensure_mfcc_labels, generate_labels
from pretrain.labelling.kmeans.model import KMeansError, KMeansModel, make_extractor
from pretrain.labelling.stream import StreamError
from pretrain.models.speech_encoder import SpeechEncoder
from pretrain.world import World

ROOT = Path(__file__).resolve().parent.parent
CLUSTERS = 12
LABEL_FILES = [f"{split}.{suffix}" for split in ("train", "valid") for suffix in ("km", "npy", "offsets.npy")]


def tiny_encoder(layer_norm_first: bool = False) -> SpeechEncoder:
    """Three layers of width 48."""
    return small_method(KINDS[int(layer_norm_first)]).encoder


def upstream_spec(layer: int, **values: float) -> FeatureSpec:
    return FeatureSpec("upstream", "hubert", layer, **values)


def waveform(samples: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(babble(samples, seed))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifests of 12 + 4 files between 0.5 and 2.5 s."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("valid", 4)):
        lengths = {f"{split}/{i}.wav": int(rng.integers(8000, 40000)) for i in range(count)}
        write_corpus(folder / "audio", lengths)
        write_manifest(folder / f"{split}.tsv", folder / "audio", lengths.items())
    return folder


@pytest.fixture(scope="module")
def mfcc_labels(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("labels") / "mfcc"
    generate_labels(LabelOptions(str(output), LabelData(str(corpus)), clusters=CLUSTERS))
    return output


def test_assignment_is_scikit_learns() -> None:
    points = np.random.default_rng(0).standard_normal((3000, 7)).astype(np.float32)
    kmeans = KMeans(20, n_init=1, random_state=0).fit(points)
    centroids = torch.from_numpy(kmeans.cluster_centers_)
    units, distances = nearest_centroids(torch.from_numpy(points), centroids)
    np.testing.assert_array_equal(units.numpy(), kmeans.predict(points))
    expected = torch.cdist(torch.from_numpy(points), centroids).min(dim=1).values ** 2
    torch.testing.assert_close(distances, expected, rtol=1e-4, atol=1e-4)


def test_ties_go_to_the_lowest_index() -> None:
    centroids = torch.tensor([[5.0, 5.0], [1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    assert nearest_centroids(torch.tensor([[0.9, 0.0], [0.0, 0.0]]), centroids)[0].tolist() == [1, 1]


def test_assignment_does_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    points, centroids = torch.randn(100, 5), torch.randn(9, 5)
    whole = nearest_centroids(points, centroids)[0]
    monkeypatch.setattr("pretrain.labelling.kmeans.assign.BLOCK_FRAMES", 7)
    assert torch.equal(nearest_centroids(points, centroids)[0], whole)


@pytest.mark.parametrize("backend", ["faiss", "sklearn"])
def test_a_fit_finds_separate_blobs_and_repeats_itself(backend: str, learning_seed: int) -> None:
    rng = np.random.default_rng(learning_seed)
    centres = 20 * rng.standard_normal((8, 6))
    points = torch.from_numpy((centres[rng.integers(8, size=4000)] + rng.standard_normal((4000, 6))).astype(np.float32))
    options = FitOptions(8, backend=backend, starts=5, seed=learning_seed)
    fitted = fit_centroids(points, options)
    nearest = torch.cdist(torch.from_numpy(centres).float(), fitted).min(dim=1).values
    assert_learned(nearest.max().item(), below=0.5)
    assert torch.equal(fitted, fit_centroids(points, options))


def test_faiss_fits_as_well_as_scikit_learns_lloyd(learning_seed: int) -> None:
    points = torch.cat([mfcc39(waveform(64000, seed)) for seed in range(5)])
    fitted = fit_centroids(points, FitOptions(20, starts=20, seed=learning_seed))
    ours = nearest_centroids(points, fitted)[1].mean().item()
    reference = KMeans(20, n_init=20, random_state=learning_seed).fit(points.numpy()).inertia_ / len(points)
    assert_learned(ours / reference - 1, below=0.06)


@pytest.mark.parametrize(
    ("points", "message"),
    [(torch.zeros(5, 3), "clusters: 8 cannot be fitted to 5 frames"), (torch.full((9, 3), torch.nan), "not finite")],
)
def test_a_fit_that_cannot_be_done_is_refused(points: Tensor, message: str) -> None:
    with pytest.raises(FitError, match=message):
        fit_centroids(points, FitOptions(8))


def test_wrong_options_are_refused() -> None:
    with pytest.raises(FitError, match="backend: unknown 'torch'"):
        FitOptions(8, backend="torch")
    with pytest.raises(FitError, match="clusters: is 0"):
        FitOptions(0)
    with pytest.raises(UserError, match="seed: -1 is out of range; give 0 to 2147483647"):
        FitOptions(8, seed=-1)
    with pytest.raises(FeatureError, match="unknown kind 'plp'"):
        FeatureSpec("plp")
    with pytest.raises(FeatureError, match="has no layers"):
        FeatureSpec("mfcc", layer=3)
    with pytest.raises(FeatureError, match="layer: missing"):
        FeatureSpec("upstream", "hubert")
    with pytest.raises(FeatureError, match="layer: 4 does not exist; this encoder has 0 to 3"):
        UpstreamFeatures(upstream_spec(4), tiny_encoder())


def test_sampled_rows_make_up_the_hours_asked_for() -> None:
    lengths = np.random.default_rng(0).integers(16000, 160000, size=2000)
    rows = sample_rows(lengths, 0.5, seed=3)
    assert len(set(rows.tolist())) == len(rows)
    assert 0 <= lengths[rows].sum() - 0.5 * 3600 * 16000 < 160000
    assert not np.array_equal(rows, sample_rows(lengths, 0.5, seed=4))
    np.testing.assert_array_equal(sample_rows(lengths, 1e6, seed=3), np.arange(2000))


def test_sampled_points_are_frames_and_do_not_depend_on_the_company() -> None:
    extractor = make_extractor(FeatureSpec("mfcc"))
    rows = [(row, waveform(48000, row)) for row in range(20)]
    device = torch.device("cpu")
    together, features = sample_points(extractor, rows, 0.3, 0, device)
    apart = [sample_points(extractor, part, 0.3, 0, device)[0] for part in (rows[:7], rows[7:])]
    assert features == {}
    assert torch.equal(together, torch.cat(apart))
    frames = torch.cat([mfcc39(audio) for _, audio in rows])
    assert abs(len(together) - 0.3 * len(frames)) < 20
    assert len(torch.unique(together, dim=0)) == len(together)
    assert {tuple(point) for point in together.tolist()} <= {tuple(frame) for frame in frames.tolist()}


@pytest.mark.parametrize("layer_norm_first", [False, True])
@pytest.mark.parametrize("layer", [0, 1, 2, 3])
def test_upstream_features_are_the_hidden_state_of_the_whole_encoder(layer: int, layer_norm_first: bool) -> None:
    encoder = tiny_encoder(layer_norm_first).eval()
    audio = waveform(20000)
    expected = encoder(audio[None], torch.tensor([20000]))[0][layer][0]
    extractor = make_extractor(upstream_spec(layer), encoder.train())
    assert (extractor.rate_hz, extractor.dim) == (50, 48)
    torch.testing.assert_close(extractor.extract(audio), expected.detach(), rtol=1e-5, atol=1e-5)
    assert len(extractor.encoder.encoder.layers) == min(layer + layer_norm_first, 3)


def test_features_do_not_follow_a_surrounding_bf16_autocast() -> None:
    extractor, audio = make_extractor(upstream_spec(2), tiny_encoder()), waveform(16000)
    outside = extractor.extract(audio)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(extractor.extract(audio), outside)


@pytest.mark.parametrize("samples", [0, 399, 400, 32000, 32079, 32080, 32400, 50001, 96000])
def test_long_files_are_encoded_in_pieces_without_losing_frames(samples: int) -> None:
    encoder = tiny_encoder()
    pieces = UpstreamFeatures(upstream_spec(0, max_chunk_seconds=1.0), encoder).extract(waveform(samples))
    frames = 0 if samples < 400 else (samples - 400) // 320 + 1
    assert pieces.shape == (frames, 48)


def test_pieces_see_the_same_samples_as_the_whole() -> None:
    """Without group norm, and far from the border, the convolutions' frames must be those of the whole file."""
    encoder, audio = tiny_encoder(layer_norm_first=True), waveform(48000)
    encoder.config.normalize = False
    pieces = UpstreamFeatures(upstream_spec(0, max_chunk_seconds=1.0), encoder).extract(audio)
    whole = UpstreamFeatures(upstream_spec(0), encoder).extract(audio)
    away = torch.ones(len(whole), dtype=torch.bool)
    for border in (50, 100):
        away[border - 16 : border + 16] = False
    torch.testing.assert_close(pieces[away], whole[away], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["mfcc", "logmel", "upstream"])
def test_a_model_travels(kind: str, tmp_path: Path) -> None:
    spec = upstream_spec(2) if kind == "upstream" else FeatureSpec(kind)
    extractor = make_extractor(spec, tiny_encoder() if kind == "upstream" else None)
    audio = waveform(24000)
    model = KMeansModel(extractor.extract(audio)[::3].clone(), extractor)
    model.save(tmp_path / "kmeans")
    loaded = KMeansModel.load(tmp_path / "kmeans")
    assert (loaded.sha256, loaded.rate_hz, loaded.num_clusters) == (model.sha256, model.rate_hz, model.num_clusters)
    assert torch.equal(loaded.units(audio), model.units(audio))
    assert loaded.units(audio)[::3].tolist() == list(range(model.num_clusters))
    assert loaded.units(audio[:100]).shape == (0,)


def test_a_damaged_model_is_refused(tmp_path: Path) -> None:
    extractor = make_extractor(FeatureSpec("mfcc"))
    KMeansModel(torch.randn(4, 39), extractor).save(tmp_path / "one")
    KMeansModel(torch.randn(4, 39), extractor).save(tmp_path / "two")
    (tmp_path / "one" / "kmeans.json").replace(tmp_path / "two" / "kmeans.json")
    with pytest.raises(KMeansError, match="not those that"):
        KMeansModel.load(tmp_path / "two")
    with pytest.raises(KMeansError, match=r"kmeans\.json: cannot be read"):
        KMeansModel.load(tmp_path / "one")
    KMeansModel(torch.randn(4, 39), extractor).save(tmp_path / "three")
    path = tmp_path / "three" / "kmeans.json"
    whole = json.loads(path.read_text())
    for changes, message in (
        ({"features": {"kind": "logmel"}}, r"centroids: \(4, 39\) do not fit features of 80 dimensions"),
        ({"features": {"kind": "mfcc", "layers": 2}}, r"kmeans\.json: features\.layers: no such option; did you mean"),
        ({"features": 3}, r"kmeans\.json: features: 3 is not a mapping"),
    ):
        path.write_text(json.dumps(whole | changes))
        with pytest.raises(UserError, match=message):
            KMeansModel.load(tmp_path / "three")
    del whole["sha256"]
    path.write_text(json.dumps(whole))
    with pytest.raises(KMeansError, match=r"kmeans\.json: sha256: missing"):
        KMeansModel.load(tmp_path / "three")


def test_a_label_directory_is_complete(mfcc_labels: Path, corpus: Path) -> None:
    model = KMeansModel.load(mfcc_labels / "kmeans")
    report = json.loads((mfcc_labels / "report.json").read_text())
    for split in ("train", "valid"):
        manifest = Manifest.read(corpus / f"{split}.tsv")
        label_set = LabelSet.open(mfcc_labels, split, manifest)
        assert (label_set.rate_hz, label_set.num_classes) == (100, CLUSTERS)
        assert label_set.kmeans_sha256 == model.sha256
        distances = []
        for row in range(len(manifest)):
            audio = torch.from_numpy(read_audio(manifest.path(row)))
            np.testing.assert_array_equal(label_set[row], model.units(audio).numpy())
            distances.append(torch.cdist(mfcc39(audio), model.centroids).min(dim=1).values ** 2)
        values = report["splits"][split]
        assert values["frames"] == label_set.counts().sum() == len(torch.cat(distances))
        assert values["inertia_per_frame"] == pytest.approx(float(torch.cat(distances).mean()), rel=1e-4)
        assert values["hours"] == pytest.approx(manifest.lengths.sum() / 16000 / 3600)
        assert 1 < values["perplexity"] <= values["clusters_used"] <= CLUSTERS
    assert not list(mfcc_labels.parent.glob(".*"))


def test_two_ranks_write_the_same_files(mfcc_labels: Path, corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "two"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    tool = ["tools/kmeans_labels.py", "features=mfcc", f"clusters={CLUSTERS}", f"data.dir={corpus}", f"output={output}"]
    done = subprocess.run(
        [*command, *tool], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for name in [*LABEL_FILES, "labels.json", "kmeans/centroids.safetensors"]:
        assert (output / name).read_bytes() == (mfcc_labels / name).read_bytes(), name
    one, two = (json.loads((folder / "report.json").read_text()) for folder in (mfcc_labels, output))
    assert (one["world_size"], two["world_size"], len(two["peak_rss_gib_per_rank"])) == (1, 2, 2)
    for split in ("train", "valid"):
        distance = two["splits"][split].pop("inertia_per_frame")
        assert distance == pytest.approx(one["splits"][split]["inertia_per_frame"], rel=1e-9)
        assert two["splits"][split].items() <= one["splits"][split].items()


def test_upstream_labels_and_the_same_centroids_once_more(corpus: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", small_method())
    data = LabelData(str(corpus))
    options = LabelOptions(
        str(tmp_path / "first"),
        data,
        "upstream",
        8,
        checkpoint=str(tmp_path / "run"),
        layer=2,
        backend="sklearn",
        starts=2,
    )
    report = generate_labels(options)
    assert (report["rate_hz"], report["features"]["method"], report["features"]["layer"]) == (50, "hubert", 2)
    model = KMeansModel.load(tmp_path / "first" / "kmeans")
    assert len(model.extractor.encoder.encoder.layers) == 2
    valid = Manifest.read(corpus / "valid.tsv")
    labels = LabelSet.open(tmp_path / "first", "valid", valid, rate_hz=50)
    for row in range(len(valid)):
        audio = torch.from_numpy(read_audio(valid.path(row)))
        np.testing.assert_array_equal(labels[row], model.units(audio).numpy())
    again = LabelOptions(str(tmp_path / "again"), data, kmeans=str(tmp_path / "first"))
    assert generate_labels(again)["fit"] is None
    for name in [*LABEL_FILES, "labels.json"]:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()


def test_labels_of_a_hugging_face_directory_are_nearest_to_its_own_hidden_states(corpus: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = HubertConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        conv_dim=[16] * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    )
    theirs = HubertModel(config).eval()
    theirs.save_pretrained(tmp_path / "hf")
    output = tmp_path / "labels"
    data = LabelData(str(corpus))
    generate_labels(LabelOptions(str(output), data, "upstream", 8, checkpoint=str(tmp_path / "hf"), layer=2))
    centroids = KMeansModel.load(output / "kmeans").centroids
    valid = Manifest.read(corpus / "valid.tsv")
    labels = LabelSet.open(output, "valid", valid)
    same = []
    for row in range(len(valid)):
        audio = torch.from_numpy(read_audio(valid.path(row)))
        with torch.no_grad():
            hidden = theirs(audio[None], output_hidden_states=True).hidden_states[2][0]
        same += (torch.cdist(hidden, centroids).argmin(dim=1).numpy() == labels[row]).tolist()
    assert np.mean(same) > 0.99  # rounding may move a frame on a border
    assert len(np.unique(labels[0])) > 1


def test_options_that_contradict_each_other_are_refused(corpus: Path, mfcc_labels: Path, tmp_path: Path) -> None:
    data, output = LabelData(str(corpus)), str(tmp_path / "never")
    with pytest.raises(FeatureError, match="checkpoint: missing"):
        generate_labels(LabelOptions(output, data, "upstream", layer=1))
    with pytest.raises(FeatureError, match="did you mean features=upstream"):
        generate_labels(LabelOptions(output, data, "mfcc", checkpoint="outputs/x"))
    with pytest.raises(FeatureError, match="leave out checkpoint and layer"):
        generate_labels(LabelOptions(output, data, kmeans=str(mfcc_labels), layer=1))
    with pytest.raises(LabelError, match="output: exists already"):
        generate_labels(LabelOptions(str(mfcc_labels), data))
    assert not Path(output).exists()


def broken_corpus(folder: Path, files: int, broken: int) -> Path:
    """A train split whose first `broken` files are no audio."""
    lengths = {f"{i}.wav": 8000 for i in range(files)}
    write_corpus(folder / "audio", lengths)
    write_manifest(folder / "train.tsv", folder / "audio", lengths.items())
    for i in range(broken):
        (folder / "audio" / f"{i}.wav").write_bytes(b"not audio")
    return folder


def test_an_unreadable_file_gets_an_empty_line(tmp_path: Path) -> None:
    data = LabelData(str(broken_corpus(tmp_path, files=20, broken=1)), max_bad_share=0.1)
    report = generate_labels(LabelOptions(str(tmp_path / "labels"), data, clusters=4))
    assert len(report["splits"]["train"]["unreadable"]) == 1
    assert "0.wav" in report["splits"]["train"]["unreadable"][0]
    assert (tmp_path / "labels" / "train.km").read_text().splitlines()[0] == ""
    labels = LabelSet.open(tmp_path / "labels", "train", Manifest.read(tmp_path / "train.tsv"))
    assert labels.unlabelled.tolist() == [0]
    assert len(labels[1]) == 48


def test_too_many_unreadable_files_end_the_run(tmp_path: Path) -> None:
    data = LabelData(str(broken_corpus(tmp_path, files=20, broken=1)))
    with pytest.raises(StreamError, match=r"1 of 20 files could not be read, more than 1.0%[\s\S]*0.wav"):
        generate_labels(LabelOptions(str(tmp_path / "labels"), data, clusters=4))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["audio", "train.tsv"]


def test_features_that_the_fit_kept_whole_are_not_computed_again(
    corpus: Path, mfcc_labels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`mfcc_labels` keeps every frame for the fit; here few are, so that all of train is read once more."""
    read: list[str] = []
    monkeypatch.setattr(
        "pretrain.labelling.stream.read_audio", lambda path, *a: read.append(path) or read_audio(path, *a)
    )
    data = LabelData(str(corpus))
    generate_labels(LabelOptions(str(tmp_path / "whole"), data, clusters=CLUSTERS))
    assert len(read) == len(set(read)) == 16
    for name in LABEL_FILES:
        assert (tmp_path / "whole" / name).read_bytes() == (mfcc_labels / name).read_bytes()
    read.clear()
    report = generate_labels(LabelOptions(str(tmp_path / "part"), data, clusters=CLUSTERS, max_points_per_cluster=20))
    assert len(read) == 12 + 16
    assert abs(report["fit"]["points"] - 240) < 12


def test_ensure_makes_labels_once_and_again_for_another_manifest(tmp_path: Path) -> None:
    broken_corpus(tmp_path, files=6, broken=0)
    output = ensure_mfcc_labels(tmp_path, tmp_path / "labels", clusters=4)
    made = (output / "labels.json").stat().st_mtime_ns
    ensure_mfcc_labels(tmp_path, output, clusters=4)
    assert (output / "labels.json").stat().st_mtime_ns == made
    write_manifest(tmp_path / "train.tsv", tmp_path / "audio", [(f"{i}.wav", 8000) for i in range(4)])
    ensure_mfcc_labels(tmp_path, output, clusters=4)
    assert len(LabelSet.open(output, "train", Manifest.read(tmp_path / "train.tsv"))) == 4


def test_labels_are_made_inside_a_process_group_that_stays(tmp_path: Path, world: World) -> None:
    """As the trainer calls it, with torch.distributed initialised."""
    broken_corpus(tmp_path, files=4, broken=0)
    ensure_mfcc_labels(tmp_path, tmp_path / "labels", clusters=4)
    assert distributed.is_initialized()
    assert len(LabelSet.open(tmp_path / "labels", "train", Manifest.read(tmp_path / "train.tsv"))) == 4


def mboshi_manifests(source: Path, folder: Path) -> Path:
    for split, name in (("train", "train"), ("dev", "valid")):
        rows = [line.split("\t") for line in (source / split / "utterances.tsv").read_text().splitlines()[1:]]
        write_manifest(folder / f"{name}.tsv", source, [(row[1], int(row[2])) for row in rows])
    return folder


@pytest.mark.slow
def test_mfcc_units_on_real_speech_reach_the_known_quality(shared_dir: Path, tmp_path: Path) -> None:
    """Mboshi (arXiv 1710.03501): PNMI 0.455, phone purity 0.664, cluster purity 0.096 with scikit-learn's k-means."""
    source = shared_dir / "data" / "mboshi"
    options = LabelOptions(
        str(tmp_path / "labels"),
        LabelData(str(mboshi_manifests(source, tmp_path))),
        alignments=str(source / "dev" / "phones.tsv"),
    )
    quality = generate_labels(options)["splits"]["valid"]["quality"]
    assert quality["all_frames"]["pnmi"] == pytest.approx(0.455, abs=0.01)
    assert quality["all_frames"]["phone_purity"] == pytest.approx(0.664, abs=0.01)
    assert quality["all_frames"]["cluster_purity"] == pytest.approx(0.096, abs=0.02)
    assert quality["speech_frames"]["pnmi"] == pytest.approx(0.313, abs=0.01)
