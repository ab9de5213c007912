"""What a `generate` call of transformers is: Python that calls a model with a cache, token after token.

Here are the pieces that a plan of it needs: the static cache whose tensors are the plan's, a module for each kind of call that
the loop makes (what is captured), and the loop itself with that call handed to somebody else (to be run, or rehearsed).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves
from transformers.cache_utils import StaticCache, StaticLayer, StaticSlidingWindowLayer
from transformers.generation.configuration_utils import GenerationMode

from planner.capture import fake_inputs
from planner.isolate import fake_weights, random_draws
from runtime.errors import CaptureError, PlannerError

# The submodule under which the cache's tensors are among a program's weights.
CACHE = "past_key_values"
_TENSORS = ("keys", "values", "cumulative_length")
_LAYERS = (StaticLayer, StaticSlidingWindowLayer)
_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
# Arguments of `generate` that are the user's own code: it is not called to find out what a call needs.
CALLABLES = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "streamer")
_REFUSED = {
    "past_key_values": "the cache is the plan's own, within its budget",
    "assistant_model": "another model would write into the cache of this one",
    "custom_generate": "its loop is not known",
}
Stages = tuple[Hashable, ...]


@dataclass(frozen=True)
class CacheShape:
    """A static cache for `batch` sequences of at most `length` tokens; its tensors by name ("0.keys"): shape and dtype."""

    batch: int
    length: int
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]] = field(hash=False)

    @property
    def prefix(self) -> str:
        """What the names of its tensors begin with among the weights of a program."""
        return f"{CACHE}."

    @property
    def nbytes(self) -> int:
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.tensors.values())


def refuse_generation(model: nn.Module) -> None:
    """Raises PlannerError for a model whose `generate` is not the loop of a decoder around one static cache."""
    kind: Any = type(model)
    if kind.generate is not transformers.GenerationMixin.generate:
        raise PlannerError(
            f"{kind.__name__} has a generate of its own, which is not planned; plan the methods that it calls, such as "
            "plan(model, budget, method='forward', inputs=(...))"
        )
    if model.config.is_encoder_decoder:  # type: ignore[union-attr]
        raise PlannerError(
            f"{kind.__name__} has an encoder and a decoder; generation is planned for models that are a decoder alone. "
            "Plan its parts: plan(model.get_encoder(), budget, inputs=(ids,))"
        )
    static_cache(model, 1)


def static_cache(model: nn.Module, length: int) -> StaticCache:
    """An empty static cache for the model, without tensors yet: they are adopted, and until then it takes no memory.

    Raises:
        PlannerError: the model keeps something else than keys and values.
    """
    config: Any = model.config
    try:
        with _disable_current_modes(), torch.device("meta"):
            cache = StaticCache(config=config.get_text_config(decoder=True), max_cache_len=length)
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise _no_static_cache(model, f"transformers makes no static cache for it ({error})") from error
    other = next((layer for layer in cache.layers if type(layer) not in _LAYERS), None)
    if other is not None or not cache.layers:
        raise _no_static_cache(model, f"its cache has a {type(other).__name__}, and not only keys and values of fixed size")
    return cache


def _no_static_cache(model: nn.Module, why: str) -> PlannerError:
    return PlannerError(
        f"generation of {type(model).__name__} is not planned: {why}. Plan its forward without a cache: "
        "plan(model, budget, inputs=(ids,), kwargs={'use_cache': False})"
    )


def adopt(cache: StaticCache, tensors: Mapping[str, torch.Tensor]) -> None:
    """Makes the tensors (by name) those of the cache, which is initialised then."""
    for index, layer in enumerate(cache.layers):
        _adopt_layer(layer, *(tensors[f"{index}.{name}"] for name in _TENSORS))


def _adopt_layer(layer: Any, keys: torch.Tensor, values: torch.Tensor, length: torch.Tensor, *_: Any) -> None:
    layer.keys, layer.values, layer.cumulative_length = keys, values, length
    layer.dtype, layer.device = keys.dtype, keys.device
    layer.batch_size, layer.num_heads = keys.shape[:2]
    layer.k_head_dim, layer.v_head_dim = keys.shape[-1], values.shape[-1]
    layer.is_initialized = True


def counts_of(cache: StaticCache) -> tuple[int | None, ...]:
    """How many tokens each layer has seen, where its Python keeps count."""
    return tuple(getattr(layer, "cumulative_length_int", None) for layer in cache.layers)


def stages_of(cache: StaticCache, tokens: int) -> Stages:
    """What the Python of the layers decides by before a call with so many tokens: equal stages run the same operators."""
    started = tuple(layer.is_initialized for layer in cache.layers)
    windows = []
    for count, layer in zip(counts_of(cache), cache.layers, strict=True):
        full = layer.max_cache_len
        windows.append(None if count is None else (count == 0, count >= full, count + tokens > full))
    return started, tuple(windows)


def advance(cache: StaticCache, tokens: int) -> None:
    """Counts the tokens of a call, as Python would have that its program stands for."""
    for layer in cache.layers:
        if hasattr(layer, "cumulative_length_int"):
            layer.cumulative_length_int += tokens


def cache_shape(model: nn.Module, batch: int, length: int, kwargs: Mapping[str, Any]) -> CacheShape:
    """What the cache's tensors are: found by one call of the model on fakes.

    Raises:
        CaptureError: it does not run on fakes.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    cache = static_cache(model, length)
    _, named = fake_inputs(((), dict(kwargs)), mode)
    try:
        with fake_weights(model, mode), random_draws(), torch.no_grad(), mode, traced(True):
            type(model).forward(model, **named, past_key_values=cache)
    except Exception as error:  # whatever the model's Python raises
        raise CaptureError(f"{type(model).__name__} does not run on tensors without values: {error}") from error
    tensors = {
        f"{index}.{name}": (tuple(getattr(layer, name).shape), getattr(layer, name).dtype)
        for index, layer in enumerate(cache.layers)
        for name in _TENSORS
    }
    return CacheShape(batch, length, tensors)


@contextlib.contextmanager
def traced(value: bool) -> Iterator[None]:
    """Within it models take the branches of a call that is exported or, if not `value`, of one that nobody traces.

    The latter have the masks and the attention of an eager call; but some branches run on tensors with values alone.
    """
    flags = torch.compiler._is_compiling_flag, torch.compiler._is_exporting_flag
    torch.compiler._is_compiling_flag = torch.compiler._is_exporting_flag = value
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag, torch.compiler._is_exporting_flag = flags


def phase_module(
    model: nn.Module, name: str, shape: CacheShape, counts: tuple[int | None, ...], *, started: bool, eager: bool = True
) -> nn.Module:
    """The model with a method `name`: its forward on a static cache whose tensors are buffers, at the given counts.

    It shares all modules and weights with the model, whose own attributes stay as they are. The method takes keyword arguments,
    and gives what forward gives but for the cache. With `eager`, branches are those of a call that nobody traces.
    """
    kind: Any = type(model)

    def call(self: Any, **kwargs: Any) -> Any:
        cache = static_cache(model, shape.length)
        tensors = dict(self._modules[CACHE].named_buffers())
        for index, layer in enumerate(cache.layers):
            layer.lazy_initialization = functools.partial(
                _adopt_layer, layer, *(tensors[f"{index}.{name}"] for name in _TENSORS)
            )
            if counts[index] is not None:
                layer.cumulative_length_int = counts[index]
        if started:
            adopt(cache, tensors)
        with traced(not eager):
            outputs = kind.forward(self, **kwargs, past_key_values=cache)
        return type(outputs)(**{key: value for key, value in outputs.items() if key != CACHE})

    call.__name__ = call.__qualname__ = name
    phase = type(kind.__name__, (kind,), {name: call, "__module__": kind.__module__})
    held = nn.Module()
    for path, (size, dtype) in shape.tensors.items():
        index, _, key = path.partition(".")
        if index not in held._modules:
            held.add_module(index, nn.Module())
        held.get_submodule(index).register_buffer(key, torch.empty(size, dtype=dtype, device="meta"), persistent=False)
    return _sharing(phase, model, _modules={**model._modules, CACHE: held.eval()})


def _sharing(kind: Any, model: nn.Module, **changed: Any) -> nn.Module:
    """An object of that class with the attributes of the model, as they are now."""
    made: nn.Module = kind.__new__(kind)
    object.__setattr__(made, "__dict__", {**vars(model), **changed})
    return made


class Host(Protocol):
    """Who answers what the loop asks for."""

    device: torch.device

    def cache(self, batch: int, length: int) -> StaticCache:
        """An empty cache for at least so many tokens."""
        ...

    def forward(self, kwargs: dict[str, Any]) -> Any:
        """A call of the model; the cache is among its arguments, and is in its result."""
        ...


def loop_of(model: nn.Module, host: Host) -> Any:
    """An object like the model, whose `generate` has the host answer: greedy or sampling, on a static cache, never compiled."""
    kind: Any = type(model)

    @functools.wraps(kind.forward)
    def forward(self: Any, **kwargs: Any) -> Any:
        return host.forward(kwargs)

    forward.__signature__ = inspect.signature(kind.forward)  # type: ignore[attr-defined]

    def _prepare_generation_config(self: Any, generation_config: Any, **kwargs: Any) -> Any:
        config, rest = kind._prepare_generation_config(self, generation_config, **kwargs)
        _settle(config)
        return config, rest

    def _prepare_static_cache(self: Any, cache_implementation: str, batch_size: int, max_cache_len: int, **_: Any) -> Any:
        return host.cache(batch_size, max_cache_len)

    body = {
        "forward": forward,
        "device": property(lambda self: host.device),
        "_prepare_generation_config": _prepare_generation_config,
        "_prepare_static_cache": _prepare_static_cache,
        "__module__": kind.__module__,
    }
    return _sharing(type(kind.__name__, (kind,), body), model)


def _settle(config: Any) -> None:
    """Makes of a generation config one that runs on the planned cache.

    Raises:
        PlannerError: it asks for what such a cache cannot do.
    """
    if config.get_generation_mode() not in _MODES:
        raise PlannerError(
            f"{config.get_generation_mode().value} reorders or rewinds the cache, and a plan has one of fixed size; "
            "call generate(..., num_beams=1), greedy or with do_sample=True"
        )
    if config.cache_implementation not in (None, "static", "dynamic"):
        raise PlannerError(
            f"cache_implementation={config.cache_implementation!r} is another cache than the planned one, which is static and "
            "within the budget; leave cache_implementation out"
        )
    if config.use_cache is False:
        raise PlannerError(
            "use_cache=False computes all tokens anew for each new one; leave it out: the planned cache is in the budget"
        )
    config.cache_implementation, config.disable_compile = "static", True


def check_call(kwargs: Mapping[str, Any]) -> None:
    """Raises PlannerError for arguments of `generate` that a planned one does not take."""
    for name, why in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise PlannerError(f"generate({name}=...) is not planned: {why}. Call generate(ids, max_new_tokens=64) without it")


def outline_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable:
    """Equal for calls of `generate` that make the same calls of the model, and take the same memory besides."""
    config: Any = model.generation_config
    kind: Any = type(model)
    named = inspect.signature(kind.generate).bind_partial(model, *args, **kwargs).arguments
    named = {**named, **named.pop("kwargs", {})}
    own = named.get("generation_config") or config
    pad = getattr(own, "pad_token_id", None)
    entries: list[Hashable] = []
    for name, value in sorted(named.items()):
        if name == "self":
            continue
        for leaf in tree_leaves(value):
            entries.append((name, _outline(leaf, pad)))
    return tuple(entries), repr(config)


def _outline(value: Any, pad: int | None) -> Hashable:
    if isinstance(value, torch.Tensor):
        geometry = tuple(value.shape), value.stride(), value.dtype
        if value.is_floating_point() or value.is_meta:
            return geometry
        return *geometry, bool((value == 1).all()), pad is not None and bool((value == pad).any())
    if isinstance(value, (int, float, str, bool, type(None))):
        return type(value), value
    return (repr(value),) if isinstance(value, transformers.GenerationConfig) else (type(value),)


class Loop:
    """The loop as the runtime runs it: see `runtime.generated.Loop`."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def outline(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable:
        check_call(kwargs)
        return outline_of(self._model, args, kwargs)

    def run(
        self,
        step: Callable[[dict[str, Any], Stages], Any],
        tensors: Mapping[str, torch.Tensor],
        length: int,
        device: torch.device,
        call: tuple[tuple[Any, ...], dict[str, Any]],
    ) -> Any:
        host = _Running(self._model, step, {n.removeprefix(f"{CACHE}."): t for n, t in tensors.items()}, length, device)
        args, kwargs = call
        result = loop_of(self._model, host).generate(*args, **kwargs)
        if isinstance(result, transformers.utils.ModelOutput) and result.get(CACHE) is not None:
            result[CACHE] = None  # the plan's memory, which the next call writes over
        return result


@dataclass
class _Running:
    model: nn.Module
    step: Callable[[dict[str, Any], Stages], Any]
    tensors: Mapping[str, torch.Tensor]
    length: int
    device: torch.device

    def cache(self, batch: int, length: int) -> StaticCache:
        assert length <= self.length
        for tensor in self.tensors.values():
            tensor.zero_()  # as a new one: what is masked counts for nothing only where it is finite
        return static_cache(self.model, self.length)

    def forward(self, kwargs: dict[str, Any]) -> Any:
        cache = kwargs.pop(CACHE)
        tokens = tokens_of(kwargs)
        outputs = self.step(dict(sorted(kwargs.items())), stages_of(cache, tokens))
        if not cache.is_initialized:
            adopt(cache, self.tensors)
        advance(cache, tokens)
        outputs[CACHE] = cache
        return outputs


def tokens_of(kwargs: Mapping[str, Any]) -> int:
    """How many tokens a call of the model has for each sequence."""
    given = kwargs.get("input_ids")
    return int((kwargs["inputs_embeds"] if given is None else given).shape[1])
