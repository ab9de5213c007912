"""Inserts the operators that bring streamed weights to the device and forget them again.

before:  y = linear(x, w_a, b); z = linear(y, w_b)
after:   prefetch(0); o = onload(0); a = o[0]; y = linear(x, a, b); evict(0); prefetch(1); ...
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from passes.program import Program
from runtime import ops


@dataclass(frozen=True)
class Stream:
    """One bundle: `weights` (placeholder names) start to travel before `prefetch`, are there at `first`, gone after `last`.

    Where `prefetch` comes after `last` it is for the next call.
    """

    weights: tuple[str, ...]
    prefetch: str
    first: str
    last: str


@dataclass(frozen=True)
class StreamWeights:
    """Requires: a canonical program; every use of a streamed weight lies in one of its streams, no stream in another's way.

    Ensures: streamed weights have no placeholder left; each stream has one prefetch, onload and evict, in that order (over the
    seam of two calls where the prefetch is for the next), and the prefetches are in the order of `streams`, those for the next
    call last. Nothing is computed differently (I5).

    Raises:
        ValueError: a stream names an unknown node or misses a use of its weight.
    """

    streams: tuple[Stream, ...]
    name: str = "stream_weights"

    def apply(self, program: Program) -> Program:
        graph = program.copy_graph()
        nodes = {node.name: node for node in graph.nodes}
        order = {node: i for i, node in enumerate(graph.nodes)}
        for stream in self.streams:
            missing = [n for n in (*stream.weights, stream.prefetch, stream.first, stream.last) if n not in nodes]
            if missing:
                raise ValueError(f"stream of {stream.weights} names unknown nodes: {', '.join(missing)}")
        # Everything that happens between two operators: evictions, then copies that may follow them, then arrivals.
        for index, stream in enumerate(self.streams):
            with graph.inserting_after(nodes[stream.last]):
                graph.call_function(ops.evict, (index,))
        for index, stream in sorted(
            enumerate(self.streams), key=lambda s: order[nodes[s[1].prefetch]] > order[nodes[s[1].last]]
        ):
            with graph.inserting_before(nodes[stream.prefetch]):
                graph.call_function(ops.prefetch, (index,))
        arrivals = [self._onload(graph, index, stream, nodes, order) for index, stream in enumerate(self.streams)]
        streamed = {w for stream in self.streams for w in stream.weights}
        for name in streamed:
            if nodes[name].users:
                raise ValueError(f"{name} is used outside of its streams, by {', '.join(n.name for n in nodes[name].users)}")
            graph.erase_node(nodes[name])
        _name_after_weights(graph, arrivals)
        return program.with_graph(graph)

    @staticmethod
    def _onload(
        graph: fx.Graph, index: int, stream: Stream, nodes: dict[str, fx.Node], order: dict[fx.Node, int]
    ) -> list[tuple[fx.Node, str]]:
        """Gives the nodes that hold the arrived weights, each with its weight's name."""
        first, last = order[nodes[stream.first]], order[nodes[stream.last]]
        with graph.inserting_before(nodes[stream.first]):
            held = []
            arrived = graph.call_function(ops.onload, (index,))
            arrived.meta["val"] = tuple(nodes[w].meta["val"] for w in stream.weights)
            for slot, weight in enumerate(stream.weights):
                here = graph.call_function(operator.getitem, (arrived, slot))
                here.meta["val"] = nodes[weight].meta["val"]
                for user in _within(nodes[weight].users, order, first, last):
                    user.replace_input_with(nodes[weight], here)
                held.append((here, weight))
        return held


def _within(users: Iterable[fx.Node], order: dict[fx.Node, int], first: int, last: int) -> list[fx.Node]:
    return [user for user in users if user in order and first <= order[user] <= last]


def _name_after_weights(graph: fx.Graph, arrivals: list[list[tuple[fx.Node, str]]]) -> None:
    """A weight that has arrived is called as it was; in its second stream `_again`, so that programs read well."""
    held = [pair for pairs in arrivals for pair in pairs]
    taken = {node.name for node in graph.nodes} - {node.name for node, _ in held}
    for node, weight in held:
        name = weight
        while name in taken:
            name += "_again"
        node.name = name
        taken.add(name)
