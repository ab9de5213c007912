"""Attributes that a call changes: captured where no call depends on them, else left to the module's own Python."""

from __future__ import annotations

import collections
import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from planner import Plan, PlannerError, plan
from planner.capture import capture
from runtime.errors import CaptureError, ModuleUnusable
from tests.planner.toys import Mlp, x


class Leaves(nn.Module):
    """Something with weights around what changes attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = Mlp(32), Mlp(32)

    def compute(self, v: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, v: Tensor) -> Tensor:
        return self.after(self.compute(self.before(v)))  # type: ignore[no-any-return]


class ResetAtTheStart(Leaves):
    def compute(self, v: Tensor) -> Tensor:
        self.index, self.cache = [0], [None] * 3  # new in the first call
        for turn in range(3):
            self.cache[turn] = v if turn == 0 else self.cache[turn - 1] * 2
            self.index[0] += 1
        result = self.cache[2] * self.index[0]
        self.cache = [None] * 3
        return result  # type: ignore[no-any-return]


class ResetInPlace(Leaves):
    def __init__(self) -> None:
        super().__init__()
        self.log: list[Any] = ["new"]
        self.sizes: dict[str, Any] = {}
        self.heard: set[int] = set()

    def compute(self, v: Tensor) -> Tensor:
        self.log.clear()
        self.sizes["last"] = [tuple(v.shape), v.shape]
        self.heard.add(len(self.log))
        self.log.append(0.1)
        return v * len(self.log)


class Announces(Leaves):
    """The first call and later ones agree."""

    ready = False

    def compute(self, v: Tensor) -> Tensor:
        if not self.ready:
            self.ready = True
        return v * 2


class Deletes(Leaves):
    def __init__(self) -> None:
        super().__init__()
        self.once = 3

    def compute(self, v: Tensor) -> Tensor:
        self.__dict__.pop("once", None)
        return v * 2


class InAChild(Leaves):
    def __init__(self) -> None:
        super().__init__()
        self.child = ResetAtTheStart()

    def compute(self, v: Tensor) -> Tensor:
        return self.child(v)  # type: ignore[no-any-return]


class OfTheShape(Leaves):
    """What is left depends on the call, but no call depends on it."""

    def compute(self, v: Tensor) -> Tensor:
        self.shape = tuple(v.shape)
        return v * 2


WHOLE: list[type[Leaves]] = [ResetAtTheStart, ResetInPlace, Announces, Deletes, InAChild, OfTheShape]


class FirstIsOther(Leaves):
    first = True

    def compute(self, v: Tensor) -> Tensor:
        first, self.first = self.first, False
        return v * 2 if first else v * 3


class Grows(Leaves):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def compute(self, v: Tensor) -> Tensor:
        self.seen.append(1)
        return v * len(self.seen)


class GrowsUnread(Grows):
    def compute(self, v: Tensor) -> Tensor:
        self.seen.append(1)
        return v * 2


class Flips(Leaves):
    flag = False

    def compute(self, v: Tensor) -> Tensor:
        self.flag = not self.flag
        return v * 2 if self.flag else v * 3


class FlipsUnread(Flips):
    def compute(self, v: Tensor) -> Tensor:
        self.flag = not self.flag
        return v * 2


class TensorCache(Leaves):
    def __init__(self) -> None:
        super().__init__()
        self.cache: list[Any] = [None]

    def compute(self, v: Tensor) -> Tensor:
        before, self.cache[0] = self.cache[0], v * 3
        return v if before is None else v + before


class TensorsByShape(Leaves):
    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[Any, Tensor] = {}

    def compute(self, v: Tensor) -> Tensor:
        if v.shape not in self.cache:
            self.cache[v.shape] = v * 3
        return v + self.cache[v.shape]


class LastUnread(Leaves):
    """No call depends on it, but it is there for others to read."""

    def compute(self, v: Tensor) -> Tensor:
        self.last = v * 3
        return v * 2


class Nested(Leaves):
    def __init__(self) -> None:
        super().__init__()
        self.state: dict[str, Any] = {"seen": ([0],)}

    def compute(self, v: Tensor) -> Tensor:
        self.state["seen"][0][0] += 1
        return v * self.state["seen"][0][0]  # type: ignore[no-any-return]


class Queue(Leaves):
    def __init__(self) -> None:
        super().__init__()
        self.queue = collections.deque([1], maxlen=9)

    def compute(self, v: Tensor) -> Tensor:
        self.queue.append(1)
        return v * len(self.queue)


class Names(Leaves):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[int] = set()

    def compute(self, v: Tensor) -> Tensor:
        self.names.add(len(self.names))
        return v * len(self.names)


class Counter:
    n = 0


class AnObject(Leaves):
    def __init__(self) -> None:
        super().__init__()
        self.counter = Counter()

    def compute(self, v: Tensor) -> Tensor:
        self.counter.n += 1
        return v * self.counter.n


class Shared(Leaves):
    """What is left shares a list with another attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.mine, self.other = [1], [2]

    def compute(self, v: Tensor) -> Tensor:
        self.mine = self.other
        return v * self.mine[0]


PARTED: list[type[Leaves]] = [
    FirstIsOther, Grows, GrowsUnread, Flips, FlipsUnread, TensorCache, TensorsByShape, LastUnread, Nested, Queue, Names,
    AnObject, Shared,
]  # fmt: skip


def made(kind: type[Leaves]) -> tuple[Leaves, Leaves]:
    torch.manual_seed(0)
    module = kind().eval()
    return module, copy.deepcopy(module)


def planned(module: nn.Module) -> Plan:
    most = plan(module, "1GB", inputs=(x(),), device="accounting")
    return most.replan(most.minimum_bytes)


def attributes(module: nn.Module) -> dict[str, Any]:
    """Plain attributes of all submodules, by value; tensors by their bits."""
    found = {}
    for path, child in module.named_modules():
        for name, value in child.__dict__.items():
            if not name.startswith("_") and name not in ("forward",):
                found[f"{path}.{name}"] = repr(vars(value) if isinstance(value, Counter) else value)
    return found


def agree(built: nn.Module, reference: nn.Module, *inputs: Tensor) -> None:
    for value in inputs:
        with torch.no_grad():
            assert torch.equal(built(value), reference(value))
        assert attributes(built) == attributes(reference)


@pytest.mark.parametrize("kind", WHOLE)
def test_one_program(kind: type[Leaves]) -> None:
    module, reference = made(kind)
    before = attributes(module)
    p = planned(module)
    assert type(p) is Plan, "not in parts"
    assert attributes(module) == before, "planning leaves no trace"
    agree(p.build(), reference, x(seed=1), x(seed=2), x(seed=3))


@pytest.mark.parametrize("kind", PARTED)
def test_in_parts(kind: type[Leaves]) -> None:
    module, reference = made(kind)
    before = attributes(module)
    with pytest.raises(CaptureError, match=r"changes the attribute '\w+' while it runs"):
        capture(module, (x(),))
    p = planned(module)
    assert hasattr(p, "parts")
    assert attributes(module) == before, "planning leaves no trace"
    agree(p.build(), reference, x(seed=1), x(seed=2), x(seed=3))


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Grows, "every call leaves it otherwise"),
        (Flips, "every call leaves it otherwise"),
        (FirstIsOther, "what it computes depends on what the last call left"),
    ],
)
def test_the_error_says_why(kind: type[Leaves], why: str) -> None:
    with pytest.raises(CaptureError, match=f"not repeat, for {why}; keep state in a buffer"):
        capture(made(kind)[0], (x(),))


def test_planned_after_a_call_of_its_own() -> None:
    module, reference = made(ResetAtTheStart)
    with torch.no_grad():
        module(x()), reference(x())
    agree(planned(module).build(), reference, x(seed=1))


def test_lists_stay_the_lists_they_are() -> None:
    module, reference = made(ResetInPlace)
    held = module.log
    agree(planned(module).build(), reference, x())
    assert module.log is held
    assert held == [0.1]


def test_leftovers_of_other_shapes() -> None:
    module, reference = made(OfTheShape)
    built = plan(module, "1GB", inputs=(x(),), device="accounting").build()
    agree(built, reference, x(4), x(8), x(4), x(8), x(4))


class SetByOneShape(Leaves):
    factor = 1

    def compute(self, v: Tensor) -> Tensor:
        if v.shape[0] == 4:
            self.factor = 2
            return v
        return v * self.factor


def test_what_one_program_leaves_and_another_reads() -> None:
    module, reference = made(SetByOneShape)
    built = plan(module, "1GB", inputs=(x(8),), device="accounting").build()
    agree(built, reference, x(8), x(4), x(8), x(4), x(8))


class Threshold(Leaves):
    n = 0

    def compute(self, v: Tensor) -> Tensor:
        large, self.n = self.n > 9, 1
        return v * 5 if large else v * 2


def test_other_values_than_were_captured() -> None:
    module, reference = made(Threshold)
    built = plan(module, "1GB", inputs=(x(),), device="accounting").build()
    agree(built, reference, x(), x(seed=1))
    module.n = reference.n = 7
    agree(built, reference, x(), x(seed=1))
    module.n = 10
    with pytest.raises(PlannerError, match="depends on what the last call left"):
        built(x())


class ResetAtTheEnd(Leaves):
    """Its first call and later ones agree, unless one was left in the middle."""

    def __init__(self, cache: Any) -> None:
        super().__init__()
        self.cache = cache

    def compute(self, v: Tensor) -> Tensor:
        cache: Any = self.cache
        cache.append(1) if isinstance(cache, list) else cache.update({len(cache): 1})
        if v.isnan().any() if not torch.compiler.is_compiling() else False:
            raise ValueError("not a number")
        result = v * len(cache)
        cache.clear()
        return result

    def alone(self, v: Tensor) -> Tensor:
        return self.compute(v)


@pytest.mark.parametrize("cache", [[], {}], ids=["list", "dict"])
def test_a_call_that_raised_in_between(cache: Any) -> None:
    torch.manual_seed(0)
    module = ResetAtTheEnd(cache).eval()
    reference = copy.deepcopy(module)
    p = plan(module, "1GB", inputs=(x(),), device="accounting")
    assert type(p) is Plan
    built: Any = p.build()
    agree(built, reference, x(), x(seed=1))
    with pytest.raises(ValueError, match="not a number"):
        built.alone(torch.full((4, 8), torch.nan))
    with pytest.raises(ModuleUnusable, match="an attribute of the module changed"):
        built(x())
    module.cache.clear()
    agree(built, reference, x(seed=2))
