"""tools/benchmark.py at a tiny size: every row is there, and the peers do the work that they are measured for."""

from __future__ import annotations

import json
import math
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torchaudio

from pretrain.bench import labels, loader, pipeline, step, timing, turns
from pretrain.config import ConfigError
from pretrain.data.folders import SAMPLE_DIR
from pretrain.data.manifest import Manifest
from pretrain.data.plan import MicroBatch
from pretrain.weights.interop.speech_encoder import state_to_huggingface
from recipes.hubert.reference_steps import TorchaudioHubert, TransformersHubert

TOOL = Path(__file__).resolve().parent.parent / "tools" / "benchmark.py"
CPU = torch.device("cpu")


def tiny(**changes: Any) -> step.StepOptions:
    return step.StepOptions("step", recipe="hubert_tiny", batch=1, seconds=1.0, device="cpu", **changes)


def assert_positive(rows: list[timing.Row]) -> None:
    numbers = [value for row in rows for value in row.values() if not isinstance(value, str)]
    assert numbers
    assert all(math.isfinite(value) and value >= 0 for value in numbers)
    assert all(row["wall_seconds"] > 0 for row in rows)


def test_the_tool_times_steps_in_fp32_and_bf16(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = "task=step recipe=hubert_tiny batch=1 seconds=1 rounds=1 memory=false device=cpu"
    report = tmp_path / "benchmark.json"
    monkeypatch.setattr(sys, "argv", [str(TOOL), *arguments.split(), f"output={report}"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setitem(sys.modules, "fairseq", None)  # as where it is not installed
    runpy.run_path(str(TOOL), run_name="__main__")
    result = json.loads(report.read_text())
    rows = result["rows"]
    names = [(row["precision"], row["variant"]) for row in rows]
    assert names == [(p, v) for p in ("fp32", "bf16") for v in ("headwater", "transformers", "torchaudio")]
    assert_positive(rows)
    assert len({row["parameters_m"] for row in rows}) == 1
    assert rows[2]["scale_wall"] == rows[2]["scale_cpu"] == 1
    assert "fairseq" in result["absent"]
    printed = capsys.readouterr().out
    assert len([line for line in printed.splitlines() if line.startswith("| ")]) == 1 + 1 + len(rows)
    assert "Not measured: fairseq" in printed


def test_a_peer_that_fails_in_bf16_is_named_and_left_out() -> None:
    """s3prl's quantizer, for one, wants numpy's types, and numpy has no bfloat16."""
    options = step.StepOptions(
        "step", recipe="vq_apc_tiny", batch=1, seconds=1.0, rounds=1, peers="s3prl", memory=False, device="cpu"
    )
    result = step.measure_steps(options)
    rows = [(row["precision"], row["variant"]) for row in result["rows"]]
    assert rows == [("fp32", "headwater"), ("fp32", "s3prl"), ("bf16", "headwater")]
    assert "BFloat16" in result["absent"]["s3prl in bf16"]
    assert result["rows"][1]["scale_wall"] == 1


def test_peers_compute_our_loss_from_our_weights() -> None:
    subject = step.Subject.of_recipe("hubert_tiny")
    batch = step.make_batch(tiny(), subject)
    ours = step.make_contender(tiny(), step.OURS, subject, CPU)
    state = ours.model.state_dict()
    encoder = {key.removeprefix("encoder."): value for key, value in state.items() if key.startswith("encoder.")}

    huggingface = TransformersHubert(subject.config)
    huggingface.model.load_state_dict(state_to_huggingface(encoder, ours.model.encoder.to_config()))
    head = {key: value for key, value in state.items() if not key.startswith("encoder.")}
    assert huggingface.load_state_dict(head, strict=False).unexpected_keys == []

    other = TorchaudioHubert(subject.config)
    imported = torchaudio.models.wav2vec2.utils.import_huggingface_model(huggingface.model)
    other.model.wav2vec2.load_state_dict(imported.state_dict())
    other.model.mask_generator.mask_embedding.data = state["encoder.mask_emb"]
    other.model.logit_generator.label_embeddings.data = state["label_embs_concat"]
    other.model.logit_generator.final_proj.load_state_dict(
        {name: state[f"final_proj.{name}"] for name in ("weight", "bias")}
    )

    expected = ours.loss(batch)
    for peer in (huggingface, other):
        torch.testing.assert_close(peer.train()(batch), expected, rtol=1e-4, atol=0)


def test_an_unknown_peer_is_refused() -> None:
    with pytest.raises(ConfigError, match="peers: 'transformer' is no peer of hubert_tiny; known: transformers"):
        step.missing_peers(tiny(peers="transformer"), step.Subject.of_recipe("hubert_tiny"))


def test_peak_memory_of_a_step() -> None:
    assert step.peak_of_step(tiny(), step.OURS, "fp32") > 0.1  # torch alone takes more


def test_a_fresh_process_is_another_one() -> None:
    assert timing.in_fresh_process(os.getpid) != os.getpid()


def test_ratios_compare_within_a_group() -> None:
    costs = {("a", "x"): 2.0, ("b", "x"): 4.0, ("a", "y"): 9.0, ("b", "y"): 3.0}
    rows = [{"variant": v, "group": g, "wall_seconds": c, "cpu_seconds": 2 * c} for (v, g), c in costs.items()]
    timing.add_ratios(rows, "a", group="group")
    assert [row["ours_by_this_wall"] for row in rows] == [1.0, 0.5, 1.0, 3.0]
    assert [row["ours_by_this_cpu"] for row in rows] == [1.0, 0.5, 1.0, 3.0]


def test_interleaving_runs_everything_once_per_round() -> None:
    order: list[str] = []
    timing.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2, warmups=1)
    assert order == ["a", "b"] * 3


def test_loaders_read_the_same_audio() -> None:
    result = loader.measure_loaders(
        loader.LoaderOptions("loader", recipe="hubert_tiny", workers="0", batches=2, rounds=1)
    )
    variants = [row["variant"] for row in result["rows"]]
    assert variants[:2] == ["headwater", "whole files, soundfile"]
    assert ("lhotse" in variants) != ("lhotse" in result["absent"])
    assert_positive(result["rows"])
    manifest = Manifest.read(SAMPLE_DIR / "train.tsv")
    rows = (manifest.lengths > 16_000).nonzero()[0][:3]
    assert loader.WholeFileReader(manifest)[MicroBatch(0, rows, 16_000)].shape == (3, 16_000)


def test_labels_in_every_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "in_fresh_process", lambda function, *arguments: function(*arguments))
    options = labels.LabelBenchOptions(
        "labels", clusters=8, hours=0.01, rounds=1, alignments=str(SAMPLE_DIR / "phones.tsv")
    )
    rows = {row["variant"]: row for row in labels.measure_labels(options)["rows"]}
    assert list(rows) == ["headwater, faiss", "headwater, scikit-learn", labels.PEER]
    assert_positive(list(rows.values()))
    inertia = [row["inertia"] for row in rows.values()]
    assert max(inertia) < 1.2 * min(inertia)
    assert all(0 < row["pnmi"] < 1 for row in rows.values())
    assert rows["headwater, faiss"]["disk_mb"] < rows[labels.PEER]["disk_mb"]


SCRIPT = """
import sys, threading, time
sys.path[0] = {folder!r}
from turns import Training, serve

def start(job):
    print("hello")  # must not be taken for an answer
    def live():
        while True:
            with open(job["beats"], "a") as file:
                file.write(".")
            time.sleep(0.01)
    threading.Thread(target=live, daemon=True).start()
    made = []
    def update():
        made.append(1)
        if len(made) > job["limit"]:
            raise ValueError("no more data")
        sum(range(3_000_000))
        return 2.5
    return Training(update, 7)

serve(start)
"""


@pytest.fixture
def taker_script(tmp_path: Path) -> Path:
    script = tmp_path / "taker.py"
    script.write_text(SCRIPT.format(folder=str(Path(turns.__file__).parent)))
    return script


def test_a_process_that_does_not_have_its_turn_stands_still(taker_script: Path, tmp_path: Path) -> None:
    beats = tmp_path / "beats"
    job = {"beats": str(beats), "limit": 9}
    with turns.TurnTaker([str(taker_script)], job, tmp_path / "log", {}) as taker:
        turn = taker.take(3)
        assert (turn.audio_seconds, turn.parameters) == (7.5, 7)
        assert 0 < turn.cpu_seconds < 10
        time.sleep(0.1)  # a stop is delivered at once, but not at the same moment
        before = beats.stat().st_size
        time.sleep(0.3)
        assert beats.stat().st_size == before
        assert taker.take(1).audio_seconds == 2.5
    ended = beats.stat().st_size
    assert ended > before
    time.sleep(0.1)
    assert beats.stat().st_size == ended  # nothing is left running
    assert "hello" in (tmp_path / "log").read_text()


def test_a_training_that_ends_says_why(taker_script: Path, tmp_path: Path) -> None:
    job = {"beats": str(tmp_path / "beats"), "limit": 1}
    with turns.TurnTaker([str(taker_script)], job, tmp_path / "log", {}) as taker:
        taker.take(1)
        with pytest.raises(turns.TurnError, match="no more data"):
            taker.take(1)


@pytest.mark.parametrize("recipe", ["apc_tiny", "npc_tiny", "tera_tiny"])
def test_pipelines_train_networks_of_one_size_on_the_same_files(recipe: str) -> None:
    options = pipeline.PipelineOptions("pipeline", recipe=recipe, utterances=2, updates=1, rounds=1, device="cpu")
    rows = pipeline.measure_pipelines(options)["rows"]
    assert [row["variant"] for row in rows] == ["headwater", "s3prl"]
    assert rows[0]["parameters_m"] == rows[1]["parameters_m"]
    assert_positive(rows)


def test_a_method_that_s3prl_cannot_train_is_refused() -> None:
    with pytest.raises(ConfigError, match="no counterpart of hubert_tiny"):
        pipeline.measure_pipelines(pipeline.PipelineOptions("pipeline", recipe="hubert_tiny"))
