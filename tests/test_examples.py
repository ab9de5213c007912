"""Every example runs to its end, in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

# What an example is asked for, where all that it can do takes minutes.
ARGUMENTS = {"what_fits": ["--quick"]}
EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_example_runs(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(path), *ARGUMENTS.get(path.stem, [])], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()
