"""Plans in parts: right on every path, within the budget, and honest where bytes depend on values."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from planner import BudgetError, InfeasibleBudget, ModuleUnusable, Plan, UnknownSize, plan
from planner.parted import PartedPlan
from tests.planner.routed import Branch, CountedExperts, Experts, Layers, Loop, MaskedExperts, Padded, rows
from tests.planner.toys import Mlp, x

PLENTY = "1GB"


def parted(module: nn.Module, *inputs: Tensor, budget: Any = PLENTY, **options: Any) -> PartedPlan:
    made = plan(module.eval(), budget, inputs=inputs, device="accounting", **options)
    assert isinstance(made, PartedPlan)
    return made


def half(most: Plan) -> Plan:
    return most.replan(max(most.minimum_bytes, most.unplanned_bytes // 2))


def agree(made: Plan, reference: nn.Module, inputs: list[Tensor]) -> list[int]:
    """Every call gives eager's bits within the budget; gives the measured peaks."""
    built, peaks = made.build(), []
    for value in inputs:
        with torch.no_grad():
            assert torch.equal(built(value), reference(value))
        peaks.append(built.report().peak_bytes)
        assert peaks[-1] <= made.peak_bytes <= made.budget_bytes
    made.restore()
    return peaks


VALUES = [rows(shift=shift, seed=seed) for seed in range(2) for shift in (-0.5, 0.5, 0.0)]


@pytest.mark.parametrize("kind", [Branch, Loop, Experts, MaskedExperts])
@pytest.mark.parametrize("share", ["least", "half", "all"])
def test_right_on_inputs_that_take_different_branches(kind: type[nn.Module], share: str) -> None:
    torch.manual_seed(1)
    module = kind()
    reference = copy.deepcopy(module).eval()
    most = parted(module, rows())
    made = {"least": lambda: most.replan(most.minimum_bytes), "half": lambda: half(most)}.get(share, lambda: most)()
    agree(made, reference, VALUES)


def test_the_prediction_is_exact_where_the_worst_path_is_walked() -> None:
    torch.manual_seed(1)
    module = Branch()
    reference = copy.deepcopy(module).eval()
    most = parted(module, rows())
    for budget in (most.minimum_bytes, most.unplanned_bytes * 2 // 3, most.unplanned_bytes):
        made = most.replan(budget)
        assert max(agree(made, reference, VALUES)) == made.peak_bytes


class Chain(nn.Module):
    """Parts one after the other, each given what the one before gives and nobody needs later; may keep a tensor."""

    def __init__(self, *, keeps: bool = False) -> None:
        super().__init__()
        self.steps, self.keeps, self.last = nn.ModuleList(nn.Linear(32, 32) for _ in range(4)), keeps, torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = x * 2
        for step in self.steps:
            x = step(x)
        if self.keeps:
            self.last = x.repeat(1, 8)
        return x


def test_what_a_part_was_given_counts_as_long_as_somebody_holds_it() -> None:
    torch.manual_seed(1)
    module = Chain()
    reference = copy.deepcopy(module).eval()
    most = parted(module, torch.ones(64, 32))
    for budget in (most.minimum_bytes, most.unplanned_bytes):
        made = most.replan(budget)
        assert agree(made, reference, [torch.ones(64, 32)]) == [made.peak_bytes]


def test_what_the_module_keeps_is_there_in_the_next_call() -> None:
    plain, keeping = (parted(Chain(keeps=keeps), torch.ones(64, 32)) for keeps in (False, True))
    kept = 64 * 32 * 8 * 4
    assert (plain.exploration.left, keeping.exploration.left) == (0, kept)
    assert keeping.minimum_bytes >= 2 * kept  # the new one, and the one before
    agree(keeping, copy.deepcopy(keeping.target).eval(), [torch.ones(64, 32)] * 2)


def test_the_least_budget_and_one_byte_less() -> None:
    most = parted(Experts(), rows())
    most.replan(most.minimum_bytes)
    with pytest.raises(InfeasibleBudget, match="the least possible is") as caught:
        most.replan(most.minimum_bytes - 1)
    assert caught.value.minimum_bytes == most.minimum_bytes


def test_parts_are_planned_for_one_call_and_say_so() -> None:
    most = parted(Layers(Experts), rows(), repeats=4)
    made = half(most)
    assert most.repeats == made.repeats == made.frontier(points=2).repeats == 1
    assert {part.repeats for part in made.parts.values()} == {1}
    alone = half(parted(Layers(Experts), rows()))
    assert made.step_seconds == alone.step_seconds
    assert [p.step_seconds for p in made.parts.values()] == [p.step_seconds for p in alone.parts.values()]


def test_a_larger_budget_is_never_slower_and_copies_less() -> None:
    most = parted(Layers(Experts), rows())
    budgets = [most.minimum_bytes + (most.unplanned_bytes - most.minimum_bytes) * i // 8 for i in range(9)]
    seconds = [most.replan(budget).step_seconds for budget in budgets]
    assert seconds == sorted(seconds, reverse=True)
    built = most.build()
    built(rows())
    built(rows())
    assert built.report().copied_bytes == 0


class TestSizesThatOnlyDataKnows:
    def test_asks_and_names_the_module(self) -> None:
        with pytest.raises(UnknownSize, match=r"blocks\.0\.inner \(CountedExperts\).*opaque_bytes=\{'blocks\.\*\.inner'"):
            parted(Layers(), rows())

    @pytest.mark.parametrize("stated", [{"blocks.*.inner": "40kB"}, "40kB"])
    def test_is_told(self, stated: Any) -> None:
        torch.manual_seed(1)
        module = Layers()
        reference = copy.deepcopy(module).eval()
        most = parted(module, rows(), opaque_bytes=stated)
        assert {part.partition("#")[0] for part in most.parts} == {"blocks.0.up", "blocks.1.up"}
        agree(half(most), reference, VALUES)

    def test_what_is_told_is_taken_from_the_budget(self) -> None:
        little, much = (parted(Layers(), rows(), opaque_bytes=n) for n in ("10kB", "90kB"))
        assert much.minimum_bytes - little.minimum_bytes == 80_000

    def test_the_root_is_asked_for_a_submodule(self) -> None:
        with pytest.raises(UnknownSize, match="plan a submodule of it"):
            parted(CountedExperts(), rows())

    def test_on_the_meta_device(self) -> None:
        torch.manual_seed(1)
        reference = Layers().eval()
        made = half(parted(Layers().to("meta"), rows().to("meta"), opaque_bytes="40kB"))
        built = made.build(weights=reference)
        with torch.no_grad():
            assert torch.equal(built(rows()), reference(rows()))


def test_values_of_buffers_are_known() -> None:
    torch.manual_seed(1)
    module = Padded()
    reference = copy.deepcopy(module).eval()
    value = torch.randn(1, 32, 9)
    made = parted(module, value)
    assert len(made.parts) == 1
    agree(made, reference, [value, value * 2])


def test_another_signature_is_explored_again_within_the_budget() -> None:
    torch.manual_seed(1)
    module = Experts()
    reference = copy.deepcopy(module).eval()
    most = parted(module, rows(24))
    built = most.replan(most.minimum_bytes + 4096).build()
    for count in (24, 12, 24, 6):
        with torch.no_grad():
            assert torch.equal(built(rows(count)), reference(rows(count)))
        assert built.report().peak_bytes <= most.minimum_bytes + 4096


def test_save_and_load(tmp_path: Path) -> None:
    torch.manual_seed(1)
    module = Branch()
    reference = copy.deepcopy(module).eval()
    made = half(parted(module, rows()))
    made.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json", module)
    assert loaded == made
    assert str(loaded).splitlines()[:4] == str(made).splitlines()[:4]
    agree(loaded, reference, VALUES)


def test_weights_written_between_calls_are_seen() -> None:
    torch.manual_seed(1)
    module = Branch()
    made = half(parted(module, rows()))
    built = made.build()
    built(rows(shift=1.0))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.125)
    reference = copy.deepcopy(made.restore())
    built = half(parted(module, rows())).build()
    with torch.no_grad():
        assert torch.equal(built(rows(shift=1.0)), reference(rows(shift=1.0)))


def test_state_that_python_keeps_in_buffers() -> None:
    class Counting(Branch):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("sums", torch.zeros(3))

        def forward(self, v: Tensor) -> Tensor:
            self.calls.add_(1)
            self.sums = self.sums + self.calls
            return super().forward(v) * self.calls + self.sums[0]

    torch.manual_seed(1)
    module = Counting()
    reference = copy.deepcopy(module).eval()
    most = parted(module, rows())
    for made in (most.replan(most.minimum_bytes), most):
        agree(made, reference, VALUES[:3])
        assert torch.equal(module.calls, reference.calls)
        assert torch.equal(module.sums, reference.sums)


def test_an_error_in_its_python_leaves_the_module_as_it_is() -> None:
    class Fails(Branch):
        fail = False

        def forward(self, v: Tensor) -> Tensor:
            h = super().forward(v)
            if self.fail:
                raise KeyError("asked for")
            return h

    module = Fails()
    built = half(parted(module, rows())).build()
    wanted = built(rows())
    module.fail = True
    with pytest.raises(KeyError, match="asked for"):
        built(rows())
    assert all("forward" not in child.__dict__ for child in module.modules())
    module.fail = False
    assert torch.equal(built(rows()), wanted)
    built.close()
    with pytest.raises(ModuleUnusable, match="closed"):
        built(rows())
    with torch.no_grad():
        assert torch.equal(module(rows()), wanted)


def test_autocast_inside() -> None:
    class Autocasts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Mlp(), Mlp()

        def forward(self, v: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                h = self.first(v)
            return self.second(h.float())

    torch.manual_seed(1)
    module = Autocasts()
    reference = copy.deepcopy(module).eval()
    made = parted(module, x())
    assert list(made.parts) == ["second"]
    agree(made, reference, [x(seed=s) for s in (1, 2, 3)])


def test_tied_weights_of_several_parts() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
            self.head.weight = self.table.weight
            self.last: Tensor | None = None

        def forward(self, ids: Tensor) -> Tensor:
            self.last = self.table(ids)
            return self.head(self.last) + (self.last @ self.head.weight.t())

    torch.manual_seed(1)
    module = Tied()
    reference = copy.deepcopy(module).eval()
    most = parted(module, torch.arange(5))
    for made in (most, most.replan(most.minimum_bytes)):
        agree(made, reference, [torch.arange(5), torch.arange(5) + 3])


def test_it_says_what_it_does() -> None:
    made = half(parted(Branch(), rows()))
    text = str(made)
    assert "its Python runs as it is, 3 calls in it as programs" in text
    assert "along 3 paths" in text
    assert "return self.large(h) if h.sum() > 0" in " ".join(text.split())
    assert all(len(line) <= 100 for line in text.splitlines())
    assert "def program(rt, w, device, arg_0):" in made.code
    assert made.bound_seconds <= made.step_seconds


def test_exchanged_data_is_refused_in_every_call() -> None:
    module = Branch()
    built = parted(module, rows()).build()
    module.before.weight.data = module.before.weight.data.clone()
    for _ in range(2):
        with pytest.raises(ModuleUnusable, match=r"the data of 'before.weight' was exchanged"):
            built(rows())


def test_the_disk_budget_holds_for_parts() -> None:
    made = plan(Branch().eval(), {"cpu": "1GB", "disk": "1KB"}, inputs=(rows(),), device="cpu")
    with pytest.raises(BudgetError, match="disk"):
        made.build()


def test_loops_are_said_not_to_be_walked_to_their_end() -> None:
    assert parted(Branch(), rows()).exploration.complete
    assert not parted(Loop(), rows()).exploration.complete
