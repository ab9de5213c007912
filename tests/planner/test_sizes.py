"""Sizes: what accelerate reads we read alike, everything else is refused with a corrected call."""

import numpy as np
import pytest
from accelerate.utils import convert_file_size_to_int
from hypothesis import given
from hypothesis import strategies as st

from planner.sizes import MAX_BYTES, format_bytes, parse_size
from runtime.errors import BudgetError, PlannerError

UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "PB": 10**15,
    "EB": 10**18,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "PiB": 2**50,
    "EiB": 2**60,
}
CORRECTED = 'Write budget="{n}GB" (powers of 1000), budget="{n}GiB" (powers of 1024) or an integer of bytes.'


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("6GB", 6 * 10**9),
        ("6GiB", 6 * 2**30),
        ("1.5GB", 1_500_000_000),
        (" 44.1 MB ", 44_100_000),
        ("0.29GB", 290_000_000),
        (".5KiB", 512),
        ("1e3MB", 10**9),
        ("512B", 512),
        ("2TB", 2 * 10**12),
        ("3gib", 3 * 2**30),
        ("8gb", 10**9),  # a lower-case b counts bits, as in accelerate
        ("4EiB", MAX_BYTES),
    ],
)
def test_reads_strings(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("value", [1, 6 * 10**9, MAX_BYTES, np.int64(7), 6e9])
def test_numbers_are_bytes(value: int) -> None:
    parsed = parse_size(value)
    assert parsed == value
    assert type(parsed) is int


@given(st.integers(1, MAX_BYTES), st.sampled_from(list(UNITS)), st.sampled_from(["", " "]))
def test_an_integer_and_a_unit_always_reads_exactly(number: int, unit: str, space: str) -> None:
    number = max(1, number // UNITS[unit])
    assert parse_size(f"{number}{space}{unit}") == number * UNITS[unit]


@given(
    st.integers(1, 10**6),
    st.sampled_from(["KB", "MB", "GB", "KiB", "MiB", "GiB", "Kb", "Mb", "Gb", "gb", "gib", "GIB", "Gib", "mB"]),
)
def test_reads_what_accelerate_reads(number: int, unit: str) -> None:
    assert parse_size(f"{number}{unit}") == convert_file_size_to_int(f"{number}{unit}")


@pytest.mark.parametrize(
    ("value", "problem", "number"),
    [
        ("6 gigs", "'6 gigs' has the unknown unit 'gigs'; known are B, KB, MB, GB, TB", "6"),
        ("12GX", "'12GX' has the unknown unit 'GX'", "12"),
        ("-1GB", "'-1GB' is negative; a size is at least 1 byte.", "6"),
        (-1, "-1 is negative; a size is at least 1 byte.", "6"),
        (0, "0 is zero; a size is at least 1 byte.", "6"),
        ("0", "'0' has no unit; which one is meant?", "6"),
        ("12", "'12' has no unit; which one is meant?", "12"),
        ("0GB", "'0GB' is less than one byte; a size is at least 1 byte.", "6"),
        ("0.1B", "'0.1B' is less than one byte", "6"),
        ("1e-999999999GB", "'1e-999999999GB' is less than one byte", "6"),
        ("NaN", "'NaN' is not a number and a unit.", "6"),
        ("nanGB", "'nanGB' is not a number and a unit.", "6"),
        ("infGB", "'infGB' is not a number and a unit.", "6"),
        ("6,5GB", "'6,5GB' is not a number and a unit.", "6.5"),
        ("GB", "'GB' is not a number and a unit.", "6"),
        ("٦GB", "'٦GB' is not a number and a unit.", "6"),
        ("", "'' is empty.", "6"),
        ("  ", "'  ' is empty.", "6"),
        (True, "True is not a size.", "6"),
        (None, "None is not a size.", "6"),
        ([6], "[6] is not a size but a list.", "6"),
        (float("nan"), "nan is not a finite number of bytes.", "6"),
        (float("inf"), "inf is not a finite number of bytes.", "6"),
        (6.5, "6.5 is not a whole number of bytes; a bare number counts bytes, not gigabytes.", "6.5"),
        (MAX_BYTES + 1, "4611686018427387905 is more than 2**62 bytes (4.6 EB), the most a size can be.", "6"),
        ("5EB", "'5EB' is more than 2**62 bytes", "6"),
        ("1e999999999GB", "'1e999999999GB' is more than 2**62 bytes", "6"),
        ("9" * 5000 + "GB", "'" + "9" * 39 + "...9999999GB' is more than 2**62 bytes", "6"),
    ],
)
def test_refuses_and_shows_the_corrected_call(value: int | str, problem: str, number: str) -> None:
    with pytest.raises(BudgetError) as caught:
        parse_size(value)
    message = str(caught.value)
    assert message.startswith(f"budget {problem}")
    assert message.endswith(CORRECTED.format(n=number))
    assert isinstance(caught.value, PlannerError | ValueError)


def test_the_message_names_the_argument() -> None:
    with pytest.raises(BudgetError, match=r'^max_error None is not a size\. Write max_error="6GB"'):
        parse_size(None, what="max_error")  # type: ignore[arg-type]


@given(st.text(max_size=12))
def test_any_other_text_is_refused_or_positive(text: str) -> None:
    try:
        size = parse_size(text)
    except BudgetError:
        return
    assert 0 < size <= MAX_BYTES


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (999, "999 B"),
        (1000, "1.00 KB"),
        (9_994, "9.99 KB"),
        (9_995, "10.0 KB"),
        (44_100_000, "44.1 MB"),
        (99_960_000, "100 MB"),
        (999_499_999, "999 MB"),
        (999_500_000, "1.00 GB"),
        (7_420_000_000, "7.42 GB"),
        (6 * 10**9, "6.00 GB"),
        (MAX_BYTES, "4.61 EB"),
        (5000 * 10**18, "5000 EB"),
        (-1500, "-1.50 KB"),
    ],
)
def test_prints_three_digits(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text


@given(st.integers(1, MAX_BYTES - 2**54))
def test_printing_and_reading_round_trips_to_three_digits(nbytes: int) -> None:
    text = format_bytes(nbytes)
    assert abs(parse_size(text) - nbytes) <= 0.00502 * nbytes
    assert format_bytes(parse_size(text)) == text
    assert len(text.split()[0].replace(".", "")) <= 3
