"""The run of a planned pipeline, call by call: how long it takes, which weights come early, and how many bytes that takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from planner.pipeline_problem import PipelineProblem
from planner.plan import Plan
from planner.solve.early import Early
from planner.solve.phases import MemberShares, arenas_of
from planner.solve.run import CallModel, PlannedRun
from planner.solve.seams import SeamBytes, SeamSearch
from planner.solve.share import state_bytes_of
from planner.solve.turns import Turn, turns_of
from runtime import ops
from runtime.errors import PlanFileError


@dataclass(frozen=True, eq=False)
class PipelineRun:
    """What is simulated; `live` and `reserved` bytes are those that are allocated, and those that the allocator holds."""

    problem: PipelineProblem
    shares: MemberShares
    run: PlannedRun
    live: SeamBytes
    reserved: SeamBytes

    @classmethod
    def of(cls, problem: PipelineProblem, shares: MemberShares, parts: Mapping[str, Plan], budget_bytes: int) -> PipelineRun:
        phases = {key: member.phases for key, member in problem.budget.members.items()}
        turns = turns_of(problem.order, shares, phases)
        models = {key: _model(part, shares[key].loaded_read_bytes) for key, part in parts.items()}
        run = PlannedRun(problem.budget.machine, turns, models)
        live = _bytes(problem, shares, turns, parts, budget_bytes)
        if live.memory.device != "cuda":
            return cls(problem, shares, run, live, live)
        # There what a call has given back stays with the allocator.
        held = {key: (part.reserved_bytes,) * len(live.tails[key]) for key, part in parts.items()}
        return cls(problem, shares, run, live, dataclasses.replace(live, tails=held))

    def decide(self, budget_bytes: int) -> tuple[Early, ...]:
        """What comes early."""
        return SeamSearch(self.run, self.reserved, budget_bytes).decide()

    def check(self, early: Iterable[Early]) -> None:
        """Refuses early weights that there are not, or that no call follows so.

        Raises:
            PlanFileError: they are for another pipeline.
        """
        seams = {self.run.pair(at) for at in filter(self.run.is_seam, range(len(self.run.turns)))}
        for each in early:
            if (each.during, each.of) not in seams:
                raise PlanFileError(
                    f"I3: weights of {each.of!r} are to come in a call of {each.during!r}, behind which it does not wait for "
                    "any; plan the pipeline again"
                )
            there, last = len(self.run.members[each.of].resident), self.run.members[each.during].prefetches
            if each.weights > there or each.pieces[-1][0] > last:
                raise PlanFileError(
                    f"I3: {each.weights} weights of {each.of!r} are to come early, behind {each.pieces[-1][0]} prefetches of "
                    f"{each.during!r}; the one has {there}, the other makes {last}; plan the pipeline again"
                )

    @property
    def read_bytes(self) -> int:
        """From disk in one run: what calls stream, and what is loaded before them."""
        loaded = sum(self.run.members[turn.key].resident_read_bytes for turn in self.run.turns if turn.loads)
        return loaded + sum(
            share.streamed_read_bytes * self.problem.budget.members[key].calls for key, share in self.shares.items()
        )

    def split_shares(self, early: Iterable[Early]) -> MemberShares:
        """The shares with what their arenas take in two parts."""
        shares = dict(self.shares)
        for each in early:
            split = max(shares[each.of].split_bytes, self.reserved.split(self.run, each))
            shares[each.of] = dataclasses.replace(shares[each.of], split_bytes=split)
        return shares

    def peaks(self, own: Mapping[str, int], early: Sequence[Early], *, reserved: bool = False) -> dict[str | None, int]:
        """The most bytes at the calls of each member, which takes `own` itself, and between calls (None)."""
        found = self.problem.budget.peaks(self.split_shares(early), own)
        more = (self.reserved if reserved else self.live).peaks(self.run, early)
        return {key: max(nbytes, more.get(key, 0)) for key, nbytes in found.items()}


def _model(part: Plan, read_bytes: int) -> CallModel:
    layout = part.layout
    carried = tuple(bundle.index for bundle in layout.bundles if bundle.carried)
    pace = part.engines.pace(part.machine)
    return CallModel(part.engines.steps, pace, carried, layout.resident, layout.resident_bytes, read_bytes)


def _bytes(
    problem: PipelineProblem, shares: MemberShares, turns: Sequence[Turn], parts: Mapping[str, Plan], budget_bytes: int
) -> SeamBytes:
    state = problem.budget.state_bytes
    around, before = [], []
    for at, turn in enumerate(turns):
        there = arenas_of(shares[key] for key in {*turn.there, turn.key}) - shares[turn.key].arena_bytes
        own_state = state_bytes_of(shares[turn.key].solver)
        around.append(problem.outside_bytes[at] - own_state + state + there)
        kept = turns[at - 1].after if at else frozenset(key for key, share in shares.items() if share.stay == "always")
        before.append(problem.between_bytes[at] + state + arenas_of(shares[key] for key in kept))
    peaks = problem.budget.peaks(shares, {key: part.reserved_bytes for key, part in parts.items()})
    near: dict[str, set[str | None]] = {key: {key, None} for key in shares}
    for turn in turns:
        for key in turn.there:
            near[key].add(turn.key)
    room = {key: budget_bytes - max(peaks[other] for other in others) for key, others in near.items()}
    return SeamBytes(problem.memory, around, before, {key: tuple(_tails(part)) for key, part in parts.items()}, room)


def _tails(part: Plan) -> list[int]:
    """Behind each number of prefetches of a call that is the last of its phase, the most bytes from there on, as proved."""
    most, skipped = [0], 0
    for node in part.emitted.graph.nodes:
        if node.target is ops.prefetch:
            bundle = part.layout.bundles[node.args[0]]
            skipped += bundle.nbytes if bundle.carried and bundle.offset is None else 0
            most.append(0)
        if node.name in part.proof.live_bytes:
            most[-1] = max(most[-1], part.proof.live_bytes[node.name] - skipped)
    for place in range(len(most) - 2, -1, -1):
        most[place] = max(most[place], most[place + 1])
    return most
