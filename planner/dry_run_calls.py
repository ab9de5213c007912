"""What a dry run has recorded: distinct calls of components, the order they come in, bytes held besides, and a table of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from passes.spec import TensorSpec
from planner.call_key import CallKey, call_specs, frozen
from planner.pretend_device import Held
from planner.show_dry_run import brief, describe
from runtime.layout import align
from runtime.leftovers import Key


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
        settings: plain attributes of the component that the pipeline has set for it, by path within it and name.
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
    settings: Mapping[Key, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        key: CallKey,
        given: Any,
        result: Any,
        *,
        by_values: bool,
        most_steps: int | None,
        settings: Mapping[Key, Any],
    ) -> ComponentCall:
        (leaves, spec), (outputs, result_spec) = tree_flatten(given), tree_flatten(result)
        both = call_specs([*leaves, *outputs])
        own, others = tuple(both[: len(leaves)]), tuple(both[len(leaves) :])
        results = others, result_spec
        return cls(
            key.component, key.method, own, spec, *results, key.dtypes, key.autocast, by_values, most_steps, settings
        )  # fmt: skip

    @staticmethod
    def outline(result: Any) -> tuple[Any, ...]:
        """Equal for results of the same structure, shapes and strides."""
        leaves, spec = tree_flatten(result)
        return spec, frozen(leaf if isinstance(leaf, torch.Tensor) else type(leaf) for leaf in leaves)

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
        widest = {storage: max(s.dtype.itemsize for s in specs if s.storage == storage) for storage in ends}
        homes = {
            storage: torch.empty(align(nbytes, widest[storage]), dtype=torch.uint8, device="meta")
            for storage, nbytes in ends.items()
        }

        def meta(spec: TensorSpec) -> torch.Tensor:
            return homes[spec.storage].view(spec.dtype).as_strided(spec.shape, spec.stride, spec.offset)

        args, kwargs = tree_unflatten([meta(x) if isinstance(x, TensorSpec) else x for x in self.leaves], self.spec)
        return args, kwargs

    @property
    def signature(self) -> str:
        """Shapes and plain values of arguments and results, as `(i64[1, 77]) -> f32[1, 77, 768]`."""
        arguments = [
            *map(brief, self.args),
            *(f"{key}={brief(value)}" for key, value in self.kwargs.items() if value is not None),
        ]
        return f"({', '.join(arguments)}) -> {brief(self.result_leaves)}"

    def __str__(self) -> str:
        return self.name + self.signature


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
        read_bytes: of the weights that the pipeline's own Python computes with (buffers with means and deviations, say).
    """

    name: str
    calls: tuple[ComponentCall, ...]
    steps: tuple[Step, ...]
    last: Held = field(default_factory=Held)
    asked: tuple[str, ...] = ()
    read_bytes: int = 0

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

    def held_beside(self, call: int) -> Held:
        """The most that the pipeline holds while that call runs, its arguments apart."""
        return _most(step.held for step in self.steps_of(call))

    def held_before(self, call: int) -> Held:
        """The most that the pipeline holds between that call and the one before it."""
        return _most(step.between for step in self.steps_of(call))

    def varying_floats(self, call: int) -> tuple[str, ...]:
        """Where in the arguments of a call there are Python floats that differ from step to step: `scale`, `args[2]`."""
        seen = [step.floats for step in self.steps_of(call)]
        given = self.calls[call]
        leaves = tree_flatten_with_path((given.args, given.kwargs))[0]
        paths = [_spelled(path) for path, leaf in leaves if isinstance(leaf, float)]
        return tuple(path for path, values in zip(paths, zip(*seen, strict=True), strict=True) if len(set(values)) > 1)

    def __str__(self) -> str:
        return "\n".join(describe(self))


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


def _most(held: Iterable[Held]) -> Held:
    return reduce(Held.most, held, Held())


def _spelled(path: Any) -> str:
    """A key path into (args, kwargs) as a name: `args[0]`, `scales[2]`."""
    if path[0].idx == 0:
        return "args" + keystr(path[1:])
    return f"{path[1].key}{keystr(path[2:])}"
