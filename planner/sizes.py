"""Sizes in bytes: reading `"6GB"` the way accelerate does, and printing bytes for people.

An integer is bytes. Decimal units are powers of 1000 (`"6GB"` = 6·10⁹), binary units powers of 1024 (`"6GiB"` = 6·2³⁰).
Case is as in accelerate: units are read without regard to case, except that a decimal unit ending in a lower-case `b`
counts bits (`"8Gb"` = 10⁹ bytes).
"""

from __future__ import annotations

import math
import operator
import re
from decimal import Decimal
from fractions import Fraction
from typing import SupportsIndex, cast

from runtime.errors import BudgetError

MAX_BYTES = 2**62

_DECIMAL_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "PB": 10**15, "EB": 10**18}
_BINARY_UNITS = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "PIB": 2**50, "EIB": 2**60}
_SIZE = re.compile(r"\s*(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(?P<unit>[A-Za-z]*)\s*", re.ASCII)
_KNOWN_UNITS = "B, KB, MB, GB, TB (powers of 1000) and KiB, MiB, GiB, TiB (powers of 1024)"
_EXAMPLE_NUMBER = "6"


def parse_size(value: int | str, what: str = "budget") -> int:
    """Read a size and return it in bytes, between 1 and 2**62.

    Args:
        value: an integer of bytes, or a string of a number and a unit such as `"6GB"`, `"1.5 GiB"`, `"512MB"`.
        what: the name of the argument, for error messages.

    Raises:
        BudgetError: if the value is no size, not positive, or above 2**62; the message shows a corrected call.
    """
    if isinstance(value, str):
        return _checked(_parse_text(value, what), value, what)
    return _checked(_integer(value, what), value, what)


def format_bytes(n: int) -> str:
    """Bytes for people, decimal units and three significant digits: `"512 B"`, `"44.1 MB"`, `"7.42 GB"`."""
    if n < 0:
        return "-" + format_bytes(-n)
    if n < 1000:
        return f"{n} B"
    unit = next((unit for unit, factor in _DECIMAL_UNITS.items() if n / factor < 999.5), "EB")
    scaled = n / _DECIMAL_UNITS[unit]
    # Thresholds sit half a last digit below the power of ten, so that rounding never yields a fourth digit.
    digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
    return f"{scaled:.{digits}f} {unit}"


def _integer(value: object, what: str) -> int:
    """Bytes from a Python, NumPy or SymPy integer, or from a float that is a whole number."""
    if isinstance(value, bool) or value is None:
        raise BudgetError(f"{what} {value!r} is not a size. {_corrected(what)}")
    if isinstance(value, float):
        if not math.isfinite(value):
            raise BudgetError(f"{what} {value!r} is not a finite number of bytes. {_corrected(what)}")
        if not value.is_integer():
            raise BudgetError(
                f"{what} {value!r} is not a whole number of bytes; a bare number counts bytes, not gigabytes. "
                f"{_corrected(what, f'{abs(value):g}')}"
            )
        return int(value)
    try:
        return operator.index(cast(SupportsIndex, value))
    except TypeError:
        kind = type(value).__name__
        raise BudgetError(f"{what} {_shown(value)} is not a size but a {kind}. {_corrected(what)}") from None


def _parse_text(text: str, what: str) -> int:
    """Bytes from a number and a unit; may be zero or too large, which the caller refuses."""
    shown = _shown(text)
    if not text.strip():
        raise BudgetError(f"{what} {shown} is empty. {_corrected(what)}")
    match = _SIZE.fullmatch(text)
    if match is None:
        if re.match(r"\s*-\s*[\d.]", text):
            raise BudgetError(f"{what} {shown} is negative; a size is at least 1 byte. {_corrected(what)}")
        raise BudgetError(f"{what} {shown} is not a number and a unit. {_corrected(what, _first_number(text))}")
    number, unit = Decimal(match["number"]), match["unit"]
    if not unit:
        # Digits alone could be bytes or gigabytes; accelerate refuses them as well.
        raise BudgetError(f"{what} {shown} has no unit; which one is meant? {_corrected(what, _first_number(text))}")
    factor = _unit_factor(unit)
    if factor is None:
        raise BudgetError(
            f"{what} {shown} has the unknown unit {_shown(unit)}; known are {_KNOWN_UNITS}. "
            f"{_corrected(what, _first_number(text))}"
        )
    return _scaled(number, factor)


def _unit_factor(unit: str) -> Fraction | None:
    """Bytes per unit, or None for an unknown unit."""
    upper = unit.upper()
    if unit == "B":
        return Fraction(1)
    if upper in _BINARY_UNITS:
        return Fraction(_BINARY_UNITS[upper])
    if upper in _DECIMAL_UNITS:
        return Fraction(_DECIMAL_UNITS[upper], 8 if unit.endswith("b") else 1)
    return None


def _scaled(number: Decimal, factor: Fraction) -> int:
    """`number * factor`, exact, rounded down; clipped before an absurd exponent makes an absurdly long integer."""
    if number.adjusted() > 30:
        return MAX_BYTES + 1
    if number.adjusted() < -30:
        return 0
    return math.floor(Fraction(number) * factor)


def _checked(size: int, value: object, what: str) -> int:
    """`size`, if it is one; `value` is what the user wrote."""
    if size <= 0:
        sign = "negative" if size < 0 else "less than one byte" if isinstance(value, str) else "zero"
        raise BudgetError(f"{what} {_shown(value)} is {sign}; a size is at least 1 byte. {_corrected(what)}")
    if size > MAX_BYTES:
        raise BudgetError(
            f"{what} {_shown(value)} is more than 2**62 bytes (4.6 EB), the most a size can be. {_corrected(what)}"
        )
    return size


def _first_number(text: str) -> str:
    """The number the user meant, as far as it can be made out; a decimal comma becomes a point."""
    found = re.search(r"\d+(?:[.,]\d+)?", text, re.ASCII)
    number = found[0].replace(",", ".") if found else ""
    return number if number and len(number) <= 12 and Decimal(number) else _EXAMPLE_NUMBER


def _shown(value: object) -> str:
    """The repr, cut in the middle where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:40]}...{text[-10:]}"


def _corrected(what: str, number: str = _EXAMPLE_NUMBER) -> str:
    return f'Write {what}="{number}GB" (powers of 1000), {what}="{number}GiB" (powers of 1024) or an integer of bytes.'


def format_seconds(seconds: float) -> str:
    """`1.23 s`, `45.6 ms` or `7.89 us`."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1 or unit == "us":
            return f"{seconds * factor:.3g} {unit}"
    raise AssertionError
