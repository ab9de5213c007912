"""Emission: an fx graph becomes Python source. What `plan.code` prints is what runs.

One line per operator, with the type of its result and the bytes live while it runs; frees are `del`. Streamed weights come
from `rt.onload`, resident ones are attributes of `w`, device constants are the argument `device`.
"""

from __future__ import annotations

import builtins
import functools
import keyword
import linecache
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from runtime import ops

_RESERVED = {"rt", "w", "device", "torch", "math", "aten", "program", "inf", "nan"} | set(keyword.kwlist) | set(dir(builtins))

# Formulas of at most so many characters are printed inside the calls that use them.
_INLINE = 32
# So many characters of a table, and of a line, are printed; of a longer table progressions of at least so many rows as such.
_TABLE, _LINE, _ROWS = 80, 110, 4


def emit_source(graph: fx.Graph, weights: Mapping[str, str], header: Sequence[str], comment: Callable[[fx.Node], str]) -> str:
    """Python source of a function `program(rt, w, device, *inputs)` that returns the flat list of output leaves.

    Args:
        graph: emitted: placeholders, operators, streaming operators, one output.
        weights: for resident weights, placeholder name to attribute of `w`.
        header: comment lines for the top.
        comment: text behind an operator's line; empty for none.
    """
    names = _Names(weights)
    inputs = [n for n in graph.nodes if n.op == "placeholder" and n.name not in weights]
    lines = [f"# {line}".rstrip() for line in header]
    lines.append(f"def program({', '.join(['rt', 'w', 'device', *map(names, inputs)])}):")
    lines += _block(graph, names, comment, "    ")
    return "\n".join(lines) + "\n"


def _block(graph: fx.Graph, names: _Names, comment: Callable[[fx.Node], str], indent: str) -> Iterator[str]:
    """The lines of a graph's operators."""
    for node in graph.nodes:
        if node.op == "placeholder" or _is_inline(node):
            continue
        if node.target is ops.loop:
            yield from _loop(node, names, comment, indent)
            continue
        for text in _statement(node, names):
            note = comment(node)
            text = indent + text
            yield f"{text:<94}  # {note}".rstrip() if note else text


def _loop(node: fx.Node, names: _Names, comment: Callable[[fx.Node], str], indent: str) -> Iterator[str]:
    """A Python loop for each run of a loop."""
    loop, operands = node.meta["loop"], [names(operand) for operand in node.args[0]]  # type: ignore[union-attr,arg-type]
    yield "  ".join(filter(None, (f"{indent}# {node.name}: {loop.label}", comment(node))))
    if loop.banded:
        yield f"{indent}rt.begin_bands()"
    for run in loop.runs:
        placeholders = run.placeholders
        bound = dict(zip(placeholders, operands, strict=False))
        head = ", ".join(p.name for p in placeholders[len(operands) :])
        yield from _head(f"{indent}for {head} in ", _rows(run.table), indent)
        yield from _block(run.body, names.within(bound), comment, indent + "    ")
    if loop.banded:
        yield f"{indent}rt.end_bands()"


def _head(start: str, rows: list[str], indent: str) -> Iterator[str]:
    """The first lines of a Python loop over rows, which are alone where they are no list: `for lo, hi in zip(...):`."""
    if len(rows) == 1 and rows[0].startswith("*"):
        yield f"{start}{rows[0][1:]}:"
        return
    text = ", ".join(rows)
    if len(start) + len(text) <= _LINE:
        yield f"{start}[{text}]:"
        return
    yield f"{start}["
    line = indent + "   "
    for row in rows:
        if line.strip() and len(line) + len(row) > _LINE:
            yield line
            line = indent + "   "
        line += f" {row},"
    yield line
    yield f"{indent}]:"


def _rows(table: Sequence[tuple[int, ...]]) -> list[str]:
    """The rows of a table as the elements of a Python list; of a long one what rises evenly as `*zip(range(...), ...)`."""
    texts = [str(row[0] if len(row) == 1 else row) for row in table]
    if len(", ".join(texts)) <= _TABLE:
        return texts
    found, first = [], 0
    while first < len(table):
        last = _even(table, first)
        if last - first < _ROWS:
            found.append(texts[first])
            first += 1
        else:
            found.append("*" + _progression(table[first:last]))
            first = last
    return found


def _even(table: Sequence[tuple[int, ...]], first: int) -> int:
    """Where the rows end that rise evenly from `first` on."""
    steps = [[b - a for a, b in zip(*rows, strict=True)] for rows in pairwise(table[first:])]
    return first + 1 + next((i for i, step in enumerate(steps) if step != steps[0]), len(steps))


def _progression(table: Sequence[tuple[int, ...]]) -> str:
    """Rows that rise evenly."""
    columns = []
    for begin, following, *rest in zip(*table, strict=True):
        step = following - begin
        end = (rest or [following])[-1] + step
        columns.append(str(range(begin, end, step)) if step else f"[{begin}] * {len(table)}")
    return columns[0] if len(columns) == 1 else f"zip({', '.join(columns)})"


def attribute_names(weights: Sequence[str]) -> dict[str, str]:
    """Attributes of `w` for placeholder names: without the `w_` prefix where that leaves an identifier."""
    short = {name: name.removeprefix("w_") for name in weights}
    return {name: s if s.isidentifier() and not keyword.iskeyword(s) else name for name, s in short.items()}


@functools.lru_cache(maxsize=512)
def compile_source(source: str, name: str) -> Callable[..., list[Any]]:
    """The function that the source defines; tracebacks show its lines."""
    filename = f"<vramplan {name}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    scope: dict[str, Any] = {"torch": torch, "math": math, "aten": torch.ops.aten, "inf": float("inf"), "nan": float("nan")}
    exec(compile(source, filename, "exec"), scope)
    return scope["program"]


class _Names:
    """Node to Python expression."""

    def __init__(self, weights: Mapping[str, str], bound: Mapping[fx.Node, str] | None = None) -> None:
        self._weights, self._bound = weights, bound or {}

    def within(self, bound: Mapping[fx.Node, str]) -> _Names:
        """Names in the body of a loop, whose operands have names outside."""
        return _Names({}, bound)

    def __call__(self, node: fx.Node) -> str:
        if node in self._bound:
            return self._bound[node]
        if node.name in self._weights:
            return f"w.{self._weights[node.name]}"
        if _is_inline(node):
            return f"({_formula(node, self)})"
        return node.name + "_" if node.name in _RESERVED else node.name


def _statement(node: fx.Node, names: _Names) -> Iterator[str]:
    if node.op == "output" and not node.args[0]:
        return  # of a body
    if node.op == "output":
        yield f"return {_value(list(node.args[0]), names)}"  # type: ignore[arg-type]
    elif node.target is ops.free:
        yield f"del {', '.join(names(n) for n in node.args)}"  # type: ignore[arg-type]
    elif node.target is ops.prefetch:
        yield f"rt.prefetch({node.args[0]})"
    elif node.target is ops.onload:
        yield f"{names(node)} = rt.onload({node.args[0]})"
    elif node.target is ops.evict:
        yield f"rt.evict({node.args[0]})"
    elif node.target is ops.lookup:
        yield f"{names(node)} = rt.lookup({node.args[0]!r}, {_value(node.args[1], names)})"
    elif node.target is ops.size:
        yield f"{names(node)} = {_value(node.args[0], names)}.size({node.args[1]})"
    elif node.target is ops.integer:
        yield f"{names(node)} = {_formula(node, names)}"
    elif node.target is ops.host:
        yield f"{names(node)} = rt.host({', '.join(_value(a, names) for a in node.args)})"
    elif node.target in ops.BANDS:
        call = f"rt.{node.target.__name__}({', '.join(_value(a, names) for a in node.args)})"
        yield f"{names(node)} = {call}" if node.users else call
    elif node.target is operator.getitem:
        yield f"{names(node)} = {_value(node.args[0], names)}[{node.args[1]}]"
    else:
        arguments = [_value(a, names) for a in node.args]
        arguments += [f"{key}={_value(value, names)}" for key, value in node.kwargs.items()]
        call = f"{_callee(node.target)}({', '.join(arguments)})"
        yield f"{names(node)} = {call}" if node.users else call


def _is_inline(node: fx.Node) -> bool:
    """Whether a number is short enough to be written where it is used."""
    return node.target is ops.integer and len(str(node.args[0])) <= _INLINE


def _formula(node: fx.Node, names: _Names) -> str:
    return str(node.args[0]).format(*(names(n) for n in node.args[1:]))  # type: ignore[arg-type]


def _callee(target: Any) -> str:
    text = str(target)
    return text if text.startswith("aten.") else f"torch.ops.{text}"


def _value(value: Any, names: _Names) -> str:
    if isinstance(value, fx.Node):
        return _formula(value, names) if _is_inline(value) else names(value)
    if isinstance(value, (list, tuple)):
        inner = ", ".join(_value(v, names) for v in value)
        if isinstance(value, list):
            return f"[{inner}]"
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, torch.device):
        return "device"
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format, bool, int, float, complex, str, type(None))):
        return repr(value)
    raise AssertionError(f"no source form for an argument of type {type(value).__name__}")
