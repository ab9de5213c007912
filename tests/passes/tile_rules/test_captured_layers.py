"""The convolution and pool operators that captures hold, of layers with every argument they have, all have their rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from passes.tile_rules import Untileable
from passes.tile_rules.base import RULES
from planner.capture import capture
from tests.passes.tile_rules.harness import check_tiles

WORDS = ("conv", "pool")


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.paths = nn.ModuleList(
            [
                nn.Conv2d(4, 6, 3, padding=1),
                nn.Conv2d(4, 4, 3, stride=2, dilation=2, groups=4, bias=False),
                nn.Conv2d(4, 6, (4, 3), padding="same"),
                nn.Conv2d(4, 6, 3, padding="valid"),
                nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
                nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1),
                nn.ConvTranspose2d(4, 6, 3, stride=3, output_padding=1, groups=2),
                nn.MaxPool2d(3, stride=2, padding=1),
                nn.MaxPool2d(2, ceil_mode=True, dilation=2),
                nn.AvgPool2d(3, stride=2, padding=1),
                nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False, divisor_override=3),
                nn.LPPool2d(2, 3),
                nn.AdaptiveAvgPool2d(4),
                nn.AdaptiveAvgPool2d((1, None)),
                nn.AdaptiveMaxPool2d(3),
            ]
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        lines, volume = x.flatten(2), x.unsqueeze(2)
        one, three = torch.ones(4, 4, 3).to(x), torch.ones(4, 4, 1, 3, 3).to(x)
        more = [
            F.conv1d(lines, one, padding=1),
            F.conv_transpose1d(lines, one, stride=2),
            F.max_pool1d(lines, 2),
            F.avg_pool1d(lines, 2),
            F.adaptive_avg_pool1d(lines, 5),
            F.conv3d(volume, three, padding=(0, 1, 1)),
            F.conv_transpose3d(volume, three),
            F.max_pool3d(volume, (1, 2, 2)),
            F.avg_pool3d(volume, (1, 2, 2)),
            F.adaptive_avg_pool3d(volume, (1, 2, 2)),
            F.max_pool2d(x, 2, return_indices=True)[0],
            torch.convolution(x, torch.ones(4, 4, 3, 3).to(x), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1),
        ]
        return [path(x) for path in self.paths] + more


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_every_captured_operator() -> None:
    """Each is computed in two parts of its first result, along every dimension; the shapes are such that none need refuse."""
    graph = capture(Layers().double().eval(), (torch.randn(2, 4, 13, 11, dtype=torch.float64),)).graph
    nodes = [node for node in graph.nodes if any(word in str(node.target) for word in WORDS) and node.op == "call_function"]
    assert len(nodes) >= 26
    for node in nodes:
        assert node.target in RULES, f"{node.target} has no tile rule"
        args, kwargs = tree_map_only(fx.Node, lambda n: torch.randn_like(value_of(n)), (node.args, node.kwargs))
        shape = value_of(node).shape
        for dim, size in enumerate(shape):
            try:
                check_tiles(node.target, args, dim, sorted({0, size // 2, size}), kwargs)
            except Untileable as reason:
                pytest.fail(f"{node.target} {reason}")


def value_of(node: fx.Node) -> Any:
    """The tensor that a node gives, or its first."""
    value = node.meta["val"]
    value = value[0] if isinstance(value, (tuple, list)) else value
    return torch.empty(tuple(value.shape), dtype=torch.float64)
