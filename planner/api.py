"""`plan()`: the one function that users call."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, overload

import torch
from torch import nn

from passes.calibrate import free_ram_bytes
from planner.budget import Budget
from planner.checkpoint import open_target
from planner.dynamic import read_dynamic
from planner.frontends.pipelines import is_pipeline
from planner.generation import plan_generation
from planner.machine import Machine
from planner.options import (
    Options,
    check_allow,
    check_casts,
    check_keep,
    check_max_error,
    check_opaque_bytes,
    check_profile,
    check_repeats,
)
from planner.parted import plan_or_parts
from planner.pipeline_folder import open_pipeline_target
from planner.pipeline_plan import PipelinePlan
from planner.plan import Plan
from planner.prepare import prepare
from planner.pretrained import example_call, generates, is_pretrained
from planner.refuse import refuse_unplannable
from runtime.errors import BudgetError, InputError, PlannerError

BudgetLike = int | str | Mapping[str | int, int | str] | Budget


class Pipeline(Protocol):
    """A pipeline of diffusers, as far as types can tell."""

    @property
    def components(self) -> dict[str, Any]: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


@overload
def plan(
    target: nn.Module | str | os.PathLike[str],
    budget: BudgetLike | None,
    *,
    inputs: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    method: str = "forward",
    device: str | None = None,
    machine: str | os.PathLike[str] | Machine | None = None,
    allow: tuple[str, ...] = ...,
    allow_cast: str | torch.dtype | Sequence[str | torch.dtype] | None = None,
    max_error: float | None = None,
    keep: Mapping[str, Mapping[str, Any]] | None = None,
    repeats: int = 1,
    dynamic: Any = None,
    profile: bool = False,
    opaque_bytes: int | str | Mapping[str, int | str] | None = None,
    dtype: str | torch.dtype | None = None,
    variant: str | None = None,
) -> Plan: ...


@overload
def plan(
    target: Pipeline | str | os.PathLike[str],
    budget: BudgetLike | None,
    *,
    call: Mapping[str, Any],
    device: str | None = None,
    machine: str | os.PathLike[str] | Machine | None = None,
    allow: tuple[str, ...] = ...,
    allow_cast: str | torch.dtype | Sequence[str | torch.dtype] | None = None,
    max_error: float | None = None,
    keep: Mapping[str, Mapping[str, Any]] | None = None,
    profile: bool = False,
    opaque_bytes: int | str | Mapping[str, int | str] | None = None,
    dtype: str | torch.dtype | None = None,
    variant: str | None = None,
) -> PipelinePlan: ...


def plan(
    target: Any,
    budget: BudgetLike | None,
    *,
    inputs: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    method: str = "forward",
    call: Mapping[str, Any] | None = None,
    device: str | None = None,
    machine: str | os.PathLike[str] | Machine | None = None,
    allow: tuple[str, ...] = ("offload", "tile", "layout", "attention"),
    allow_cast: str | torch.dtype | Sequence[str | torch.dtype] | None = None,
    max_error: float | None = None,
    keep: Mapping[str, Mapping[str, Any]] | None = None,
    repeats: int = 1,
    dynamic: Any = None,
    profile: bool = False,
    opaque_bytes: int | str | Mapping[str, int | str] | None = None,
    dtype: str | torch.dtype | None = None,
    variant: str | None = None,
) -> Plan | PipelinePlan:
    """Plans `target.method(*inputs, **kwargs)` so that its device memory stays within `budget`.

    Args:
        target: a module in eval mode; real, fake or meta weights, wherever they are. It is not changed before `build()`. Or the
            folder of a diffusers or transformers model: its config is read and the headers of its safetensors files, and
            `build()` reads the weights from there, one at a time (on cpu: the budget's share of them, ahead of use).
            Or a pipeline of diffusers, or the folder of one, all of whose components are planned together: see `call`.
        budget: bytes, a size such as "6GB" (6e9) or "6GiB", a mapping such as {"cuda": "6GB"}; None for what is free now.
        inputs, kwargs: an example call; real, fake or meta tensors, of which only shapes, strides and dtypes are read. Of a
            folder's model they may be left out where they are known: from a preset of its class, else from its config; of
            a model of transformers from its config, else its `dummy_inputs`.
        method: which method to plan; of a folder without inputs the one whose inputs are known (an autoencoder's decode).
            "generate" of a language model of transformers is prefill and decode on one static cache: `GenerationPlan`.
        call: of a pipeline, the keyword arguments it is called with, such as dict(prompt="...", height=1024, width=1024).
            Its own Python runs with zeros for what its components give, to find which calls it makes on them; the prompt's
            words do not matter. Calls of other sizes are planned when they come.
        device: "cuda", "cuda:1", "cpu" (the budget is RAM, weights live on disk) or "accounting" (CPU kernels, every byte
            counted). Default: CUDA where it is or where `machine` is one, else cpu.
        machine: a preset's name, the path of a file with a machine (.toml or .json), a `Machine`, or None for this one.
        allow: transforms that may be used; without "offload" every weight stays on the device, without "layout" convolutions
            keep the layout that they were captured in, without "attention" products around a softmax stay as they are written.
        allow_cast: types in which weights may be stored, with scales: "float8_e4m3fn", "float8_e5m2", "int8", or several. As
            many weights are as shorten the step or are needed to fit; none without this. Small ones, the first and the last
            projections, and what models mark as not to be cast stay as they are.
        max_error: the largest relative error of the result that casts may cause: |planned - own| / |own|, of the worst output.
            Measured on the example inputs where these and the weights are real; else an estimate keeps it.
        dynamic: which dimensions vary, as in `torch.export`: {"x": {0: "batch", 2: torch.export.Dim("height", max=128)}}. One
            program then serves every size from 2 up to the largest (a named dim's is the example's, a `Dim`'s its maximum), and
            the budget holds for the largest. Other sizes, and those that the model's own guards exclude, are planned anew.
        profile: measure how long the operators take on this device, each distinct one once on made-up data, and plan with
            that instead of the machine model. Kept in the cache folder: a second plan runs nothing.
        keep: patterns of weight names to pin, such as {"embeddings.*": {"resident": True}}, or not to cast: {"cast": False}.
        repeats: how many calls follow each other, the steps of a denoiser say. From two on, copies go over the seam between
            calls: the end of one fetches what the beginning of the next needs, and bundles stay on the device in between.
            A model that is planned in parts is planned for one call.
        opaque_bytes: what the Python of modules that cannot be captured takes at most, besides inputs and weights, by pattern
            of their paths: {"blocks.*.moe": "200MB"}, of a pipeline {"unet.blocks.*.moe": "200MB"}. Asked for by UnknownSize
            where it cannot be found out.
        dtype: of a folder's model; default: what its config says, else that of most of its weights. Weights in other dtypes
            are converted as they are read; parts that the library keeps in float32 stay so.
        variant: of a folder's files: "fp16" for model.fp16.safetensors.

    Returns:
        The plan: printable, and `build()` makes the module that runs it; of a pipeline a `PipelinePlan`, whose `build()` gives
        the same pipeline back.

    Raises:
        BudgetError: the budget cannot be read, or names a device that is not here.
        CheckpointError: a file of the folder is damaged, or lacks a weight of the model; names file and tensor.
        InfeasibleBudget: no plan fits; says the minimum, where it is and what would help.
        CaptureError: the call cannot be captured, nor run on tensors without values; names the operator or line.
        UnknownSize: how many bytes are needed depends on values; names the module.
        PlannerError: anything else that was asked and cannot be done.
    """
    opened = open_pipeline_target(target, dtype, variant)
    if opened is not None:
        target = opened.pipe
    whole = is_pipeline(target)
    target, folder = (target, None) if whole else open_target(target, dtype, variant)
    kwargs = _call_of(target, call, inputs, kwargs) if whole else kwargs
    if call is not None and not whole:
        raise PlannerError(
            f"call={call!r} is of pipelines; for a module leave it at None, and pass inputs=(...,) and kwargs={{...}}"
        )
    casts = check_casts(allow_cast)
    if "cast" in check_allow(allow) and not casts:
        raise PlannerError("allow has 'cast', and no type is named: write allow_cast='float8_e4m3fn'")
    chosen = _device(device, budget, machine)
    described = _machine(machine, chosen)
    args = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    if folder is not None and not args and not kwargs:
        kwargs, method = folder.call(method)
    elif not args and not kwargs and is_pretrained(target):
        kwargs = example_call(target, method)
    if dynamic is not None:
        refuse_unplannable(target, method)  # before its method is looked at
    options = Options(
        budget=Budget.parse(_free_bytes(chosen) if budget is None else budget, chosen),
        machine=described,
        device=chosen,
        method=method,
        args=args,
        kwargs=dict(kwargs or {}),
        keep=check_keep(keep),
        offload="offload" in check_allow(allow),
        tile="tile" in check_allow(allow),
        opaque_bytes=check_opaque_bytes(opaque_bytes),
        dynamic=None if dynamic is None else read_dynamic(target, method, args, dict(kwargs or {}), dynamic),
        repeats=check_repeats(repeats),
        profile=check_profile(profile),
        casts=casts,
        max_error=check_max_error(max_error, casts),
        layout="layout" in check_allow(allow),
        attention="attention" in check_allow(allow),
        folder=folder,
    )
    if whole:
        return PipelinePlan.of(target, options, opened)
    if method == "generate" and generates(target):
        return plan_generation(target, options)
    return plan_or_parts(target, options, prepare)


def _call_of(pipe: Any, call: Any, inputs: Any, kwargs: Any) -> dict[str, Any]:
    """The keyword arguments of a pipeline's call.

    Raises:
        PlannerError: they are not given, or given as those of a module.
    """
    kind = type(pipe).__name__
    if inputs or kwargs or not isinstance(call, Mapping):
        raise PlannerError(
            f"{kind} is a pipeline: say what it is called with, plan(pipe, budget, call=dict(prompt='...', height=1024, "
            "width=1024)); inputs and kwargs are a module's"
        )
    try:
        inspect.signature(type(pipe).__call__).bind(pipe, **call)
    except TypeError as error:
        raise InputError(f"call=... does not fit {kind}.__call__: {error}; help(pipe.__call__) lists what it takes") from error
    return dict(call)


def _device(device: str | None, budget: BudgetLike | None, machine: str | os.PathLike[str] | Machine | None) -> str:
    if device is None and isinstance(budget, (Mapping, Budget)):
        device = Budget.parse(budget).device
    if device is None:
        foreign = machine is not None and _machine(machine, "cpu").capability is not None
        device = "cuda" if foreign or torch.cuda.is_available() else "cpu"
    kind, _, index = device.partition(":")
    if kind not in ("cuda", "cpu", "accounting") or (index and not index.isdigit()) or (index and kind != "cuda"):
        raise BudgetError(f"no device {device!r}; write device='cuda', 'cuda:1', 'cpu' or 'accounting'")
    if kind == "cuda" and machine is None and int(index or 0) >= torch.cuda.device_count():
        raise BudgetError(
            f"device {device!r} does not exist here ({torch.cuda.device_count()} CUDA devices); to plan for one that is "
            "elsewhere, name it: machine='rtx-4090'"
        )
    return device


def _machine(machine: str | os.PathLike[str] | Machine | None, device: str) -> Machine:
    return (Machine.detect(device) if machine is None else Machine.of(machine)).on(device)


def _free_bytes(device: str) -> int:
    if device in ("cpu", "accounting"):
        return free_ram_bytes()
    if not torch.cuda.is_available():
        raise BudgetError("budget=None means what is free now, and there is no CUDA device here: write budget='6GB'")
    return int(torch.cuda.mem_get_info(torch.device(device))[0])
