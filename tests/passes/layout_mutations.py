"""Ways to break where weights lie: bundles, slots and arenas."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from passes.program import Program
from runtime.layout import Bundle, Slot
from tests.passes.mutations import Broken, Register, concurrent, layout_of, with_bundle, with_layout

mutation = Register()


@mutation("I2", "I4", arena_only=True)
def overlap_two_bundles(program: Program) -> Iterator[Callable[[], Broken]]:
    for a, b in concurrent(program):

        def broken(a: Bundle = a, b: Bundle = b) -> Broken:
            fits = a.offset is not None and a.offset + b.nbytes <= layout_of(program).staging_bytes
            changed = with_bundle(program, b.index, offset=a.offset) if fits else with_bundle(program, a.index, offset=b.offset)
            return changed, ("bundle",)

        yield broken


@mutation("I2", arena_only=True)
def push_a_bundle_out_of_the_arena(program: Program) -> Iterator[Callable[[], Broken]]:
    layout = layout_of(program)
    for bundle in layout.bundles:
        for offset in (layout.staging_bytes - bundle.nbytes + layout.alignment, -layout.alignment):

            def broken(bundle: Bundle = bundle, offset: int = offset) -> Broken:
                changed = with_bundle(program, bundle.index, offset=offset)
                return changed, (f"bundle {bundle.index} ends outside the staging arena",)

            yield broken


@mutation("I2", arena_only=True)
def shrink_the_staging_arena(program: Program) -> Iterator[Callable[[], Broken]]:
    layout = layout_of(program)
    for nbytes in (layout.staging_bytes - 1, layout.staging_bytes // 2, 0):
        yield lambda nbytes=nbytes: (with_layout(program, staging_bytes=nbytes), ("ends outside the staging arena",))


@mutation("I2")
def shrink_a_bundle(program: Program) -> Iterator[Callable[[], Broken]]:
    for bundle in layout_of(program).bundles:
        nbytes = max(s.offset + s.nbytes for s in bundle.slots) - 1
        changed = with_bundle(program, bundle.index, nbytes=nbytes)
        yield lambda changed=changed, bundle=bundle: (changed, (f"the weights of bundle {bundle.index} end 1 B behind it",))


@mutation("I3")
def exchange_two_bundles(program: Program) -> Iterator[Callable[[], Broken]]:
    first, second, *rest = layout_of(program).bundles
    yield lambda: (with_layout(program, bundles=(second, first, *rest)), ("bundle 1 is listed as number 0",))


def _slots(program: Program) -> list[tuple[tuple[Slot, ...], Callable[[tuple[Slot, ...]], Program]]]:
    """The resident slots and those of every bundle, with how to put others in their place."""
    places: list[tuple[tuple[Slot, ...], Callable[[tuple[Slot, ...]], Program]]] = [
        (layout_of(program).resident, lambda slots: with_layout(program, resident=slots))
    ]
    for bundle in layout_of(program).bundles:
        places.append((bundle.slots, lambda slots, index=bundle.index: with_bundle(program, index, slots=slots)))  # type: ignore[misc]
    return places


def _exchange(slots: tuple[Slot, ...], index: int, **changes: Any) -> tuple[Slot, ...]:
    return (*slots[:index], replace(slots[index], **changes), *slots[index + 1 :])


@mutation("I2")
def overlap_two_slots(program: Program) -> Iterator[Callable[[], Broken]]:
    for slots, put in _slots(program):
        for index in range(1, len(slots)):
            before = slots[index - 1]
            changed = put(_exchange(slots, index, offset=before.offset))
            names = before.weight, slots[index].weight
            yield lambda changed=changed, names=names: (changed, tuple(f"{n} overlaps the weight before it" for n in names))


@mutation("I3")
def misalign_a_slot(program: Program) -> Iterator[Callable[[], Broken]]:
    for slots, put in _slots(program):
        for index, slot in enumerate(slots):
            changed = put(_exchange(slots, index, offset=slot.offset + 4))
            yield lambda changed=changed, slot=slot: (changed, (f"{slot.weight} is not aligned to 64 B",))


@mutation("I3", arena_only=True)
def misalign_a_bundle(program: Program) -> Iterator[Callable[[], Broken]]:
    layout = layout_of(program)
    for bundle in layout.bundles:
        assert bundle.offset is not None
        if bundle.offset + bundle.nbytes + 4 <= layout.staging_bytes:
            changed = with_bundle(program, bundle.index, offset=bundle.offset + 4)
            yield lambda changed=changed, bundle=bundle: (changed, (f"bundle {bundle.index} is not aligned to 64 B",))


@mutation("I3")
def shrink_a_slot(program: Program) -> Iterator[Callable[[], Broken]]:
    state = layout_of(program).state
    for slots, put in [*_slots(program), (state, lambda slots: with_layout(program, state=slots))]:
        for index, slot in enumerate(slots):
            if slot.nbytes:
                changed = put(_exchange(slots, index, nbytes=slot.nbytes - 1))
                yield lambda changed=changed, slot=slot: (changed, (f"{slot.weight} does not fit its slot",))


@mutation("I2")
def shrink_the_resident_arena(program: Program) -> Iterator[Callable[[], Broken]]:
    layout = layout_of(program)
    if layout.resident:
        for nbytes in (layout.resident_bytes - layout.alignment, 0):
            changed = with_layout(program, resident_bytes=nbytes)
            yield lambda changed=changed: (changed, ("the weights of the resident arena end",))


@mutation("I3")
def forget_a_resident(program: Program) -> Iterator[Callable[[], Broken]]:
    resident = layout_of(program).resident
    for slot in resident:
        changed = with_layout(program, resident=tuple(s for s in resident if s is not slot))
        yield lambda changed=changed, slot=slot: (changed, (f"{slot.weight} is read but neither resident nor onloaded",))


@mutation("I2")
def give_a_weight_two_homes(program: Program) -> Iterator[Callable[[], Broken]]:
    layout = layout_of(program)
    for slot in (*layout.resident, *(s for b in layout.bundles for s in b.slots)):
        again = replace(slot, offset=layout.resident_bytes)
        changed = with_layout(program, resident=(*layout.resident, again), resident_bytes=layout.resident_bytes + slot.nbytes)
        yield lambda changed=changed: (changed, ("a weight has two homes",))
