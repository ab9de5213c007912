"""`golden(name, text)`: compares a text with tests/goldens/<name>.txt; `--update-golden` writes it instead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

GOLDENS = Path(__file__).parents[1] / "goldens"


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    def check(name: str, text: str) -> None:
        path = GOLDENS / f"{name}.txt"
        if request.config.getoption("--update-golden"):
            path.write_text(text.rstrip("\n") + "\n")
        assert path.exists(), f"no {path.name}; write it with pytest --update-golden and review the diff"
        assert text.rstrip("\n") + "\n" == path.read_text(), f"{path.name} differs; if wanted: pytest --update-golden"

    return check
