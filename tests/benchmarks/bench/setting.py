"""What a contender is told, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from planner.sizes import parse_size


@dataclass(frozen=True)
class Setting:
    """Where a contender runs: `device` of its kernels, of what `kind` ("cuda", "cpu", "accounting").

    `budget` as written, or None; "60%" is of what unplanned takes, `unplanned_bytes`. `room_bytes`: what that took besides
    weights, which a person who states `max_memory` has to know. `scratch`: a folder of its own.
    """

    kind: str
    device: torch.device
    scratch: Path
    budget: str | None = None
    unplanned_bytes: int = 0
    room_bytes: int = 0

    @property
    def share(self) -> float | None:
        """Of what unplanned takes, where the budget is given so."""
        return float(self.budget[:-1]) / 100 if self.budget is not None and self.budget.endswith("%") else None

    @property
    def budget_bytes(self) -> int:
        assert self.budget is not None
        return parse_size(self.budget) if self.share is None else int(self.share * self.unplanned_bytes)


@dataclass
class Ready:
    """A contender that can be called.

    Attributes:
        files: what it reads from disk. said: about itself, once.
        report: of the last call: measured peaks and bytes, where the contender counts them itself.
    """

    files: list[Path] = field(default_factory=list)
    said: dict[str, Any] = field(default_factory=dict)
    report: Callable[[], dict[str, Any]] | None = None
