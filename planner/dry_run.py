"""The dry run of a pipeline: its own Python runs for real, its components do not run at all.

The outermost call that the pipeline makes on a component, whatever the method, is recorded and answered with zeros of the right
shapes. What comes out is which calls there are, in which order, how often, and how many bytes the pipeline's own Python holds
on the execution device while each runs and between them.

    record("P", {"unet": unet, "vae": vae}, run, call={"steps": 20})  ->  (unet.forward) x 20, vae.decode x 1

Where bytes are: see `planner.pretend_device`. Tensors of the call that are on the CPU are on the host until the pipeline moves
them; those on another device (or on meta) are on the execution device. Workspace inside of operators that the pipeline's own
Python runs is not counted: they are elementwise ones and copies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves, tree_map

from planner.call_key import CallKey
from planner.component_results import Outcome, is_integer, outcome_of
from planner.dry_run_calls import ComponentCall, DryRun, Step
from planner.frontends.caches import register_containers
from planner.isolate import exchanged_weights, random_draws
from planner.outermost import Outermost, outermost_calls
from planner.plain_state import held_objects
from planner.pretend_device import PretendDevice, plain_devices
from planner.refuse import refuse_unplannable
from planner.settings import Settings
from runtime.errors import PlannerError
from runtime.fingerprint import Fingerprint


class OpenEnded(Protocol):
    """Answers methods that go on until values say stop, such as `generate`.

    Gives the tensors that such a call gives at most, and how many steps these are; None for all other methods.
    """

    def __call__(
        self, module: nn.Module, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], /
    ) -> tuple[Any, int] | None: ...


def record(
    name: str,
    components: Mapping[str, nn.Module],
    run: Callable[..., Any],
    call: Mapping[str, Any],
    *,
    state: Iterable[Any] = (),
    open_ended: OpenEnded | None = None,
) -> DryRun:
    """The dry run of `run(**call)`.

    Components may be on any device, and on meta. Afterwards they are untouched, and so are random state, generators and tensors
    in the call, and all that can be reached from the objects in `state` (schedulers, the pipeline's attributes). Arguments
    with "callback" in their names are not passed when they can be called.

    Raises:
        PlannerError: a component that cannot be planned, a call of one whose result cannot be had without values, or an error
            of the pipeline's own Python.
    """
    register_containers()
    recorder = _Recorder(name, components, open_ended)
    with contextlib.ExitStack() as stack:
        stack.enter_context(held_objects(*state))
        stack.enter_context(random_draws())
        for component in components.values():
            stack.enter_context(exchanged_weights(component, _without_bytes))
        device = stack.enter_context(recorder.device)
        stack.enter_context(outermost_calls(components, recorder.answer))
        for component in components.values():
            device.own((*component.parameters(), *component.buffers()))
        try:
            with device.pause():
                own = _own_call(call, device)
                recorder.begin()
            run(**own)
        except PlannerError:
            raise
        except Exception as error:
            raise PlannerError(
                f"the dry run of {name} ends in an error of its own Python, {type(error).__name__}: {error}. Either the call "
                "is wrong, and fails without a plan too, or that Python cannot go on where components give zeros; then plan "
                "them one by one: plan(pipe.transformer, ...)"
            ) from error
        return recorder.finish()


class _Recorder:
    """Answers the calls of components, and keeps what it needs to tell them apart."""

    def __init__(self, name: str, components: Mapping[str, nn.Module], open_ended: OpenEnded | None) -> None:
        self.name, self.components = name, components
        self.device = PretendDevice()
        self._open_ended = open_ended
        self._refused = {component: _refusal(module) for component, module in components.items()}
        self._outcomes: dict[Any, tuple[Outcome, Fingerprint]] = {}
        self._integers: set[Any] = set()  # keys of calls for which integers count
        self._calls: dict[Any, ComponentCall] = {}
        self._order: dict[Any, int] = {}
        self._steps: list[Step] = []
        self._settings: dict[str, Settings] = {}

    def begin(self) -> None:
        """From here on the pipeline's Python runs: how components are set now is how they are as usual."""
        self._settings = {name: Settings(component) for name, component in self.components.items()}

    def answer(self, call: Outermost) -> Any:
        given = (call.args, call.kwargs)
        if call.method != "forward" and not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(given)):
            result = call.function(*call.args, **call.kwargs)
            if not _computes(call.module, result):
                return result  # `cache_context`, `set_adapters`: nothing that runs on a device
        between = self.device.take_peak()
        refused = self._refused[call.component]
        if refused is not None:
            raise refused
        with self.device.pause():
            args, kwargs = plain_devices(given)
            settings = self._settings[call.component].differing()
            key = CallKey.of(call.component, call.method, args, kwargs, call.module, settings)
            result, how, most = self._result(call, key, (args, kwargs))
        held, arguments = self.device.held, self.device.bytes_of(given)
        self.device.answer(result)
        self._add(key, how, most, settings, given, result, Step(0, key.floats, held - arguments, arguments, between))
        self.device.take_peak()
        return result

    def finish(self) -> DryRun:
        calls = tuple(self._calls[key] for key in self._order)
        last = self.device.take_peak()
        return DryRun(self.name, calls, tuple(self._steps), last, tuple(self.device.asked), self.device.read_bytes)

    def _result(self, call: Outermost, key: CallKey, given: tuple[Any, Any]) -> tuple[Any, Any, int | None]:
        if self._open_ended is not None:
            found = self._open_ended(call.module, call.method, *given)
            if found is not None:
                return tree_map(_zeros, found[0]), "fakes", found[1]
        exact: Any = key
        if key.without_floats in self._integers:
            exact = (key, _integers(given))
        known = self._outcomes.get(exact)
        if known is None or known[1].changed() is not None:
            outcome = outcome_of(call.module, call.function, given, f"{call.component}.{call.method}")
            if outcome.how != "fakes":
                self._integers.add(key.without_floats)
                exact = (key, _integers(given))
            known = self._outcomes[exact] = outcome, Fingerprint(call.module)
        return known[0].zeros(given), known[0].how, None

    def _add(self, key: CallKey, how: Any, most: int | None, settings: Any, given: Any, result: Any, step: Step) -> None:
        same = key.without_floats, ComponentCall.outline(result)
        if same not in self._calls:
            self._order[same] = len(self._order)
            self._calls[same] = ComponentCall.of(
                key, given, result, by_values=how == "values", most_steps=most, settings=settings
            )
        self._steps.append(replace(step, call=self._order[same]))


def _refusal(module: nn.Module) -> PlannerError | None:
    try:
        refuse_unplannable(module, "forward")
    except PlannerError as error:
        return error
    return None


def _computes(module: nn.Module, result: Any) -> bool:
    """Whether a result holds tensors that are no weights."""
    own = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    return any(isinstance(leaf, torch.Tensor) and id(leaf) not in own for leaf in tree_leaves(result))


def _without_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """In place of a weight while the pipeline's Python runs: no bytes, but buffers keep their values, which it may read."""
    if isinstance(tensor, nn.Parameter) or tensor.is_meta or isinstance(tensor, FakeTensor):
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return tensor.detach().to("cpu", copy=True)


def _own_call(call: Mapping[str, Any], device: PretendDevice) -> dict[str, Any]:
    """The call with generators and tensors of its own, and without callbacks."""

    def own(leaf: Any) -> Any:
        if isinstance(leaf, torch.Generator):
            return leaf.clone_state() if leaf.device.type == "cpu" else torch.Generator()
        if not isinstance(leaf, torch.Tensor):
            return leaf
        made = _zeros(leaf) if leaf.is_meta or isinstance(leaf, FakeTensor) else leaf.detach().cpu().clone()
        device.count(made, on_device=leaf.is_meta or leaf.device.type != "cpu")
        return made

    return {key: None if "callback" in key and callable(value) else tree_map(own, value) for key, value in call.items()}


def _zeros(value: Any) -> Any:
    return torch.zeros(value.shape, dtype=value.dtype) if isinstance(value, torch.Tensor) else value


def _integers(given: Any) -> tuple[Any, ...]:
    """Values of the small integers among the arguments."""
    return tuple(tuple(leaf.flatten().tolist()) for leaf in tree_leaves(given) if is_integer(leaf))
