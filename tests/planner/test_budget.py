"""Budgets: one size, accelerate's mapping, or a Budget; everything ambiguous is refused with a corrected call."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.budget import Budget
from planner.sizes import MAX_BYTES
from runtime.errors import BudgetError

GB = 10**9
SIZES = st.integers(1, MAX_BYTES)


@pytest.mark.parametrize(
    ("value", "device", "expected"),
    [
        ("6GB", None, Budget(6 * GB)),
        ("6GiB", "cuda", Budget(6 * 2**30, device="cuda")),
        (123, "accounting", Budget(123, device="accounting")),
        ({"cuda": "6GB", "cpu": "16GB"}, None, Budget(6 * GB, host_bytes=16 * GB, device="cuda")),
        ({"cuda": "6GB"}, "cuda:1", Budget(6 * GB, device="cuda:1")),
        ({"cuda:1": "6GB"}, "cuda", Budget(6 * GB, device="cuda:1")),
        (
            {0: "8GB", "cpu": "16GB", "disk": "100GB"},
            "cuda:0",
            Budget(8 * GB, host_bytes=16 * GB, disk_bytes=100 * GB, device="cuda:0"),
        ),
        ({"cpu": "4GB", "disk": "9GB"}, "cpu", Budget(4 * GB, disk_bytes=9 * GB, device="cpu")),
        ({"cpu": "4GB"}, None, Budget(4 * GB, device="cpu")),
        ({"accounting": 77}, "accounting", Budget(77, device="accounting")),
        ({"accounting": 77, "cpu": 99}, None, Budget(77, host_bytes=99, device="accounting")),
        (Budget(5, device="cuda:1"), "cuda", Budget(5, device="cuda:1")),
        (Budget(5, include_context=True), "cuda", Budget(5, device="cuda", include_context=True)),
        (Budget(5), None, Budget(5)),
    ],
)
def test_parse(value: Any, device: str | None, expected: Budget) -> None:
    assert Budget.parse(value, device) == expected


@given(SIZES, SIZES, SIZES, st.integers(0, 15))
def test_a_mapping_keeps_every_size(on_device: int, on_host: int, on_disk: int, index: int) -> None:
    budget = Budget.parse({index: on_device, "cpu": f"{on_host}B", "disk": on_disk}, "cuda")
    assert budget == Budget(on_device, on_host, on_disk, f"cuda:{index}")
    assert Budget.parse(budget, "cuda") == budget


@given(SIZES, st.sampled_from(["cuda", "cuda:3", "cpu", "accounting"]))
def test_one_size_and_a_mapping_of_one_size_agree(size: int, device: str) -> None:
    assert Budget.parse(size, device) == Budget.parse({device: f"{size} B"}, device)


@pytest.mark.parametrize(
    ("value", "device", "message"),
    [
        ({}, None, 'the budget names no device. Write budget="6GB" or budget={"cuda": "6GB", "cpu": "16GB"}.'),
        (
            {"cuda:0": "8GB", 1: "8GB"},
            None,
            "the budget names 2 devices (cuda:0, cuda:1); planning over several devices is not supported yet. "
            'Give one of them: budget={"cuda:0": 8000000000}.',
        ),
        (
            {"accounting": 5, "cuda": 6},
            "accounting",
            "the budget names 2 devices (accounting, cuda); planning over several devices is not supported yet. "
            'Give one of them: budget={"accounting": 5}.',
        ),
        (
            {0: 1, "cuda:0": 2},
            None,
            "the budget names 'cuda:0' twice. Give it one size: budget={\"cuda:0\": 2}.",
        ),
        (
            {"gpu": "8GB"},
            None,
            'the budget names an unknown device \'gpu\'; known are "cuda", "cuda:1", 1, "cpu", "disk" and '
            '"accounting". Write for example budget={"cuda:0": "8GB", "cpu": "16GB"}.',
        ),
        (
            {"disk": "8GB"},
            "cuda:1",
            'the budget has only a size for disk. Add the device: budget={"cuda:1": "6GB", ...}.',
        ),
        (
            {"cpu": "8GB"},
            "cuda",
            "the plan is for 'cuda', but the budget gives a size for 'cpu' and none for 'cuda'. "
            'Write budget={"cuda": "6GB"}, or pass device=\'cpu\'.',
        ),
        (
            {"cuda:0": "8GB", "cpu": "9GB"},
            "cuda:1",
            "the plan is for 'cuda:1', but the budget gives a size for 'cuda:0' and none for 'cuda:1'. "
            'Write budget={"cuda:1": "6GB"}, or pass device=\'cuda:0\'.',
        ),
        (
            Budget(5, device="cuda"),
            "cpu",
            "the plan is for 'cpu', but the budget gives a size for 'cuda' and none for 'cpu'. "
            'Write budget={"cpu": "6GB"}, or pass device=\'cuda\'.',
        ),
        (
            "6GB",
            "tpu",
            'unknown device \'tpu\'; known are "cuda", "cuda:1", "cpu" and "accounting". Write for example device="cuda".',
        ),
        (
            {"cuda": "6 gigs"},
            None,
            "budget['cuda'] '6 gigs' has the unknown unit 'gigs'; known are B, KB, MB, GB, TB (powers of 1000) and "
            "KiB, MiB, GiB, TiB (powers of 1024). Write budget['cuda']=\"6GB\" (powers of 1000), "
            "budget['cuda']=\"6GiB\" (powers of 1024) or an integer of bytes.",
        ),
    ],
)
def test_refuses_with_a_corrected_call(value: Any, device: str | None, message: str) -> None:
    with pytest.raises(BudgetError) as caught:
        Budget.parse(value, device)
    assert str(caught.value) == message


@pytest.mark.parametrize("key", [-1, True, None, "cuda:", "cuda:x", "0", "CPU", ("cuda", 0)])
def test_refuses_other_keys(key: Any) -> None:
    with pytest.raises(BudgetError, match="the budget names an unknown device"):
        Budget.parse({key: "8GB"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"device_bytes": "6GB"},
            "Budget(device_bytes='6GB') needs an integer of bytes. Sizes with a unit are read by Budget.parse: "
            'Budget.parse("6GB", device="cuda").',
        ),
        (
            {"device_bytes": True},
            "Budget(device_bytes=True) needs an integer of bytes. Sizes with a unit are read by Budget.parse: "
            'Budget.parse("6GB", device="cuda").',
        ),
        (
            {"device_bytes": 5, "host_bytes": 0},
            'host_bytes 0 is zero; a size is at least 1 byte. Write host_bytes="6GB" (powers of 1000), '
            'host_bytes="6GiB" (powers of 1024) or an integer of bytes.',
        ),
        (
            {"device_bytes": 5, "device": "mps"},
            'unknown device \'mps\'; known are "cuda", "cuda:1", "cpu" and "accounting". Write for example device="cuda".',
        ),
        (
            {"device_bytes": 5, "host_bytes": 6, "device": "cpu"},
            "on the device 'cpu' the device memory is the host memory, so it has one budget. "
            "Write Budget(device_bytes=5, device='cpu') without host_bytes.",
        ),
    ],
)
def test_a_budget_cannot_be_made_wrong(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError) as caught:
        Budget(**fields)
    assert str(caught.value) == message


def test_prints() -> None:
    assert str(Budget(6 * GB)) == "6.00 GB on the default device"
    full = Budget(6 * GB, 16 * GB, 100 * GB, "cuda", include_context=True)
    assert str(full) == "6.00 GB on cuda, 16.0 GB of host memory, 100 GB of disk, driver context included"
