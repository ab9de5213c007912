"""Which regions are chosen."""

from __future__ import annotations

from tests.passes.tiled import captured
from tests.properties.test_tiling import forced


def test_what_has_to_be_tiled_is_even_where_that_takes_more_memory() -> None:
    p = forced(captured(), 4, None)
    made = {"empty_strided", "merge_statistics", "loop", "free"}
    assert {getattr(node.target, "__name__", "").partition(".")[0] for node in p.emitted.ops()} <= made
