"""Which regions are chosen."""

from __future__ import annotations

import pytest

from planner.solve.decisions import UNTILED
from planner.solve.tile_search import TileSearch
from tests.passes.tiled import captured
from tests.planner.test_decide import tilings
from tests.properties.test_tiling import forced


def test_what_has_to_be_tiled_is_even_where_that_takes_more_memory() -> None:
    p = forced(captured(), 4, None)
    made = {"empty_strided", "merge_statistics", "loop", "free"}
    assert {getattr(node.target, "__name__", "").partition(".")[0] for node in p.emitted.ops()} <= made


@pytest.mark.parametrize("name", ["flux", "bert", "unet", "vae_decoder"])
def test_equal_stretches_get_what_each_would_get_by_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = tilings(name).branch(UNTILED).levels
    assert levels is not None
    search = levels._search(levels.looked_up)
    top = int(search.costs.total.max())
    for share in (0.9, 0.75, 0.6, 0.45, 0.3):
        found = search.tiles(int(top * share))
        alone = TileSearch(search.costs, search.constraint)
        monkeypatch.setattr(alone, "_equal_cover", alone._cover)
        assert alone.tiles(int(top * share)) == found
