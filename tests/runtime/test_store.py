"""The host arena: exact size, a storage per tensor, coalesced runs."""

from __future__ import annotations

import io
from dataclasses import replace
from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.executable import Rows, WeightView
from runtime.store import HostStore


def view(name: str, *shape: int, dtype: torch.dtype = torch.float32, stride: tuple[int, ...] | None = None) -> WeightView:
    empty = torch.empty(shape, dtype=dtype)
    if stride is not None:
        empty = torch.empty_strided(shape, stride, dtype=dtype)
    return WeightView(name, (), shape, empty.stride(), dtype, empty.untyped_storage().nbytes(), False)


def store(*views: WeightView, alignment: int = 64) -> HostStore:
    return HostStore({v.name: v for v in views}, alignment)


def test_exact_size_and_alignment() -> None:
    host = store(view("a", 3), view("b", 17), view("c", 1, dtype=torch.float64))
    assert host.nbytes == 64 + 128 + 64 == sum(buffer.numel() for buffer in host.buffers)
    starts = [host.tensor(n).data_ptr() for n in "abc"]
    assert [s % 64 for s in starts] == [0, 0, 0]
    assert [b - a for a, b in pairwise(starts)] == [64, 128]


def test_values_strides_and_dtypes() -> None:
    values = {
        "t": torch.randn(4, 6).t(),
        "h": torch.randn(5).to(torch.bfloat16),
        "b": torch.tensor([True, False]),
        "c": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "z": torch.empty(0, 3),
        "s": torch.tensor(3),
    }
    host = store(*(view(n, *v.shape, dtype=v.dtype, stride=v.stride()) for n, v in values.items()))
    adopted = []
    for name, value in values.items():
        adopted.append(host.fill(name, value))
    for name, value, own in zip(values, values.values(), adopted, strict=True):
        assert torch.equal(own, value)
        assert (own.stride(), own.dtype) == (value.stride(), value.dtype)
        assert torch.equal(host.tensor(name), value)


def test_saving_one_tensor_does_not_save_the_arena() -> None:
    host = store(view("small", 4), view("large", 1 << 18))
    file = io.BytesIO()
    torch.save(host.tensor("small"), file)
    assert len(file.getvalue()) < 4096
    assert host.tensor("small").untyped_storage().nbytes() == 16


def test_runs_join_neighbours() -> None:
    host = store(view("a", 16), view("b", 16), view("c", 16), view("d", 4))
    assert [(o, s.numel()) for o, s in host.runs([("a", 0), ("b", 64), ("c", 128), ("d", 192)])] == [(0, 208)]
    assert [(o, s.numel()) for o, s in host.runs([("b", 0), ("a", 64)])] == [(0, 64), (64, 64)]
    assert [(o, s.numel()) for o, s in host.runs([("a", 0), ("c", 64)])] == [(0, 64), (64, 64)]


def test_later_segments() -> None:
    host = store(view("a", 16))
    host.fill("a", torch.ones(16))
    host.extend({"b": view("b", 16)})
    host.fill("b", torch.full((16,), 2.0))
    assert torch.equal(host.tensor("a"), torch.ones(16))
    assert [s.view(torch.float32)[0].item() for _, s in host.runs([("a", 0), ("b", 64)])] == [1.0, 2.0]
    assert host.nbytes == 128


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_runs_put_every_weight_where_it_belongs(sizes: list[int], random: object) -> None:
    views = [view(f"w{i}", n, dtype=torch.uint8) for i, n in enumerate(sizes)]
    host = store(*views, alignment=8)
    for i, v in enumerate(views):
        host.fill(v.name, torch.full(v.shape, i + 1, dtype=torch.uint8))
    random.shuffle(views)  # type: ignore[attr-defined]
    offset, places = 0, []
    for v in views:
        places.append((v.name, offset))
        offset += -(-v.nbytes // 8) * 8
    target = torch.zeros(offset, dtype=torch.uint8)
    for at, source in host.runs(places):
        target[at : at + source.numel()] = source
    for v, (_, at) in zip(views, places, strict=True):
        assert torch.equal(target[at : at + v.nbytes], host.tensor(v.name))


def test_rows_are_found_inside_of_their_weight() -> None:
    whole = view("b", 7, 3)
    host = store(view("a", 5), whole, view("c", 4))
    value = torch.arange(21.0).view(7, 3)
    host.fill("b", value)
    parts = [
        replace(whole, shape=(stop - start, 3), nbytes=(stop - start) * 12, rows=Rows(start, stop, 7))
        for start, stop in ((0, 2), (2, 3), (3, 7))
    ]
    assert all(part.whole == whole for part in parts)
    assert [part.label for part in parts] == ["b[0:2]", "b[2:3]", "b[3:7]"]
    target = torch.zeros(256, dtype=torch.uint8)
    for offset, source in host.runs([(part, 64 * i) for i, part in enumerate(parts)]):
        target[offset : offset + source.numel()] = source
    for i, part in enumerate(parts):
        assert part.rows is not None
        assert torch.equal(part.on(target, 64 * i), value[part.rows.start : part.rows.stop])
    assert [(o, s.numel()) for o, s in host.runs([(parts[0], 0), (parts[1], 24)])] == [(0, 36)]  # neighbours on both sides
