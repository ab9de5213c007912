"""Shared by all tests: Hypothesis profiles, one thread, seeded randomness, no network, GPU tests skipped."""

import atexit
import gc
import os
import shutil
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers or diffusers are imported
# What operators were measured to take is not believed from one run of the tests to the next.
if "VRAMPLAN_CACHE" not in os.environ:
    os.environ["VRAMPLAN_CACHE"] = tempfile.mkdtemp(prefix="vramplan-test-cache-")
    atexit.register(shutil.rmtree, os.environ["VRAMPLAN_CACHE"], ignore_errors=True)

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

GOLDENS = Path(__file__).parent / "goldens"
_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]  # capturing a module takes longer than drawing one
settings.register_profile("ci", max_examples=60, deadline=None, derandomize=True, suppress_health_check=_SLOW)
settings.register_profile("dev", max_examples=20, deadline=None, suppress_health_check=_SLOW)
settings.register_profile("deep", max_examples=1000, deadline=None, suppress_health_check=_SLOW)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

torch.set_num_threads(1)  # the order of a sum must not depend on the machine


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/goldens/*.txt instead of comparing")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests where there is no GPU."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """What was imported stays: collecting garbage need not look at it again and again, which took a sixth of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """The same global random numbers in every test, and the state of before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden(name, text)`: compares a text with tests/goldens/<name>.txt; `--update-golden` writes it instead."""

    def check(name: str, text: str) -> None:
        path = GOLDENS / f"{name}.txt"
        if request.config.getoption("--update-golden"):
            path.write_text(text.rstrip("\n") + "\n")
        assert path.exists(), f"no {path.name}; write it with pytest --update-golden and review the diff"
        assert text.rstrip("\n") + "\n" == path.read_text(), f"{path.name} differs; if wanted: pytest --update-golden"

    return check
