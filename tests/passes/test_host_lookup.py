"""Tables that are looked up on the host: the same bits, errors instead of nonsense, and nothing of the table on the device."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from passes.base import run_passes
from passes.big_weights import host_lookups, sliceable
from passes.host_lookup import HostLookup
from planner import PlannerError
from planner.costs import lookup_seconds
from planner.machine import Machine
from runtime.errors import PlanFileError
from tests.passes.in_parts import assert_same, check_runs, plan_cut, plan_with
from tests.passes.programs import canonical, text

LOOK_UP = (HostLookup(("w_table_weight",)),)


class Words(nn.Module):
    """Tokens to scores, with one table at both ends."""

    def __init__(self, rows: int = 200, width: int = 8, tied: bool = True) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, width, padding_idx=0)
        self.middle = nn.Linear(width, width)
        self.head = nn.Linear(width, rows, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.relu(self.middle(self.table(ids))))


class Lookup(nn.Module):
    def __init__(self, rows: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, width, dtype=dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids)


def test_the_graph() -> None:
    program = run_passes(canonical(Lookup(5, 3, torch.float32), torch.tensor([[1, 2]])), LOOK_UP)
    assert text(program) == "input arg_0: i64[1, 2]\nembedding = lookup(table.weight, arg_0)\nreturn embedding"
    assert list(program.tables) == ["table.weight"]
    assert not program.weights
    p = plan_with(LOOK_UP, Lookup(5, 3, torch.float32), torch.tensor([[1, 2]]))
    assert "embedding = rt.lookup('table.weight', arg_0)" in p.code
    assert p.peak_bytes == 2 * 8 + 2 * 3 * 4


@settings(max_examples=25)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.sampled_from([torch.int64, torch.int32]),
    st.sampled_from(["accounting", "cpu"]),
)
def test_any_table_and_any_indices(
    rows: int, width: int, shape: list[int], dtype: torch.dtype, index: torch.dtype, device: str
) -> None:
    module = Lookup(rows, width, dtype).eval()
    ids = torch.randint(0, rows, shape).to(index)
    p = plan_with(LOOK_UP, module, ids, device=device)
    expected = module(ids).detach()
    m = p.build()
    for _ in range(2):
        assert_same(m(ids), expected)
        assert m.report().peak_bytes == p.peak_bytes
    p.restore()


@pytest.mark.parametrize("device", ["accounting", "cpu"])
def test_indices_that_are_computed_and_lie_apart(device: str) -> None:
    class Computed(Lookup):
        def forward(self, ids: Tensor) -> Tensor:
            return self.table(ids.t() * 2 % 7)[0]

    module, ids = Computed(7, 3, torch.float32).eval(), torch.randint(0, 7, (2, 5))
    p = plan_with(LOOK_UP, module, ids, device=device)
    expected = module(ids).detach()
    m = p.build()
    assert_same(m(ids), expected)
    assert m.report().peak_bytes == p.peak_bytes
    p.restore()


@pytest.mark.parametrize("device", ["accounting", "cpu"])
@pytest.mark.parametrize("index", [-1, 200, 1 << 40])
def test_an_index_outside_is_an_error_and_the_module_stays_usable(device: str, index: int) -> None:
    module, ids = Words(tied=False).eval(), torch.tensor([[1, 2, 3]])
    p = plan_with(LOOK_UP, module, ids, device=device)
    m = p.build()
    expected = m(ids)
    with pytest.raises(
        IndexError, match=rf"index {index} is outside of 'table.weight', which has 200 rows: .* \(1 of 3"
    ) as caught:
        m(torch.tensor([[1, index, 3]]))
    assert isinstance(caught.value, PlannerError)
    assert_same(m(ids), expected)
    p.restore()


@pytest.mark.parametrize("tied", [True, False])
def test_a_table_that_is_the_head_too(tied: bool) -> None:
    module, ids = Words(tied=tied).double().eval(), torch.tensor([[1, 0, 3, 199]])
    expected = module(ids).detach()
    program = canonical(module, ids)
    table = "w_head_weight" if tied and "w_head_weight" in program.weights else "w_table_weight"
    assert host_lookups(program) == (table,)
    assert (table in sliceable(program)) is False
    whole = plan_with((HostLookup((table,)),), module, ids)
    check_runs(whole, expected, ids)
    parts = plan_cut(module, ids, count=4, above=4000)
    assert {w.label.partition("[")[2] for w in parts.program.weights.values() if w.rows} == {
        "0:50]",
        "50:100]",
        "100:150]",
        "150:200]",
    }
    check_runs(parts, expected, ids, close=1e-12)
    assert parts.minimum_bytes < whole.minimum_bytes


@pytest.mark.parametrize("device", ["accounting", "cpu"])
def test_weights_written_in_place_are_what_is_read(device: str) -> None:
    module, ids = Words().eval(), torch.tensor([[1, 2, 3]])
    p = plan_cut(module, ids, above=1000, device=device)
    m = p.build()
    m(ids)
    with torch.no_grad():
        module.table.weight.mul_(2.0)
    fresh = copy.deepcopy(dict(module.state_dict()))
    given = m(ids)
    p.restore()
    module.load_state_dict(fresh)
    assert_same(given, module(ids).detach(), close=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_a_checkpoint_are_read_from_its_files(tmp_path: Path, dtype: torch.dtype) -> None:
    """Where they are as the program reads them; a checkpoint in another dtype is converted into a file of ours."""
    real, ids = Words(tied=True).eval(), torch.tensor([[1, 2, 3]])
    save_file({"table.weight": real.table.weight.detach().to(dtype)}, tmp_path / "a.safetensors")
    save_file(
        {n: t.detach().to(dtype) for n, t in real.middle.state_dict(prefix="middle.").items()}, tmp_path / "b.safetensors"
    )
    places = {"table.weight": "a.safetensors", "middle.weight": "b.safetensors", "middle.bias": "b.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with torch.device("meta"):
        empty = Words(tied=True).eval()
    p = plan_cut(empty, ids, above=1000, device="cpu")
    m = p.build(weights=tmp_path)
    assert_same(m(ids), real(ids).detach(), close=1e-6)
    with torch.no_grad():
        m.table.weight.copy_(torch.ones_like(real.table.weight))
        real.table.weight.copy_(torch.ones_like(real.table.weight))
    assert_same(m(ids), real(ids).detach(), close=1e-6)
    p.restore()


def test_what_cannot_be_looked_up() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.renormed = nn.Embedding(5, 3, max_norm=1.0)
            self.columns = nn.Parameter(torch.randn(3, 5).t())
            self.cast = nn.Embedding(5, 3)
            self.constant = torch.randn(5, 3)
            self.plain = nn.Embedding(5, 3)

        def forward(self, ids: Tensor) -> Tensor:
            others = (
                F.embedding(ids, self.columns) + F.embedding(ids, self.cast.weight.double()) + F.embedding(ids, self.constant)
            )
            return self.renormed(ids) + others + self.plain(ids)

    program = canonical(Odd(), torch.tensor([1, 2]))
    assert host_lookups(program) == ("w_plain_weight",)
    for key, words in (
        ("w_renormed_weight", "the program writes it"),
        ("w_columns", "its rows are not runs of bytes"),
        ("w_cast_weight", "no embedding reads it"),
        ("w_constant", "it is a constant"),
        ("w_missing", "Odd.forward has not"),
    ):
        with pytest.raises(PlanFileError, match=words):
            HostLookup((key,)).apply(program)


def test_what_a_look_up_takes() -> None:
    machine = Machine.preset("rtx-4090")
    assert lookup_seconds(0, machine) >= machine.link_latency_seconds + machine.launch_seconds
    assert lookup_seconds(1 << 20, machine) - lookup_seconds(0, machine) == pytest.approx(
        machine.copy_seconds(1 << 20) - machine.copy_seconds(0)
    )
    p = plan_with(LOOK_UP, Lookup(50, 3, torch.float32), torch.tensor([1, 2]))
    assert p.step_seconds == lookup_seconds(2 * 3 * 4, p.machine)
