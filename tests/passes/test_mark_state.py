"""`MarkState`: the weights that a program writes."""

from __future__ import annotations

from passes.mark_state import MarkState, written_nodes
from planner.capture import capture
from tests.passes.programs import layers, stateful


def test_written_buffers_are_state_and_nothing_else() -> None:
    module, args, _ = stateful()
    program = capture(module, args)
    assert not any(w.state for w in program.weights.values())
    marked = MarkState().apply(program)
    assert [name for name, w in marked.weights.items() if w.state] == ["w_count", "w_mean"]
    assert [[w.name for w in written_nodes(n)] for n in marked.ops() if written_nodes(n)] == [
        ["w_count"], ["w_mean"], ["mul_"],
    ]  # fmt: skip


def test_a_program_that_only_reads_has_no_state() -> None:
    module, args, _ = layers()
    assert not any(w.state for w in MarkState().apply(capture(module, args)).weights.values())
