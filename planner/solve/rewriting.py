"""The canonical program as tilings say, by the passes that do it; what several tilings begin with is done once."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import cached_property

from passes.base import Pass, run_passes
from passes.cast_weights import CastWeights
from passes.channels_last import ChannelsLast
from passes.functionalise import Functionalise
from passes.fuse_attention import FuseAttention
from passes.gather_writes import GatherWrites
from passes.host_lookup import HostLookup
from passes.move_up import MoveUp
from passes.program import Program
from passes.recompute import Recompute
from passes.slice_weights import SliceWeights
from passes.split_norms import SplitNorms
from passes.tile_regions import TileRegions
from passes.unroll_slices import UnrollSlices
from planner.solve.decisions import Tiling

# So many programs are kept for those that go on from them.
_KEPT = 6


@dataclass(frozen=True, eq=False)
class Rewriting:
    """Rewritings of one program."""

    program: Program

    def of(self, tiling: Tiling) -> Program:
        """The program as a tiling says; itself where that says nothing.

        Raises:
            PlanFileError: it names what the program does not have. Untileable: a region that cannot be cut so.
        """
        program = self._begun(replace(without_regions(tiling), recomputed=(), moved=()))
        return run_passes(program, tile_passes(tiling)) if tiling.norms or tiling.tiles else program

    def _begun(self, tiling: Tiling) -> Program:
        """What comes before regions are run in tiles, in two steps."""
        first = Tiling(attention=tiling.attention, channels_last=tiling.channels_last, unrolled=tiling.unrolled)
        for step, passes in ((first, _before_weights(tiling)), (tiling, _of_weights(tiling))):
            if step not in self._known:
                if step:
                    self._known[step] = run_passes(self.program if step == first else self._known[first], passes)
                else:
                    self._known[step] = self.program
            self._known.move_to_end(step)
        found = self._known[tiling]
        while len(self._known) > _KEPT:
            self._known.popitem(last=False)
        return found

    @cached_property
    def _known(self) -> OrderedDict[Tiling, Program]:
        return OrderedDict()


def tile_passes(tiling: Tiling) -> tuple[Pass, ...]:
    """What runs regions in tiles."""
    return (
        GatherWrites(),  # first, as the next: a tile must not write into what is not its own
        Functionalise(),
        SplitNorms(tiling.norms),  # regions begin and end at the halves
        Recompute(tiling.recomputed),
        MoveUp(tiling.moved),
        TileRegions(tiling.tiles, tiling.hosted, tiling.over),
    )


def without_regions(tiling: Tiling) -> Tiling:
    """What a search for regions begins with."""
    return replace(tiling, norms=(), tiles=(), hosted=(), over=(), apart=())


def _before_weights(tiling: Tiling) -> tuple[Pass, ...]:
    return (
        FuseAttention(tiling.attention),  # first, as the next: others name what they leave
        ChannelsLast(tiling.channels_last),  # others cut and replace what regions are named by
        *((GatherWrites(), Functionalise(), UnrollSlices(tiling.unrolled)) if tiling.unrolled else ()),
    )


def _of_weights(tiling: Tiling) -> tuple[Pass, ...]:
    return HostLookup(tiling.lookups), SliceWeights(tiling.slices), CastWeights(tiling.casts)
