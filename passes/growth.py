"""How expressions in sizes grow: which of them is never the largest, and whether more size always means more bytes.

Everything here is a sufficient condition, decided by coefficients alone: over `size = least + t` with t >= 0, a polynomial with
no negative coefficient is never negative, and one with none but the constant grows in every size. A False means "not shown".
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

import sympy
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod

_ATOMS = (FloorDiv, Max, Min, sympy.Max, sympy.Min)


def alternatives(expr: sympy.Expr) -> set[sympy.Expr]:
    """Expressions without Max, of which the largest is `expr` wherever it is evaluated."""
    if isinstance(expr, (Max, sympy.Max)):
        return set().union(*(alternatives(arg) for arg in expr.args))
    if isinstance(expr, sympy.Add) and expr.has(Max, sympy.Max):
        choices = [alternatives(arg) for arg in expr.args]
        return {sympy.expand(sympy.Add(*chosen)) for chosen in itertools.product(*choices)}
    if isinstance(expr, sympy.Mul) and expr.has(Max, sympy.Max):
        factor, rest = expr.as_coeff_Mul()
        if factor.is_positive and isinstance(rest, (Max, sympy.Max)):
            return {sympy.expand(factor * choice) for choice in alternatives(rest)}
    return {sympy.expand(expr)}


class Growth:
    """Facts about expressions for dims that are at least `least` (a lower bound per symbol)."""

    def __init__(self, least: Mapping[sympy.Symbol, int]) -> None:
        self._least = dict(least)
        self._shift = {symbol: low + _offset(symbol.name) for symbol, low in self._least.items()}
        self._atoms: dict[sympy.Expr, sympy.Expr] = {}
        self._known: dict[sympy.Expr, dict[sympy.Expr, sympy.Expr] | None] = {}

    def grows(self, expr: sympy.Expr) -> bool:
        """Whether it is shown that no size can be made larger and the value smaller."""
        return all(self._grows(choice) for choice in alternatives(expr))

    def always(self, guard: sympy.Basic) -> bool:
        """Whether it is shown that a relation holds for all sizes."""
        if isinstance(guard, sympy.And):
            return all(map(self.always, guard.args))
        if not isinstance(guard, sympy.core.relational.Relational):
            return guard is sympy.true
        left, right = guard.lhs, guard.rhs
        if isinstance(guard, (sympy.Gt, sympy.Ge)):
            return self._at_least(left - right, int(isinstance(guard, sympy.Gt)))
        if isinstance(guard, (sympy.Lt, sympy.Le)):
            return self._at_least(right - left, int(isinstance(guard, sympy.Lt)))
        if isinstance(guard, sympy.Ne) and right == 0 and isinstance(left, Mod):  # what is less than the divisor is left over
            return self._at_least(left.args[0], 1) and self._at_least(left.args[1] - left.args[0], 1)
        return isinstance(guard, sympy.Ne) and (self._at_least(left - right, 1) or self._at_least(right - left, 1))

    def _at_least(self, expr: sympy.Expr, low: int) -> bool:
        terms = self._terms(sympy.expand(expr - low))
        return terms is not None and all(n >= 0 for n in terms.values())

    def largest(self, exprs: Iterable[sympy.Expr]) -> list[sympy.Expr]:
        """The alternatives of which one is the largest at any sizes; others are shown to be below one of these."""
        distinct = dict.fromkeys(choice for expr in exprs for choice in sorted(alternatives(expr), key=sympy.default_sort_key))
        probe = {symbol: sympy.Integer(8 * low + 64) for symbol, low in self._least.items()}
        ordered = sorted(distinct, key=lambda e: (-_number(e.xreplace(probe)), sympy.default_sort_key(e)))
        kept: list[tuple[sympy.Expr, dict[sympy.Expr, sympy.Expr] | None]] = []
        for expr in ordered:
            terms = self._terms(expr)
            if not any(_covers(other, terms) for _, other in kept):
                kept.append((expr, terms))
        return [expr for expr, _ in kept]

    def _grows(self, expr: sympy.Expr) -> bool:
        terms = self._terms(expr)
        return terms is not None and all(n >= 0 for monomial, n in terms.items() if monomial != 1)

    def _terms(self, expr: sympy.Expr) -> dict[sympy.Expr, sympy.Expr] | None:
        """Monomials over `least + t` with their coefficients; None where it is no polynomial."""
        if expr not in self._known:
            self._known[expr] = self._shifted(expr)
        return self._known[expr]

    def _shifted(self, expr: sympy.Expr) -> dict[sympy.Expr, sympy.Expr] | None:
        replaced = expr
        for atom in sorted(_outermost(expr), key=sympy.default_sort_key):
            if not self._atom_grows(atom):
                return None
            replaced = replaced.xreplace({atom: self._atom(atom)})
        poly = sympy.expand(replaced.xreplace(self._shift))
        if not poly.is_polynomial(*poly.free_symbols):
            return None
        return dict(poly.as_coefficients_dict())

    def _atom_grows(self, atom: sympy.Expr) -> bool:
        if isinstance(atom, FloorDiv):
            return bool(atom.args[1].is_Integer and atom.args[1] > 0 and self.grows(atom.args[0]))
        return all(self.grows(arg) for arg in atom.args)

    def _atom(self, atom: sympy.Expr) -> sympy.Expr:
        """The atom as its least value and what it is above that: a size like any other."""
        if atom not in self._atoms:
            low = atom.xreplace({symbol: sympy.Integer(n) for symbol, n in self._least.items()})
            self._atoms[atom] = low + _offset(f"atom{len(self._atoms)}")
        return self._atoms[atom]


def _offset(name: str) -> sympy.Symbol:
    return sympy.Symbol(f"t_{name}", integer=True, nonnegative=True)


def _number(value: sympy.Expr) -> float:
    return float(value) if value.is_number else 0.0


def _covers(above: dict[sympy.Expr, sympy.Expr] | None, below: dict[sympy.Expr, sympy.Expr] | None) -> bool:
    """Whether `above - below` has no negative coefficient."""
    if above is None or below is None:
        return False
    return all(above.get(monomial, 0) >= n for monomial, n in below.items()) and all(
        n >= 0 for monomial, n in above.items() if monomial not in below
    )


def _outermost(expr: sympy.Expr) -> set[sympy.Expr]:
    """Functions in it that are no polynomials, and not inside of one another."""
    if isinstance(expr, _ATOMS):
        return {expr}
    return set().union(*(_outermost(arg) for arg in expr.args))
