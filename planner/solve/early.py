"""What comes early: resident weights of one member of a pipeline that are copied while another one's call still runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Early:
    """The first resident weights of `of` come in that call of `during` behind which `of` is called and is not there yet.

    `pieces`: in order, behind how many prefetches of that call so many weights follow. Their memory is taken with the first.
    """

    during: str
    of: str
    pieces: tuple[tuple[int, int], ...]

    @property
    def weights(self) -> int:
        """How many come."""
        return sum(count for _, count in self.pieces)

    @property
    def begins(self) -> int:
        """Behind how many prefetches their memory is taken."""
        return self.pieces[0][0]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Early:
        """Requires what `to_json` gave.

        Raises:
            ValueError: the pieces are none, or out of order.
        """
        pieces = tuple((int(prefetches), int(weights)) for prefetches, weights in data["pieces"])
        places = [prefetches for prefetches, _ in pieces]
        if not pieces or places != sorted(set(places)) or places[0] < 0 or min(weights for _, weights in pieces) < 1:
            raise ValueError(f"early weights come in pieces of at least one, in the order of the call, not {data['pieces']}")
        return cls(str(data["during"]), str(data["of"]), pieces)
