"""`plan(..., dynamic=...)`: which dimensions vary, in `torch.export`'s vocabulary, and the capture that keeps them symbols.

`{"x": {0: "batch", 2: Dim("height", min=16, max=128)}}` names axes of the argument `x`. A string names a dim whose largest size
is the one in the example; a `torch.export.Dim` with a maximum says it itself. Equal names are equal sizes. One program then
serves all sizes from the least (at least 2: `torch.export` takes 0 and 1 for constants) to the largest.
"""

from __future__ import annotations

import inspect
import keyword
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils._sympy.functions import FloorDiv, Mod

from passes.base import run_passes
from passes.canonicalise import CANONICALISE
from passes.dims import LEAST_SIZE, Axis, Dims, Evaluator
from passes.program import Program, storage_bytes, storage_id
from passes.sizes_first import SizesFirst
from passes.spec import TensorSpec
from planner.capture import capture
from runtime.errors import CaptureError, PlannerError
from runtime.signature import bind_call

_EXAMPLE = 'dynamic={"x": {0: "batch", 2: torch.export.Dim("height", min=16, max=128)}}'
# Models take multiples of 8, 16 or 64; beyond this nothing is looked for.
_LARGEST_UNIT = 1024


@dataclass(frozen=True)
class DynamicShapes:
    """What `dynamic=` said, resolved: per dim its least and largest size, per input leaf its dynamic axes and its name."""

    ranges: Mapping[str, tuple[int, int]]
    leaves: tuple[Mapping[int, Axis], ...]
    names: tuple[str, ...]

    @property
    def largest(self) -> dict[str, int]:
        return {name: high for name, (_, high) in self.ranges.items()}

    @staticmethod
    def bound(module: nn.Module, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        """The call with one spelling, as the leaves are ordered."""
        return bind_call(getattr(module, method), args, kwargs)

    def at(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], sizes: Mapping[str, int]) -> tuple[Any, Any]:
        """The example call, bound, with its dynamic axes at `sizes`: meta tensors where a size differs."""
        flat, spec = tree_flatten((args, dict(kwargs)))
        resized = [_resized(leaf, axes, sizes) if axes else leaf for leaf, axes in zip(flat, self.leaves, strict=True)]
        call: tuple[Any, Any] = tree_unflatten(resized, spec)
        return call

    def to_json(self) -> dict[str, Any]:
        leaves = [{str(axis): [a.dim, a.scale, a.shift] for axis, a in axes.items()} for axes in self.leaves]
        return {"ranges": {name: list(ends) for name, ends in self.ranges.items()}, "leaves": leaves, "names": list(self.names)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DynamicShapes:
        leaves = tuple({int(axis): Axis(*how) for axis, how in axes.items()} for axes in data["leaves"])
        return cls(
            {str(name): (int(low), int(high)) for name, (low, high) in data["ranges"].items()}, leaves, tuple(data["names"])
        )


def read_dynamic(
    module: nn.Module, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic: Any
) -> DynamicShapes:
    """Resolves `dynamic=` against an example call.

    Raises:
        PlannerError: an argument, axis or dim that does not exist; ranges that contradict each other or the example.
    """
    function = getattr(module, method)
    args, kwargs = bind_call(function, args, kwargs)
    reader = _Reader()
    leaves: list[dict[int, Axis]] = []
    for name, value, how in _arguments(function, args, kwargs, dynamic):
        leaves += reader.read(name, value, how)
    if not reader.ranges:
        raise PlannerError(f"dynamic={dynamic!r} names no dimension; write {_EXAMPLE}")
    shapes = DynamicShapes(reader.finished(leaves), tuple(leaves), tuple(reader.names))
    _refuse_shared(args, kwargs)
    return shapes


def _arguments(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic: Any) -> Iterator[tuple[str, Any, Any]]:
    """(name, value, what `dynamic` says of it) for every argument of the bound call, in the order of its leaves."""
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][: len(args)]
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "args")
    names += [f"{rest}[{i}]" for i in range(len(args) - len(names))]
    if isinstance(dynamic, (tuple, list)):
        if len(dynamic) > len(args):
            raise PlannerError(f"dynamic= has {len(dynamic)} entries for {len(args)} positional arguments; write {_EXAMPLE}")
        dynamic = dict(enumerate(dynamic))
    if not isinstance(dynamic, Mapping):
        raise PlannerError(f"dynamic={dynamic!r} is no mapping of arguments to named dimensions; write {_EXAMPLE}")
    wanted = dict(dynamic)
    for key in [k for k in wanted if k in (rest, "kwargs") and k not in names and k not in kwargs]:  # torch.export's nesting
        inner = wanted.pop(key)
        wanted |= inner if isinstance(inner, Mapping) else {f"{rest}[{i}]": how for i, how in enumerate(inner or ())}
    for index, (name, value) in enumerate([*zip(names, args, strict=True), *kwargs.items()]):
        by_position = wanted.pop(index, None) if index < len(args) else None
        yield name, value, wanted.pop(name, None) or by_position
    if wanted:
        have = ", ".join(repr(name) for name in (*names, *kwargs))
        raise PlannerError(f"dynamic= names the argument {next(iter(wanted))!r}; the call has {have}: write {_EXAMPLE}")


class _Reader:
    """Collects dims over all arguments: equal names must be equal sizes in the example, and have one range."""

    def __init__(self) -> None:
        self.ranges: dict[str, list[int | None]] = {}  # least, largest as declared
        self._seen: dict[str, tuple[int, str]] = {}  # size in the example, and where
        self.names: list[str] = []  # of leaves, in their order

    def read(self, name: str, value: Any, how: Any) -> list[dict[int, Axis]]:
        if how is None:
            static: list[dict[int, Axis]] = [{} for _ in tree_leaves(value)]
            self.names += [name] * len(static)
            return static
        if isinstance(value, torch.Tensor):
            self.names.append(name)
            return [self._tensor(name, value, how)]
        children = tree_flatten(value, is_leaf=lambda v: v is not value)[0]
        if not children or (len(children) == 1 and children[0] is value):
            raise PlannerError(f"dynamic= gives dimensions for {name}, which is a {type(value).__name__} and has none")
        keys = list(value) if isinstance(value, Mapping) else list(range(len(children)))
        if isinstance(how, (tuple, list)):
            how = dict(zip(keys, how, strict=False))
        if not isinstance(how, Mapping) or set(how) - set(keys):
            raise PlannerError(f"dynamic= gives {how!r} for {name}, whose members are {keys}; nest it in the same way")
        leaves = []
        for key, child in zip(keys, children, strict=True):
            leaves += self.read(f"{name}[{key!r}]", child, how.get(key))
        return leaves

    def _tensor(self, name: str, tensor: torch.Tensor, how: Any) -> dict[int, Axis]:
        if isinstance(how, (tuple, list)):
            how = dict(enumerate(how))
        if not isinstance(how, Mapping):
            raise PlannerError(f'dynamic= gives {how!r} for {name}; name its axes: dynamic={{"{name}": {{0: "batch"}}}}')
        axes: dict[int, Axis] = {}
        for index, dim in how.items():
            if dim is None or isinstance(dim, int):
                continue  # static, as in torch.export
            if not isinstance(index, int) or not -tensor.dim() <= index < tensor.dim():
                raise PlannerError(
                    f"dynamic= names axis {index!r} of {name}, which has {tensor.dim()} axes (shape {tuple(tensor.shape)}); "
                    f"axes count from 0 to {tensor.dim() - 1}"
                )
            axes[index % tensor.dim()] = self._axis(f"{name}.shape[{index}]", int(tensor.shape[index]), dim)
        return axes

    def _axis(self, where: str, size: int, dim: Any) -> Axis:
        if isinstance(dim, str):
            axis, least, largest = Axis(dim), None, None
        elif isinstance(dim, torch.export.Dim) and hasattr(dim, "__name__"):
            root = getattr(dim, "root", dim)
            fn = getattr(dim, "fn", lambda n: n)
            axis = Axis(root.__name__, int(fn(1)) - int(fn(0)), int(fn(0)))
            least, largest = _bound(root.min), _bound(root.max)
        else:
            raise PlannerError(
                f"dynamic= gives {dim!r} for {where}; name the dimension, for its sizes have to be said: "
                '"batch", or torch.export.Dim("batch", min=2, max=8)'
            )
        if not axis.dim.isidentifier() or keyword.iskeyword(axis.dim):
            raise PlannerError(f'dynamic= calls {where} {axis.dim!r}; a dim is called like a variable, as in "batch"')
        example = axis.dim_of(size)
        if example is None:
            raise PlannerError(f"{where} is {size} in the example, which is not {axis} for any integer {axis.dim}")
        self._agree(axis.dim, example, where)
        self._range(axis.dim, least, largest)
        return axis

    def _agree(self, dim: str, example: int, where: str) -> None:
        size, first = self._seen.setdefault(dim, (example, where))
        if size != example:
            raise PlannerError(
                f"the dim {dim!r} is {size} in {first} and {example} in {where}, and equal names are equal sizes; "
                f'give them two names, or an example in which they agree: dynamic={{..., "{dim}_2"}}'
            )

    def _range(self, dim: str, least: int | None, largest: int | None) -> None:
        known = self.ranges.setdefault(dim, [None, None])
        for end, value in enumerate((least, largest)):
            if value is not None and known[end] not in (None, value):
                raise PlannerError(f"the dim {dim!r} is given two ranges; use one torch.export.Dim({dim!r}, ...) throughout")
            known[end] = known[end] if value is None else value

    def finished(self, leaves: list[dict[int, Axis]]) -> dict[str, tuple[int, int]]:
        """The ranges, with what the example and `torch.export` say where the user did not."""
        result = {}
        for dim, (least, largest) in self.ranges.items():
            example, where = self._seen[dim]
            high = example if largest is None else largest
            axes = [axis for leaf in leaves for axis in leaf.values() if axis.dim == dim]
            low = max(least or 1, *(-((axis.shift - LEAST_SIZE) // axis.scale) for axis in axes))
            if example > high or (least is not None and example < least):
                raise PlannerError(
                    f"the dim {dim!r} is {example} in the example ({where}), outside of its range {least or low} to {high}; "
                    f"write torch.export.Dim({dim!r}, min={min(example, least or low)}, max={max(example, high)})"
                )
            if low > high:
                raise PlannerError(
                    f"the dim {dim!r} has the largest size {high} and the least {low}, so nothing varies (0 and 1 are "
                    "constants to torch.export); give an example of the largest size, or say it: "
                    f"torch.export.Dim({dim!r}, max={4 * low})"
                )
            result[dim] = (low, high)
        return result


def _bound(value: Any) -> int | None:
    """A declared bound; None for torch.export's infinity, and for 0, which says nothing."""
    return int(value) if isinstance(value, int) and value > 0 else None


def _refuse_shared(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raises PlannerError for inputs that are views of more memory than they show, or of each other's."""
    seen: set[int] = set()
    for leaf in tree_leaves((args, dict(kwargs))):
        if isinstance(leaf, torch.Tensor):
            if storage_id(leaf) in seen or storage_bytes(leaf) != TensorSpec.of(leaf).span_bytes:
                raise PlannerError("dynamic= needs inputs with memory of their own, all of it; pass copies (x.clone())")
            seen.add(storage_id(leaf))


def _resized(leaf: torch.Tensor, axes: Mapping[int, Axis], sizes: Mapping[str, int]) -> torch.Tensor:
    """The leaf with its dynamic axes resized: dense, its axes in memory in the order of before."""
    shape = [axes[i].size(sizes[axes[i].dim]) if i in axes else int(n) for i, n in enumerate(leaf.shape)]
    stride, step = [0] * leaf.dim(), 1
    dense = list(stride)
    for at, target in ((leaf.shape, dense), (shape, stride)):
        step = 1
        for axis in sorted(range(leaf.dim()), key=lambda i: (leaf.stride(i), -i)):
            target[axis] = step
            step *= int(at[axis])
    if any(n > 1 and have != want for n, have, want in zip(leaf.shape, leaf.stride(), dense, strict=True)):
        raise PlannerError(
            f"dynamic= needs dense inputs; one of shape {tuple(leaf.shape)} has strides {leaf.stride()}: pass x.contiguous()"
        )
    return torch.empty_strided(shape, stride, dtype=leaf.dtype, device="meta")


# Capture.


def capture_dynamic(
    module: nn.Module, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], shapes: DynamicShapes
) -> Program:
    """The canonical program in symbols; `Program.dims` says under which names, in which range, with which guards.

    Captured at the largest sizes. The model may restrict them (`height % 8 == 0`): what it took for granted becomes guards,
    and a call that breaks one is another program.

    Raises:
        CaptureError: the model makes a dim a constant, or ties two of different names to each other.
    """
    args, kwargs = bind_call(getattr(module, method), args, kwargs)
    call = shapes.at(args, kwargs, shapes.largest)
    flat, spec = tree_flatten(call)
    auto = torch.export.Dim.AUTO
    wanted = [dict.fromkeys(axes, auto) if isinstance(leaf, torch.Tensor) else None
              for leaf, axes in zip(flat, shapes.leaves, strict=True)]  # fmt: skip
    program = capture(module, *call, method, dynamic_shapes=tree_unflatten(wanted, spec))
    program = replace(program, dims=_dims(program, shapes))
    return run_passes(SizesFirst().apply(program), CANONICALISE)


def _dims(program: Program, shapes: DynamicShapes) -> Dims:
    """The capture's symbols in the user's, and its guards.

    Raises:
        CaptureError: as `capture_dynamic`.
    """
    nodes = {n.name: n for n in program.graph.nodes}
    symbols: dict[sympy.Symbol, sympy.Expr] = {}
    later: list[tuple[str, Axis, sympy.Expr]] = []
    env: Any = None
    for node, name, axes in zip(program.inputs, shapes.names, shapes.leaves, strict=True):
        for index, axis in axes.items():
            size = nodes[node].meta["val"].shape[index]
            if not isinstance(size, torch.SymInt) or size.node.expr.is_number:
                raise _constant(program, name, index, axis, int(size))
            env, expr = size.node.shape_env, size.node.expr
            if expr.is_Symbol and expr not in symbols:
                symbols[expr] = axis.expr
            else:
                later.append((f"{name}.shape[{index}]", axis, expr))
    for where, axis, expr in later:
        known = expr.xreplace(symbols)
        if sympy.expand(known - axis.expr) != 0:
            raise CaptureError(
                f"{program.name} ties two dims: {where}, named {axis}, is always {known}; "
                f"say so: dynamic={{...: {{...: {_as_dim(known)}}}}}, or pass an example in which they differ"
            )
    symbols = {**{s: sympy.sympify(e).xreplace(symbols) for s, e in _resolved(env).items()}, **symbols}
    return _guarded(Dims(dict(shapes.ranges), tuple(shapes.leaves), symbols), _guards(env, symbols))


def _resolved(env: Any) -> dict[sympy.Symbol, sympy.Expr]:
    """Symbols that the capture found to be others, in terms of those that are left."""
    found = dict(env.replacements)
    for _ in range(len(found)):
        found = {s: sympy.sympify(e).xreplace(found) for s, e in found.items()}
    return found


def _guards(env: Any, symbols: Mapping[sympy.Symbol, sympy.Expr]) -> tuple[sympy.Expr, ...]:
    """Everything that tracing assumed of sizes, in the user's symbols, without what always holds."""
    assumed = [guard.expr for guard in env.guards]
    assumed += [check.expr for checks in env.deferred_runtime_asserts.values() for check in checks]
    for symbol, interval in env.var_to_range.items():
        low, high = interval.lower, interval.upper
        if symbol in symbols and low.is_Integer and low > LEAST_SIZE:
            assumed.append(sympy.Ge(symbol, low))
        if symbol in symbols and high.is_Integer and high < 2**62:
            assumed.append(sympy.Le(symbol, high))
    guards = dict.fromkeys(sympy.sympify(expr).xreplace(dict(symbols)) for expr in assumed)
    known = {dim for expr in symbols.values() for dim in expr.free_symbols}
    for guard in guards:
        if not guard.free_symbols <= known:
            raise CaptureError(
                f"the program takes {guard} for granted, which depends on data and cannot be checked; plan without dynamic="
            )
    return tuple(guard for guard in guards if guard is not sympy.true)


def _guarded(dims: Dims, guards: tuple[sympy.Expr, ...]) -> Dims:
    """Dims with guards, those that say `dim % n == 0` apart: they make all other expressions simpler."""
    multiples: dict[str, int] = {}
    for guard in guards:
        if isinstance(guard, sympy.Eq) and len(guard.free_symbols) == 1:
            (dim,) = guard.free_symbols
            multiples[dim.name] = math.lcm(multiples.get(dim.name, 1), _multiple(guard, dim.name))
    multiples = {name: n for name, n in multiples.items() if n > 1}
    dims = replace(dims, multiples=multiples)
    left = dict.fromkeys(dims.tidy(guard) for guard in guards)
    return replace(dims, guards=tuple(guard for guard in left if guard is not sympy.true))


def _multiple(guard: sympy.Eq, dim: str) -> int:
    """The number of which an equality lets only multiples in; 1 where there is none. Too large a one would only serve less."""
    holds = Evaluator(guard)
    for n in sorted({int(part.args[1]) for part in guard.atoms(FloorDiv, Mod) if part.args[1].is_Integer}, reverse=True):
        if 1 < n <= _LARGEST_UNIT and [holds({dim: 8 * n + rest}) for rest in range(n)] == [True] + [False] * (n - 1):
            return n
    return 1


def _as_dim(expr: sympy.Expr) -> str:
    return repr(str(expr)) if expr.is_Symbol else f"{expr}"


def _constant(program: Program, name: str, index: int, axis: Axis, size: int) -> CaptureError:
    return CaptureError(
        f"{program.name} makes the dim {axis.dim!r} ({name}.shape[{index}]) a constant: it works only for the size {size} "
        f"(a table of that length, or an axis that has to equal it and is not named). Leave axis {index} of {name!r} out, or "
        f"give the other axis the same name: dynamic={{{name!r}: {{{index}: {axis.dim!r}}}, 'other': {{...: {axis.dim!r}}}}}"
    )
