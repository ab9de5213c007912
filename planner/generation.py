"""`GenerationPlan`: the plan of a language model's `generate`. Prefill and decode are phases within one budget, on one cache."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import nn

from planner.bounds import Bound
from planner.budget import Budget
from planner.generation_problem import (
    GenerationProblem,
    given_phases,
    held_bytes,
    plan_phases,
    prepare_generation,
)
from planner.machine import Machine
from planner.options import Options
from planner.plan import Plan
from planner.plan_file import check_fingerprint, fingerprint, write_plan
from planner.profile_ops import counts_of
from planner.progress import transferring
from planner.sizes import format_bytes
from planner.solve.problem import Problem
from planner.solve.simulate import StepTime
from planner.weights import Lookup
from runtime.devices import open_device
from runtime.errors import PlanFileError, PlannerError
from runtime.generated import Generation, GenerationReport, GenerationRunner
from runtime.module import PlannedModule, planned
from runtime.origins import view_of

# What each phase has, and a plan of several has not.
_OF_PHASES = frozenset(
    ["decisions", "emitted", "engines", "executable", "layout", "memory_use", "problem", "program", "proof", "timeline"]
)


class GenerationPlan(Plan):
    """A plan of `generate`; what `Plan` says of one program holds for each of `phases`, and here for a whole call.

    A call of `generate` on the built model runs the library's own loop (greedy or sampling, with its processors, criteria and
    streamers), each call of the model in it as a program. Its cache is static, has room for the planned prompt and new tokens,
    is on the device as long as the model is built, and counts in the budget. So a default `generate()`, whose cache would grow,
    runs on this one. Shorter prompts and fewer tokens do too. What needs more (a longer prompt, more tokens, a larger batch) and
    what is called otherwise (another length of the prompt, padding) is planned anew when it is first called, once for each kind
    of call, with a line in the log; tokens never are. Beam search, assistants, other caches and `use_cache=False` are refused.

    Attributes:
        phases: a plan for each kind of call of the model, by name: "prefill", "decode"; where a window of attention fills up
            while tokens are generated, "decode_2" from then on.
        rehearsal: what a call was found to do.
    """

    def __init__(
        self, target: nn.Module, options: Options, problem: GenerationProblem, given: Mapping[str, Any] | None = None
    ) -> None:
        self._target, self._options, self._generation = target, options, problem
        self._runner, self._lookup, self.validation = None, None, None
        self.rehearsal = problem.rehearsal
        self.phases = plan_phases(problem) if given is None else given_phases(problem, given)
        if self.reserved_bytes > self.budget_bytes:
            raise PlanFileError(
                f"the decisions need {format_bytes(self.reserved_bytes)} here, more than their budget of "
                f"{format_bytes(self.budget_bytes)}; plan the model again"
            )

    def __getattr__(self, name: str) -> Any:
        if name in _OF_PHASES:
            raise AttributeError(
                f"a plan of a generation has no {name!r} of its own; each of its phases has one: p.phases['decode'].{name}"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def problem(self) -> Problem:
        return self.__getattr__("problem")

    # What was found.

    @property
    def decode(self) -> Plan:
        """The phase of a token after the first; the prefill where there is none."""
        return next((plan for name, plan in self.phases.items() if name.startswith("decode")), next(iter(self.phases.values())))

    @cached_property
    def peak_bytes(self) -> int:
        """Predicted: the most bytes that are live in a call of `generate`, what its Python holds included."""
        return max(self._peaks("peak_bytes").values())

    @cached_property
    def reserved_bytes(self) -> int:
        return max(self._peaks("reserved_bytes").values())

    def _peaks(self, which: str) -> dict[str, int]:
        """Of the programs by their phases, and of Python after each as "after ..."."""
        peaks = {}
        for name, plan in self.phases.items():
            peaks[name] = self.outside_bytes(name) + int(getattr(plan, which))
            peaks[f"after {name}"] = self._generation.python_bytes(name) + held_bytes(plan.layout)
        return peaks

    @property
    def minimum_bytes(self) -> int:
        return self._generation.minimum_bytes

    @property
    def unplanned_bytes(self) -> int:
        return max(self.outside_bytes(name) + plan.unplanned_bytes for name, plan in self.phases.items())

    @property
    def cache_bytes(self) -> int:
        """Of the static cache."""
        return self.rehearsal.shape.nbytes

    @property
    def peak_at(self) -> str:
        """The phase, with operator and module; or Python after it."""
        peaks = self._peaks("peak_bytes")
        name = max(peaks, key=lambda each: peaks[each])
        return f"{self.phases[name].peak_at}, {name}" if name in self.phases else f"the Python of generate, {name}"

    @property
    def peak_parts(self) -> dict[str, int]:
        """What the peak is made of, in bytes."""
        peaks = self._peaks("peak_bytes")
        name = max(peaks, key=lambda each: peaks[each])
        if name not in self.phases:
            held = held_bytes(self.phases[name.removeprefix("after ")].layout)
            return {"weights and cache": held, "Python": peaks[name] - held}
        parts, layout = dict(self.phases[name].peak_parts), self.phases[name].layout
        parts["resident weights"] -= layout.state_bytes
        return {**parts, "cache": layout.state_bytes, "Python": self.outside_bytes(name)}

    @property
    def weight_bytes(self) -> int:
        """Of all weights that are read; the cache is none."""
        return sum(self._bytes_by_name().values())

    def _bytes_by_name(self) -> dict[str, int]:
        named: dict[str, int] = {}
        for plan in self.phases.values():
            named |= {w.name: w.nbytes for w in plan.program.weights.values() if not w.name.startswith(self._prefix)}
        return named

    @property
    def _prefix(self) -> str:
        from planner.frontends.transformers_generate import CACHE

        return f"{CACHE}."

    @property
    def resident_bytes(self) -> int:
        """Of weights that stay on the device from token to token, and of the cache."""
        return self.decode.resident_bytes

    @property
    def streamed_bytes(self) -> int:
        """Of weights that are copied to the device for each token."""
        return self.decode.streamed_bytes

    @property
    def band_bytes(self) -> int:
        return self.decode.band_bytes

    @property
    def bundle_count(self) -> int:
        return self.decode.bundle_count

    def outside_bytes(self, phase: str) -> int:
        """What is on the device besides the program of a phase and its inputs while it runs: tensors of Python, mostly."""
        return self._generation.outside_bytes(phase)

    @property
    def prompt_tokens(self) -> int:
        """Of the planned prompt, of each sequence."""
        return self.rehearsal.prompt_tokens

    @property
    def padded(self) -> bool:
        """Whether the prompts are padded: a mask is given for them."""
        first = next(iter(self.phases.values()))
        return first.options.kwargs.get("attention_mask") is not None

    @property
    def tokens(self) -> int:
        """How many are generated for each sequence if nothing ends it."""
        return self._generation.tokens

    @property
    def repeats(self) -> int:
        return self.decode.repeats

    @cached_property
    def time(self) -> StepTime:
        """Of a token after the first, on average."""
        decoding = {name: plan for name, plan in self.phases.items() if name.startswith("decode")} or self.phases
        calls = {name: self.rehearsal.moments[name].calls for name in decoding}
        total = sum(calls.values())

        def mean(which: str) -> float:
            return sum(calls[name] * float(getattr(plan.time, which)) for name, plan in decoding.items()) / total

        return StepTime(mean("step_seconds"), mean("stall_seconds"), mean("copy_seconds"))

    @property
    def prefill_seconds(self) -> float:
        """Predicted: until the first token, the copies of what it keeps on the device included."""
        names = [name for name in self.phases if name.startswith("prefill")]
        run = sum(self.rehearsal.moments[name].calls * self.phases[name].step_seconds for name in names)
        return run + sum(self.load_seconds[name] for name in names)

    @cached_property
    def load_seconds(self) -> dict[str, float]:
        """Predicted, by phase: the copies of what it keeps on the device, when it follows another one."""
        order = list(self.phases)
        found = {}
        for index, name in enumerate(order):
            before, own = self.phases[order[index - 1]].layout, self.phases[name].layout
            fresh = 0 if index == 0 and len(order) == 1 else own.resident_bytes
            found[name] = (0 if before.resident == own.resident else fresh) / self.machine.link_peak_bandwidth
        return found

    @property
    def generate_seconds(self) -> float:
        """Predicted: a whole call, Python aside."""
        decoding = sum(seconds for name, seconds in self.load_seconds.items() if name.startswith("decode"))
        after = self.tokens - sum(self.rehearsal.moments[n].calls for n in self.phases if n.startswith("prefill"))
        return self.prefill_seconds + decoding + after * self.step_seconds

    @property
    def profiled(self) -> tuple[int, int] | None:
        return counts_of([plan.problem.profiled for plan in self.phases.values()])

    @property
    def cast_count(self) -> int:
        return max(plan.cast_count for plan in self.phases.values())

    @property
    def cast_error(self) -> float:
        """The relative error of the logits that casts cause, estimated: of the worst phase."""
        return max(plan.cast_error for plan in self.phases.values())

    @property
    def symbols(self) -> dict[str, Any]:
        return {}

    def bound_at(self, budget_bytes: int) -> Bound:
        """What no schedule can beat for a token after the first."""
        name = next(name for name, plan in self.phases.items() if plan is self.decode)
        return self.decode.bound_at(budget_bytes - self.outside_bytes(name))

    @property
    def gap(self) -> Any:
        """That of a token after the first."""
        return self.decode.gap

    @property
    def code(self) -> str:
        """The programs of all phases as Python; what is printed is what runs."""
        texts = []
        for name, plan in self.phases.items():
            calls = self.rehearsal.moments[name].calls
            texts.append(f"# {name}: {'once' if calls == 1 else f'{calls} times'} in a call of generate\n{plan.code}")
        return "\n\n".join(texts)

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

    __hash__ = None

    # What can be done with it.

    def replan(
        self, budget: int | str | Mapping[str | int, int | str] | Budget, *, machine: str | Machine | None = None
    ) -> Plan:
        options = dataclasses.replace(self._options, budget=Budget.parse(budget, self.device))
        if machine is None:
            return GenerationPlan(self._target, options, dataclasses.replace(self._generation, options=options))
        options = dataclasses.replace(options, machine=Machine.of(machine).on(self.device))
        return GenerationPlan(self._target, options, self._generation.for_machine(options))

    def save(self, path: str | Path) -> None:
        phases = {
            name: {"budget_bytes": plan.budget_bytes, **plan.decisions.to_json()} for name, plan in self.phases.items()
        }
        write_plan(
            path,
            name=self.title,
            fingerprint=[f"{name}/{entry}" for name, plan in self.phases.items() for entry in fingerprint(plan.program)],
            decisions={"phases": phases, "padded": self.padded},
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
        options = dataclasses.replace(self._options, args=args, kwargs=kwargs)
        problem = prepare_generation(self._target, options, self._generation.known)
        return GenerationPlan(self._target, options, problem)._runnable()

    def report(self) -> GenerationReport:
        found = super().report()
        assert isinstance(found, GenerationReport)
        return found

    def _of_one_phase(self, method: str) -> PlannerError:
        return PlannerError(
            f"{method} is for one program, and a generation has {len(self.phases)}; take a phase: p.phases['decode'].{method}(...)"
        )


def plan_generation(model: nn.Module, options: Options) -> GenerationPlan:
    """The plan of the call of `generate` in the options.

    Raises:
        PlannerError: as `plan()`.
    """
    return GenerationPlan(model, options, prepare_generation(model, options))


def generates(model: object) -> bool:
    """Whether it is a model of transformers that generates."""
    if "transformers" not in sys.modules:
        return False
    from planner.frontends.transformers_rehearsal import generates as find

    return find(model)
