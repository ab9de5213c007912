"""Tables: weights of which only rows are read, on the host where they live (`ops.lookup`), in memory or in a file.

NumPy does the work: it moves bytes of any dtype, and PyTorch's allocators, which measure what the device holds, see none of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from runtime.errors import RowError
from runtime.executable import WeightView
from runtime.weight_file import FileRange, Source


@dataclass(frozen=True, eq=False)
class Table:
    """A weight with dense rows, and its bytes on the host; None for one without bytes."""

    view: WeightView
    source: Source | None

    @classmethod
    def of(cls, view: WeightView, runs: list[tuple[int, Source]]) -> Table:
        """From what `HostStore.runs` gives for the one weight."""
        return cls(view, runs[0][1] if runs else None)

    def positions(self, indices: torch.Tensor) -> np.ndarray[Any, Any]:
        """Indices (integers on the host, any shape) as int64[n].

        Raises:
            RowError: one is negative or not below the number of rows.
        """
        flat = indices.numpy().ravel().astype(np.int64)
        rows = self.view.shape[0]
        outside = np.flatnonzero((flat < 0) | (flat >= rows))
        if outside.size:
            raise RowError(
                f"index {flat[outside[0]]} is outside of {self.view.name!r}, which has {rows} rows: pass indices from 0 to "
                f"{rows - 1} ({outside.size} of {flat.size} are not)"
            )
        return flat

    def read(self, positions: np.ndarray[Any, Any], result: torch.Tensor) -> None:
        """Copies those rows into `result`, a contiguous host tensor of as many bytes.

        Raises:
            StoreError: the file cannot be read.
        """
        if positions.size == 0 or self.source is None or self.view.row_bytes == 0:
            return
        target = result.view(-1).view(torch.uint8).numpy().reshape(positions.size, self.view.row_bytes)
        if isinstance(self.source, FileRange):
            _read_rows(self.source, positions, target)
            return
        rows = self.source.numpy().reshape(self.view.shape[0], self.view.row_bytes)
        np.take(rows, positions, axis=0, out=target, mode="clip")  # in range by now; another mode would copy once more


def _read_rows(source: FileRange, positions: np.ndarray[Any, Any], target: np.ndarray[Any, Any]) -> None:
    """Every row once, in the order of the file."""
    row_bytes, before = target.shape[1], -1
    for at in np.argsort(positions, kind="stable").tolist():
        row = int(positions[at])
        if before >= 0 and positions[before] == row:
            target[at] = target[before]
        else:
            source.file.read_into(memoryview(target[at]), source.offset + row * row_bytes)
        before = at
