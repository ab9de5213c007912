"""Storages are counted once, and until the last tensor over them is gone."""

import torch

from passes.live_storages import LiveStorages
from passes.program import storage_id


def test_views_count_once_and_until_the_last_is_gone() -> None:
    gone: list[int] = []
    live = LiveStorages(gone.append)
    base = torch.zeros(8)
    view, key = base[2:], storage_id(base)
    assert live.count(base)
    assert not live.count(view)
    assert (live.live_bytes, live.bytes_of(key), key in live) == (32, 32, True)
    del base
    assert live.live_bytes == 32
    del view
    assert (live.live_bytes, live.bytes_of(key), gone) == (0, 0, [key])


def test_a_storage_may_count_as_something_else() -> None:
    live = LiveStorages()
    weight = torch.zeros(8)
    live.count(weight, 0)
    assert not live.count(weight)
    assert live.live_bytes == 0


def test_detached_it_follows_nothing() -> None:
    gone: list[int] = []
    live = LiveStorages(gone.append)
    tensor = torch.zeros(2)
    live.count(tensor)
    live.detach()
    del tensor
    assert not gone
