"""What users say of tiling, operator by operator."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TileConstraint:
    """What the user says of tiling an operator: not at all, or in `count` tiles, along dimension `dim` of what is read."""

    allowed: bool = True
    count: int | None = None
    dim: int | None = None

    @property
    def forced(self) -> bool:
        """Whether it has to be tiled wherever that is possible."""
        return self.count is not None or self.dim is not None


FREE = TileConstraint()
