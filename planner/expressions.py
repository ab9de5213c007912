"""Small integer arithmetic from data files: `"(frames - 1) / 4 + 1"`, over named sizes and config values, and nothing else.

Allowed are integers, names, `+ - * / //`, parentheses, `name[0]` and `len(name)`. `/` must divide exactly, so that a size that
does not fit raises instead of being rounded. The text is parsed, never evaluated as Python.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from runtime.errors import PlannerError


class ExpressionError(PlannerError, ValueError):
    """An expression that is none of those allowed, names something unknown, or divides with a remainder."""


def _divide(a: int, b: int) -> int:
    if a % b:
        raise ExpressionError(f"{a} is not a multiple of {b}")
    return a // b


_BINARY: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: _divide,
    ast.FloorDiv: operator.floordiv,
}
_MAX_LENGTH = 200


def evaluate(expression: int | str, names: Mapping[str, Any]) -> int:
    """The integer that `expression` gives with `names`.

    Raises:
        ExpressionError: not in the grammar above, an unknown name, a value that is no integer, or a division with a remainder.
    """
    if isinstance(expression, int) and not isinstance(expression, bool):
        return expression
    if not isinstance(expression, str) or len(expression) > _MAX_LENGTH:
        raise ExpressionError(f"{str(expression)[:40]!r} is neither an integer nor a short expression such as 'height / 8'")
    try:
        tree = ast.parse(expression, mode="eval").body
        return _integer(_value(tree, names), expression)
    except ExpressionError as error:
        raise ExpressionError(f"in {expression!r}: {error}") from None
    except ZeroDivisionError:
        raise ExpressionError(f"in {expression!r}: division by zero") from None
    except (SyntaxError, RecursionError, MemoryError, ValueError):
        raise ExpressionError(f"{expression!r} is no arithmetic over names; write for example 'height / 8'") from None


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=int(number)) if not isinstance(number, bool):
            return number
        case ast.Name(id=name):
            if name not in names:
                raise ExpressionError(f"{name!r} is unknown; known are {', '.join(sorted(names))}")
            return names[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_integer(_value(operand, names), ast.unparse(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            a, b = (_integer(_value(side, names), ast.unparse(side)) for side in (left, right))
            return _BINARY[type(op)](a, b)
        case ast.Subscript(value=ast.Name() as owner, slice=ast.Constant(value=int(index))):
            items = _sequence(owner, names)
            if not 0 <= index < len(items):
                raise ExpressionError(f"{owner.id} has {len(items)} entries, none at {index}")
            return items[index]
        case ast.Call(func=ast.Name(id="len"), args=[ast.Name() as owner], keywords=[]):
            return len(_sequence(owner, names))
    raise ExpressionError(f"{ast.unparse(node)!r} is not allowed: only integers, names, + - * / //, name[0] and len(name) are")


def _sequence(owner: ast.Name, names: Mapping[str, Any]) -> list[Any] | tuple[Any, ...]:
    items = _value(owner, names)
    if not isinstance(items, (list, tuple)):
        raise ExpressionError(f"{owner.id} is {items!r}, not a list")
    return items


def _integer(value: Any, text: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ExpressionError(f"{text} is {value!r}, not an integer")
