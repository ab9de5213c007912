"""`GenerationPlan`: the plan of a language model's `generate`. Prefill and decode are phases in one budget, on one cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from torch import nn

from planner.budget import Budget
from planner.compare import Comparison
from planner.frontier import POINTS, Frontier
from planner.generation_facts import GenerationFacts
from planner.generation_host import given_phases, proved_bytes, with_homes
from planner.generation_problem import GenerationProblem, plan_phases, prepare_generation
from planner.machine import Machine
from planner.options import Options
from planner.plan import Plan
from planner.plan_file import check_fingerprint, fingerprint, write_plan
from planner.progress import transferring
from planner.sizes import format_bytes
from planner.weights import Lookup
from runtime.devices import open_device
from runtime.errors import PlanFileError, PlannerError
from runtime.generated import Generation, GenerationReport, GenerationRunner
from runtime.module import PlannedModule, planned
from runtime.origins import view_of


class GenerationPlan(GenerationFacts):
    """A plan of `generate`; what `Plan` says of one program holds for each of `phases`, and here for a whole call.

    A call of `generate` on the built model runs the library's own loop (greedy or sampling, with its processors, criteria and
    streamers), each call of the model in it as a program. Its cache is static, has room for the planned prompt and new tokens,
    is on the device as long as the model is built, and counts in the budget. So a default `generate()`, whose cache would grow,
    runs on this one. What is called otherwise (a prompt of another length, more tokens, padding, another batch) is planned
    anew when it is first called, once for each kind of call, with a line in the log; tokens never are. A cache that is large
    enough stays; a larger one takes its place, within the same budget. Beam search, assistants, other caches and
    `use_cache=False` are refused, with the call to make instead.

    Attributes:
        phases: a plan for each kind of call of the model, by name: "prefill", "decode"; where a window of attention fills up
            while tokens are generated, "decode_2" from then on.
        locked_bytes: the most that is taken of the host's memory, weights, rings and values; None where that has no budget.
        rehearsal: what a call was found to do.
    """

    def __init__(
        self, target: nn.Module, options: Options, problem: GenerationProblem, given: Mapping[str, Any] | None = None
    ) -> None:
        self._target, self._options, self._generation = target, options, problem
        self._runner, self._lookup, self.validation = None, None, None
        self.rehearsal = problem.rehearsal
        self._host = problem.host
        self.phases = with_homes(problem, plan_phases(problem)) if given is None else given_phases(problem, given)
        self.locked_bytes = proved_bytes(problem, self.phases)
        if self.reserved_bytes > self.budget_bytes:
            raise PlanFileError(
                f"the decisions need {format_bytes(self.reserved_bytes)} here, more than their budget of "
                f"{format_bytes(self.budget_bytes)}; plan the model again"
            )

    def __str__(self) -> str:
        from planner.show_generation import describe_generation

        return describe_generation(self)

    def __repr__(self) -> str:
        return f"<Plan of {self.title} in {len(self.phases)} phases: {format_bytes(self.peak_bytes)}>"

    @property
    def title(self) -> str:
        return f"{type(self._target).__name__}.generate"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GenerationPlan):
            return NotImplemented
        mine = (self.phases, self.budget, self.machine, self.device)
        return mine == (other.phases, other.budget, other.machine, other.device)

    __hash__ = None  # type: ignore[assignment]

    # What can be done with it.

    def replan(
        self, budget: int | str | Mapping[str | int, int | str] | Budget, *, machine: str | Machine | None = None
    ) -> Plan:
        options = dataclasses.replace(self._options, budget=Budget.parse(budget, self.device), held=None)
        if machine is None:
            return GenerationPlan(self._target, options, dataclasses.replace(self._generation, options=options))
        options = dataclasses.replace(options, machine=Machine.of(machine).on(self.device))
        return GenerationPlan(self._target, options, self._generation.for_machine(options))

    def save(self, path: str | Path) -> None:
        host = {name: {"host_bytes": plan.budget.host_bytes} if self.spills else {} for name, plan in self.phases.items()}
        phases = {
            name: {"budget_bytes": plan.budget_bytes, **host[name], **plan.decisions.to_json()}
            for name, plan in self.phases.items()
        }
        held = {} if self.held is None else {"held": dict(self.held)}
        write_plan(
            path,
            name=self.title,
            fingerprint=[f"{name}/{entry}" for name, plan in self.phases.items() for entry in fingerprint(plan.program)],
            decisions={"phases": phases, "padded": self.padded, **held},
            budget=self.budget,
            machine=self.machine,
            device=self.device,
            method="generate",
            call=(self._options.args, self._options.kwargs),
            keep=self._options.keep,
            offload=self._options.offload,
            profile=self._options.profile,
            tile=self._options.tile,
            casts=self._options.casts,
            max_error=self._options.max_error,
            layout=self._options.layout,
            attention=self._options.attention,
            folder=self._options.folder,
        )

    @classmethod
    def of_saved(cls, model: nn.Module, options: Options, saved: list[str], decisions: Mapping[str, Any]) -> Plan:
        """The plan whose decisions were read from a file.

        Raises:
            PlanFileError: they are for another model.
        """
        if "held" in decisions:
            held = {str(name): int(nbytes) for name, nbytes in decisions["held"].items()}
            options = dataclasses.replace(options, held=held)
        problem = prepare_generation(model, options, padded=bool(decisions["padded"]))
        own = [f"{phase.name}/{entry}" for phase in problem.phases for entry in fingerprint(phase.program)]
        check_fingerprint(saved, own)
        return cls(model, options, problem, decisions["phases"])

    def _build(self, lookup: Lookup | None, concurrent: Literal["wait", "raise"]) -> PlannedModule:
        from planner.frontends.transformers_generate import Loop

        runner = GenerationRunner(
            self._target,
            "generate",
            open_device(self.device, self.budget.disk_bytes),
            self.budget_bytes,
            self.machine.link_peak_bandwidth,
            Loop(self._target),
            self._replan_all,
            concurrent,
        )
        with transferring(f"moving the weights of {type(self._target).__name__} into the host arena") as runner.moved:
            runner.attach_generation((self._options.args, self._options.kwargs), self._runnable(), lookup)
        self._runner = runner
        return planned(self._target, runner)

    def _runnable(self) -> Generation:
        """All that the runtime takes."""
        keys = {phase.name: phase.key for phase in self._generation.phases}
        predicted = {
            "peak_bytes": float(self.peak_bytes),
            "reserved_bytes": float(self.reserved_bytes),
            "step_seconds": self.step_seconds,
        }
        programs = {keys[name]: plan.executable for name, plan in self.phases.items()}
        first, cache = self._generation.phases[0], {}
        for name, tensor in first.module.named_buffers():
            if name.startswith(self._prefix):
                cache[name] = view_of(name, tensor)
        return Generation(programs, cache, self._generation.alignment, self.rehearsal.shape.length, predicted)

    def _replan_all(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Generation:
        options = dataclasses.replace(self._options, args=args, kwargs=kwargs, held=self.held_now)
        problem = prepare_generation(self._target, options, self._generation.known)
        return GenerationPlan(self._target, options, problem)._runnable()

    @property
    def held_now(self) -> Mapping[str, int] | None:
        """As `held`, and what calls that were planned since have brought; where it is built, that does not move."""
        store = None if self._runner is None else self._runner.store
        return self.held if store is None or not self.spills else store.held

    def report(self) -> GenerationReport:
        found = super().report()
        assert isinstance(found, GenerationReport)
        return found

    # What is of one program.

    def compare(self) -> Comparison:
        raise self._of_one_phase("compare()")

    def frontier(self, budgets: Iterable[int | str] | None = None, points: int = POINTS, *, compare: bool = False) -> Frontier:
        raise self._of_one_phase("frontier()")

    def save_trace(self, path: str | Path, *, measured: bool = False) -> None:
        raise self._of_one_phase(f"save_trace({str(path)!r})")

    def save_memory_history(self, path: str | Path) -> None:
        raise self._of_one_phase(f"save_memory_history({str(path)!r})")

    def plot(self, path: str | Path) -> None:
        raise self._of_one_phase(f"plot({str(path)!r})")

    def peak_bytes_at(self, **sizes: int) -> int:
        raise self._of_one_size()

    def largest(self, dim: str, /, **sizes: int) -> int:
        raise self._of_one_size()

    def emit(self, folder: str | Path, weights: Any = None, *, max_shard_size: int | str = "5GB", copy: bool = True) -> None:
        raise PlannerError(
            "the loop of generate is Python of transformers, and a package runs without it: emit the model's forward instead, "
            f"plan(model, budget, inputs=(ids,), kwargs={{'use_cache': False}}).emit({str(folder)!r})"
        )

    def _of_one_phase(self, call: str) -> PlannerError:
        name = next(name for name, plan in self.phases.items() if plan is self.decode)
        return PlannerError(f"a generation is {len(self.phases)} programs; take one of them: p.phases[{name!r}].{call}")

    def _of_one_size(self) -> PlannerError:
        return PlannerError(
            "a generation is planned for one prompt and so many new tokens; plan it with others to see their peaks: "
            "plan(model, budget, method='generate', inputs=(ids,), kwargs={'max_new_tokens': 256}).peak_bytes"
        )


def plan_generation(model: nn.Module, options: Options) -> GenerationPlan:
    """The plan of the call of `generate` in the options.

    Raises:
        PlannerError: as `plan()`.
    """
    return GenerationPlan(model, options, prepare_generation(model, options))
