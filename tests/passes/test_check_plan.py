"""The checker: good programs pass, and every way to break one is refused by invariant and node."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

from passes.check_kernels import Kernels
from passes.check_plan import check_plan
from passes.program import Program
from runtime import ops
from runtime.errors import CheckError
from tests.passes.mutations import Edit, Mutation, layout_of, of_bundle, with_bundle, with_layout
from tests.passes.plan_mutations import MUTATIONS
from tests.passes.programs import EXAMPLES, Mode, emitted, nodes_calling, run

NAMES = ("layers", "stateful", "bert", "t5_encoder", "unet", "vae_decoder")
MODES: tuple[Mode, ...] = ("arena", "allocator", "seam", "seam in an arena")
AMPLE = 10**9
PLACES = 3  # of one mutation in one program: the first, the last and some between


@pytest.fixture(autouse=True)
def shared_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """One cache of operators for all checks here: broken programs have the operators of good ones."""
    monkeypatch.setattr("passes.check_plan.Kernels", lambda: KERNELS)


KERNELS = Kernels()

good = pytest.mark.parametrize(("name", "mode"), list(itertools.product(NAMES, MODES)))


@good
def test_a_good_program_passes_with_its_own_peak_as_the_budget(name: str, mode: Mode) -> None:
    case = emitted(name, mode)
    assert check_plan(case.program, case.proof.peak_bytes) == case.proof
    assert case.proof.live_bytes[case.proof.peak_node] == case.proof.peak_bytes
    assert layout_of(case.program).bundles
    assert bool(layout_of(case.program).staging_bytes) == ("arena" in mode)


@good
def test_the_proved_peak_is_what_is_measured(name: str, mode: Mode) -> None:
    case = emitted(name, mode)
    # Over the seam the first call has to copy what the others find.
    *_, (_, measured) = run(case.program, case.proof, case.example, calls=2)
    assert measured == case.proof.peak_bytes


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
@pytest.mark.parametrize("name", NAMES)
def test_a_broken_program_is_refused(mutation: Mutation, name: str) -> None:
    for mode in mutation.modes:
        case = emitted(name, mode)  # type: ignore[arg-type]
        for make in _some(list(mutation.make(case.program))):
            broken, words = make()
            with pytest.raises(CheckError) as caught:
                check_plan(broken, AMPLE)
            first, *around = str(caught.value).splitlines()
            assert first[:2] in mutation.invariants
            assert any(word in first for word in words), f"{first!r} has none of {words}"
            assert sum(line.startswith("  > ") for line in around) == 1


def test_every_mutation_has_a_place_somewhere() -> None:
    programs = [(mode, emitted(name, mode).program) for name in ("layers", "stateful", "bert") for mode in MODES]
    assert [m.name for m in MUTATIONS if not any(list(m.make(p)) for mode, p in programs if mode in m.modes)] == []


def _some(places: list[Any]) -> list[Any]:
    return places if len(places) <= PLACES else [places[i * (len(places) - 1) // (PLACES - 1)] for i in range(PLACES)]


# I1 ------------------------------------------------------------------------------------------------------------------


@good
def test_one_byte_less_is_refused_at_the_peak(name: str, mode: Mode) -> None:
    case = emitted(name, mode)
    peak, node = case.proof.peak_bytes, case.proof.peak_node
    with pytest.raises(CheckError, match=rf"^I1: {peak} B are live at {node}, 1 B over the budget\n"):
        check_plan(case.program, peak - 1)


@good
def test_more_workspace_is_refused_at_its_node(name: str, mode: Mode) -> None:
    case = emitted(name, mode)
    operators = [n for n in case.program.ops() if n.name in case.proof.live_bytes and n.target not in ops.ALL]
    for node in _some(operators):
        edit = Edit(case.program)
        room = case.proof.peak_bytes - case.proof.live_bytes[node.name]
        before = int(node.meta.get("workspace_bytes", 0))
        edit[node].meta["workspace_bytes"] = before + room
        check_plan(edit.program, case.proof.peak_bytes)
        edit[node].meta["workspace_bytes"] = before + room + 1
        with pytest.raises(CheckError, match=rf"^I1: \d+ B are live at {node.name}, 1 B over the budget\n"):
            check_plan(edit.program, case.proof.peak_bytes)


@pytest.mark.parametrize("name", ["layers", "stateful"])
@pytest.mark.parametrize("mode", MODES)
def test_a_value_that_is_never_freed_counts_to_the_end(name: str, mode: Mode) -> None:
    case = emitted(name, mode)
    refused = 0
    for node in nodes_calling(case.program.graph, ops.free):
        edit = Edit(case.program)
        edit.graph.erase_node(edit[node])
        proof = check_plan(edit.program, AMPLE)
        grown = {n for n, b in proof.live_bytes.items() if b > case.proof.live_bytes[n]}
        order = [n.name for n in case.program.graph.nodes]
        assert all(order.index(n) > order.index(node.name) for n in grown)
        assert all(proof.live_bytes[n] >= b for n, b in case.proof.live_bytes.items())
        if proof.peak_bytes > case.proof.peak_bytes:
            refused += 1
            with pytest.raises(CheckError, match=r"^I1: "):
                check_plan(edit.program, case.proof.peak_bytes)
    assert refused


@pytest.mark.parametrize("mode", MODES)
def test_arenas_that_alone_exceed_the_budget(mode: Mode) -> None:
    case = emitted("bert", mode)
    layout = layout_of(case.program)
    fixed = layout.resident_bytes + layout.staging_bytes
    fixed += sum(b.nbytes for b in layout.bundles if b.carried and b.offset is None)  # there before the first operator too
    with pytest.raises(CheckError, match=rf"^I1: the arenas alone take {fixed} B of {fixed - 1} B"):
        check_plan(case.program, fixed - 1)


def test_library_workspaces_and_rounding_count() -> None:
    case = emitted("layers", "arena")
    peak = case.proof.peak_bytes
    assert check_plan(case.program, AMPLE, fixed_bytes=1000).peak_bytes == peak + 1000
    # resident 128 + staging 512 + input 512 + the output and the argument of a linear, 512 each
    assert check_plan(case.program, AMPLE, rounding_bytes=512).peak_bytes == 128 + 512 + 3 * 512


def test_a_bundle_from_the_allocator_is_rounded_when_it_comes_and_when_it_goes() -> None:
    case = emitted("layers", "allocator")
    assert {b.nbytes for b in layout_of(case.program).bundles} == {320, 256}
    # at the last layer: input, sum and result of 128 B, and the one bundle left, of 320 B
    assert check_plan(case.program, AMPLE, rounding_bytes=512).live_bytes["linear_3"] == 4 * 512


def test_a_program_without_a_layout_is_refused() -> None:
    with pytest.raises(CheckError, match="I2: the program has no layout"):
        check_plan(replace(emitted("layers", "arena").program, layout=None), AMPLE)


def test_an_error_prints_ten_neighbours_and_marks_the_node() -> None:
    case = emitted("layers", "arena")
    edit = Edit(case.program)
    (prefetch,) = [n for n in nodes_calling(edit.graph, ops.prefetch) if n.args[0] == 2]
    edit[of_bundle(case.program, ops.onload, 0)].append(prefetch)
    with pytest.raises(CheckError) as caught:
        check_plan(edit.program, AMPLE)
    first, *lines = str(caught.value).splitlines()
    assert first == "I2: bundle 2 is copied over bundle 0, which is still in use"
    assert len(lines) == 11
    assert "runtime.ops.prefetch" in lines[5]
    assert lines[5].startswith("  > ")


# Anything at all -----------------------------------------------------------------------------------------------------


@st.composite
def broken_somehow(draw: st.DrawFn) -> tuple[str, Mode, Program, str]:
    """A program with one random change, which may also be harmless."""
    name, mode = draw(st.sampled_from(["layers", "stateful"])), draw(st.sampled_from(MODES))
    program = emitted(name, mode).program
    edit, layout = Edit(program), layout_of(program)
    markers = [n for n in edit.graph.nodes if n.target in ops.ALL and n.target is not ops.onload]
    first = next(i for i, n in enumerate(edit.graph.nodes) if n.op != "placeholder")
    places = list(edit.graph.nodes)[first:]
    marker, place = draw(st.sampled_from(markers)), draw(st.sampled_from(places))
    kind = draw(st.sampled_from(["move", "copy", "drop", "carried", "offset", "slot", "operator"]))
    if kind == "move" and place is not marker:
        place.prepend(marker)
    elif kind == "copy":
        edit.insert_before(place, marker.target, *marker.args)  # type: ignore[arg-type]
    elif kind == "drop":
        edit.graph.erase_node(marker)
    elif kind == "carried":  # with its prefetch anywhere behind its eviction this may be a good program
        bundle = draw(st.sampled_from(layout.bundles))
        prefetch = edit[of_bundle(program, ops.prefetch, bundle.index)]
        if prefetch is not place:
            place.prepend(prefetch)
        return name, mode, with_bundle(edit.program, bundle.index, carried=not bundle.carried), kind
    elif kind == "operator":
        node = draw(st.sampled_from([n for n in places if n.op == "call_function" and n.target not in ops.ALL]))
        if node is not place:
            place.prepend(node)
    else:
        bundle = draw(st.sampled_from(layout.bundles))
        offset = draw(st.integers(-1, 32)) * draw(st.sampled_from([64, 64, 32]))
        if kind == "offset" and "arena" in mode:
            return name, mode, with_bundle(program, bundle.index, offset=offset), kind
        slot = draw(st.sampled_from(layout.resident or bundle.slots))
        moved = tuple(replace(s, offset=offset) if s is slot else s for s in layout.resident)
        return name, mode, with_layout(program, resident=moved), kind
    return name, mode, edit.program, kind


@given(broken_somehow())
def test_what_the_checker_accepts_computes_the_same_within_the_budget(
    change: tuple[str, Mode, Program, str],
) -> None:
    name, mode, program, _ = change
    budget = emitted(name, mode).proof.peak_bytes
    try:
        proof = check_plan(program, budget)
    except CheckError as error:
        assert str(error)[:4] in ("I1: ", "I2: ", "I3: ", "I4: ", "I6: ")  # noqa: PT017
        return
    module, args, kwargs = EXAMPLES[name]()
    module = copy.deepcopy(module)
    for outputs, measured in run(program, proof, (module, args, kwargs), calls=2):
        with torch.no_grad():
            expected = tree_leaves(module(*args, **kwargs))
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
        assert measured == proof.peak_bytes <= budget
