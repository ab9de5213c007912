"""`Dims`: what varies in a program with symbolic sizes, under the names that the user gave.

`torch.export` calls symbols `s33`; a plan calls them `batch`. Everything that leaves this library (expressions, printed
programs, guards) is in the user's symbols, which are positive integers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import sympy
import torch
from torch.utils._sympy.printers import PythonPrinter

# Sizes of 0 and 1 are constants to torch.export: it reasons as if a symbol were at least this.
LEAST_SIZE = 2


def corners(ranges: Mapping[str, tuple[int, int]]) -> list[dict[str, int]]:
    """Every combination of least and largest sizes."""
    return [
        dict(zip(ranges, sizes, strict=True)) for sizes in itertools.product(*(dict.fromkeys(ends) for ends in ranges.values()))
    ]


def dim_symbol(name: str) -> sympy.Symbol:
    """The symbol of a dim: equal names are equal symbols."""
    return sympy.Symbol(name, integer=True, positive=True)


@dataclass(frozen=True)
class Axis:
    """One axis of an input whose size is `scale * dim + shift`."""

    dim: str
    scale: int = 1
    shift: int = 0

    def size(self, dim: int) -> int:
        return self.scale * dim + self.shift

    def dim_of(self, size: int) -> int | None:
        """The dim's size for which the axis has this one, if there is one."""
        quotient, rest = divmod(size - self.shift, self.scale)
        return quotient if rest == 0 else None

    @property
    def expr(self) -> sympy.Expr:
        return self.scale * dim_symbol(self.dim) + self.shift

    def __str__(self) -> str:
        return str(self.expr)


@dataclass(frozen=True, eq=False)
class Dims:
    """Names, ranges and guards of a program's dynamic dimensions.

    Attributes:
        ranges: per dim the least and the largest size that one program serves, both inclusive.
        axes: per input leaf (in the order of `Program.inputs`) its dynamic axes.
        symbols: the capture's symbols as expressions in the user's.
        multiples: dims of which only multiples of a number are served, with the number.
        guards: what else the capture took for granted of the sizes: all true, or the program is not the model's.
    """

    ranges: Mapping[str, tuple[int, int]]
    axes: tuple[Mapping[int, Axis], ...]
    symbols: Mapping[sympy.Symbol, sympy.Expr]
    multiples: Mapping[str, int] = field(default_factory=dict)
    guards: tuple[sympy.Expr, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.ranges)

    @property
    def largest(self) -> dict[str, int]:
        return {name: high for name, (_, high) in self.ranges.items()}

    @property
    def smallest(self) -> dict[str, int]:
        return {name: low for name, (low, _) in self.ranges.items()}

    def expr(self, value: Any) -> sympy.Expr:
        """A size of the program (int, SymInt, SymFloat or the capture's expression) in the user's symbols."""
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            value = value.node.expr
        return self.tidy(sympy.sympify(value).xreplace(self._symbols))

    def tidy(self, expr: sympy.Expr) -> sympy.Expr:
        """The same for all sizes that the guards let in: `(height - 1) // 2 + 1` is `height / 2` where height is even."""
        if not self.multiples or expr.is_Integer or expr.is_Symbol:
            return expr
        units, back = self._units
        return sympy.expand(expr.xreplace(units)).xreplace(back)

    @cached_property
    def _symbols(self) -> dict[sympy.Symbol, sympy.Expr]:
        return dict(self.symbols)

    @cached_property
    def _units(self) -> tuple[dict[sympy.Symbol, sympy.Expr], dict[sympy.Symbol, sympy.Expr]]:
        """Dims as multiples of dims, and back."""
        pairs = [(dim_symbol(name), dim_symbol(f"{name}_unit"), n) for name, n in self.multiples.items()]
        return {dim: n * unit for dim, unit, n in pairs}, {unit: dim / n for dim, unit, n in pairs}

    def holds(self, sizes: Mapping[str, int]) -> bool:
        """Whether the program is the model's at these sizes, whatever range was declared."""
        axes = (axis for leaf in self.axes for axis in leaf.values())
        return all(axis.size(sizes[axis.dim]) >= LEAST_SIZE for axis in axes) and bool(eval(self._guard, SCOPE, dict(sizes)))

    @cached_property
    def _guard(self) -> Any:
        return compile(self.guard_text, "<guards>", "eval")

    @cached_property
    def guard_text(self) -> str:
        """The guards, multiples first, as one Python expression in the dims' names."""
        texts = [f"{name} % {n} == 0" for name, n in self.multiples.items()] + [python_text(guard) for guard in self.guards]
        return " and ".join(f"({text})" for text in texts) or "True"


class Evaluator:
    """An expression in dims as a function of their sizes; exact for integers of any length."""

    def __init__(self, expr: sympy.Expr) -> None:
        self._code = compile(python_text(expr), "<sizes>", "eval")

    def __call__(self, sizes: Mapping[str, int]) -> Any:
        return eval(self._code, SCOPE, dict(sizes))


SCOPE = {"math": math, "torch": torch, "min": min, "max": max, "float": float, "int": int, "__builtins__": {}}


def python_text(expr: sympy.Expr) -> str:
    """The expression as Python over plain ints; the names in it are the dims'."""
    return str(_Printer().doprint(expr))


class _Printer(PythonPrinter):
    """As torch prints guards, with the simple form where there is one."""

    def _print_ToFloat(self, expr: sympy.Expr) -> str:
        return f"float({self._print(expr.args[0])})"

    def _print_Mul(self, expr: sympy.Expr) -> str:
        """A fraction of a size is a whole number (`Dims.tidy`): printed as a division that is exact for any length."""
        factor, rest = expr.as_coeff_Mul()
        if not factor.is_Rational or factor.is_Integer:
            return str(super()._print_Mul(expr))
        return f"({self._print(factor.p * rest)} // {factor.q})"

    def _print_BooleanTrue(self, expr: sympy.Expr) -> str:
        return "True"

    def _print_BooleanFalse(self, expr: sympy.Expr) -> str:
        return "False"
