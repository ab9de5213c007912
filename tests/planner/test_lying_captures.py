"""Modules whose capture succeeds and is wrong: each planned gives what it gives itself, effects included."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from planner import Plan, plan
from tests.planner.toys import Mlp, x


class Wrapped(nn.Module):
    """Something to stream around what lies."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = Mlp(32), Mlp(32)

    def compute(self, v: Tensor) -> Tensor:
        return v * 2

    def forward(self, v: Tensor, *rest: Any) -> Any:
        return self.after(self.compute(self.before(v), *rest))


class MutatesAList(Wrapped):
    def compute(self, v: Tensor, seen: list[Tensor]) -> Tensor:
        seen.append(v + 1)
        return v * len(seen)


class MutatesADict(Wrapped):
    def compute(self, v: Tensor, seen: dict[str, Tensor]) -> Tensor:
        seen["last"] = v
        return v


class Counts(Wrapped):
    n = 0

    def compute(self, v: Tensor) -> Tensor:
        self.n += 1
        return v * self.n


class CountsInAChild(Wrapped):
    def __init__(self) -> None:
        super().__init__()
        self.child = Counts()

    def compute(self, v: Tensor) -> Tensor:
        return self.child(v)  # type: ignore[no-any-return]


class Remembers(Wrapped):
    last: Tensor | None = None

    def compute(self, v: Tensor) -> Tensor:
        before, self.last = self.last, v * 3
        return v if before is None else v + before


class Memo(Wrapped):
    def __init__(self) -> None:
        super().__init__()
        self.memo: dict[int, Tensor] = {}
        self.table = nn.Parameter(torch.randn(8))

    def compute(self, v: Tensor) -> Tensor:
        if v.shape[0] not in self.memo:
            self.memo[v.shape[0]] = self.table * v.shape[0]
        return v + self.memo[v.shape[0]]


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.turn = nn.Linear(8, 8), 0

    def forward(self, v: Tensor) -> Tensor:
        return self.layer(v) * self.turn


class ChangesAChild(Wrapped):
    """The child's program would bake in what its parent changes."""

    def __init__(self) -> None:
        super().__init__()
        self.child = Reads()

    def compute(self, v: Tensor) -> Tensor:
        self.child.turn += 1
        return self.child(v)  # type: ignore[no-any-return]


class Reaches(nn.Module):
    """Changes an attribute of a module that is not in it."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.layer, self.reach = nn.Linear(8, 8), [other]

    def forward(self, v: Tensor) -> Tensor:
        self.reach[0].turn += 1  # type: ignore[assignment,operator]
        return self.layer(v)


class ChangesASibling(Wrapped):
    def __init__(self) -> None:
        super().__init__()
        self.child = Reads()
        self.changes = Reaches(self.child)

    def compute(self, v: Tensor) -> Tensor:
        return self.child(self.changes(v))  # type: ignore[no-any-return]


class Layout(Wrapped):
    def forward(self, v: Tensor) -> Tensor:
        return self.after(v * 2 if v.is_contiguous() else v * 3)


class PythonDraws(Wrapped):
    def compute(self, v: Tensor) -> Tensor:
        return v * random.random()


class NumpyDraws(Wrapped):
    def compute(self, v: Tensor) -> Tensor:
        return v * float(np.random.rand())


class TorchDraws(Wrapped):
    def compute(self, v: Tensor) -> Tensor:
        return v + torch.randn(8)


def budgets(module: nn.Module, *inputs: Any) -> list[Plan]:
    most = plan(module, "1GB", inputs=inputs, device="accounting")
    middle = max(most.minimum_bytes, most.unplanned_bytes // 2)
    return [most.replan(most.minimum_bytes), most.replan(middle), most.replan(most.unplanned_bytes)]


def seeded(module: nn.Module, *args: Any) -> Any:
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    with torch.no_grad():
        return module(*args)


def agree(module: nn.Module, reference: nn.Module, plan: Plan, *rest: Any) -> None:
    """Three calls, on other values each, give the same bits within the budget."""
    built = plan.build()
    for seed in (1, 2, 3):
        value, own, other = x(seed=seed), copy.deepcopy(rest), copy.deepcopy(rest)
        assert torch.equal(seeded(built, value, *own), seeded(reference, value, *other))
        assert built.report().peak_bytes <= plan.peak_bytes <= plan.budget_bytes
        mine, others = tree_flatten(own), tree_flatten(other)
        assert mine[1] == others[1]
        assert all(map(torch.equal, mine[0], others[0]))
    plan.restore()


@pytest.mark.parametrize("least", [0, 1, 2])
@pytest.mark.parametrize(
    ("kind", "rest"),
    [
        (Wrapped, ()), (MutatesAList, ([],)), (MutatesADict, ({},)), (Counts, ()), (CountsInAChild, ()), (Remembers, ()),
        (Memo, ()), (ChangesAChild, ()), (ChangesASibling, ()), (PythonDraws, ()), (NumpyDraws, ()), (TorchDraws, ()),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)  # fmt: skip
def test_planned_does_what_the_module_does(kind: type[nn.Module], rest: tuple[Any, ...], least: int) -> None:
    torch.manual_seed(0)
    module = kind().eval()
    reference = copy.deepcopy(module)
    agree(module, reference, budgets(module, x(), *rest)[least], *rest)


def test_effects_are_the_modules_own() -> None:
    module = Remembers().eval()
    built = budgets(module, x())[0].build()
    given = built(x())
    assert module.last is not None
    assert module.last.shape == given.shape
    assert Counts().eval().n == 0


def test_an_attribute_changed_later() -> None:
    """Read by a program: refused. Read by Python that runs: seen."""
    captured, parted = ChangesAChild().child.eval(), Counts().eval()
    built = plan(captured, "1MB", inputs=(x(),), device="accounting").build()
    captured.turn = 5
    with pytest.raises(Exception, match="changed since the plan was made"):
        built(x())
    reference = copy.deepcopy(parted)
    again = plan(parted, "1MB", inputs=(x(),), device="accounting").build()
    parted.n = reference.n = 40
    with torch.no_grad():
        assert torch.equal(again(x()), reference(x()))
    parted.after.up.bias.data.add_(0)  # a write that changes nothing is no harm
    assert parted.n == 41


def test_a_branch_on_the_layout() -> None:
    module = Layout().eval()
    built = plan(module, "1MB", inputs=(x(8),), device="accounting").build()
    for value in (x(8), x(8).t(), x(8)):
        with torch.no_grad():
            assert torch.equal(built(value), copy.deepcopy(module).forward(value))


@pytest.mark.parametrize("where", ["before.up", "after", ""])
def test_hooks_fire_in_every_call(where: str) -> None:
    module = Wrapped().eval()
    heard: list[Tensor] = []

    def hook(child: nn.Module, args: Any, out: Tensor) -> Tensor:
        heard.append(out.clone())
        return out * 2

    module.get_submodule(where).register_forward_hook(hook)
    with torch.no_grad():
        expected = [module(x(seed=seed)) for seed in (1, 2)]
    said, heard[:] = list(heard), []
    for attempt in budgets(module, x()):
        assert not heard, "planning calls no hook"
        built = attempt.build()
        for seed, wanted in zip((1, 2), expected, strict=True):
            assert torch.equal(built(x(seed=seed)), wanted)
        assert len(heard) == len(said)
        assert all(map(torch.equal, heard, said))
        heard.clear()
        attempt.restore()


def test_hooks_of_torch_itself_are_captured() -> None:
    module = nn.utils.weight_norm(nn.Linear(8, 8)).eval()
    wrapped = nn.Sequential(module, nn.ReLU()).eval()
    with torch.no_grad():
        expected = wrapped(x())
        built = plan(wrapped, "1MB", inputs=(x(),), device="accounting").build()
        assert torch.equal(built(x()), expected)


def test_planning_leaves_no_trace() -> None:
    for kind in (Counts, Remembers, Memo, ChangesAChild, PythonDraws):
        module = kind().eval()
        before = {path: dict(child.__dict__) for path, child in module.named_modules()}
        state = random.getstate()
        plan(module, "1MB", inputs=(x(),), device="accounting")
        assert random.getstate() == state
        for path, child in module.named_modules():
            assert list(child.__dict__) == list(before[path])
            assert all(a is b for a, b in zip(child.__dict__.values(), before[path].values(), strict=True))
