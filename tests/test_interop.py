"""Key tables, foreign files, exports and `init_from`."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_checks import finish, write_checkpoint
from safetensors.torch import save_file
from small_hubert import KINDS, small_method
from transformers import HubertConfig, HubertModel

from pretrain.weights.export import ExportConfig, export, write_native
from pretrain.weights.interop.files import read_huggingface, read_torch, write_safetensors, write_torch
from pretrain.weights.interop.speech_encoder import parse_conv_layers
from pretrain.weights.interop.tables import KeyTable
from pretrain.weights.interop.types import InteropError
from pretrain.weights.read import initialise, load_trained, read_weights

ROOT = Path(__file__).resolve().parent.parent


def their_config(**changes: Any) -> HubertConfig:
    values = {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "conv_dim": [32] * 7,
        "num_conv_pos_embedding_groups": 4,
    }
    return HubertConfig(**(values | changes))


def test_a_key_table_is_applied_both_ways() -> None:
    table = KeyTable([("layers.{j}.norm.*", "blocks.{j}.ln.*"), ("mask", "masked_embed")])
    ours = {"layers.0.norm.weight": torch.zeros(1), "layers.11.norm.bias": torch.ones(1), "mask": torch.ones(2)}
    theirs = table.to_theirs(ours)
    assert list(theirs) == ["blocks.0.ln.weight", "blocks.11.ln.bias", "masked_embed"]
    assert table.to_ours(theirs) == ours


def test_a_key_table_lists_every_key_that_it_does_not_know() -> None:
    table = KeyTable([("layers.{j}.*", "blocks.{j}.*")])
    # A dot is a dot, a number a number, and a star only weight or bias.
    unknown = ["layersX0.weight", "layers.a.weight", "layers.0.running_mean", "prefix.layers.0.bias"]
    with pytest.raises(InteropError, match="4 keys") as caught:
        table.to_theirs(dict.fromkeys([*unknown, "layers.0.bias"], torch.zeros(1)))
    assert all(key in str(caught.value) for key in unknown)


def test_a_key_table_refuses_two_keys_for_one_parameter() -> None:
    table = KeyTable([("a.*", "x.*"), ("a.*", "y.*")])
    with pytest.raises(InteropError, match="several keys"):
        table.to_ours({"x.weight": torch.zeros(1), "y.weight": torch.zeros(1)})


def test_conv_layers_are_read_without_running_them() -> None:
    expected = [[512, 10, 5], *[[512, 3, 2]] * 4, *[[512, 2, 2]] * 2]
    text = "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2"
    assert parse_conv_layers(text) == parse_conv_layers(expected) == [list(layer) for layer in eval(text)]
    for bad in ("__import__('os').getcwd()", "[(1, 2)]", "[(1,2,3)] * 10**9", "[(1,2,3)] * 65", "12", "[", [1, 2, 3]):
        with pytest.raises(InteropError, match="conv_feature_layers"):
            parse_conv_layers(bad)


def test_a_pickle_with_objects_is_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "stranger.pt"
    torch.save({"model": {}, "folder": tmp_path}, path)
    with pytest.raises(InteropError, match=r"stranger\.pt: it holds Python objects.*weights_only=False"):
        read_torch(path)


def test_a_namespace_of_options_is_read_as_a_mapping(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save({"model": {"a": torch.ones(2)}, "args": argparse.Namespace(arch="hubert", lr=[0.1])}, path)
    assert read_torch(path)["args"] == {"arch": "hubert", "lr": [0.1]}


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.pt"
    torch.save({"model": {"a": torch.zeros(1000)}}, path)
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(InteropError, match=r"cut\.pt: not a complete PyTorch file"):
        read_torch(path)


@pytest.mark.parametrize("content", [b"", b"hello\n", b"exp/hubert\n", b"0", b"cos\nsystem\n", b"\xff" * 99])
def test_a_file_that_is_none_of_torchs_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(InteropError, match=r"notes\.txt: not a PyTorch file; give a file"):
        read_torch(path)


def test_a_list_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "list.pt").write_bytes(b"\x80\x02]q\x00.")
    with pytest.raises(InteropError, match=r"list\.pt: "):
        read_torch(tmp_path / "list.pt")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InteropError, match=r"absent\.pt: cannot be read \(No such file or directory\)"):
        read_torch(tmp_path / "absent.pt")


def test_written_files_hold_plain_containers_only(tmp_path: Path) -> None:
    with pytest.raises(InteropError, match="cfg: a PosixPath"):
        write_torch(tmp_path / "a.pt", {"cfg": Path("x")})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["single", "sharded", "binary"])
def test_every_form_of_hugging_face_weights_is_read(form: str, tmp_path: Path) -> None:
    model = HubertModel(their_config())
    model.save_pretrained(tmp_path, max_shard_size="100KB" if form == "sharded" else "5GB")
    if form == "binary":
        (tmp_path / "model.safetensors").unlink()
        # Weight norm as torch named it before it became a parametrization.
        names = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
        state = model.state_dict()
        for new, old in names.items():
            state[f"encoder.pos_conv_embed.conv.{old}"] = state.pop(f"encoder.pos_conv_embed.conv.{new}")
        torch.save(dict(state), tmp_path / "pytorch_model.bin")
    assert (tmp_path / "model.safetensors.index.json").exists() == (form == "sharded")
    weights = read_weights(tmp_path)
    assert weights.method_name == "hubert"
    direction = model.encoder.pos_conv_embed.conv.parametrizations.weight.original1
    assert torch.equal(weights.encoder_state["encoder.pos_conv.weight_v"], direction)


def test_an_index_cannot_leave_its_directory(tmp_path: Path) -> None:
    HubertModel(their_config()).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path.parent / "outside.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../outside.safetensors"}}')
    with pytest.raises(InteropError, match="must name files beside it"):
        read_huggingface(tmp_path)


def test_a_model_of_another_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "whisper"}')
    with pytest.raises(InteropError, match="'whisper' is no model of hubert"):
        read_weights(tmp_path, "hubert")


def test_half_written_checkpoints_are_refused(tmp_path: Path) -> None:
    step = write_checkpoint(tmp_path, small_method())
    (step / "complete.json").unlink()
    with pytest.raises(InteropError, match=r"complete\.json is missing, so it was never finished"):
        load_trained(step)
    finish(step)
    (step / "state.json").write_text("{}")
    (step / "model.safetensors").write_bytes((step / "model.safetensors").read_bytes()[:-1] + b"x")
    with pytest.raises(InteropError, match=r"model\.safetensors: content differs"):
        load_trained(step)
    for name in ("model.safetensors", "complete.json"):
        (step / name).unlink()
    save_file({"exp_avg": torch.zeros(3)}, step / "optimizer-00000-of-00001.safetensors")
    finish(step)
    with pytest.raises(InteropError, match=r"model\.safetensors: missing, so it holds no weights"):
        load_trained(step)
    with pytest.raises(InteropError, match="not a checkpoint"):
        load_trained(tmp_path / "checkpoints")


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    step = write_checkpoint(tmp_path / "run", small_method())
    with pytest.raises(InteropError, match="hubert has no 'hugging'; did you mean huggingface"):
        export(ExportConfig(str(step), str(tmp_path / "out"), "hugging"))


def test_an_export_replaces_an_older_one_whole(tmp_path: Path) -> None:
    kmeans = tmp_path / "kmeans"
    kmeans.mkdir()
    (kmeans / "kmeans.json").write_text("{}")
    method = small_method()
    write_native("hubert", method.encoder, tmp_path / "export", kmeans)
    assert read_weights(tmp_path / "export").kmeans_dir == tmp_path / "export" / "kmeans"
    write_native("hubert", method.encoder, tmp_path / "export")
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == ["config.json", "encoder.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "kmeans"]


def test_the_tool_exports_and_explains(tmp_path: Path) -> None:
    step = write_checkpoint(tmp_path / "run", small_method())
    command = [sys.executable, "tools/export_checkpoint.py", f"checkpoint={step}", f"output={tmp_path / 'hubert.pt'}"]
    done = subprocess.run([*command, "format=s3prl"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "hubert in s3prl format" in done.stdout
    assert "final_proj.weight" in read_torch(tmp_path / "hubert.pt")["model_weight"]
    failed = subprocess.run([*command, "format=onnx"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: format: hubert has no 'onnx'; known: huggingface, native, s3prl")


@pytest.mark.parametrize("kind", KINDS)
def test_a_method_starts_from_every_source(kind: str, tmp_path: Path) -> None:
    source = small_method(kind)
    step = write_checkpoint(tmp_path / "run", source)
    for form in ("native", "s3prl", "huggingface"):
        export(ExportConfig(str(step), str(tmp_path / f"{form}.pt"), form))
    for path, has_head in (
        (step, True),
        (tmp_path / "s3prl.pt", True),
        *[(tmp_path / f"{f}.pt", False) for f in ("native", "huggingface")],
    ):
        method = small_method(kind)
        with torch.no_grad():
            for parameter in method.parameters():
                parameter.zero_()
        done = initialise(method, str(path), "keep" if has_head else "reset")
        assert str(path) in done[0]
        for key, value in method.state_dict().items():
            loaded = key.startswith("encoder.") or has_head
            assert torch.equal(value, source.state_dict()[key]) == loaded, key


def test_init_from_another_architecture_names_the_field(tmp_path: Path) -> None:
    step = write_checkpoint(tmp_path / "run", small_method())
    with pytest.raises(InteropError, match=r"method\.encoder\.encoder_attention_heads: 4 there, 6 in the recipe"):
        initialise(small_method(encoder_attention_heads=6), str(step), "reset")
    # Regularisation is the new run's own business.
    assert initialise(small_method(dropout=0.0, encoder_layerdrop=0.0), str(step), "keep")


def test_a_head_that_does_not_fit_asks_for_a_reset(tmp_path: Path) -> None:
    method = small_method()
    step = write_checkpoint(tmp_path / "run", method)
    other = small_method()
    other.label_embs_concat = torch.nn.Parameter(torch.zeros(30, 12))
    with pytest.raises(InteropError, match=r"label_embs_concat: \(25, 12\) there, \(30, 12\).*init_head=reset"):
        initialise(other, str(step), "keep")
    write_native("hubert", method.encoder, tmp_path / "export")
    with pytest.raises(InteropError, match=r"absent there.*init_head=reset"):
        initialise(other, str(tmp_path / "export"), "keep")
    initialise(other, str(step), "reset")
    assert torch.equal(other.label_embs_concat, torch.zeros(30, 12))


def test_weights_are_as_readable_as_any_other_file(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "weights.safetensors", {"x": torch.zeros(2)})
    (tmp_path / "plain").touch()
    assert (tmp_path / "weights.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
