"""Fixtures of several files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for scratch files, empty again after each test."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setenv("VRAMPLAN_SCRATCH", str(folder))
    yield folder
    assert not list(folder.iterdir())
