"""On a real device (I7): predicted peaks, reserved memory under the cap, equal outputs, copies behind compute.

With VRAMPLAN_RESULTS=<folder>, the figures are written to <folder>/cuda.json.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from planner import Plan, plan
from tests.benchmarks.bench.about import driver
from tests.zoo import ZOO

pytestmark = pytest.mark.gpu

MIB = 1024 * 1024
SHARES = {"all": 1.0, "half": 0.5, "least": 0.0}


@pytest.fixture(scope="module")
def results() -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    yield rows
    folder = os.environ.get("VRAMPLAN_RESULTS")
    if not folder or not rows:
        return
    properties = torch.cuda.get_device_properties(0)
    about = {
        "chip": properties.name,
        "memory_bytes": properties.total_memory,
        "driver": driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "rows": rows,
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "cuda.json").write_text(json.dumps(about, indent=1))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.cuda.empty_cache()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def on_cuda(tree: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.cuda(), tree)


def close_to(got: Any, wanted: Any, tolerance: float) -> None:
    for a, b in zip(tree_leaves(got), tree_leaves(wanted), strict=True):
        if isinstance(b, Tensor):
            torch.testing.assert_close(a.cpu(), b.cpu(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", sorted(ZOO))
def test_within_budget_as_predicted(name: str, share: str, results: list[dict[str, Any]]) -> None:
    module, args, kwargs = ZOO[name]()
    with torch.no_grad():
        module.cuda()
        args, kwargs = on_cuda((args, kwargs))
        wanted = on_cuda(tree_map_only(Tensor, lambda t: t.cpu(), module(*args, **kwargs)))
        module.cpu()
    torch.cuda.empty_cache()
    made = plan(module, "8GB", inputs=args, kwargs=kwargs, device="cuda")
    low, high = made.minimum_bytes, made.unplanned_bytes
    made = made.replan(max(low, int(low + SHARES[share] * (high - low))))
    built = made.build()
    torch.cuda.reset_accumulated_memory_stats()
    for _ in range(3):
        close_to(built(*args, **kwargs), wanted, 1e-4)
        report = built.report()
        slack = max(0.01 * made.peak_bytes, 2 * MIB)
        assert report.peak_bytes <= made.peak_bytes + slack
        assert abs(report.peak_bytes - made.peak_bytes) <= slack
        assert report.reserved_bytes is not None
        assert report.reserved_bytes <= made.budget_bytes
        assert torch.cuda.memory_stats()["num_alloc_retries"] == 0
    results.append(
        {
            "model": name,
            "share": share,
            "budget_bytes": made.budget_bytes,
            "predicted_allocated_bytes": made.peak_bytes,
            "predicted_reserved_bytes": made.reserved_bytes,
            "allocated_bytes": report.peak_bytes,
            "reserved_bytes": report.reserved_bytes,
            "step_seconds": report.step_seconds,
            "predicted_step_seconds": made.step_seconds,
        }
    )
    made.restore()


class _Tower(nn.Module):
    """Large linear layers: about 2 GB in bfloat16."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def tower() -> tuple[Plan, Tensor, nn.Module]:
    with torch.device("meta"):
        module = _Tower(30, 5760).to(torch.bfloat16)
    module = module.to_empty(device="cpu").eval()
    for p in module.parameters():
        nn.init.normal_(p, std=0.01)
    value = torch.randn(8192, 5760, dtype=torch.bfloat16, device="cuda")
    return plan(module, "8GB", inputs=(value,), device="cuda"), value, module


def test_copies_overlap_compute(results: list[dict[str, Any]]) -> None:
    resident, value, _ = tower()
    built = resident.build()
    compute = min(_seconds(built, value) for _ in range(5))
    resident.restore()
    half = (resident.minimum_bytes + resident.unplanned_bytes) // 2
    made = resident.replan(half)
    built = made.build()
    step = min(_seconds(built, value) for _ in range(5))
    report = built.report()
    assert report.copied_bytes > 0
    assert report.copy_seconds is not None
    results.append(
        {
            "model": "tower",
            "compute_seconds": compute,
            "copy_seconds": report.copy_seconds,
            "step_seconds": step,
            "predicted_step_seconds": made.step_seconds,
            "link_fraction": report.link_fraction,
            "copied_bytes": report.copied_bytes,
        }
    )
    made.restore()
    assert step < 0.9 * (compute + report.copy_seconds)


def _seconds(built: Any, value: Tensor) -> float:
    built(value)
    return float(built.report().step_seconds)


def test_another_stream() -> None:
    made, value, module = tower()
    made = made.replan(made.minimum_bytes)
    built = made.build()
    wanted = built(value)
    torch.cuda.synchronize()
    for _ in range(3):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            got = built(value)
        stream.synchronize()
        assert torch.equal(got, wanted)
    made.restore()
    assert all(p.device.type == "cpu" for p in module.parameters())


def test_close_undoes_the_cap_and_frees_the_arenas() -> None:
    module, args, kwargs = ZOO["bert"]()
    args, kwargs = on_cuda((args, kwargs))
    before = torch.cuda.memory_allocated()
    made = plan(module, "8GB", inputs=args, kwargs=kwargs, device="cuda")
    made = made.replan(made.minimum_bytes)
    built = made.build()
    built(*args, **kwargs)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        torch.empty(made.budget_bytes + (1 << 30), dtype=torch.uint8, device="cuda")
    built.close()
    assert torch.cuda.memory_allocated() == before
    large = torch.empty(made.budget_bytes + (1 << 30), dtype=torch.uint8, device="cuda")
    assert large.numel() > made.budget_bytes
    built.close()


def test_inputs_on_the_cpu_are_refused() -> None:
    from planner import InputError

    module, args, kwargs = ZOO["vit"]()
    made = plan(module, "8GB", inputs=args, kwargs=kwargs, device="cuda")
    built = made.build()
    with pytest.raises(InputError, match=r"x\.to\('cuda:0'\)"):
        built(*args, **kwargs)
    made.restore()
