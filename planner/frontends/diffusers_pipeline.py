"""Pipelines of diffusers: which components one has, and how its call runs without a sound and without effects."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import nn

from planner import dry_run
from planner.dry_run_calls import DryRun
from planner.progress import working
from runtime.errors import PlannerError

try:
    import diffusers
    from diffusers.utils import logging as _logging
except ImportError as error:
    raise PlannerError("this needs diffusers: pip install 'vramplan[diffusers]'") from error

_PROGRESS = "_progress_bar_config"
_GENERATION = ("max_new_tokens", "max_length", "num_return_sequences", "return_dict_in_generate")
_DEFAULT_LENGTH = 20  # of transformers, prompt included


def record(pipe: Any, call: Mapping[str, Any]) -> DryRun:
    """The dry run of `pipe(**call)`: see `planner.dry_run`. The pipeline is as before afterwards; callbacks are not called.

    Raises:
        PlannerError: no pipeline, one that is offloaded already, or a call that cannot be run without values.
    """
    pipes = pipelines_of(pipe)
    kind = type(pipe).__name__
    with contextlib.ExitStack() as stack:
        stack.enter_context(working(f"dry run of {kind}"))
        stack.enter_context(_silent())

        def run(**own: Any) -> None:
            for each in pipes:
                vars(each)[_PROGRESS] = {**vars(each).get(_PROGRESS, {}), "disable": True}
            pipe(**own)

        states = [vars(each) for each in pipes]
        return dry_run.record(kind, components_of(pipe), run, call, state=states, open_ended=generated)


def pipelines_of(pipe: Any) -> list[Any]:
    """A pipeline and those that it calls, such as the prior and the decoder of a combined one.

    Raises:
        PlannerError: it is no pipeline of diffusers.
    """
    if not isinstance(pipe, diffusers.DiffusionPipeline):
        raise PlannerError(
            f"a pipeline of diffusers is wanted, got {type(pipe).__name__}; pass diffusers.XPipeline(...) itself"
        )
    found = [pipe]
    for each in found:
        inner = (value for value in vars(each).values() if isinstance(value, diffusers.DiffusionPipeline))
        found += [value for value in inner if not any(value is other for other in found)]
    return found


def components_of(pipe: Any) -> dict[str, nn.Module]:
    """The modules of a pipeline by name; one that has several names has the first."""
    found: dict[str, nn.Module] = {}
    for each in pipelines_of(pipe):
        for name, value in (*each.components.items(), *vars(each).items()):
            if isinstance(value, nn.Module) and not any(value is other for other in found.values()):
                found[name if name not in found else f"{type(each).__name__}.{name}"] = value
    return found


def generated(
    module: nn.Module, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[torch.Tensor, int] | None:
    """What `generate` of a model of transformers gives if no token ends it: ids int64[batch, tokens], and how many are new.

    None for other methods.

    Raises:
        PlannerError: it is called in a way that does not say how many tokens there are at most.
    """
    if method != "generate" or not isinstance(module, transformers.GenerationMixin):
        return None
    config = kwargs.get("generation_config") or module.generation_config
    asked = {name: kwargs.get(name, getattr(config, name, None)) for name in _GENERATION}
    ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
    if not isinstance(ids, torch.Tensor) or ids.is_floating_point() or asked["return_dict_in_generate"]:
        raise PlannerError(
            f"{type(module).__name__}.generate is called without input_ids, or for more than ids; how large its result is "
            "cannot be known. Pass what the pipeline makes of it to the call instead (such as prompt=...)"
        )
    given = 1 if module.config.is_encoder_decoder else ids.shape[1]
    new = asked["max_new_tokens"]
    if new is None:
        new = (asked["max_length"] or _DEFAULT_LENGTH) - given
    return torch.empty(ids.shape[0] * (asked["num_return_sequences"] or 1), given + new, dtype=torch.int64, device="meta"), new


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without what the libraries log and warn of: the real call says it again."""
    loggers = (_logging, transformers.utils.logging)
    levels = [logger.get_verbosity() for logger in loggers]
    for logger in loggers:
        logger.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.set_verbosity(level)
