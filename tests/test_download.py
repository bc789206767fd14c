"""Weights behind addresses, from a server on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from recipe_checks import write_checkpoint
from small_hubert import batch, small_method
from transformers import HubertConfig, HubertModel

from pretrain import Upstream
from pretrain.weights.download import fetch
from pretrain.weights.export import ExportConfig, export
from pretrain.weights.interop.types import InteropError
from pretrain.weights.read import read_weights


class Server:
    """Serves `folder`, counts requests, and sends `cut` bytes less of each file than it promises."""

    def __init__(self, folder: Path) -> None:
        self.requests: list[str] = []
        self.cut = 0
        outer = self

        class Handler(SimpleHTTPRequestHandler):
            def log_message(self, format: str, *args: object) -> None:
                outer.requests.append(self.path)

            def copyfile(self, source: object, outputfile: object) -> None:
                content = source.read()
                outputfile.write(content[: len(content) - outer.cut])

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Serves the three exports of one checkpoint, the native one with a k-means model."""
    step = write_checkpoint(tmp_path / "run", small_method())
    kmeans = tmp_path / "labels" / "kmeans"
    kmeans.mkdir(parents=True)
    (kmeans / "kmeans.json").write_text("{}")
    folder = tmp_path / "www"
    for form, output in (("native", "export"), ("s3prl", "hubert.pt"), ("huggingface", "hf")):
        export(ExportConfig(str(step), str(folder / output), form, str(tmp_path / "labels")))
    server = Server(folder)
    yield server
    server.http.shutdown()
    server.http.server_close()


def test_an_address_is_downloaded_once(server: Server, cache: Path) -> None:
    with torch.no_grad():
        expected = small_method().encoder(*batch())[0][-1]
    for name in ("export", "hf", "hubert.pt"):
        address = f"{server.url}/{name}"
        upstream = Upstream("hubert", address, extra_conf={"frame_length_rule": "fold"}).eval()
        with torch.no_grad():
            states, _ = upstream(*batch())
        torch.testing.assert_close(states[-1][:, : expected.shape[1]], expected, rtol=1e-4, atol=2e-5)
        count = len(server.requests)
        Upstream("hubert", address)
        assert len(server.requests) == count
        Upstream("hubert", address, refresh=True)
        assert len(server.requests) > count
    assert not list(cache.glob(".*"))


def test_the_kmeans_model_travels_too(server: Server, cache: Path) -> None:
    weights = read_weights(f"{server.url}/export")
    assert weights.kmeans_dir is not None
    assert weights.kmeans_dir.is_relative_to(cache)
    assert (weights.kmeans_dir / "kmeans.json").read_text() == "{}"


def test_sharded_hugging_face_weights_are_followed(server: Server, cache: Path, tmp_path: Path) -> None:
    model = HubertModel(HubertConfig(hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96))
    model.save_pretrained(tmp_path / "www" / "shards", max_shard_size="1MB")
    weights = read_weights(f"{server.url}/shards/")
    assert torch.equal(weights.encoder_state["mask_emb"], model.masked_spec_embed)


@pytest.mark.parametrize("name", ["export", "hf", "hubert.pt"])
def test_a_download_that_breaks_off_leaves_nothing(name: str, server: Server, cache: Path) -> None:
    server.cut = 1
    with pytest.raises(InteropError, match="bytes arrived; try again"):
        fetch(f"{server.url}/{name}")
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_an_absent_address_is_named(server: Server, cache: Path) -> None:
    with pytest.raises(InteropError, match=r"absent\.pt: HTTP Error 404"):
        fetch(f"{server.url}/absent.pt")
    with pytest.raises(InteropError, match=r"absent/config\.json: HTTP Error 404"):
        fetch(f"{server.url}/absent")


def test_an_export_that_was_altered_is_refused(server: Server, cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "www" / "export" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"files": {**config["files"], "encoder.safetensors": "0" * 64}}))
    with pytest.raises(InteropError, match=r"encoder\.safetensors: differs from the hash"):
        fetch(f"{server.url}/export")
    path.write_text(json.dumps(config | {"files": {"../outside": "0" * 64}}))
    with pytest.raises(InteropError, match="lies outside the directory"):
        fetch(f"{server.url}/export")
