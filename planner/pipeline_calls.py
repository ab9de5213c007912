"""The calls that a dry run has recorded, as programs with the names of a module that holds all components."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from passes.base import run_passes
from passes.canonicalise import CANONICALISE
from passes.program import Program
from planner.capture import capture, refuse_leftovers
from planner.dry_run_calls import ComponentCall, DryRun
from planner.names import Names
from planner.options import Options
from planner.pipeline_captured import ProgramOfCall, with_own_constants
from planner.pipeline_parts import PartsOfCall, parts_of_call
from planner.progress import stepping
from planner.refuse import refuse_shared_state
from planner.settings import Settings, as_set
from runtime.errors import CaptureError, InvalidCall, PlannerError
from runtime.leftovers import Key, is_within, outline
from runtime.loose_signature import LooseSignature, as_inputs
from runtime.signature import bind_call

Captured = ProgramOfCall | PartsOfCall
Call = tuple[tuple[Any, ...], dict[str, Any]]


class Components(nn.Module):
    """All components of a pipeline under one root, by name; nothing else."""

    def __init__(self, components: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.training = False
        for name, component in components.items():
            self._modules[name.replace(".", "_")] = component


@dataclass(eq=False)
class Captures:
    """Captured calls of the components under a root, whole or in parts; an equal call is captured once."""

    root: nn.Module
    _known: list[ProgramOfCall] = field(default_factory=list)
    _parted: list[PartsOfCall] = field(default_factory=list)
    _single: list[ProgramOfCall] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._usual = Settings(self.root)

    def of_run(self, run: DryRun, options: Options) -> tuple[list[Captured], list[int]]:
        """The calls of a dry run, in the order of their first time, and for each step the index of its call.

        Raises:
            PlannerError: a call cannot be captured, not even in parts; names it, and says what can be done.
        """
        programs: list[Captured] = []
        chosen: dict[tuple[int, Any], int] = {}
        with stepping(f"capturing {run.name}", len(run.calls)) as step:
            for index, call in enumerate(run.calls):
                step(call.name)
                component = self.root.get_submodule(call.component.replace(".", "_"))
                with as_set(component, call.settings):
                    found = self._of_call(run, index, call, options)
                for floats, made in found.items():
                    if made not in programs:
                        programs.append(made)
                    chosen[index, floats] = programs.index(made)
        order = [chosen.get((s.call, None), chosen.get((s.call, s.floats), -1)) for s in run.steps]
        assert min(order, default=0) >= 0
        return programs, order

    def _of_call(self, run: DryRun, index: int, call: ComponentCall, options: Options) -> dict[Any, Captured]:
        """By the floats among the arguments; one for all of them (None) where these can be inputs."""
        self._refuse(call)
        path, _, method = f"{call.component.replace('.', '_')}.{call.method}".rpartition(".")
        steps = run.steps_of(index)
        seen = dict.fromkeys(step.floats for step in steps)
        if len(seen) > 1:
            varying = [len(set(values)) > 1 for values in zip(*seen, strict=True)]
            try:
                return {None: self.of(path, method, *_with_floats(call, steps[0].floats), varying)}
            except CaptureError:
                pass  # what it does depends on the numbers
        return {floats: self._whole_or_parts(path, method, _with_floats(call, floats), options) for floats in seen}

    def _whole_or_parts(self, path: str, method: str, call: Call, options: Options) -> Captured:
        """The program of a call, or its parts where it cannot be captured whole.

        Raises:
            PlannerError: neither.
        """
        bound = bind_call(getattr(self.root.get_submodule(path), method), *call)
        exact = LooseSignature.of(*bound)
        for known in self._parted:
            if (known.path, known.method) == (path, method) and known.signature.accepts(exact):
                return known
        try:
            return self.of(path, method, *call)
        except InvalidCall:
            raise
        except CaptureError as error:
            if settings := self._settings(path):
                where, name = next(iter(settings))
                raise PlannerError(
                    f"{path}.{method} cannot be captured whole ({error}), and its own Python cannot run around parts of it "
                    f"while the pipeline sets {name!r} of {where}: set it before the call"
                ) from error
            made = parts_of_call(self.root, path, method, bound, options, error, len(self._parted))
        self._parted.append(made)
        return made

    def of(
        self, path: str, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], varying: list[bool] | None = None
    ) -> ProgramOfCall:
        """The program of one call. `varying`: of its floats, in the order of the tree, which are inputs.

        Raises:
            CaptureError: it cannot be captured.
        """
        module = self.root.get_submodule(path)
        args, kwargs, floats = _bound(getattr(module, method), args, kwargs, varying or [])
        exact, settings = LooseSignature.of(args, kwargs), self._settings(path)
        for known in self._known:
            same = (known.path, known.method) == (path, method) and (floats <= known.signature.floats or not floats)
            same = same and list(known.settings) == list(settings)
            same = same and outline(known.settings.values()) == outline(settings.values())
            if same and known.signature.accepts(exact):
                return known
        asks = any(isinstance(leaf, torch.Generator) for leaf in tree_flatten((args, kwargs))[0])
        args, kwargs = as_inputs(args, kwargs, floats)
        program = run_passes(capture(module, args, kwargs, method), CANONICALISE)
        draws = any(map(_draws, program.ops()))
        if draws and asks:
            raise CaptureError(f"{path}.{method} draws random numbers from a generator that it is given, which no program does")
        signature = replace(LooseSignature.of(args, kwargs, floats), draws=draws)
        refuse_shared_state(module, program)
        program = self._renamed(program, path, method)
        made = ProgramOfCall(path, method, signature, program, args, dict(kwargs), settings=settings)
        self._known.append(made)
        return made

    def of_part(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ProgramOfCall:
        """The program of a call that a component's own Python makes.

        Raises:
            CaptureError: it cannot be captured.
        """
        module = self.root.get_submodule(path)
        program = run_passes(capture(module, args, kwargs), CANONICALISE)
        refuse_leftovers(program)
        refuse_shared_state(module, program)
        renamed = with_own_constants(self.root, Names(self.root).rename(program, path), f"single {len(self._single)}")
        program = replace(renamed, name=f"{path}.forward")
        self._single.append(ProgramOfCall(path, "forward", LooseSignature.of(args, kwargs), program, args, kwargs, part=True))
        return self._single[-1]

    def _settings(self, path: str) -> dict[Key, tuple[Any, Any]]:
        """How the module at `path` is set that programs do not leave so: what is usual, and what is now.

        Raises:
            CaptureError: an attribute is another object than when the pipeline was planned.
        """
        other = next((key for key in self._usual.exchanged() if is_within(key, path)), None)
        if other is not None:
            raise CaptureError(f"{other[1]!r} of {other[0]} is another object than when the pipeline was planned")
        left = {key for known in self._known if known.program.leftovers for key in known.program.leftovers.before}
        now = {key: value for key, value in self._usual.differing().items() if key not in left and is_within(key, path)}
        return {key: (self._usual.usual(key), value) for key, value in now.items()}

    def _renamed(self, program: Program, path: str, method: str) -> Program:
        """With the root's names; constants that the module has no name for get one that no other program has."""
        named = with_own_constants(self.root, Names(self.root).rename(program, path), len(self._known)).weights
        leftovers = program.leftovers
        if leftovers is not None:
            before, after = ({(_join(path, at), n): v for (at, n), v in t.items()} for t in (leftovers.before, leftovers.after))
            in_place = frozenset((_join(path, at), n) for at, n in leftovers.in_place)
            leftovers = replace(leftovers, before=before, after=after, in_place=in_place)
        return replace(program, name=f"{path}.{method}", weights=named, leftovers=leftovers)

    def _refuse(self, call: ComponentCall) -> None:
        """Raises PlannerError for calls that no program can stand for."""
        name = call.component
        if call.most_steps is not None:
            raise PlannerError(
                f"{call.name} goes on until values say stop, which no program of a pipeline does. Run it before, and pass what "
                "it gives to the call (such as prompt_embeds=...)"
            )
        if call.autocast is not None:
            raise PlannerError(
                f"{call.name} is called within torch.autocast, and a plan keeps the dtypes it was made with: call outside of "
                f"it, or cast the component: pipe.{name}.to(torch.bfloat16)"
            )
        own = {p.dtype for p in self.root.get_submodule(name.replace(".", "_")).parameters()}
        if set(call.dtypes) - own:
            wanted = min(set(call.dtypes) - own, key=str)
            raise PlannerError(
                f"the pipeline casts {name} to {wanted} while it runs, and a planned component stays as it is: cast it before, "
                f"pipe.{name}.to({wanted}), and plan then"
            )


class _Float:
    """In place of a float, so that it can be found after binding."""


def _bound(
    function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], varying: list[bool]
) -> tuple[tuple[Any, ...], dict[str, Any], frozenset[int]]:
    """The call spelled as `bind_call` does, and which of its leaves are floats that vary."""
    leaves, spec = tree_flatten((args, dict(kwargs)))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, float)]
    marks = [_Float() for _ in places]
    marked = list(leaves)
    for place, mark in zip(places, marks, strict=True):
        marked[place] = mark
    found = tree_flatten(bind_call(function, *tree_unflatten(marked, spec)))[0]
    loose = [mark for mark, varies in zip(marks, varying, strict=False) if varies]
    floats = frozenset(i for i, leaf in enumerate(found) if any(leaf is mark for mark in loose))
    return *bind_call(function, args, kwargs), floats


def _with_floats(call: ComponentCall, floats: tuple[float, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments on meta, with the given floats."""
    leaves, spec = tree_flatten(call.inputs())
    given = iter(floats)
    return tree_unflatten([next(given) if isinstance(leaf, float) else leaf for leaf in leaves], spec)


def _draws(node: fx.Node) -> bool:
    """Whether an operator draws random numbers; attention has the tag for a dropout that is zero in inference."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    given = {own.name: value for own, value in zip(target._schema.arguments, node.args, strict=False)} | dict(node.kwargs)
    return bool(given.get("dropout_p", 0.0)) or all(own.name != "dropout_p" for own in target._schema.arguments)


def _join(path: str, inner: str) -> str:
    return f"{path}.{inner}".rstrip(".")
