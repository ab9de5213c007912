"""What a dry run has recorded: distinct calls of components, the order they come in, bytes held besides, and a table of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, keystr, tree_flatten, tree_flatten_with_path, tree_leaves, tree_unflatten

from passes.program import storage_id
from passes.spec import TensorSpec, short_dtype
from planner.pretend_device import Held
from planner.sizes import format_bytes


@dataclass(frozen=True)
class CallKey:
    """What makes two calls one: component, method, geometry of tensors, Python values, dtypes of the weights, autocast.

    Storages are numbered within the call, and where in its storage a tensor lies counts only beside another one of the same
    storage: the timestep of every step, a view into one tensor of all timesteps, is the same argument.
    """

    component: str
    method: str
    leaves: tuple[Any, ...]
    spec: TreeSpec
    floats: tuple[float, ...]
    dtypes: tuple[torch.dtype, ...]
    autocast: torch.dtype | None

    @classmethod
    def of(cls, component: str, method: str, args: Any, kwargs: Any, module: nn.Module) -> CallKey:
        leaves, spec = tree_flatten((args, kwargs))
        dtypes = dict.fromkeys(parameter.dtype for parameter in module.parameters())
        autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        floats = tuple(leaf for leaf in leaves if isinstance(leaf, float))
        return cls(component, method, _frozen(leaves), spec, floats, tuple(sorted(dtypes, key=str)), autocast)

    @property
    def without_floats(self) -> tuple[Any, ...]:
        return self.component, self.method, self.leaves, self.spec, self.dtypes, self.autocast


@dataclass(frozen=True, eq=False)
class ComponentCall:
    """One distinct call that a pipeline makes on a component.

    Attributes:
        component: its name; method: "forward", "decode"; "decoder.forward" where a submodule is called past the component.
        leaves, spec: of the tree (args, kwargs), as given in the first such call, with a `TensorSpec` for each tensor; equal
            storages share memory. result_leaves, result_spec: the same of what it gives.
        dtypes: those of the parameters at the time of the call: a pipeline may have cast them (SDXL's VAE, to float32).
        autocast: the dtype of autocast around it, or None.
        by_values: its Python cannot run on fakes: shapes are those of runs on zeros and on random numbers.
        most_steps: for a method that goes on until values say stop (`generate`), after how many steps it stops at the latest.
    """

    component: str
    method: str
    leaves: tuple[Any, ...]
    spec: TreeSpec
    result_leaves: tuple[Any, ...]
    result_spec: TreeSpec
    dtypes: tuple[torch.dtype, ...] = ()
    autocast: torch.dtype | None = None
    by_values: bool = False
    most_steps: int | None = None

    @classmethod
    def of(cls, key: CallKey, given: Any, result: Any, *, by_values: bool, most_steps: int | None) -> ComponentCall:
        (leaves, spec), (outputs, result_spec) = tree_flatten(given), tree_flatten(result)
        both = _specs([*leaves, *outputs])
        own, others = tuple(both[: len(leaves)]), tuple(both[len(leaves) :])
        return cls(
            key.component, key.method, own, spec, others, result_spec, key.dtypes, key.autocast, by_values, most_steps
        )  # fmt: skip

    @staticmethod
    def outline(result: Any) -> tuple[Any, ...]:
        """Equal for results of the same structure, shapes and strides."""
        leaves, spec = tree_flatten(result)
        return spec, _frozen(leaf if isinstance(leaf, torch.Tensor) else type(leaf) for leaf in leaves)

    @property
    def name(self) -> str:
        return f"{self.component}.{self.method}"

    @property
    def args(self) -> tuple[Any, ...]:
        """Positional arguments, with a `TensorSpec` for each tensor."""
        return tree_unflatten(self.leaves, self.spec)[0]

    @property
    def kwargs(self) -> dict[str, Any]:
        """Named arguments, with a `TensorSpec` for each tensor."""
        return tree_unflatten(self.leaves, self.spec)[1]

    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with tensors on the meta device, for a capture; what shares a storage shares one here too."""
        specs = [leaf for leaf in self.leaves if isinstance(leaf, TensorSpec)]
        ends: dict[int, int] = {}
        for spec in specs:
            stop = spec.offset * spec.dtype.itemsize + spec.span_bytes
            ends[spec.storage] = max(ends.get(spec.storage, 0), stop)
        homes = {storage: torch.empty(-nbytes // -16 * 16, dtype=torch.uint8, device="meta") for storage, nbytes in ends.items()}

        def meta(spec: TensorSpec) -> torch.Tensor:
            return homes[spec.storage].view(spec.dtype).as_strided(spec.shape, spec.stride, spec.offset)

        args, kwargs = tree_unflatten([meta(x) if isinstance(x, TensorSpec) else x for x in self.leaves], self.spec)
        return args, kwargs

    def __str__(self) -> str:
        arguments = [*map(_brief, self.args), *(f"{key}={_brief(value)}" for key, value in self.kwargs.items() if value is not None)]
        return f"{self.name}({', '.join(arguments)}) -> {_brief(self.result_leaves)}"


@dataclass(frozen=True)
class Step:
    """One call in the order of the run.

    Attributes:
        call: index into `DryRun.calls`.
        floats: the Python floats among its arguments, in the order of the flattened tree.
        held: bytes of the pipeline's own tensors while the component runs, those of its arguments apart: `arguments`.
        between: the most that the pipeline held, all in all, from the call before (its result included) to this one.
    """

    call: int
    floats: tuple[float, ...]
    held: Held
    arguments: Held
    between: Held


@dataclass(frozen=True)
class Phase:
    """A run of calls that comes `times` times: indices into `DryRun.calls`, in order."""

    cycle: tuple[int, ...]
    times: int


@dataclass(frozen=True)
class DryRun:
    """Which calls a pipeline makes on its components, in which order, and what its own Python holds meanwhile.

    Attributes:
        calls: the distinct ones, in the order of their first time.
        steps: every call of the run. last: the most that the pipeline held after the last of them.
        asked: lines of Python that asked for a value which only a real run knows: there it may go another way.
    """

    name: str
    calls: tuple[ComponentCall, ...]
    steps: tuple[Step, ...]
    last: Held = field(default_factory=Held)
    asked: tuple[str, ...] = ()

    @property
    def sequence(self) -> tuple[int, ...]:
        """Indices into `calls`, one for each step."""
        return tuple(step.call for step in self.steps)

    @property
    def is_certain(self) -> bool:
        """Whether the sequence is that of any real run: nothing asked for values, and no call goes on until values say stop."""
        return not self.asked and all(call.most_steps is None for call in self.calls)

    @cached_property
    def phases(self) -> tuple[Phase, ...]:
        """The sequence by what repeats: the longest repetition from each point on, of the shortest cycle."""
        return tuple(phases_of(self.sequence))

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the components that are called, in the order of their first call."""
        return tuple(dict.fromkeys(call.component for call in self.calls))

    def times(self, call: int) -> int:
        return self.sequence.count(call)

    def steps_of(self, call: int) -> list[Step]:
        return [step for step in self.steps if step.call == call]

    def varying_floats(self, call: int) -> tuple[str, ...]:
        """Where in the arguments of a call there are Python floats that differ from step to step: `[1]['scale']`."""
        seen = [step.floats for step in self.steps_of(call)]
        given = self.calls[call]
        paths = [keystr(p) for p, leaf in tree_flatten_with_path((given.args, given.kwargs))[0] if isinstance(leaf, float)]
        return tuple(path for path, values in zip(paths, zip(*seen, strict=True), strict=True) if len(set(values)) > 1)

    def __str__(self) -> str:
        return "\n".join(_describe(self))


def phases_of(sequence: Sequence[int]) -> Iterator[Phase]:
    """Cuts a sequence into phases, whose cycles repeated give the sequence again."""
    start = 0
    while start < len(sequence):
        best, later = _longest(sequence, start), _longest(sequence, start + 1)
        if len(later.cycle) * later.times > len(best.cycle) * best.times:
            best = Phase((sequence[start],), 1)  # t t u t u t u: a single t, and then (t u) three times
        yield best
        start += len(best.cycle) * best.times


def _longest(sequence: Sequence[int], start: int) -> Phase:
    """The repetition from `start` on that covers most; of those the one with the shortest cycle."""
    best = Phase(tuple(sequence[start : start + 1]), 1)
    for length in range(1, (len(sequence) - start) // 2 + 1):
        cycle, times = sequence[start : start + length], 1
        while sequence[start + times * length : start + (times + 1) * length] == cycle:
            times += 1
        if times > 1 and times * length > best.times * len(best.cycle):
            best = Phase(tuple(cycle), times)
    return best


def _describe(run: DryRun) -> Iterator[str]:
    calls = f"{len(run.steps)} calls" if len(run.steps) != 1 else "1 call"
    yield f"{run.name}: {calls} of {', '.join(run.components) or 'no component'}"
    for phase in run.phases:
        for place, (index, times) in enumerate(_runs(phase.cycle)):
            call = run.calls[index]
            bracket = f"{phase.times} x" if place == 0 else ""
            inner = f" x {times}" if times > 1 else ""
            yield f"  {bracket:>6} {call}{inner}"
            held = Held()
            for step in run.steps_of(index):
                held = held.most(step.held)
            yield f"  {'':6}   beside it {format_bytes(held.device_bytes)} of the pipeline's own tensors"
            floats = run.varying_floats(index)
            if floats:
                yield f"  {'':6}   floats that vary: {', '.join(floats)}"
            if call.most_steps is not None:
                yield f"  {'':6}   goes on until values say stop, {call.most_steps} steps at most"
    between = run.last
    for step in run.steps:
        between = between.most(step.between)
    yield f"  between the calls the pipeline holds {format_bytes(between.device_bytes)} at most"
    for site in run.asked:
        yield f"  may go another way with real values: {site}"


def _runs(cycle: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(call, how often one after the other) within a cycle."""
    start = 0
    for place in range(1, len(cycle) + 1):
        if place == len(cycle) or cycle[place] != cycle[start]:
            yield cycle[start], place - start
            start = place


def _brief(value: Any) -> str:
    """A value in a few characters: shapes, and no more of containers than that they are there."""
    if isinstance(value, TensorSpec):
        return f"{short_dtype(value.dtype)}[{', '.join(map(str, value.shape))}]"
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    tensors = [_brief(leaf) for leaf in tree_leaves(value) if isinstance(leaf, TensorSpec)]
    if not tensors:
        return repr(value) if isinstance(value, (str, torch.dtype)) else f"{type(value).__name__}"
    shown = ", ".join(tensors[:3]) + (f", {len(tensors) - 3} more" if len(tensors) > 3 else "")
    return shown if len(tensors) == 1 else f"({shown})"


def _specs(leaves: Sequence[Any]) -> list[Any]:
    """The leaves with specs for tensors; storages are numbered, and begin with the first of their tensors."""
    numbers: dict[int, int] = {}
    first: dict[int, int] = {}  # bytes from which on a storage is used
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            key, start = storage_id(leaf), leaf.storage_offset() * leaf.dtype.itemsize
            numbers.setdefault(key, len(numbers))
            first[key] = min(first.get(key, start), start)

    def spec(tensor: torch.Tensor) -> TensorSpec:
        key = storage_id(tensor)
        offset = tensor.storage_offset() - first[key] // tensor.dtype.itemsize
        made = TensorSpec.of(tensor, numbers[key])
        return TensorSpec(made.shape, made.stride, made.dtype, offset, made.storage, made.grad)

    return [spec(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]


def _frozen(leaves: Any) -> tuple[Any, ...]:
    """Leaves as what makes them equal: geometry of tensors, type and value of Python values, floats by type alone."""
    return tuple(_Leaf(leaf) for leaf in _specs(list(leaves)))


class _Leaf:
    """A leaf that is equal to others of its type and value; by identity where it cannot be compared so."""

    __slots__ = ("_key", "_value")

    def __init__(self, value: Any) -> None:
        self._value = value  # alive, so that its identity stays its own
        if isinstance(value, float):
            self._key: Any = float
        elif isinstance(value, (TensorSpec, bool, int, str, complex, type(None), type, torch.dtype, torch.device)):
            self._key = type(value), value
        else:
            self._key = type(value), id(value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Leaf) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)
