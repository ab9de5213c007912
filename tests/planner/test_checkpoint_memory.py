"""A checkpoint is never in memory twice, and on the cpu device not even once: resident memory of a process, measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import T5Config, T5EncoderModel

from planner.sizes import parse_size

SMALL = 40_000_000  # programs, a piece of a weight, the heap's holes
SCRIPT = """
import ctypes, gc, json, os, sys
import torch
from planner import plan

def resident(field):
    with open("/proc/self/status") as lines:
        return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024

def begin():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    return resident("VmRSS")

def steps(folder, device, dtype):
    kwargs = {"input_ids": torch.arange(4).view(1, 4)}
    p = plan(folder, "1GB", kwargs=kwargs, device=device, dtype=dtype, allow=("offload",))
    p = p.replan(p.minimum_bytes + 20_000_000)
    start = begin()
    m = p.build()
    built = resident("VmHWM") - start
    with torch.no_grad():
        m(**kwargs)
    called = resident("VmHWM") - start
    start = begin()
    m.save_sharded(os.path.join(sys.argv[2], f"{device}-{dtype}"), "50MB")
    saving = resident("VmHWM") - start
    p.restore()
    return {"budget": p.budget_bytes, "weights": p.weight_bytes, "built": built, "called": called, "saving": saving}

torch.set_num_threads(1)
cases = [("cpu", "float32"), ("accounting", "float32")]
print(json.dumps({f"{device} {dtype}": steps(sys.argv[1], device, dtype) for device, dtype in cases}))
"""


# A whole process: importing, planning, building, running.
WHOLE = """
import json, sys
import torch
from planner import plan

torch.set_num_threads(1)
folder, budget, machine = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
kwargs = {"input_ids": torch.arange(4).view(1, 4)}
p = plan(folder, budget, kwargs=kwargs, machine=machine, allow=("offload",))
m = p.build()
with torch.no_grad():
    for _ in range(2):
        m(**kwargs)
with open("/proc/self/status") as lines:
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
print(json.dumps({"peak": peak, "weights": p.weight_bytes}))
"""
INTERPRETER = 500_000_000  # Python, PyTorch, the model's library, what planning takes

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux says what is resident")


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 302 MB, in two shards."""
    config = T5Config(vocab_size=99, d_model=1024, d_ff=4096, d_kv=64, num_heads=16, num_layers=6)
    with torch.device("meta"):
        model = T5EncoderModel(config)
    block = torch.randn(4096 * 1024) * 0.02
    folder = tmp_path_factory.mktemp("memory") / "t5"
    folder.mkdir()
    config.architectures, config.dtype = ["T5EncoderModel"], torch.float32
    config.save_pretrained(folder)
    state = {n: block[: p.numel()].view(p.shape).clone() for n, p in model.named_parameters()}
    names = sorted(state)
    for number, members in enumerate((names[::2], names[1::2]), 1):
        save_file({n: state[n] for n in members}, folder / f"model-0000{number}-of-00002.safetensors")
    assert sum(t.nbytes for t in state.values()) > 300_000_000
    return folder


def measured_by(script: str, scratch: Path, *arguments: str) -> Any:
    """What a process of its own prints last, as JSON."""
    environment = {**os.environ, "VRAMPLAN_SCRATCH": str(scratch), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_peaks_of_a_process(t5: Path, tmp_path: Path) -> None:
    measured = measured_by(SCRIPT, tmp_path, str(t5), str(tmp_path))
    for case, held in measured.items():
        assert held["built"] < (0 if case.startswith("cpu") else held["weights"]) + SMALL, measured
        assert held["saving"] < SMALL, measured
    # On accounting RAM plays the device too, and its allocator is the heap.
    assert measured["cpu float32"]["called"] < measured["cpu float32"]["budget"] + SMALL, measured
    assert measured["cpu float32"]["weights"] > 300_000_000 > 3 * measured["cpu float32"]["budget"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("budget", "machine"),
    [({"cpu": "60MB"}, "cpu"), ({"accounting": "60MB", "cpu": "100MB"}, "rtx-4060-ti")],
    ids=["weights on disk", "host and device"],
)
def test_a_whole_process_stays_within_its_budgets(t5: Path, tmp_path: Path, budget: dict[str, str], machine: str) -> None:
    """From its start to its end; on accounting RAM plays the device too. With the checkpoint in memory it would be over."""
    allowed = sum(map(parse_size, budget.values())) + INTERPRETER
    measured = measured_by(WHOLE, tmp_path, str(t5), json.dumps(budget), machine)
    assert measured["peak"] < allowed < measured["peak"] + measured["weights"], measured
