"""`Program`: the unit that passes take and return, and the `Layout` that an emitted one carries.

A program is an fx graph whose placeholders are first the weights, then the leaves of the call's inputs, and whose output is
a flat list of leaves. Every tensor-valued node has `meta["val"]`, a fake tensor on the CPU whose storage identity is the
aliasing that the capture saw. Passes copy the graph: a program is never changed once it is made.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import fx
from torch.utils._pytree import TreeSpec

from passes.dims import Dims
from passes.spec import TensorSpec
from runtime.executable import Rows
from runtime.layout import Layout
from runtime.leftovers import Leftovers
from runtime.stored import Stored

WeightKind = Literal["parameter", "buffer", "constant"]


@dataclass(frozen=True)
class Weight:
    """A tensor that belongs to the module: parameter, buffer or constant.

    `name` is the module's own dotted name, `aliases` the other names of the same tensor (tied weights), `node` the name of
    its placeholder. `state` says that the program writes it (I6); `made` that the runtime makes it on the device, such as a
    cache, and the host has none. With `rows` it is that part of the module's weight: `spec` is the part's, and the parts of one
    weight share its name; so do the two tensors as which a weight is `stored` in another type.
    """

    name: str
    node: str
    kind: WeightKind
    spec: TensorSpec
    aliases: tuple[str, ...] = ()
    persistent: bool = True
    state: bool = False
    made: bool = False
    rows: Rows | None = None
    stored: Stored | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in an arena: its span, so that strides are kept as they are."""
        return self.spec.span_bytes

    @property
    def host_name(self) -> str:
        """The module's name, or that of what is stored of it."""
        return self.name if self.stored is None else self.stored.name

    @property
    def label(self) -> str:
        """As `host_name`, with the rows where it is a part."""
        return self.host_name if self.rows is None else f"{self.host_name}{self.rows}"


@dataclass(frozen=True)
class Program:
    """A captured computation. `weights` and `constants` are keyed by placeholder name.

    `tables` are weights whose rows the program looks up on the host (`ops.lookup`), keyed by the module's names.
    `dims` says what varies, where sizes are symbols. A program with concrete sizes that was made from such a one has it as
    `origin`. `leftovers` is what the call does to plain attributes of the module, where it does anything.
    """

    name: str
    graph: fx.Graph
    weights: Mapping[str, Weight]
    constants: Mapping[str, torch.Tensor]
    inputs: tuple[str, ...]
    in_spec: TreeSpec
    out_spec: TreeSpec
    layout: Layout | None = None
    header: tuple[str, ...] = field(default=(), compare=False)
    dims: Dims | None = field(default=None, compare=False)
    origin: Program | None = field(default=None, compare=False)
    leftovers: Leftovers | None = field(default=None, compare=False)
    tables: Mapping[str, Weight] = field(default_factory=dict)

    def with_graph(self, graph: fx.Graph, **changes: Any) -> Program:
        return replace(self, graph=graph, **changes)

    def copy_graph(self) -> fx.Graph:
        """A private copy for a pass to change; names and meta are kept."""
        return copy_graph(self.graph)

    def ops(self) -> Iterator[fx.Node]:
        """The nodes that run, in order."""
        return (n for n in self.graph.nodes if n.op == "call_function")

    def node(self, name: str) -> fx.Node:
        return next(n for n in self.graph.nodes if n.name == name)

    def bytes_by_name(self, nbytes: Mapping[str, int] | None = None) -> dict[str, int]:
        """Bytes of the module's weights by its own names, parts added up; `nbytes` by placeholder, else as they are."""
        found: dict[str, int] = {}
        for key, weight in self.weights.items():
            found[weight.name] = found.get(weight.name, 0) + (weight.nbytes if nbytes is None else nbytes[key])
        return found

    @property
    def output(self) -> fx.Node:
        return next(n for n in reversed(self.graph.nodes) if n.op == "output")


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """The same nodes, with their names and meta, in a graph of their own."""
    new = fx.Graph()
    memo: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        memo[node] = copied = new.node_copy(node, lambda n: memo[n])
        if copied.name != node.name:
            copied._rename(node.name)
    return new


def tensors_of(node: fx.Node) -> list[torch.Tensor]:
    """The fake tensors a node gives: none, one, or the members of a tuple or list."""
    val = node.meta.get("val")
    if isinstance(val, torch.Tensor):
        return [val]
    if isinstance(val, (tuple, list)):
        return [v for v in val if isinstance(v, torch.Tensor)]
    return []


# A number of bytes: an int, or a sympy expression where sizes are symbols.
Bytes = Any


def storage_bytes(tensor: torch.Tensor) -> Bytes:
    """Bytes of the storage behind a (fake) tensor; an expression in the program's symbols where it has any."""
    nbytes = tensor.untyped_storage().nbytes()
    return nbytes.node.expr if isinstance(nbytes, torch.SymInt) else int(nbytes)


def is_symbolic(node: fx.Node) -> bool:
    """Whether some size of the node's value is a symbol."""
    sizes = [size for t in tensors_of(node) for size in (*t.shape, *t.stride(), t.storage_offset())]
    return isinstance(node.meta.get("val"), torch.SymInt) or any(isinstance(size, torch.SymInt) for size in sizes)


def geometry(tensor: torch.Tensor) -> tuple[Bytes, ...]:
    """Sizes, strides and offset; expressions where they are symbols, so that comparing them never fixes a symbol."""
    numbers = (*tensor.shape, *tensor.stride(), tensor.storage_offset())
    return tuple(n.node.expr if isinstance(n, torch.SymInt) else int(n) for n in numbers)


def storage_id(tensor: torch.Tensor) -> int:
    """Identity of the untyped storage behind a (fake) tensor: the unit of aliasing."""
    return int(tensor.untyped_storage()._cdata)


def operator_name(target: Callable[..., Any] | str) -> str:
    """`aten.linear.default` for an operator overload, the function's own name otherwise."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    return getattr(target, "__name__", str(target))


def module_path(node: fx.Node) -> str:
    """The dotted name of the innermost module that a node came from; empty for the root."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    return re.sub(r"^.*?target\.?", "", path, count=1)


# Frames of a traceback that say nothing about the user's code.
NOT_THEIRS = ("/torch/", "/planner/capture.py", "/planner/watch.py")


def place_of(node: fx.Node) -> str:
    """Where in the user's code a node came from, as ` at file:line (`code`)`; empty where that is not known."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    places = [i for i, line in enumerate(lines) if line.startswith("File")]
    frames = [i for i in places if not any(part in lines[i] for part in NOT_THEIRS)]
    if not frames:
        return ""
    parts = lines[frames[-1]].split('"')
    return f" at {parts[1]}:{parts[2].split()[2].rstrip(',')} (`{' '.join(lines[frames[-1] + 1 : frames[-1] + 2])}`)"
