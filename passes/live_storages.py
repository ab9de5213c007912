"""Bytes of storages that are alive: each counts once, from when it is first seen until the last tensor over it is gone."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from passes.program import storage_id


class LiveStorages:
    """`live_bytes` are those of all storages that were counted and are alive. `gone` is called with the id of one that dies."""

    def __init__(self, gone: Callable[[int], None] | None = None) -> None:
        self.live_bytes = 0
        self._sizes: dict[int, int] = {}
        self._deaths: dict[int, weakref.finalize[Any, Any]] = {}
        self._gone = gone

    def __contains__(self, storage: int) -> bool:
        return storage in self._sizes

    def count(self, tensor: torch.Tensor, nbytes: int | None = None) -> bool:
        """Counts the storage of a tensor, as so many bytes; False where it was counted before."""
        key = storage_id(tensor)
        if key in self._sizes:
            return False
        storage = tensor.untyped_storage()
        self._sizes[key] = int(storage.nbytes()) if nbytes is None else nbytes
        self.live_bytes += self._sizes[key]
        self._deaths[key] = death = weakref.finalize(storage, self._dies, key)
        death.atexit = False
        return True

    def bytes_of(self, storage: int) -> int:
        """Bytes of a storage, 0 for one that is not counted."""
        return self._sizes.get(storage, 0)

    def detach(self) -> None:
        """Stops following the storages that are alive."""
        for death in self._deaths.values():
            death.detach()

    def _dies(self, key: int) -> None:
        del self._deaths[key]
        self.live_bytes -= self._sizes.pop(key)
        if self._gone is not None:
            self._gone(key)
