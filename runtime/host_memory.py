"""Counts the host memory that a device page-locks: what a budget for the host bounds, by a counter of its own (I7)."""

from __future__ import annotations

import torch

PAGE_BYTES = 4096


class LockedBytes:
    """Buffers as they are locked and unlocked. `live_bytes` now, `peak_bytes` at most; whole pages, as the system counts."""

    def __init__(self) -> None:
        self.live_bytes = self.peak_bytes = 0
        self._sizes: dict[int, int] = {}

    def lock(self, buffer: torch.Tensor) -> None:
        nbytes = -(-buffer.numel() // PAGE_BYTES) * PAGE_BYTES
        self._sizes[buffer.data_ptr()] = nbytes
        self.live_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def unlock(self, buffer: torch.Tensor) -> None:
        """One that was never locked is none."""
        self.live_bytes -= self._sizes.pop(buffer.data_ptr(), 0)
