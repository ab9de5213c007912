"""A rehearsal of a `generate` call: its Python runs for real, its model gives made-up logits, and what it holds is counted."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only, tree_unflatten

from passes.base import run_passes
from passes.canonicalise import CANONICALISE
from passes.live_storages import LiveStorages
from passes.probe import Prober
from passes.program import Program, storage_id
from planner.capture import capture, is_same
from planner.frontends.transformers_generate import (
    CACHE,
    CALLABLES,
    CacheShape,
    Stages,
    advance,
    cache_shape,
    check_call,
    counts_of,
    loop_of,
    phase_module,
    refuse_generation,
    stages_of,
    static_cache,
    tokens_of,
)
from planner.isolate import random_draws
from planner.memory import MemoryModel
from planner.refuse import refuse_shared_state, refuse_unplannable
from planner.stand_ins import like, on_meta
from runtime.errors import CaptureError, PlannerError, UnknownSize
from runtime.signature import CallSignature

Key = tuple[CallSignature, Stages]


@dataclass(frozen=True, eq=False)
class Phase:
    """One kind of call that the loop makes.

    Attributes:
        name: "prefill", "decode", or with a number where there are more of them. module: its method of that name is the call.
        kwargs: an example, on the meta device. program: what was captured, canonical; the cache is state in it.
        key: the call's signature and the stages of the cache, which say that a call is this one.
    """

    name: str
    module: nn.Module
    kwargs: dict[str, Any]
    key: Key
    program: Program


@dataclass
class Moment:
    """What a phase meets in one `generate` call: how often it runs, and bytes that Python holds besides.

    `outside_bytes`: besides its inputs, while it runs; `python_bytes`: at most, until the next phase runs.
    """

    calls: int = 0
    outside_bytes: int = 0
    python_bytes: int = 0


@dataclass(frozen=True, eq=False)
class Rehearsal:
    """What one `generate` call does: the cache that it needs, and its phases in the order in which they first come."""

    shape: CacheShape
    phases: tuple[Phase, ...]
    moments: Mapping[str, Moment]
    prompt_tokens: int


@dataclass(eq=False)
class Phases:
    """All phases of a model that are known: calls that differ in their prompts alone share what they can."""

    model: nn.Module
    memory: MemoryModel
    prober: Prober | None = None
    shape: CacheShape | None = None
    known: dict[Key, Phase] = field(default_factory=dict)
    _counts: dict[Key, set[tuple[int | None, ...]]] = field(default_factory=dict)

    def rehearse(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, padded: bool | None = None) -> Rehearsal:
        """The phases and bytes of a call of `generate`; tensors may be real or meta, the model's weights too.

        The user's own processors, criteria and streamers are not called. `padded` says whether an attention mask without
        values leaves tokens out; by default one that is given does.

        Raises:
            PlannerError: the model, or the call, is none that is planned.
            CaptureError: a call of the model cannot be captured.
        """
        refuse_unplannable(self.model, "generate")
        refuse_generation(self.model)
        check_call(kwargs)
        host = _Rehearsing(self, _safe_token(self.model, kwargs))
        given = {name: value for name, value in kwargs.items() if name not in CALLABLES}
        args, given = _with_values((args, given), host.token, padded)
        with _silent(), random_draws(), torch.no_grad(), torch.inference_mode(False):
            loop = loop_of(self.model, host)
            for leaf in tree_leaves((args, given)):
                if isinstance(leaf, torch.Tensor):
                    host.held.count(leaf)
            try:
                with host.held:
                    loop.generate(*args, **given)
            finally:
                host.held.detach()
        return host.rehearsal()

    def fit(self, batch: int, length: int, kwargs: Mapping[str, Any]) -> CacheShape:
        """The shape of a cache for so much; the one that is known where it is large enough."""
        if self.shape is None or self.shape.batch != batch or self.shape.length < length:
            self.shape = cache_shape(self.model, batch, length, kwargs)
            self.known, self._counts = {}, {}
        return self.shape

    def phase(self, kwargs: dict[str, Any], stages: Stages, counts: tuple[int | None, ...], *, started: bool) -> Phase:
        """The phase of a call, captured if it is new."""
        assert self.shape is not None
        key = CallSignature.of((), kwargs)[0], stages
        seen = self._counts.setdefault(key, set())
        if key not in self.known:
            kind = "decode" if started and tokens_of(kwargs) == 1 else "prefill"
            same = sum(phase.name.partition("_")[0] == kind for phase in self.known.values())
            self.known[key] = self._capture(f"{kind}_{same + 1}" if same else kind, kwargs, key, counts, started=started)
        elif len(seen) == 1 and counts not in seen:
            self._refuse_counting(self.known[key], counts, started=started)
        seen.add(counts)
        return self.known[key]

    def _capture(self, name: str, kwargs: dict[str, Any], key: Key, counts: tuple[int | None, ...], *, started: bool) -> Phase:
        assert self.shape is not None
        kwargs = on_meta(kwargs)
        failed: CaptureError | None = None
        for eager in (True, False):  # some models have a branch for tracing because no other can be traced
            module = phase_module(self.model, name, self.shape, counts, started=started, eager=eager)
            try:
                program = run_passes(capture(module, (), kwargs, name), CANONICALISE)
            except CaptureError as error:
                failed = failed or error
                continue
            refuse_shared_state(module, program)
            return Phase(name, module, kwargs, key, cache_as_state(program))
        assert failed is not None
        raise failed

    def _refuse_counting(self, phase: Phase, counts: tuple[int | None, ...], *, started: bool) -> None:
        """Raises CaptureError where what is computed depends on how many tokens there were: each would be another program."""
        other = self._capture(phase.name, phase.kwargs, phase.key, counts, started=started)
        if not is_same(phase.program, other.program):
            raise CaptureError(
                f"{phase.program.name} computes otherwise after {counts} tokens than before; no one program is right for all "
                "tokens. Plan its forward without a cache: plan(model, budget, inputs=(ids,), kwargs={'use_cache': False})"
            )


def cache_as_state(program: Program) -> Program:
    """The cache's tensors are state of every phase, also of one that only reads some of them, and the host has none of them."""
    cache = {k: replace(w, state=True, made=True) for k, w in program.weights.items() if w.name.startswith(f"{CACHE}.")}
    return replace(program, weights={**program.weights, **cache})


class _Held(TorchDispatchMode):
    """Bytes of the tensors that Python holds, by what it runs itself; `at` is the moment to which they belong."""

    def __init__(self, phases: Phases) -> None:
        super().__init__()
        self._storages, self._round, self._prober = LiveStorages(), phases.memory.round_activation, phases.prober
        self.at: Moment | None = None
        self.before = 0

    @property
    def live_bytes(self) -> int:
        return self._storages.live_bytes

    def bytes_of(self, tensors: list[torch.Tensor]) -> int:
        return sum(self._storages.bytes_of(storage) for storage in {storage_id(tensor) for tensor in tensors})

    def detach(self) -> None:
        self._storages.detach()

    def count(self, tensor: torch.Tensor) -> None:
        nbytes = int(tensor.untyped_storage().nbytes())
        if self._storages.count(tensor, self._round(nbytes)):
            self._note(self.live_bytes)

    def _note(self, nbytes: int) -> None:
        if self.at is None:
            self.before = max(self.before, nbytes)
        else:
            self.at.python_bytes = max(self.at.python_bytes, nbytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.count(leaf)
        if self._prober is not None:
            with _disable_current_modes(), contextlib.suppress(UnknownSize):
                workspace = self._prober.cost_of(func, args, kwargs, result).workspace_bytes
                if workspace:
                    self._note(self.live_bytes + workspace)
        return result


class _Rehearsing:
    """The host of the rehearsed loop."""

    device = torch.device("cpu")

    def __init__(self, phases: Phases, token: int) -> None:
        self._phases, self.token = phases, token
        self.held = _Held(phases)
        self._moments: dict[str, Moment] = {}
        self._taken: dict[str, Phase] = {}
        self._wanted: tuple[int, int] = 0, 0
        self._length = self._prompt = 0

    def cache(self, batch: int, length: int) -> Any:
        self._wanted = batch, length
        known = self._phases.shape
        self._length = known.length if known is not None and known.batch == batch and known.length >= length else length
        return static_cache(self._phases.model, self._length)

    def forward(self, kwargs: dict[str, Any]) -> Any:
        cache = kwargs.pop(CACHE)
        tokens, kwargs = tokens_of(kwargs), dict(sorted(kwargs.items()))
        stages, started = stages_of(cache, tokens), cache.is_initialized
        self._prompt += tokens if tokens > 1 or not started else 0
        with _disable_current_modes():
            self._phases.fit(self._wanted[0], self._length, kwargs)
            phase = self._phases.phase(kwargs, stages, counts_of(cache), started=started)
        moment = self._moments.setdefault(phase.name, Moment())
        self._taken[phase.name] = phase
        inputs = [leaf for leaf in tree_leaves(kwargs) if isinstance(leaf, torch.Tensor)]
        moment.calls += 1
        moment.outside_bytes = max(moment.outside_bytes, self.held.live_bytes - self.held.bytes_of(inputs))
        self.held.at = moment
        outputs = self._answer(phase, kwargs)
        for layer in cache.layers:
            layer.is_initialized = True
            layer.cumulative_length = _later(layer.cumulative_length, tokens, started=started)
        advance(cache, tokens)
        outputs[CACHE] = cache
        return outputs

    def _answer(self, phase: Phase, kwargs: dict[str, Any]) -> Any:
        """What the phase gives: made-up values, of which the token that ends nothing is the likeliest."""
        nodes = {node.name: node for node in phase.program.graph.nodes}
        leaves = tree_leaves(kwargs)
        homes: dict[int, torch.Tensor] = {}
        for name, leaf in zip(phase.program.inputs, leaves, strict=True):
            if isinstance(leaf, torch.Tensor):
                homes[storage_id(nodes[name].meta["val"])] = leaf
        given = set(homes)
        results: list[Any] = []
        for value in phase.program.output.args[0]:  # type: ignore[union-attr]
            val = value.meta.get("val") if isinstance(value, torch.fx.Node) else value
            made: Any = like(val, homes) if isinstance(val, torch.Tensor) else val
            if isinstance(val, torch.Tensor) and storage_id(val) not in given:
                with _disable_current_modes():
                    made.zero_()
            results.append(made)
        outputs = tree_unflatten(results, phase.program.out_spec)
        with _disable_current_modes():
            outputs.logits[..., self.token] = 1
        return outputs

    def rehearsal(self) -> Rehearsal:
        assert self._phases.shape is not None
        for moment in self._moments.values():  # what runs before the first phase may do so in the arenas of any
            moment.python_bytes = max(moment.python_bytes, self.held.before)
        return Rehearsal(self._phases.shape, tuple(self._taken.values()), self._moments, self._prompt)


def _later(length: torch.Tensor, tokens: int, *, started: bool) -> torch.Tensor:
    with _disable_current_modes():
        return length + tokens if started else torch.tensor(tokens)


def _safe_token(model: nn.Module, kwargs: Mapping[str, Any]) -> int:
    """A token that neither ends nor pads a sequence."""
    ends: set[Any] = set()
    for config in (model.generation_config, kwargs.get("generation_config"), kwargs):
        for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
            found = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
            ends |= set(found) if isinstance(found, (list, tuple)) else {found}
    return next(token for token in range(len(ends) + 1) if token not in ends)


def _with_values(call: Any, token: int, padded: bool | None) -> Any:
    """The call with values where tensors have none: ids of a plain token; masks that leave the first token out if `padded`."""
    args, kwargs = call

    def real(tensor: torch.Tensor, name: str = "") -> torch.Tensor:
        if not (tensor.is_meta or isinstance(tensor, FakeTensor)):
            return tensor.detach().cpu()
        if tensor.is_floating_point():
            return torch.zeros(tensor.shape, dtype=tensor.dtype)
        if name != "attention_mask":
            return torch.full(tensor.shape, token, dtype=tensor.dtype)
        mask = torch.ones(tensor.shape, dtype=tensor.dtype)
        if padded is not False and mask.numel() > 1:
            mask[0, 0] = 0
        return mask

    given = {name: tree_map_only(torch.Tensor, functools.partial(real, name=name), value) for name, value in kwargs.items()}
    return tuple(tree_map_only(torch.Tensor, real, value) for value in args), given


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without what the library logs: the real call says it again."""
    logger = transformers.utils.logging
    level = logger.get_verbosity()
    logger.set_verbosity_error()
    try:
        yield
    finally:
        logger.set_verbosity(level)


def refuse_no_phase(rehearsal: Rehearsal) -> None:
    """Raises PlannerError for a call in which nothing is generated."""
    if not rehearsal.phases:
        raise PlannerError("the call generates nothing; ask for tokens: kwargs={'input_ids': ids, 'max_new_tokens': 64}")
