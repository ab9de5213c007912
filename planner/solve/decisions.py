"""Decisions: frozen records of what is done to a program. Rewrites apply them, JSON keeps them, tests write them by hand."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from passes.cast_weights import Cast
from passes.channels_last import ConvRegion
from passes.regions import Tile
from passes.slice_weights import WeightSlices
from passes.stream_weights import Stream

StagingMode = Literal["arena", "allocator"]


@dataclass(frozen=True)
class Tiling:
    """How the program is rewritten before its weights are streamed.

    `norms` are split into statistics and what applies them, of which `recomputed` have their input computed twice; `tiles` are
    the regions that run tile by tile, in program order; of their results `hosted` live on the host, and `over` may be written
    over values that are larger, or that tiles read through windows. `moved` are operators that run early, to end what they
    read, and `apart` elementwise ones that give a new value, so that it lies elsewhere. `lookups` are the weights whose rows
    are looked up on the host, `slices` those that come in parts, and `casts` those that are stored in a smaller type, by
    placeholder. `channels_last` are the regions that run so, and `attention` the softmaxes that are fused with the products
    around them. `unrolled` are stretches that run once for every slice, before all that names nodes but these two: others
    name what is in the slices.
    """

    norms: tuple[str, ...] = ()
    tiles: tuple[Tile, ...] = ()
    hosted: tuple[str, ...] = ()
    lookups: tuple[str, ...] = ()
    slices: tuple[WeightSlices, ...] = ()
    recomputed: tuple[str, ...] = ()
    over: tuple[str, ...] = ()
    casts: tuple[Cast, ...] = ()
    channels_last: tuple[ConvRegion, ...] = ()
    attention: tuple[str, ...] = ()
    unrolled: tuple[Tile, ...] = ()
    moved: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self != UNTILED

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Tiling:
        given = {name: tuple(values) for name, values in data.items()}
        given["channels_last"] = tuple(ConvRegion(tuple(each["operators"])) for each in given.get("channels_last", ()))
        made = {"tiles": Tile, "unrolled": Tile, "slices": WeightSlices, "casts": Cast}
        return cls(**{k: tuple(made[k](**value) for value in v) if k in made else v for k, v in given.items()})


UNTILED = Tiling()


@dataclass(frozen=True)
class Homes:
    """Where the host keeps weights, if its memory has a budget: `held` (placeholders) and `tables` (names) in memory.

    Beside them are `other_bytes` of weights that the program does not read; all others have their home on disk. What is read
    from there comes through `slots` of `slot_bytes`, of which `bounce` serve what is loaded before a call and looked-up rows.
    """

    held: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    other_bytes: int = 0
    slot_bytes: int = 0
    slots: int = 0
    bounce: int = 0

    @classmethod
    def from_json(cls, data: dict[str, Any] | None) -> Homes | None:
        if data is None:
            return None
        return cls(**{**data, "held": tuple(data["held"]), "tables": tuple(data["tables"])})


@dataclass(frozen=True)
class Decisions:
    """All that was decided for one program.

    `streams` in copy order; weights that none of them names are resident. `staging` says where streamed bundles live: in one
    static arena, or each in a block of the device's allocator, which costs nothing where they are not (tight budgets). `homes`
    says what of the weights the host has in its memory; None where that has no budget, and so has all.
    """

    streams: tuple[Stream, ...] = ()
    staging: StagingMode = "arena"
    tiling: Tiling = UNTILED
    homes: Homes | None = None

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {"staging": self.staging, "streams": [asdict(s) for s in self.streams]}
        if self.homes is not None:
            data["homes"] = asdict(self.homes)
        return {**data, "tiling": asdict(self.tiling)} if self.tiling else data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Decisions:
        streams = tuple(Stream(**{**s, "weights": tuple(s["weights"])}) for s in data["streams"])
        return cls(streams, data["staging"], Tiling.from_json(data.get("tiling", {})), Homes.from_json(data.get("homes")))
