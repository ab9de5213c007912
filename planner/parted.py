"""`PartedPlan`: the plan of a module that cannot be captured whole. Its parts are plans; its own Python runs between them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import nn

from planner.bounds import Bound
from planner.budget import Budget
from planner.cast_fit import fitted
from planner.gap import PartedGap
from planner.host_budget import host_memory
from planner.machine import Machine
from planner.memory import MemoryModel
from planner.names import Names
from planner.options import Options
from planner.parted_host import decide, given
from planner.parted_part import replan_part
from planner.parted_problem import PartedProblem, given_shares, infeasible_parts, prepare_parts, problem_of
from planner.plan import Plan
from planner.plan_file import check_fingerprint, fingerprint, write_plan
from planner.profile_ops import counts_of
from planner.progress import transferring
from planner.shared_host import within
from planner.sizes import format_bytes
from planner.solve.problem import Problem
from planner.solve.share import Share
from planner.solve.simulate import StepTime
from planner.solve.tilings import Tilings
from planner.weights import Lookup
from runtime.devices import open_device
from runtime.errors import CaptureError, InputError, InvalidCall, PlanFileError, PlannerError
from runtime.module import PlannedModule, planned
from runtime.parted import Parted, PartedRunner, PartProgram
from runtime.signature import CallSignature, bind_call

# What each part has, and a plan in parts has not.
_OF_PARTS = frozenset(
    [
        *["decisions", "emitted", "engines", "executable", "homes", "layout", "memory_use", "problem", "program", "proof"],
        *["schedule", "solver", "tilings", "timeline"],
    ]
)


class PartedPlan(Plan):
    """A plan in parts; what `Plan` says of one program holds for each of `parts`, and here for all of them together.

    Attributes:
        parts: a plan for every captured call, by key. kept: the keys of those whose arenas stay on the device between calls.
        exploration: what the Python between them was found to do.
        repeats: 1 whatever was asked for: no copies go over the seam between calls of a plan in parts.
        locked_bytes: the most that is taken of the host's memory, weights, rings and values; None where that has no budget.
    """

    def __init__(
        self, target: nn.Module, options: Options, problem: PartedProblem, decisions: Mapping[str, Any] | None = None
    ) -> None:
        # Each part is planned for one call, for Python runs in between: nothing is fetched over that seam.
        self._target, self._options, self._parted = target, dataclasses.replace(options, repeats=1), problem
        self._runner, self.validation = None, None
        self._host = host_memory(target, options)
        self.exploration = problem.exploration
        budget = options.budget.device_bytes
        if budget < problem.shared.minimum_bytes:
            raise infeasible_parts(target, options, problem)
        if decisions is None:
            self._homes = decide(problem, self._options, self._host)
        else:
            self._homes = given(problem, given_shares(problem, decisions), decisions, self._host)
        self._shares = shares = self._homes.shares
        self.kept = frozenset(key for key, share in shares.parts.items() if share.kept)
        self.parts = {key: self._part(key, share) for key, share in shares.parts.items()}
        self.locked_bytes = self._homes.prove(self.parts)
        if self.reserved_bytes > budget:
            raise PlanFileError(
                f"the decisions need {format_bytes(self.reserved_bytes)} here, more than their budget of "
                f"{format_bytes(budget)}; plan the model again"
            )

    def _part(self, key: str, share: Share) -> Plan:
        part = self.exploration.parts[key]
        child = self._target.get_submodule(part.path)
        solver = self._parted.solvers[key]
        options = dataclasses.replace(self._options, method="forward", args=part.call[0], kwargs=part.call[1])
        options = within(options, share.budget_bytes, self._homes.memory.get(key))
        return Plan(child, options, Tilings(solver), share.schedule.decisions(solver.problem))

    def __getattr__(self, name: str) -> Any:
        if name in _OF_PARTS:
            raise AttributeError(f"a plan in parts has no {name!r} of its own; each of its parts has one: p.parts[name].{name}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def problem(self) -> Problem:
        return self.__getattr__("problem")

    def save_trace(self, path: str | Path, *, measured: bool = False) -> None:
        raise self._no_timeline("save_trace", path)

    def save_memory_history(self, path: str | Path) -> None:
        raise self._no_timeline("save_memory_history", path)

    def plot(self, path: str | Path) -> None:
        raise self._no_timeline("plot", path)

    def _no_timeline(self, method: str, path: str | Path) -> PlannerError:
        part = next(iter(self.parts), "name")
        return PlannerError(
            "a plan in parts has no timeline of its own, for its Python runs as it is; take a part: "
            f"p.parts[{part!r}].{method}({str(path)!r})"
        )

    # What was found.

    @cached_property
    def peak_bytes(self) -> int:
        return self._parted.shared.peak_bytes(self._shares, {key: part.peak_bytes for key, part in self.parts.items()})

    @cached_property
    def reserved_bytes(self) -> int:
        return self._parted.shared.peak_bytes(self._shares, {key: part.reserved_bytes for key, part in self.parts.items()})

    @property
    def minimum_bytes(self) -> int:
        return self._parted.shared.minimum_bytes

    @property
    def unplanned_bytes(self) -> int:
        return self._parted.shared.unplanned_bytes

    @property
    def peak_at(self) -> str:
        """The part that is called, or the module whose Python runs."""
        peaks = {key: part.peak_bytes for key, part in self.parts.items()}
        at = self._parted.shared.peak_at(self._shares, peaks)
        return at if at is not None else f"the Python of {self.exploration.python_at or self.title}"

    @property
    def peak_parts(self) -> dict[str, int]:
        """What stays on the device, and the rest: tensors, and weights that pass through."""
        return {"resident weights": self.resident_bytes, "tensors and passing weights": self.peak_bytes - self.resident_bytes}

    @property
    def weight_bytes(self) -> int:
        names = Names(self._target)
        weights = {name: n for part in self.parts.values() for name, n in part.program.bytes_by_name().items()}
        read = {name for held in self.exploration.weights.values() for name in held}
        return sum((weights | {name: names.nbytes(name) for name in read}).values())

    @property
    def resident_bytes(self) -> int:
        kept = [part.layout for key, part in self.parts.items() if key in self.kept]
        opaque = sum(self._parted.shared.opaque_bytes[path] for path in self._shares.opaque)
        return sum(layout.resident_bytes for layout in kept) + self._parted.shared.state_bytes + opaque

    @property
    def band_bytes(self) -> int:
        """Nothing lives on the host in a plan in parts."""
        return 0

    @property
    def streamed_bytes(self) -> int:
        """Of one call; of an opaque module, as if it ran once."""
        calls, shared = self.exploration.calls, self._parted.shared
        streamed = sum(calls[key] * part.layout.streamed_bytes for key, part in self.parts.items())
        loaded = sum(calls[key] * part.layout.resident_bytes for key, part in self.parts.items() if key not in self.kept)
        return streamed + loaded + sum(n for path, n in shared.opaque_bytes.items() if path not in self._shares.opaque)

    @property
    def bundle_count(self) -> int:
        return sum(self.exploration.calls[key] * len(part.layout.bundles) for key, part in self.parts.items())

    @cached_property
    def time(self) -> StepTime:
        """Of all calls of parts, simulated, and of the copies around them; what Python itself takes is not known."""
        found, more = self._parted.shared.time(self._shares), self._homes.load_seconds
        return StepTime(found.step_seconds + more, found.stall_seconds + more, found.copy_seconds + more)

    @property
    def spills(self) -> bool:
        """Whether some weights come from disk, since the host's memory has a budget and not all of them fit."""
        return bool(self._homes.memory)

    @property
    def held(self) -> Mapping[str, int] | None:
        """The weights in the host's memory, with their bytes; None where all are."""
        return self._homes.held

    @property
    def read_bytes(self) -> int:
        """Of weights, from disk in one call, its parts called as often as they are at most; looked-up rows are not known."""
        return sum(
            self.exploration.calls[key] * (share.streamed_read_bytes + self._homes.loaded_read_bytes(key))
            for key, share in self._homes.members.items()
        )

    @property
    def written_bytes(self) -> int:
        """Of weights, to disk by `build()`: what is neither in the host's memory nor in a checkpoint's files."""
        return max((part.homes.scratch_bytes for part in self.parts.values() if part.homes is not None), default=0)

    @property
    def profiled(self) -> tuple[int, int] | None:
        return counts_of([solver.problem.profiled for solver in self._parted.solvers.values()])

    @property
    def cast_count(self) -> int:
        """None: parts are not cast."""
        return 0

    @property
    def cast_error(self) -> float:
        return 0.0

    def bound_at(self, budget_bytes: int) -> Bound:
        """As of one program: what arithmetic takes, and copying what cannot stay."""
        calls, solvers = self.exploration.calls, self._parted.solvers
        compute = sum(calls[key] * solver.problem.compute_seconds for key, solver in solvers.items())
        weights: dict[str, int] = {}
        for solver in solvers.values():
            weights |= solver.problem.program.bytes_by_name()
        outside = {key: max(moments.values()) for key, moments in self.exploration.outside.items()}
        needs = [outside[key] + solver.problem.most_activation_bytes for key, solver in solvers.items()]
        streamed = max(0, sum(weights.values()) - max(0, budget_bytes - max(needs, default=0)))
        return Bound(compute, streamed / self.machine.link_peak_bandwidth, streamed)

    @cached_property
    def gap(self) -> Any:
        """How far the plan is from the physical bound, and what more memory would buy: a `PartedGap`."""
        return PartedGap(self._parted.shared, self._shares, self.bound, self.budget_bytes)

    @property
    def code(self) -> str:
        """The programs of all parts as Python; what is printed is what runs."""
        where = "# {}: {} in each call of the module, its arenas {}\n"
        texts = []
        for key, part in self.parts.items():
            calls = self.exploration.calls[key]
            times = f"called {calls} times" if calls != 1 else "called once"
            texts.append(where.format(key, times, "kept" if key in self.kept else "made for each call") + part.code)
        return "\n\n".join(texts)

    def __str__(self) -> str:
        from planner.show_parts import describe_parts

        return describe_parts(self)

    def __repr__(self) -> str:
        return f"<Plan of {self.title} in {len(self.parts)} parts: {format_bytes(self.peak_bytes)}>"

    @property
    def title(self) -> str:
        return f"{type(self._target).__name__}.{self._options.method}"

    @property
    def python_bytes(self) -> int:
        """What Python holds at most between parts, the weights that it reads included."""
        return self._parted.shared.python_need(self._shares.opaque)

    @property
    def opaque(self) -> Mapping[str, str]:
        """Paths of the modules whose Python runs as it is, with the reason; "" is the module itself."""
        return self.exploration.reasons

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PartedPlan):
            return NotImplemented
        mine = (self.parts, self.kept, self.budget, self.machine, self.device)
        return mine == (other.parts, other.kept, other.budget, other.machine, other.device)

    __hash__ = None

    # What can be done with it.

    def replan(
        self, budget: int | str | Mapping[str | int, int | str] | Budget, *, machine: str | Machine | None = None
    ) -> Plan:
        options = dataclasses.replace(self._options, budget=Budget.parse(budget, self.device), held=None)
        if machine is None:
            return PartedPlan(self._target, options, self._parted)
        options = dataclasses.replace(options, machine=Machine.of(machine).on(self.device))
        return PartedPlan(self._target, options, problem_of(self._target, options, self.exploration))

    def save(self, path: str | Path) -> None:
        parts = {}
        for key, plan in self.parts.items():
            own: dict[str, Any] = {"kept": key in self.kept, "budget_bytes": self._shares.parts[key].budget_bytes}
            own |= {"host_bytes": plan.budget.host_bytes} if self.spills else {}
            parts[key] = own | plan.decisions.to_json()
        held = {} if self.held is None else {"held": dict(self.held)}
        write_plan(
            path,
            name=self.title,
            fingerprint=[f"{key}/{entry}" for key, plan in self.parts.items() for entry in fingerprint(plan.program)],
            decisions={"parts": parts, "opaque": sorted(self._shares.opaque), **held},
            budget=self.budget,
            machine=self.machine,
            device=self.device,
            method=self._options.method,
            call=(self._options.args, self._options.kwargs),
            keep=self._options.keep,
            offload=self._options.offload,
            opaque_bytes=self._options.opaque_bytes,
            profile=self._options.profile,
            folder=self._options.folder,
        )

    @classmethod
    def of_saved(
        cls, model: nn.Module, options: Options, problem: PartedProblem, saved: list[str], decisions: Mapping[str, Any]
    ) -> Plan:
        """The plan whose decisions were read from a file.

        Raises:
            PlanFileError: they are for another model.
        """
        own = [f"{k}/{entry}" for k, part in problem.exploration.parts.items() for entry in fingerprint(part.program)]
        check_fingerprint(saved, own)
        if "held" in decisions:
            options = dataclasses.replace(options, held={str(name): int(n) for name, n in decisions["held"].items()})
        return cls(model, options, problem, decisions)

    def _build(self, lookup: Lookup | None, concurrent: Literal["wait", "raise"]) -> PlannedModule:
        runner = PartedRunner(
            self._target,
            self._options.method,
            open_device(self.device, self.budget.disk_bytes),
            self.budget_bytes,
            self.machine.link_peak_bandwidth,
            self._replan_all,
            functools.partial(replan_part, self),
            concurrent,
        )
        with transferring(f"moving the weights of {type(self._target).__name__} into the host arena") as runner.moved:
            runner.attach_parts(_signature(self._target, self._options), self._runnable(), lookup)
        self._runner = runner
        return planned(self._target, runner)

    def _runnable(self) -> Parted:
        """All that the runtime takes."""
        programs = tuple(
            PartProgram(
                self.exploration.parts[key].path, self.exploration.parts[key].signature, part.executable, key in self.kept
            )
            for key, part in self.parts.items()
        )
        predicted = {
            "peak_bytes": float(self.peak_bytes),
            "reserved_bytes": float(self.reserved_bytes),
            "step_seconds": self.step_seconds,
        }
        weights = self.exploration.weights
        kept = frozenset(name for path in self._shares.opaque for name in weights[path])
        memory = MemoryModel.of(self.device.partition(":")[0], self.machine.capability)
        return Parted(programs, weights, kept, memory.weight_alignment, predicted)

    def _replan_all(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Parted:
        options = dataclasses.replace(self._options, args=args, kwargs=kwargs, held=self.held_now)
        problem = prepare_parts(self._target, options, self.exploration.reasons[""])
        return PartedPlan(self._target, options, problem)._runnable()

    @property
    def held_now(self) -> Mapping[str, int] | None:
        """As `held`, and what calls that were planned since have brought; where it is built, that does not move."""
        store = None if self._runner is None else self._runner.store
        return self.held if store is None or not self.spills else store.held


def _signature(target: nn.Module, options: Options) -> CallSignature | None:
    try:
        return CallSignature.of(*bind_call(getattr(target, options.method), options.args, options.kwargs))[0]
    except InputError:
        return None


def plan_or_parts(model: nn.Module, options: Options, whole: Callable[[nn.Module, Options], Tilings]) -> Plan:
    """The plan of the whole module where it can be captured, else a plan in parts.

    Raises:
        PlannerError: as `plan()`.
    """
    try:
        tilings = whole(model, options)
    except InvalidCall:
        raise
    except CaptureError as error:
        if options.dynamic is not None:
            raise  # sizes of Python that runs as it is are found for one call at a time
        return PartedPlan(model, options, _explored(model, options, error))
    return fitted(Plan(model, options, tilings))


def _explored(model: nn.Module, options: Options, error: CaptureError) -> PartedProblem:
    """The parts; where there are none to be had, the first error is the one that tells."""
    try:
        problem = prepare_parts(model, options, str(error))
    except CaptureError as other:
        raise error from other
    return problem
