"""What a component's call gives, in shapes: its own Python is run on tensors without values, once for each distinct call.

Three ways, each for what the one before cannot: fakes alone; fakes beside small integers that keep their values (masks, ids),
where all answers to questions about other values are tried and must agree; and, for a component of moderate size whose Python
must have values (a safety checker that goes on in NumPy), real tensors of zeros and then of random numbers, which must agree.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from passes.program import storage_id
from passes.spec import TensorSpec
from planner.capture import fake_inputs
from planner.explore import MAX_PATHS
from planner.isolate import exchanged_weights, fake_weights, random_draws, untouched_by_hooks
from planner.sizes import format_bytes
from planner.stand_ins import is_known, like, outline
from planner.watch import Answers, Numbers, Watch
from runtime.errors import PlannerError, UnknownSize

# A component of so many bytes may be run for real, on one core, without anybody wondering what takes so long.
MOST_REAL_BYTES = 2**31
_SEEDS = (None, 0, 1)  # of the values on which it is run then; the first are zeros
How = Literal["fakes", "integers", "values"]
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Outcome:
    """The result of a call as a tree with fakes in place of tensors, and which of them are the call's own inputs.

    `how` says what it took: for "integers" and "values", it holds for equal integers among the arguments alone.
    """

    result: Any
    inputs: tuple[torch.Tensor, ...]
    how: How

    def zeros(self, call: Call) -> Any:
        """The result for an equal call: new zeros on the CPU, and the call's own tensors where it passes them through."""
        real = [leaf for leaf in tree_leaves(call) if isinstance(leaf, torch.Tensor)]
        homes = {storage_id(fake): leaf for fake, leaf in zip(self.inputs, real, strict=True)}
        leaves, spec = tree_flatten(self.result)
        made = []
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                nbytes = int(leaf.untyped_storage().nbytes())
                if storage_id(leaf) not in homes:
                    homes[storage_id(leaf)] = torch.zeros(nbytes, dtype=torch.uint8)
                leaf = like(leaf, homes)
            made.append(leaf)
        return tree_unflatten(made, spec)


def outcome_of(module: nn.Module, function: Callable[..., Any], call: Call, label: str) -> Outcome:
    """What `function`, a bound method of the module or its call, gives; nothing is left changed.

    Raises:
        PlannerError: the result cannot be had without real values, or arguments are changed; names the call by its `label`.
    """
    reasons: list[str] = []
    for how, run in (("fakes", _on_fakes), ("integers", _on_integers), ("values", _on_values)):
        try:
            outcome = run(module, function, call, reasons)
        except _ChangesArguments:
            raise PlannerError(
                f"{label} ({type(module).__name__}) changes a list, dict or cache that it is given, which its program would "
                "not repeat; return the value instead, or plan the other components one by one: plan(pipe.transformer, ...)"
            ) from None
        if outcome is not None:
            return outcome
        if how == "integers" and _nbytes(module) > MOST_REAL_BYTES:
            reasons.append(f"it is too large to be run for real ({format_bytes(_nbytes(module))})")
            break
    raise PlannerError(
        f"what {label} ({type(module).__name__}) gives cannot be known without real values: "
        f"{'; '.join(dict.fromkeys(reasons))}. Leave it out of the pipeline (set the component to None), "
        "pass its result to the call (such as prompt_embeds=...), or "
        "plan the other components one by one: plan(pipe.transformer, ...)"
    )


class _ChangesArguments(Exception):
    """A call changes a container among its arguments."""


class _NoAnswers(Answers):
    """Whoever asks for a value is told that there is none."""

    def decide(self, site: str) -> bool:
        raise UnknownSize(f"{site} asks for the value of a tensor")

    def rows(self, most: int) -> int:
        raise UnknownSize("a size depends on the values of a tensor")


def _on_fakes(module: nn.Module, function: Any, call: Call, reasons: list[str]) -> Outcome | None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    inputs = fake_inputs(call, mode)
    result = _attempt(module, function, inputs, mode, _NoAnswers(), reasons)
    return None if result is None else Outcome(result[0], _tensors(inputs), "fakes")


def _on_integers(module: nn.Module, function: Any, call: Call, reasons: list[str]) -> Outcome | None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes, spec = tree_flatten(fake_inputs(call, mode))
    leaves = [r.detach().clone() if is_integer(r) else f for r, f in zip(tree_leaves(call), fakes, strict=True)]
    inputs = tree_unflatten(leaves, spec)
    found: list[Any] = []
    path = Answers()
    for _ in range(MAX_PATHS):
        result = _attempt(module, function, inputs, mode, path, reasons)
        if path.sizes or path.guessed or path.looped or (result is None and not path.taken):
            return None
        found += [] if result is None else [result[0]]  # a path may end in an error of the component's own: a check that fails
        following = path.following()
        if following is None:
            break
        path = following
    else:
        return None  # there are too many
    if not found:
        return None
    if any(outline(other) != outline(found[0]) for other in found):
        reasons.append("its shapes depend on values")
        return None
    return Outcome(found[0], _tensors(inputs), "integers")


def _on_values(module: nn.Module, function: Any, call: Call, reasons: list[str]) -> Outcome | None:
    results = []
    for seed in _SEEDS:
        fill = functools.partial(_filled, generator=None if seed is None else torch.Generator().manual_seed(seed))
        inputs = tree_map_only(torch.Tensor, functools.partial(_input, fill=fill), call)
        with exchanged_weights(module, functools.partial(_weight, fill=fill)):
            result = _attempt(module, function, inputs, None, Answers(), reasons)
        if result is None:
            return None
        results.append((inputs, result[0]))
    if any(_shapes(result) != _shapes(results[0][1]) for _, result in results):
        reasons.append("its shapes depend on values")
        return None
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    inputs, result = fake_inputs(results[0], mode)
    return Outcome(result, _tensors(inputs), "values")


def _attempt(
    module: nn.Module, function: Any, inputs: Call, mode: FakeTensorMode | None, answers: Answers, reasons: list[str]
) -> tuple[Any] | None:
    """The result in a tuple; None, with a reason, where the component's Python fails."""
    given = outline(inputs)
    args, kwargs = inputs
    try:
        with _running(module, mode, answers):
            result = function(*args, **kwargs)
    except Exception as error:  # noqa: BLE001 - whatever somebody's Python raises, when it meets tensors without values
        reasons.append(next((line for line in str(error).splitlines() if line.strip()), type(error).__name__))
        return None
    if outline((args, kwargs)) != given:
        raise _ChangesArguments
    return (result,)


@contextlib.contextmanager
def _running(module: nn.Module, mode: FakeTensorMode | None, answers: Answers) -> Iterator[None]:
    """Within it the module's Python runs on fakes, or on real tensors where there is no mode; it is as before afterwards."""
    with torch.no_grad(), random_draws(), untouched_by_hooks(module):
        if mode is None:
            yield
            return
        known = [
            (o, k, b.detach().clone()) for o in module.modules() for k, b in o._buffers.items() if b is not None and is_known(b)
        ]
        with fake_weights(module, mode):
            for owner, key, buffer in known:
                owner._buffers[key] = buffer
            watch = Watch(answers, set(), lambda storage: None, lambda nbytes: None)
            try:
                with mode, watch, Numbers():
                    yield
            finally:
                watch.detach()


def is_integer(leaf: Any) -> bool:
    """Whether it is a small tensor of integers or truths, whose values Python may want to know: ids, masks, sizes."""
    return is_known(leaf) and not leaf.is_floating_point() and not leaf.is_complex()


def _input(tensor: torch.Tensor, fill: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """A real tensor in place of an argument; integers keep their values."""
    return fill(tensor) if tensor.is_meta or tensor.is_floating_point() else tensor.detach().clone()


def _weight(tensor: torch.Tensor, fill: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """A real tensor in place of a weight; buffers that have values keep them."""
    return fill(tensor) if tensor.is_meta or isinstance(tensor, nn.Parameter) else tensor.detach().clone()


def _filled(tensor: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    made = torch.zeros(tensor.shape, dtype=tensor.dtype)
    return made if generator is None or not made.is_floating_point() else made.normal_(generator=generator)


def _nbytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _tensors(tree: Any) -> tuple[torch.Tensor, ...]:
    return tuple(leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def _shapes(result: Any) -> Any:
    leaves, spec = tree_flatten(result)
    return spec, [TensorSpec.of(leaf) if isinstance(leaf, torch.Tensor) else type(leaf) for leaf in leaves]
