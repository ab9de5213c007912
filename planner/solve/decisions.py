"""Decisions: frozen records of what is done to a program. Rewrites apply them, JSON keeps them, tests write them by hand."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from passes.stream_weights import Stream

StagingMode = Literal["arena", "allocator"]


@dataclass(frozen=True)
class Decisions:
    """All that was decided for one program.

    `streams` in copy order; weights that none of them names are resident. `staging` says where streamed bundles live: in one
    static arena, or each in a block of the device's allocator, which costs nothing where they are not (tight budgets).
    """

    streams: tuple[Stream, ...] = ()
    staging: StagingMode = "arena"

    def to_json(self) -> dict[str, Any]:
        return {"staging": self.staging, "streams": [asdict(s) for s in self.streams]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Decisions:
        streams = tuple(Stream(**{**s, "weights": tuple(s["weights"])}) for s in data["streams"])
        return cls(streams, data["staging"])
