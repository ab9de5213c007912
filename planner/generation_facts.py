"""`GenerationFacts`: what is known of a plan of a generation. Bytes are those of a call, seconds those of a token or a call."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from planner.bounds import Bound, physical_bound
from planner.generation_host import shares_of
from planner.generation_problem import GenerationProblem, held_bytes
from planner.plan import Plan
from planner.profile_ops import counts_of
from planner.solve.homes import HostMemory
from planner.solve.phases import MemberShare
from planner.solve.problem import Problem
from planner.solve.simulate import StepTime

# What each phase has, and a plan of several has not.
_OF_PHASES = frozenset(
    [
        *["decisions", "emitted", "engines", "executable", "homes", "layout", "memory_use", "problem", "program", "proof"],
        *["schedule", "solver", "tilings", "timeline"],
    ]
)


class GenerationFacts(Plan):
    """See `GenerationPlan`."""

    phases: dict[str, Plan]
    rehearsal: Any
    _generation: GenerationProblem

    def __getattr__(self, name: str) -> Any:
        if name in _OF_PHASES:
            raise AttributeError(
                f"a plan of a generation has no {name!r} of its own; each of its phases has one: p.phases['decode'].{name}"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def problem(self) -> Problem:
        return self.__getattr__("problem")

    @property
    def decode(self) -> Plan:
        """The phase of a token after the first; the prefill where there is none."""
        return next((plan for name, plan in self.phases.items() if name.startswith("decode")), next(iter(self.phases.values())))

    @cached_property
    def peak_bytes(self) -> int:
        """Predicted: the most bytes that are live in a call of `generate`, what its Python holds included."""
        return max(self._live.values())

    @cached_property
    def reserved_bytes(self) -> int:
        return max(self._generation.peaks(self.phases).values())

    @cached_property
    def _live(self) -> dict[str, int]:
        return self._generation.peaks(self.phases, "peak_bytes")

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
        peaks = self._live
        name = max(peaks, key=lambda each: peaks[each])
        return f"{self.phases[name].peak_at}, {name}" if name in self.phases else f"the Python of generate, {name}"

    @property
    def peak_parts(self) -> dict[str, int]:
        """What the peak is made of, in bytes."""
        peaks = self._live
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
        return str(self.rehearsal.shape.prefix)

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
        found = {}
        for name, share in self._shares.items():
            copied = self.phases[name].layout.resident_bytes / self.machine.link_peak_bandwidth
            found[name] = max(copied, share.loaded_read_bytes / self.machine.disk_bandwidth) if self._loads[name] else 0.0
        return found

    @cached_property
    def _loads(self) -> dict[str, bool]:
        """By phase, whether what it keeps on the device is copied when it follows another one."""
        order = list(self.phases)
        layouts = [plan.layout.resident for plan in self.phases.values()]
        return {name: layouts[i - 1] != layouts[i] for i, name in enumerate(order)}

    @cached_property
    def _shares(self) -> dict[str, MemberShare]:
        return shares_of(self.phases)

    @property
    def spills(self) -> bool:
        """Whether some weights come from disk, since the host's memory has a budget and not all of them fit."""
        return self.decode.host is not None

    @cached_property
    def held(self) -> Mapping[str, int] | None:
        """The weights in the host's memory, with their bytes; None where all are."""
        return None if self.decode.host is None else self.decode.host.held

    @cached_property
    def read_bytes(self) -> int:
        """Predicted: of weights, from disk in one call of `generate`.

        What is read ahead for a token that does not come is not in it, nor are rows that are looked up.
        """
        streamed = [self.rehearsal.moments[n].calls * share.streamed_read_bytes for n, share in self._shares.items()]
        return sum(streamed) + sum(self.loaded_read_bytes(name) for name in self.phases)

    def loaded_read_bytes(self, phase: str) -> int:
        """What of that a phase reads before its calls."""
        return self._shares[phase].loaded_read_bytes if self._loads[phase] else 0

    @property
    def written_bytes(self) -> int:
        """Of weights, to disk by `build()`: what is neither in the host's memory nor in a checkpoint's files."""
        return max((plan.homes.scratch_bytes for plan in self.phases.values() if plan.homes is not None), default=0)

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
        """What no schedule can beat for a token after the first, if its phase had all of the host's memory."""
        name = next(name for name, plan in self.phases.items() if plan is self.decode)
        host = HostMemory(self.budget.host_bytes) if self.spills and self.budget.host_bytes is not None else None
        return physical_bound(self.decode.problem, budget_bytes - self.outside_bytes(name), host)

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
