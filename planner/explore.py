"""Exploration: what a module that cannot be captured whole does, found by running its Python on fakes.

Its submodules that can be captured become *parts*; a call of one is answered from its program. All others are *opaque*: their
Python runs, on fakes here and for real later, with the weights that it reads on the device meanwhile. The run counts which
bytes the Python between parts holds, by watching storages come and go, at every moment and at every call of a part.

Where Python asks for a value (`if x.sum() > 0`), all answers are explored. Where a size depends on values (`mask.nonzero()`),
the largest there can be is taken, and what is called with such a size stays opaque. What has no largest size is not guessed:
UnknownSize names the module and asks for `opaque_bytes`.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from passes.base import run_passes
from passes.canonicalise import CANONICALISE
from passes.probe import Prober
from passes.program import Program, storage_id, tensors_of
from planner.capture import capture, fake_inputs, refuse_leftovers
from planner.isolate import fake_weights, random_draws, untouched_by_hooks
from planner.names import Names
from planner.plain_state import PlainState
from planner.stand_ins import apply_nothing, detached, is_known, like, on_meta, outline, run_on_random
from planner.watch import Answers, Numbers, Watch
from runtime.errors import CaptureError, InputError, InvalidCall, PlannerError, UnknownSize
from runtime.signature import CallSignature, bind_call

MAX_PATHS = 24


# The opaque modules whose Python runs at some moment, by path.
Running = frozenset[str]


@dataclass(frozen=True, eq=False)
class Part:
    """A submodule's call with one signature, captured. `key` is unique; weights carry the root's names."""

    key: str
    path: str
    signature: CallSignature
    call: tuple[tuple[Any, ...], dict[str, Any]]
    program: Program


@dataclass
class Exploration:
    """What was found; all bytes are maxima over the explored paths.

    Attributes:
        parts: by key, in the order of their first call. calls: how often each is called at most in one run.
        python: bytes of tensors that Python holds between parts, by the opaque modules that run then.
        outside: by part, bytes of tensors besides its inputs that Python holds at its call, likewise.
        weights: by path of an opaque module, the names of the weights that its Python reads.
        reasons: by path of an opaque module, why it is.
        left: bytes of tensors that the module still holds when a run is over.
        paths: how many were explored; complete: whether these are all there are.
    """

    parts: dict[str, Part] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    python: dict[Running, int] = field(default_factory=dict)
    outside: dict[str, dict[Running, int]] = field(default_factory=dict)
    weights: dict[str, tuple[str, ...]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    left: int = 0
    paths: int = 0
    complete: bool = True

    @property
    def python_at(self) -> str:
        """The innermost of the opaque modules that run when Python holds most; "" for the root."""
        running = max(self.python, key=self.python.__getitem__, default=frozenset(""))
        return max(running, key=len, default="")


def explore(
    module: nn.Module,
    call: tuple[tuple[Any, ...], dict[str, Any]],
    method: str = "forward",
    *,
    reason: str = "",
    opaque_bytes: Mapping[str, int] | None = None,
    prober: Prober | None = None,
) -> Exploration:
    """Explores `module.method(*args, **kwargs)`, the module itself being opaque for `reason`.

    `opaque_bytes` maps patterns of module paths to what their Python takes at most, besides inputs and weights. `prober` says
    what kernels of the device take besides their results.

    Raises:
        UnknownSize: bytes depend on values, and no `opaque_bytes` says how many; names the module.
        CaptureError: the Python fails on fakes.
    """
    return _Explorer(module, method, call, reason, dict(opaque_bytes or {}), prober).explore()


class _Unsized(UnknownSize):
    """Raised for the module at `path`, whose bytes depend on values for the reason `why`."""

    def __init__(self, message: str, path: str, why: str) -> None:
        super().__init__(message)
        self.path, self.why = path, why


class _Explorer:
    def __init__(
        self,
        module: nn.Module,
        method: str,
        call: tuple[tuple[Any, ...], dict[str, Any]],
        reason: str,
        stated: dict[str, int],
        prober: Prober | None,
    ) -> None:
        self.root, self.method, self.call = module, method, call
        self.stated, self.prober = stated, prober
        self.names = Names(module)
        self.modules = dict(module.named_modules())
        self.originals = {path: child.forward for path, child in self.modules.items()}
        self.found = Exploration(reasons={"": reason})
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.known: dict[tuple[str, CallSignature], Part | None] = {}
        self.counts: dict[str, int] = {}
        self.rehearsing = False
        self.told: set[str] = set()  # modules whose bytes the user states, as far as they were needed
        self.watch: Watch | None = None
        self.numbers = Numbers()
        self.blamed = ""
        self.open: list[str] = []  # opaque modules that run now
        self.weights: dict[str, dict[str, None]] = {}
        self.seen: dict[str, list[CallSignature]] = {}  # of one run

    def explore(self) -> Exploration:
        while True:
            try:
                return self._explore()
            except _Unsized as unsized:
                path = unsized.path
                if self._stated(path) is None or path in self.told:
                    raise UnknownSize(str(unsized)) from unsized.__cause__
                kind = type(self.modules[path])
                for other, child in self.modules.items():  # others of its kind will say the same
                    if type(child) is kind and self._stated(other) is not None:
                        self.told.add(other)
                        self.found.reasons[other] = f"its sizes depend on values ({unsized.why})"

    def _explore(self) -> Exploration:
        rehearsal = [self._run(Answers(default=default), captured=False) for default in (False, True)]
        taken = [rehearsal[0]]
        if rehearsal[0].taken or rehearsal[1].taken:
            taken = [answers for answers in self._paths(rehearsal) if answers.failed is None]
        if not taken:
            assert rehearsal[0].failed is not None
            raise rehearsal[0].failed
        if any(answers.sizes for answers in rehearsal):
            self._find_dependent_sizes(taken)
        # Measured anew, now that parts are captured; an attempt before may have been given up.
        self.found.python, self.found.outside, self.found.calls, self.found.left = {}, {}, {}, 0
        for answers in taken:
            self._run(Answers(answers.prefix, answers.default), captured=True)
        self.found.weights = {path: tuple(names) for path, names in self.weights.items() if path in self.found.reasons}
        self.found.parts = {key: part for key, part in self.found.parts.items() if key in self.found.calls}
        self.found.paths = len(taken)
        self.found.complete &= not any(answers.guessed or answers.looped for answers in (*rehearsal, *taken))
        return self.found

    def _paths(self, rehearsal: list[Answers]) -> list[Answers]:
        """All answers there are, each path walked once; the first two answer everything with no, and with yes."""
        taken, current = list(rehearsal), rehearsal[0].following()
        while current is not None and len(taken) < MAX_PATHS:
            taken.append(self._run(current, captured=False))
            current = taken[-1].following()
        self.found.complete = current is None
        return taken

    def _find_dependent_sizes(self, taken: list[Answers]) -> None:
        """Whatever is called with other sizes when fewer rows are chosen depends on values: it stays opaque."""
        for answers in taken:
            self._run(Answers(answers.prefix, answers.default), captured=False)
            most = self.seen
            self._run(Answers(answers.prefix, answers.default, share=0.5), captured=False)
            for path, signatures in most.items():
                if self.seen.get(path) != signatures:
                    self.found.reasons.setdefault(path, "it is called with sizes that depend on values")

    def _run(self, answers: Answers, *, captured: bool) -> Answers:
        """One path on fakes. The module is as before afterwards."""
        self.counts, self.seen, self.open, self.rehearsing, self.blamed = {}, {}, [], not captured, ""
        values = {n: t for n, t in self.names.tensors.items() if is_known(t)}
        with fake_weights(self.root, self.mode), untouched_by_hooks(self.root), random_draws(), torch.no_grad():
            self._keep_known(values)
            weights = Names(self.root).tensors  # held until the end: a buffer that is assigned must not lend its identity
            self.storages = {storage_id(t): self.names.canonical[n] for n, t in weights.items()}
            args, kwargs = self._inputs()
            prober = self.prober if captured else None  # what is rehearsed is measured later
            self.watch = Watch(answers, set(self.storages), self._read, self._note, prober)
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, torch.Tensor):
                    self.watch.count(leaf)
            held = PlainState(self.root)
            for path, child in self.modules.items():
                child.__dict__["forward"] = functools.partial(self._enter, path)
                child.__dict__["_apply"] = functools.partial(apply_nothing, child)
            function = self.originals[""] if self.method == "forward" else getattr(self.root, self.method)
            try:
                with self.mode, self.watch, self.numbers:
                    self._opaque("", function, args, kwargs)
                if captured:
                    given = {storage_id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
                    left = self.watch.live_bytes - sum(self.watch.bytes_of(storage) for storage in given)
                    self.found.left = max(self.found.left, left)
            except (_Unsized, CaptureError):
                raise
            except UnknownSize as error:
                raise self._unknown(str(error)) from error
            except (DataDependentOutputException, DynamicOutputShapeException) as error:
                raise self._unknown(f"{error.func} gives a size that depends on values") from error
            except Exception as error:  # whatever the user's Python raises
                if "numpy" in str(error) or "FakeTensor" in str(error):
                    raise self._unknown(str(error).splitlines()[0]) from error
                failure = CaptureError(
                    f"{self._label(self.blamed)} cannot be captured, and its Python fails on tensors without values: {error}"
                )
                if not answers.taken or isinstance(error, PlannerError):
                    raise failure from error
                answers.failed = failure  # as it may, where a check fails: this path ends here
            finally:
                self.watch.detach()
                for child in self.modules.values():
                    child.__dict__.pop("forward", None)
                    child.__dict__.pop("_apply", None)
            for path, key in held.changed():
                self.found.reasons.setdefault(path, f"it changes its attribute {key!r}")
        for key, count in self.counts.items():
            self.found.calls[key] = max(self.found.calls.get(key, 0), count)
        return answers

    def _keep_known(self, values: dict[str, torch.Tensor]) -> None:
        """Small buffers keep their values, for Python to ask for: paddings, sizes, tables."""
        for owner in self.modules.values():
            for key, fake in owner._buffers.items():
                name = self.names.of(owner, key)
                if fake is not None and name in values:
                    owner._buffers[key] = values[name].detach().clone()

    def _inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = fake_inputs(self.call, self.mode)
        real, spec = tree_flatten(self.call)
        leaves = [r.detach().clone() if is_known(r) and not r.is_floating_point() else f for r, f in
                  zip(real, tree_leaves((args, kwargs)), strict=True)]  # fmt: skip
        return tree_unflatten(leaves, spec)

    # What happens at a call of a submodule.

    def _enter(self, path: str, *args: Any, **kwargs: Any) -> Any:
        child, original = self.modules[path], self.originals[path]
        if self.watch is None or not self.names.within(path) or self.watch.paused:
            return original(*args, **kwargs)
        try:
            call = bind_call(original, args, kwargs)
            signature, leaves = CallSignature.of(*call)
        except InputError as error:
            self.found.reasons.setdefault(path, str(error))
            return self._opaque(path, original, args, kwargs)
        self.seen.setdefault(path, []).append(signature)
        if path in self.told:
            return self._answer_for_real(path, self._stated(path) or 0, call)
        if self.rehearsing or path in self.found.reasons:
            return self._opaque(path, original, args, kwargs)
        part = self._part(path, child, signature, call)
        return self._opaque(path, original, args, kwargs) if part is None else self._answer(part, leaves)

    def _opaque(self, path: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The Python of an opaque module, its weights counted while it runs."""
        assert self.watch is not None
        self.weights.setdefault(path, dict.fromkeys(self.names.direct(path)))
        self.open.append(path)
        self._note(self.watch.live_bytes)
        try:
            result = function(*args, **kwargs)
        except BaseException:
            self.blamed = self.blamed or path
            raise
        finally:
            self.open.pop()
        return detached(result, {s for s, name in self.storages.items() if name in self.weights[path]})

    def _read(self, storage: int) -> None:
        """A weight is read by Python: whoever runs now brings it, if nobody around has."""
        name = self.storages[storage]
        if self.open and not any(name in self.weights[path] for path in self.open):
            self.weights[self.open[-1]][name] = None

    def _note(self, nbytes: int) -> None:
        running = frozenset(self.open)
        self.found.python[running] = max(nbytes, self.found.python.get(running, 0))

    def _part(
        self, path: str, child: nn.Module, signature: CallSignature, call: tuple[tuple[Any, ...], dict[str, Any]]
    ) -> Part | None:
        """The captured program of a call, or None: then the module is opaque from now on."""
        if (path, signature) not in self.known:
            autocast = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
            reason = "autocast is on around it" if autocast else ""
            inner = next((p for p in self.found.reasons if path and p.startswith(path + ".")), None)
            if inner is not None:
                reason = f"{inner} in it: {self.found.reasons[inner]}"
            program = None
            if not reason:
                program, reason = self._capture(child, call)
            if program is None:
                self.found.reasons[path] = reason
                self.known[path, signature] = None
            else:
                count = sum(1 for p in self.found.parts.values() if p.path == path)
                key = f"{path}#{count}" if count else path
                with _disable_current_modes():  # not these tensors themselves, which would count as long as the part is known
                    example = on_meta(call)
                part = Part(key, path, signature, example, self.names.rename(program, path))
                self.known[path, signature] = self.found.parts[key] = part
        return self.known[path, signature]

    def _capture(self, child: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[Program | None, str]:
        shims = {id(m): m.__dict__.pop("forward") for m in child.modules()}
        held = PlainState(self.root)
        try:
            with self._numbers_off(), _disable_current_modes():
                program = run_passes(capture(child, *call), CANONICALISE)
                refuse_leftovers(program)
        except InvalidCall:
            raise  # its Python would fail as well
        except (CaptureError, InputError, UnknownSize) as error:
            return None, str(error)
        finally:
            changed = held.changed()
            for module in child.modules():
                module.__dict__["forward"] = shims[id(module)]
        if not any(True for _ in program.ops()):
            return None, "it computes nothing"
        if changed:
            return None, f"it changes the attribute {'.'.join(changed[0]).lstrip('.')!r} of another module"
        return program, ""

    def _answer(self, part: Part, leaves: list[Any]) -> Any:
        """What a part's program gives, as new fakes; inputs that it passes through are passed through."""
        assert self.watch is not None
        self.counts[part.key] = self.counts.get(part.key, 0) + 1
        mine = {storage_id(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)}
        outside = self.watch.live_bytes - sum(self.watch.bytes_of(s) for s in mine)
        moments, running = self.found.outside.setdefault(part.key, {}), frozenset(self.open)
        moments[running] = max(outside, moments.get(running, 0))
        nodes = {n.name: n for n in part.program.graph.nodes if n.op == "placeholder"}
        homes = {
            storage_id(t): leaf
            for name, leaf in zip(part.program.inputs, leaves, strict=True)
            for t in tensors_of(nodes[name])
        }  # fmt: skip
        outputs = []
        for value in part.program.output.args[0]:  # type: ignore[union-attr]
            val = value.meta.get("val") if isinstance(value, torch.fx.Node) else value
            outputs.append(like(val, homes) if isinstance(val, torch.Tensor) else val)
        return tree_unflatten(outputs, part.program.out_spec)

    def _answer_for_real(self, path: str, nbytes: int, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
        """A module whose bytes the user states: run on random values twice, for the shapes of what it gives."""
        assert self.watch is not None
        self.weights[path] = dict.fromkeys(self.names.within(path))
        for inner in self.modules:
            if inner.startswith(path + ".") and self.names.within(inner):
                self.weights[inner] = {}  # runs as Python too, on weights that are there already
                self.found.reasons[inner] = f"it runs within {path}"
        with self.watch.pause(), self._numbers_off(), _disable_current_modes(), self._shimless(self.modules[path]):
            outputs = [run_on_random(self.modules[path], call, self.names, path, seed) for seed in (0, 1)]
        if outline(outputs[0]) != outline(outputs[1]):
            raise self._unknown(f"the sizes that {path} gives depend on values", self.open[-1])
        self.open.append(path)
        self._note(self.watch.live_bytes + nbytes)
        self.open.pop()
        leaves, spec = tree_flatten(outputs[0])
        return tree_unflatten([like(x, {}) if isinstance(x, torch.Tensor) else x for x in leaves], spec)

    @contextlib.contextmanager
    def _numbers_off(self) -> Iterator[None]:
        self.numbers.paused = True
        try:
            yield
        finally:
            self.numbers.paused = False

    @contextlib.contextmanager
    def _shimless(self, child: nn.Module) -> Iterator[None]:
        shims = {id(m): m.__dict__.pop("forward") for m in child.modules()}
        try:
            yield
        finally:
            for module in child.modules():
                module.__dict__["forward"] = shims[id(module)]

    def _stated(self, path: str) -> int | None:
        return next((n for pattern, n in self.stated.items() if fnmatch.fnmatchcase(path, pattern)), None)

    def _unknown(self, why: str, path: str | None = None) -> _Unsized:
        path = self.blamed if path is None else path
        pattern = ".".join("*" if part.isdigit() else part for part in path.split("."))
        remedy = (
            f"Say how many it takes at most, besides its inputs and weights: plan(..., opaque_bytes={{{pattern!r}: '200MB'}})"
        )
        if not path:
            remedy = "Pass inputs that decide with their values (real tensors of integers), or plan a submodule of it"
        message = (
            f"{self._label(path)} cannot be captured ({self.found.reasons.get(path) or self.found.reasons['']}), and how many "
            f"bytes its Python takes depends on values: {why}. {remedy}"
        )
        return _Unsized(message, path, why)

    def _label(self, path: str) -> str:
        kind = type(self.modules[path]).__name__
        return f"{path} ({kind})" if path else f"{kind}.{self.method}"
