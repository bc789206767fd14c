"""HuBERT against the official implementation's loss, logits, hidden states and gradients."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pretrain.config import typed
from pretrain.data.collate import frame_labels
from pretrain.method import Batch
from pretrain.models.conv_features import frames, valid_frames
from recipes.hubert import interop
from recipes.hubert.method import HubertConfig, HubertMethod, make_batch

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = ["hubert_tiny_postln", "hubert_tiny_preln_2dict"]


def load_fixture(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    return json.loads((FIXTURES / f"{name}.json").read_text()), load_file(FIXTURES / f"{name}.safetensors")


def build(name: str) -> tuple[HubertMethod, Batch, dict, dict[str, torch.Tensor]]:
    """Our method with the official weights, and the official batch."""
    facts, tensors = load_fixture(name)
