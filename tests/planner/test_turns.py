"""Which arenas are on the device from call to call, what loads, and during which call weights of the next one may come."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from planner.solve.turns import Turn, turns_of

PHASES = {"text": (0,), "unet": (1, 2), "control": (1,), "vae": (2,)}
# text twice; (control, unet) twice; (unet, vae)
ORDER = [("text", 0), ("text", 0), ("control", 1), ("unet", 1), ("control", 1), ("unet", 1), ("unet", 2), ("vae", 2)]


def turns(resident: dict[str, str] | None = None, **stays: str) -> tuple[Turn, ...]:
    weights = {key: key for key in PHASES} | (resident or {})
    shares: Any = {
        key: SimpleNamespace(stay=stays.get(key, "phase"), resident=(weights[key],) if weights[key] else ()) for key in PHASES
    }
    return turns_of(ORDER, shares, PHASES)


def loads(found: tuple[Turn, ...]) -> list[int]:
    return [at for at, turn in enumerate(found) if turn.loads]


def brings(found: tuple[Turn, ...]) -> list[int]:
    return [at for at, turn in enumerate(found) if turn.brings]


def test_phases_come_and_go() -> None:
    found = turns()
    assert loads(found) == [0, 2, 3, 7]  # unet stays from one of its phases to the next
    assert brings(found) == [1, 2, 6]
    assert [at for at, turn in enumerate(found) if turn.last] == [1, 7]
    assert found[3].there == {"control"}
    assert found[6].there == set()  # control went with its phase
    assert found[7].there == {"unet"}
    assert found[1].after == found[7].after == set()


def test_for_a_call_is_for_every_call() -> None:
    found = turns(control="call", unet="call")
    assert loads(found) == [0, 2, 3, 4, 5, 6, 7]
    assert brings(found) == [1, 2, 3, 4, 6]  # not 5: the next call is of the one that is there
    assert not any(turn.last for turn in found if turn.key in ("control", "unet"))


def test_for_good_never_loads() -> None:
    found = turns(**dict.fromkeys(PHASES, "always"))
    assert loads(found) == brings(found) == []
    assert all(turn.there == set(PHASES) - {turn.key} for turn in found)


def test_what_has_no_residents_waits_for_none() -> None:
    found = turns({"unet": ""})
    assert loads(found) == [0, 2, 7]
    assert brings(found) == [1, 6]


def test_shared_residents_come_once() -> None:
    found = turns({"unet": "both", "control": "both"})
    assert loads(found) == [0, 2, 7]
    found = turns({"unet": "both", "vae": "both"}, unet="call")
    assert 7 in loads(found)
    assert 6 not in brings(found)  # they are still there for the call that runs
