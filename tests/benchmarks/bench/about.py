"""Where and with what something was measured."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from planner.detect import device_name

_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors")


def about(kind: str) -> dict[str, Any]:
    """The chip, the driver, versions, the commit, threads and the load of the machine."""
    found: dict[str, Any] = {
        "device": kind, "chip": device_name("cuda" if kind == "cuda" else "cpu"), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(), "python": platform.python_version(), "load": list(os.getloadavg()), "commit": _commit(),
        **{package: version(package) for package in _PACKAGES},
    }  # fmt: skip
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"memory_bytes": properties.total_memory, "driver": driver(), "cuda": torch.version.cuda}
        found["cudnn"] = torch.backends.cudnn.version()
    return found


def driver() -> str:
    """The version of NVIDIA's driver."""
    try:
        line = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except OSError:
        return "unknown"
    return line.partition("Module")[2].split()[0]


def _commit() -> str:
    """The commit that is measured, with a + where files differ from it."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("+" if dirty.stdout.strip() else "")
