"""`PipelinePlan`: the plan of a whole pipeline's call. Its components' calls are plans; its own Python runs between them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from passes.check_host import check_hosts
from planner.budget import Budget
from planner.compare import Comparison
from planner.dry_run_calls import DryRun
from planner.frontends import pipelines
from planner.options import Options
from planner.pipeline_build import build_runner
from planner.pipeline_calls import Components
from planner.pipeline_facts import PipelineFacts
from planner.pipeline_folder import PipelineFolder
from planner.pipeline_host import decide_shares, pipeline_host
from planner.pipeline_problem import Analyses, member_options
from planner.pipeline_run import PipelineRun
from planner.pipeline_weights import open_pipeline_weights
from planner.plan import Plan
from planner.shared_host import all_in_memory_bytes, within
from planner.sizes import format_bytes
from planner.solve.early import Early
from planner.solve.homes import HostMemory
from planner.solve.phases import MemberShare
from runtime.call_key import named_call
from runtime.errors import PlanFileError, PlannerError
from runtime.executable import RunPace
from runtime.pipeline import PipelineRunner
from runtime.pipeline_programs import PartedCall, PipelineProgram, PipelinePrograms
from runtime.pipeline_report import PipelineReport


class PipelinePlan(PipelineFacts):
    """The plan of a pipeline's call for one budget. Made by `plan()`, `PipelinePlan.load` or `replan`.

    Attributes:
        run: the dry run: which calls the pipeline makes on its components, and what its own Python holds meanwhile.
        parts: a plan for every distinct call of a component, in the order of the run, by its name ("unet.forward").
        stays: for each of them whether its arenas stay on the device "always", for a "phase", or for a "call".
        early: which weights of a part come while the call before it still runs; none where some come from disk, or where a
            component's own Python runs.
        spills: whether some do, since the host's memory has a budget and not all weights fit.
        locked_bytes: the most that is taken of the host's memory, weights, rings and values; None where that has no budget.
        budget, machine, device: what was declared. folder: where the pipeline was opened, if it was.
    """

    def __init__(
        self,
        pipe: Any,
        options: Options,
        analyses: Analyses,
        run: DryRun,
        shares: Mapping[str, Any] | None = None,
        early: tuple[Early, ...] | None = None,
        folder: PipelineFolder | None = None,
    ) -> None:
        self._pipe, self._options, self._analyses, self.run, self.folder = pipe, options, analyses, run, folder
        self._runner: PipelineRunner | None = None
        budget = options.budget.device_bytes
        self._host = host = pipeline_host(analyses.root, options, folder)
        self._problem, self._shares = problem, _ = decide_shares(run, options, analyses, host, shares)
        self.stays = {key: self._shares[key].stay for key in problem.programs}
        self.parts = {key: self._part(key, self._shares[key]) for key in problem.programs}
        self._calls = PipelineRun.of(problem, self._shares, self.parts, budget)
        self.spills = any(share.host is not None for share in self._shares.values())
        plain = not self.spills and not problem.parted
        self.early = (self._calls.decide(budget) if plain else ()) if early is None else early
        self._calls.check(self.early)
        self.locked_bytes = None if host is None else self._prove_host(host)
        if self.reserved_bytes > budget:
            raise PlanFileError(
                f"I1: the decisions need {format_bytes(self.reserved_bytes)} here, more than their budget of "
                f"{format_bytes(budget)}; plan the pipeline again"
            )

    @classmethod
    def of(cls, pipe: Any, options: Options, folder: PipelineFolder | None = None) -> PipelinePlan:
        """Dry run, captures, analyses, decisions. `folder`: where the pipeline was opened, if it was.

        Raises:
            PlannerError: as `plan()`.
        """
        analyses = Analyses.of(Components(pipelines.components_of(pipe)))
        return cls(pipe, options, analyses, pipelines.record(pipe, options.kwargs), folder=folder)

    def _part(self, key: str, share: MemberShare) -> Plan:
        made = self._problem.programs[key]
        options = member_options(self._options, made, share.solver.repeats)
        options = within(options, share.budget_bytes, share.host)
        target = self._analyses.root.get_submodule(made.path)
        tilings = self._problem.budget.members[key].tilings
        return Plan(target, options, tilings, share.schedule.decisions(share.solver.problem))

    def _prove_host(self, host: HostMemory) -> int:
        if not self.spills:
            return all_in_memory_bytes(host, self._shares)
        lacking = min(self._problem.opaque - (self.held or {}).keys(), default=None)
        if lacking is not None:
            raise PlanFileError(f"I3: the Python of a component reads {lacking}, which is on disk; plan the pipeline again")
        if self.early:
            raise PlanFileError("weights are to come early, and some of them from disk; plan the pipeline again")
        return check_hosts({key: part.emitted for key, part in self.parts.items()}, host.budget_bytes)

    def __str__(self) -> str:
        from planner.show_pipeline import describe_pipeline

        return describe_pipeline(self)

    def __repr__(self) -> str:
        return f"<PipelinePlan of {self.title}: {format_bytes(self.peak_bytes)} of {format_bytes(self.budget_bytes)}>"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PipelinePlan):
            return NotImplemented
        mine = (self.parts, self.stays, self.early, self.budget, self.machine, self.device)
        return mine == (other.parts, other.stays, other.early, other.budget, other.machine, other.device)

    __hash__ = None  # type: ignore[assignment]

    # What can be done with it.

    def replan(self, budget: int | str | Mapping[str | int, int | str] | Budget) -> PipelinePlan:
        """The same call under another budget; dry run and captures are reused.

        Raises:
            BudgetError, InfeasibleBudget: as `plan()`.
        """
        options = dataclasses.replace(self._options, budget=Budget.parse(budget, self.device), held=None)
        return PipelinePlan(self._pipe, options, self._analyses, self.run, folder=self.folder)

    def compare(self) -> Comparison:
        """The plan beside model, sequential and group offloading of the same pipeline, simulated and not run.

        Raises:
            PlannerError: a component is planned in parts.
        """
        from planner.pipeline_compare import compare_pipeline

        return compare_pipeline(self)

    def save(self, path: str | Path) -> None:
        """Writes decisions and fingerprint as JSON, atomically. No weights."""
        from planner.pipeline_file import save_pipeline

        save_pipeline(self, path)

    @classmethod
    def load(cls, path: str | Path, pipe: Any, *, call: Mapping[str, Any] | None = None) -> PipelinePlan:
        """A saved plan for this pipeline: dry run and captures are made again, decisions applied again, checked again.

        `call` is needed where the planned one had more than plain values: pictures, tensors, a generator.

        Raises:
            PlanFileError: truncated, of another version, or made for another pipeline (names the differing node).
        """
        from planner.pipeline_file import load_pipeline

        return load_pipeline(path, pipe, call)

    def build(self, weights: Any = None, *, concurrent: Literal["wait", "raise"] = "wait") -> Any:
        """The same pipeline, which runs the plan from now on: its components are the same objects, of the same classes.

        Weights move, one at a time, into one host arena that the components then share.

        Args:
            weights: for components on the meta device: another pipeline, a mapping of what `Plan.build` takes by the names of
                components, or the folder of a pipeline; by default the folder that was planned, if it was one.
            concurrent: what a call does while another thread is inside: wait or raise.

        Raises:
            PlannerError: no such device here, it is built already, or weights are missing.
        """
        if self._runner is not None and not self._runner.closed:
            raise PlannerError("this plan is built already; p.restore() before building again")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise PlannerError(
                f"this plan is for {self.device}, and there is no CUDA device here; build it where there is one, "
                "or plan with device='accounting'"
            )
        if weights is None and self.folder is not None:
            weights = self.folder.require_weights()
        lookup = None if weights is None else open_pipeline_weights(weights, self._analyses.root)
        with torch.inference_mode(False):
            self._runner = build_runner(self, lookup, concurrent)
        return self._pipe

    def programs(self) -> PipelinePrograms:
        """All that the runtime takes."""
        order = {key: index for index, key in enumerate(self.parts)}
        made = []
        for key, part in self.parts.items():
            own, member = self._problem.programs[key], self._problem.budget.members[key]
            made.append(
                PipelineProgram(
                    key, own.path, own.method, own.signature, part.executable, self.stays[key], member.phases, own.settings
                )
            )
        predicted = {
            "peak_bytes": float(self.peak_bytes),
            "reserved_bytes": float(self.reserved_bytes),
            "step_seconds": self.step_seconds,
        }
        parted = tuple(
            PartedCall(
                key,
                call.path,
                call.method,
                call.signature,
                tuple(order[part] for part in self._problem.parts[key].values()),
                call.opaque,
                self._problem.memory.weight_alignment,
            )
            for key, call in self._problem.parted.items()
        )
        order |= {call.key: ~index for index, call in enumerate(parted)}
        steps = tuple((order[key], phase) for key, phase in self._problem.steps)
        early = {(order[each.during], order[each.of]): each.pieces for each in self.early}
        return PipelinePrograms(tuple(made), steps, predicted, RunPace(self.machine.load_seconds), early, parted)

    def of_call(self, call: Mapping[str, Any]) -> PipelinePlan:
        """The plan of another call of the same pipeline within the same budget; calls that are known are not captured again.

        Raises:
            PlannerError: as `plan()`.
        """
        options = dataclasses.replace(self._options, kwargs=dict(call), held=self.held_now)
        run = pipelines.record(self._pipe, options.kwargs)
        return PipelinePlan(self._pipe, options, self._analyses, run, folder=self.folder)

    @property
    def held_now(self) -> Mapping[str, int] | None:
        """As `held`, and what calls that were planned since have brought; where it is built, that does not move."""
        store = None if self._runner is None else self._runner.store
        return self.held if store is None or not self.spills else store.held

    def call_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments of a call of the pipeline by name."""
        return named_call(functools.partial(type(self._pipe).__call__, self._pipe), args, kwargs)

    def _become(self, fresh: PipelinePlan, concurrent: Literal["wait", "raise"]) -> None:
        """The plan that takes the place of this one, since the pipeline has changed; built, or all is as before."""
        before = dict(vars(self))
        vars(self).clear()
        vars(self).update(vars(fresh))
        try:
            self._runner = build_runner(self, None, concurrent)
        except BaseException:
            vars(self).clear()
            vars(self).update(before)
            raise

    @property
    def runner(self) -> PipelineRunner | None:
        """What runs the built pipeline; None before `build()` and after `restore()`."""
        return None if self._runner is None or self._runner.closed else self._runner

    def report(self) -> PipelineReport:
        """What the last call of the built pipeline measured."""
        if self._runner is None:
            raise PlannerError("nothing was measured yet: pipe = p.build(), call pipe, then p.report()")
        return self._runner.report()

    def restore(self) -> Any:
        """Gives the pipeline back as it was: classes, weights, and where these were."""
        if self._runner is not None:
            self._runner.close()
        return self._pipe
