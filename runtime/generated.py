"""`GenerationRunner`: runs a library's generation loop, each call of the model in it as the program of a phase.

The programs share one device session: one set of arenas, laid anew where the phase changes, and the cache, which is state of
all of them: on the device as long as the module is built, never on the host.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Container, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_unflatten

from runtime.devices.base import Device
from runtime.errors import PlannerError
from runtime.executable import Executable, WeightView
from runtime.executor import Executor
from runtime.fingerprint import Fingerprint
from runtime.layout import align
from runtime.origins import Lookup
from runtime.report import Report
from runtime.runner import Runner
from runtime.signature import CallSignature

log = logging.getLogger("vramplan")

# A call's signature, and what the cache's own Python decides by.
PhaseKey = tuple[CallSignature, tuple[Hashable, ...]]
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Generation:
    """All that serves one kind of `generate` call: programs by phase, on a cache of at most `length` tokens.

    `cache`: its tensors by their names among the programs' weights; each starts at a multiple of `alignment` bytes.
    """

    phases: Mapping[PhaseKey, Executable]
    cache: Mapping[str, WeightView]
    alignment: int
    length: int
    predicted: Mapping[str, float]


@dataclass(frozen=True)
class GenerationReport(Report):
    """As `Report`, of the last `generate` call. `step_seconds` are those of a token after the first.

    Attributes:
        prefill_seconds: until the first token. tokens: how many there were for each sequence.
    """

    prefill_seconds: float = 0.0
    tokens: int = 0


class Loop(Protocol):
    """The library's loop."""

    def outline(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable:
        """Equal for calls that the same programs serve in the same memory."""
        ...

    def run(
        self,
        step: Callable[[dict[str, Any], tuple[Hashable, ...]], Any],
        tensors: Mapping[str, torch.Tensor],
        length: int,
        device: torch.device,
        call: Call,
    ) -> Any:
        """Runs it: `step` is a call of the model, `tensors` are the cache's, which begins empty."""
        ...


Replan = Callable[[tuple[Any, ...], dict[str, Any]], Generation]


class GenerationRunner(Runner):
    """One per built plan of a generation."""

    def __init__(
        self,
        module: nn.Module,
        method: str,
        device: Device,
        budget_bytes: int,
        link_bandwidth: float,
        loop: Loop,
        replan: Replan,
        concurrent: Literal["wait", "raise"],
    ) -> None:
        super().__init__(module, method, device, budget_bytes, link_bandwidth, _never, concurrent)
        self.loop, self.replan_all = loop, replan
        self._known: dict[Hashable, Generation] = {}
        self._active: Generation | None = None
        self._taken: dict[int, tuple[Executable, Executable]] = {}  # by identity, which the entry keeps alive
        self._cache: dict[str, torch.Tensor] = {}
        self._starts: list[float] = []

    def attach_generation(self, call: Call, generation: Generation, lookup: Lookup | None = None) -> None:
        """Moves the weights of the module into the host arena; whatever goes wrong, the module is as before.

        Raises:
            PlannerError: a weight is on the meta device and nothing gives it.
        """
        try:
            self._move_weights([_without_cache(p, generation.cache) for p in generation.phases.values()], lookup, together=True)
            self.executor = self._new_executor()
            self._known[self.loop.outline(*call)] = generation
            self._activate(generation)
        except BaseException:
            self.close()
            raise

    def _new_executor(self) -> Executor:
        assert self.store is not None
        return Executor(self.device, self.store, self.state, alone=False)

    def _activate(self, generation: Generation) -> None:
        """Makes it what runs. A cache of another size takes the place of the one before."""
        if self._active is None or self._active.cache != generation.cache:
            self.executor.unload()
            self._drop_cache()
            self._taken.clear()
            for name, view in generation.cache.items():
                memory = self.device.allocate(align(view.nbytes, generation.alignment))
                self._cache[name] = self.state[name] = view.on(memory, 0).zero_()
        self._active = generation
        for program in generation.phases.values():
            if id(program) not in self._taken:
                self._taken[id(program)] = program, self._with_cache(program, generation.cache)
        self.fingerprint = Fingerprint(self.module, leftovers=self._states.keys())
        self.versions = self._versions()

    def _with_cache(self, program: Executable, cache: Mapping[str, WeightView]) -> Executable:
        """The program as it runs: its weights are in the store, its part of the cache is on the device."""
        taken = self._take(_without_cache(program, cache))
        cached = {key: view for key, view in program.weights.items() if view.name in cache}
        return dataclasses.replace(taken, weights={**taken.weights, **cached}, layout=program.layout)

    def _drop_cache(self) -> None:
        for name in self._cache:
            del self.state[name]
        self._cache.clear()

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the loop, planning for its call first if that is of a new kind."""
        self._refuse_closed()
        self._enter()
        try:
            leaves = tree_leaves((args, kwargs))
            with torch.inference_mode(False), torch.no_grad():
                self._guard(leaves, self.fingerprint.changed())
                self._choose(args, kwargs)
                return self._run_loop((args, kwargs), [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)])
        finally:
            self._leave()

    def _choose(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        outline = self.loop.outline(args, kwargs)
        known = self._known.get(outline)
        if known is None:
            log.info("%s: a new kind of call, planning again (%d so far)", self.method, len(self._known))
            known = self._known[outline] = self.replan_all(args, kwargs)
        if known is not self._active:
            self._activate(known)

    def _run_loop(self, call: Call, inputs: list[torch.Tensor]) -> Any:
        assert self._active is not None
        self.calls += 1
        self.device.loaded(self._active)
        self._starts = [time.perf_counter()]
        with self.device.call(inputs, [*self.executor.arenas, *self.state.values()]):
            result = self.loop.run(self._step, self._cache, self._active.length, self.device.torch_device, call)
        self._starts.append(time.perf_counter())
        return result

    def _step(self, kwargs: dict[str, Any], stages: tuple[Hashable, ...]) -> Any:
        """One call of the model."""
        assert self._active is not None
        signature, leaves = CallSignature.of((), kwargs)
        found = self._active.phases.get((signature, stages))
        if found is None:
            raise PlannerError(
                f"{self.method} calls the model as it did not when it was rehearsed, with {_sizes(leaves)}: a processor or "
                "criterion of yours may change the inputs; plan the call without it"
            )
        program = self._taken[id(found)][1]
        self._starts.append(time.perf_counter())
        self.executor.load(program)
        outputs = self.executor.run(leaves)
        return tree_unflatten(outputs, program.out_spec)

    def _predicted(self) -> Mapping[str, float] | None:
        return None if self._active is None else self._active.predicted

    def _bundles(self) -> tuple[tuple[str, ...], ...]:
        return ()  # several programs served the call

    def report(self) -> GenerationReport:
        measured = super().report()
        first = next((second for second in self._starts[2:]), self._starts[-1])
        tokens = len(self._starts) - 2
        own = {field.name: getattr(measured, field.name) for field in dataclasses.fields(Report)}
        own["step_seconds"] = (self._starts[-1] - first) / max(tokens - 1, 1)
        return GenerationReport(**own, prefill_seconds=first - self._starts[0], tokens=tokens)

    def close(self) -> None:
        if not self.closed:
            for executor in self._executors():
                executor.unload()
            self._drop_cache()
        super().close()


def _without_cache(program: Executable, cache: Container[str]) -> Executable:
    """The program with those weights alone that the module has."""
    weights = {key: view for key, view in program.weights.items() if view.name not in cache}
    state = tuple(slot for slot in program.layout.state if slot.weight in weights)
    return dataclasses.replace(program, weights=weights, layout=dataclasses.replace(program.layout, state=state))


def _sizes(leaves: list[Any]) -> str:
    shapes = [list(leaf.shape) for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return f"tensors of {', '.join(map(str, shapes))}"


def _never(args: tuple[Any, ...], kwargs: dict[str, Any], budget_bytes: int) -> Executable:
    raise AssertionError("whole generations are planned anew")
