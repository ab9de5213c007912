"""What is chosen of tilings: what stops them is named, what lives on the host counts there, skips go there and come back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from passes.regions import Tile
from planner import InfeasibleBudget, Plan, plan
from planner.solve.decisions import UNTILED, Decisions, Tiling
from tests.zoo import ZOO


class Spectrum(nn.Module):
    """Two convolutions around a Fourier transform, for which there is no tile rule."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        wide = functional.silu(self.before(x))
        return self.after(torch.fft.fft2(wide).real)


class Skips(nn.Module):
    """A U-Net of one level: the skip waits while norms over whole images run at half the size."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.inward, self.down = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, 2, padding=1)
        self.norms = nn.ModuleList(nn.GroupNorm(4, width) for _ in range(3))
        self.middle = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.outward = nn.Conv2d(2 * width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        skip = functional.silu(self.inward(x))
        h = self.down(skip)
        for norm, conv in zip(self.norms, self.middle, strict=True):
            h = h + conv(functional.silu(norm(h)))
        return self.outward(torch.cat([skip, functional.interpolate(h, scale_factor=2.0)], 1))


def least(module: nn.Module, x: Tensor, budget: str | dict[str, str] = "1GB", device: str = "accounting") -> Plan:
    p = plan(module, budget, inputs=(x,), device=device, machine="rtx-4090")
    return p.replan(p.minimum_bytes)


def test_what_has_no_rule_is_named_where_it_stops_a_lower_peak() -> None:
    p = least(Spectrum().eval(), torch.randn(1, 3, 64, 64))
    said = "fft_fft2 runs whole: aten.fft_fft2.default has no tile rule"
    assert said in " ".join(str(p).split())
    with pytest.raises(InfeasibleBudget, match=f"what runs in no tiles: {said}"):
        p.replan(p.minimum_bytes - 1)


def test_nothing_is_named_where_everything_has_a_rule() -> None:
    assert "runs whole" not in str(least(Skips().eval(), torch.randn(1, 3, 64, 64)))


def test_a_skip_waits_on_the_host() -> None:
    module, x = Skips().double().eval(), torch.randn(1, 3, 128, 96, dtype=torch.float64)
    p = least(module, x)
    nodes = {node.name: node for node in p.program.graph.nodes}
    positions = {node: i for i, node in enumerate(nodes.values())}
    last = max(
        max(positions[user] for user in nodes[name].users) - positions[nodes[name]] for name in p.decisions.tiling.hosted
    )
    assert last > 10  # operators later
    m = p.build()
    with torch.no_grad():
        expected = module(x)
    for _ in range(2):
        assert (m(x) - expected).abs().max() <= 1e-12 * expected.abs().max()
        assert m.report().peak_bytes == p.peak_bytes <= p.budget_bytes
    p.restore()


def test_values_on_the_host_count_there() -> None:
    module, x = Skips().eval(), torch.randn(1, 3, 128, 96)
    roomy = plan(module, "1GB", inputs=(x,), device="accounting", machine="rtx-4090")
    p = roomy.replan(roomy.minimum_bytes)
    assert p.layout.host_bytes > 0
    enough = roomy.replan({"accounting": p.budget_bytes, "cpu": p.layout.host_bytes + 10 * p.weight_bytes})
    assert enough.decisions.tiling == p.decisions.tiling
    with pytest.raises(InfeasibleBudget, match=r"2\.57 MB .* of host memory: 2\.56 MB of values on the host"):
        roomy.replan({"accounting": p.budget_bytes, "cpu": p.layout.host_bytes - 1000})


def test_every_level_is_a_program() -> None:
    """Of a model where regions of one run of large values reach into the next, and do not cover it."""
    module, args, kwargs = ZOO["t5_encoder"]()
    p = plan(module, "1GB", inputs=args, kwargs=kwargs, device="accounting", machine="rtx-4090")
    levels = p._tilings.branch(UNTILED).levels
    assert levels is not None
    for cap, tiling in levels:
        assert p._tilings.of(tiling).minimum.peak_bytes <= 1.1 * cap


def test_what_has_other_views_is_not_written_over() -> None:
    """The result could be in the memory of `x`, but for its first row, which is read in all of the tiles."""

    class Shifted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x * 2
            first = x[:1]
            return x.sin() + first

    module, x = Shifted().double().eval(), torch.randn(64, 8, dtype=torch.float64)
    p = plan(module, "1GB", inputs=(x,), device="accounting")
    tile = Tile("sin", "add", "mul", 0, 4)
    p = Plan(p.target, p._options, p._tilings, Decisions(tiling=Tiling(tiles=(tile,))))
    expected = module(x)
    m = p.build()
    assert torch.equal(m(x), expected)
    p.restore()


def test_a_program_of_a_few_bytes() -> None:
    class Small(nn.Module):
        def forward(self) -> Tensor:
            return torch.zeros(1, dtype=torch.uint8) + 1

    p = plan(Small().eval(), "1KB", inputs=(), device="accounting")
    assert p.minimum_bytes <= p.unplanned_bytes < 1000
