"""What a stretch would cost in tiles."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from planner.solve.problem import Problem
from planner.solve.tile_cost import Hosting, TileCosts
from tests.planner.toys import planned


class Features(nn.Module):
    """Tokens [1, 9, 4]: what a linear layer gives of them is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x.sin())
        return y.cos() + y


def problem() -> Problem:
    return planned(Features(), torch.randn(1, 9, 4)).problem


def test_what_is_merged_from_parts_does_not_live_on_the_host() -> None:
    """It is made behind the loop, as a whole."""
    for hosting, found in ((None, True), (Hosting(200, -1), False)):
        costs = TileCosts(problem(), hosting)
        assert [node.name for node in costs.nodes[:2]] == ["sin", "linear"]
        assert (costs.nodes[1] in costs.hosted) == (hosting is not None)
        seed = next(iter(costs.nodes[0].all_input_nodes))
        region = costs.region(0, 2, seed, 2)
        assert (region is not None) == found
        assert region is None or list(region.merged) == [costs.nodes[1]]
