"""Fixtures that several test files use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with parity fixtures and real speech, where there is one beside the repository."""
    folder = Path(os.environ.get("HEADWATER_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: set HEADWATER_SHARED to the folder of fixtures and real speech")
    return folder
