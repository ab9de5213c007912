"""What runs emitted programs; `load` runs an emitted package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from runtime.module import PlannedModule


def load(
    folder: str | Path,
    device: str | None = None,
    *,
    verify: bool = True,
    checkpoint: str | Path | None = None,
    concurrent: Literal["wait", "raise"] = "wait",
) -> PlannedModule:
    """The module that an emitted package runs: called as the planned one, with its outputs, `report()` and `close()`.

    Neither the planner nor the model's library is imported. Outputs whose classes this process has not imported come as
    `runtime.structures.Output`: values by key, attribute and position.

    Args:
        folder: what `p.emit(folder)` wrote.
        device: "cuda:1", say; by default the one that was planned for, and always of its kind.
        verify: read all weights once and compare checksums; without it only sizes and headers of files are.
        checkpoint: the folder where the checkpoint is now, for a package that refers to one elsewhere.
        concurrent: what a call does while another thread is inside: wait or raise.

    Raises:
        PackageError: no package, damaged, or of another version; names the file, and the tensor where it is about one.
        PlannerError: no such device here. StoreError, BudgetError: the host has no room for the weights.
    """
    from runtime.package import load_package  # what the planner imports of the runtime does not need it

    return load_package(folder, device, verify, checkpoint, concurrent)
