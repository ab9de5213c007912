"""What each command does. A command takes the parsed arguments and gives its answer as text and as data."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import keystr, tree_flatten_with_path

from passes.spec import TensorSpec
from planner.api import plan
from planner.cli.pipeline import describe_file, make_pipeline_plan, names_pipeline, pipeline_data, refuse_call
from planner.cli.targets import Target, resolve
from planner.cli.values import budget_of, options_of
from planner.machine import Machine
from planner.pipeline_file import is_pipeline_plan, read_pipeline_plan
from planner.pipeline_plan import PipelinePlan
from planner.plan import Plan
from planner.plan_file import read_plan
from planner.presets import Preset
from planner.recipes import SIZES
from planner.sizes import format_bytes
from runtime.errors import PlannerError


@dataclass(frozen=True)
class Answer:
    """`text` for people, `data` for programs (JSON)."""

    text: str
    data: Any


def plan_command(arguments: Namespace) -> Answer:
    """`vramplan plan`."""
    if arguments.output and not Path(arguments.output).absolute().parent.is_dir():
        raise PlannerError(f"cannot write the plan {arguments.output!r}: there is no such folder; make it first")
    p, data, text = _planned(arguments)
    parts = [text]
    if arguments.output:
        _save(p, arguments.output)
        data["file"] = arguments.output
        parts.append(f"saved as {arguments.output}")
    if arguments.code:
        data["code"] = p.code
        parts.append(p.code)
    return Answer("\n\n".join(parts), data)


def _planned(arguments: Namespace) -> tuple[Plan | PipelinePlan, dict[str, Any], str]:
    """The plan of a model, or of a whole pipeline."""
    if names_pipeline(arguments):
        with quiet(arguments.debug):
            whole = make_pipeline_plan(arguments)
        return whole, pipeline_data(arguments.target, whole), str(whole)
    refuse_call(arguments)
    target = target_of(arguments)
    p = make_plan(target, arguments)
    return p, plan_data(target, p), f"{p}\n{_inputs_text(target)}"


def _save(p: Plan | PipelinePlan, path: str) -> None:
    try:
        p.save(path)
    except OSError as error:
        raise PlannerError(f"cannot write the plan {path!r}: {error.strerror or error}") from error


def run_command(arguments: Namespace) -> Answer:
    """`vramplan run`."""
    from planner.cli.run import run

    return run(arguments)


def emit_command(arguments: Namespace) -> Answer:
    """`vramplan emit`."""
    from planner.cli.emit import emit

    return emit(arguments)


def compare_command(arguments: Namespace) -> Answer:
    """`vramplan compare`."""
    from planner.cli.compare import compare

    return compare(arguments)


def frontier_command(arguments: Namespace) -> Answer:
    """`vramplan frontier`."""
    from planner.cli.frontier import frontier

    return frontier(arguments)


def plot_command(arguments: Namespace) -> Answer:
    """`vramplan plot`."""
    from planner.cli.plot import plot

    return plot(arguments)


def show_command(arguments: Namespace) -> Answer:
    """`vramplan show`."""
    if is_pipeline_plan(arguments.file):
        data = read_pipeline_plan(arguments.file)
        return Answer(describe_file(data), data)
    data = read_plan(arguments.file)
    lines = [
        f"{data['program']} on {data['device']}, planned for {data['machine']['name']}",
        f"  budget    {format_bytes(data['budget']['device_bytes'])}",
        *_host_lines(data["budget"]),
        f"  program   {len(data['fingerprint'])} nodes",
    ]
    decisions = data["decisions"]
    for key, part in (decisions.get("parts") or decisions.get("phases") or {"": decisions}).items():
        if key and "kept" not in part:
            lines.append(f"  phase     {key}")
        elif key:
            lines.append(f"  part      {key}, its arenas {'kept' if part['kept'] else 'made for each call'}")
        lines += _tiling_lines(part.get("tiling", {}))
        lines.append(f"  streams   {len(part['streams'])} bundles through the {part['staging']}")
        lines += [f"    before {s['prefetch']} for {s['first']}: {', '.join(s['weights'])}" for s in part["streams"]]
    return Answer("\n".join(lines), data)


def _host_lines(budget: dict[str, Any]) -> list[str]:
    """What a plan's file says of host and disk, where they have a budget."""
    names = {"host_bytes": "host", "disk_bytes": "disk"}
    return [f"  {label:<9} {format_bytes(budget[key])}" for key, label in names.items() if budget.get(key) is not None]


def _tiling_lines(tiling: dict[str, Any]) -> list[str]:
    """What a plan's file says of tables, slices and tiles, a line each."""
    lines = [f"  lookup    rows of {name}, on the host" for name in tiling.get("lookups", ())]
    for region in tiling.get("channels_last", ()):
        lines.append(f"  layout    {region['operators'][0]} .. {region['operators'][-1]} in channels-last")
    lines += [f"  slices    {cut['weight']} in {cut['count']} parts" for cut in tiling.get("slices", ())]
    for tile in tiling.get("tiles", ()):
        lines.append(
            f"  tiles     {tile['count']}, from {tile['first']} to {tile['last']}, by dim {tile['dim']} of {tile['seed']}"
        )
    if tiling.get("hosted"):
        lines.append(f"  host      {', '.join(tiling['hosted'])}, in bands")
    return lines


def machines_command(arguments: Namespace) -> Answer:
    """`vramplan machines`."""
    machines = [Machine.preset(name) for name in Machine.names()]
    rows = [f"{m.name:<14} {format_bytes(m.capacity_bytes):>8}  link {m.link_bandwidth / 1e9:>5.1f} GB/s" for m in machines]
    return Answer("\n".join(rows), [dataclasses.asdict(m) for m in machines])


def presets_command(arguments: Namespace) -> Answer:
    """`vramplan presets`."""
    rows, data = [], []
    for name in Preset.names():
        preset = Preset.load(name)
        rows.append(f"{name:<16} {_count(preset.parameters):>7}  {preset.dtype:<8}  {preset.description}")
        data.append(
            {
                "name": name,
                "description": preset.description,
                "library": preset.library,
                "class": preset.class_name,
                "method": preset.method,
                "dtype": preset.dtype,
                "parameters": preset.parameters,
                "sizes": {
                    size.name: {"default": size.default, "step": size.step, "offset": size.offset, "most": size.most}
                    for size in preset.recipe.sizes.values()
                },
            }
        )
    return Answer("\n".join(rows), data)


def calibrate_command(arguments: Namespace) -> Answer:
    """`vramplan calibrate`."""
    from planner.cli.calibrate import run

    return run(arguments)


COMMANDS: dict[str, Callable[[Namespace], Answer]] = {
    "plan": plan_command,
    "run": run_command,
    "emit": emit_command,
    "compare": compare_command,
    "frontier": frontier_command,
    "plot": plot_command,
    "show": show_command,
    "machines": machines_command,
    "presets": presets_command,
    "calibrate": calibrate_command,
}


def target_of(arguments: Namespace) -> Target:
    """The target that the arguments name."""
    sizes = {name: getattr(arguments, name) for name in SIZES}
    with quiet(arguments.debug):
        return resolve(arguments.target, sizes, dtype=arguments.dtype, method=arguments.method)


@contextlib.contextmanager
def quiet(debug: bool) -> Iterator[None]:
    """Holds back what libraries log and print on standard error: an error here is one message."""
    if debug:
        yield
        return
    log = logging.getLogger("torch")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(before)


def make_plan(target: Target, arguments: Namespace) -> Plan:
    """The target's plan for the budget, device and machine that the arguments name."""
    with quiet(arguments.debug):
        return plan(
            target.module,
            budget_of(arguments.budget),
            inputs=target.args,
            kwargs=target.kwargs,
            method=target.method,
            repeats=arguments.repeats,
            opaque_bytes=_opaque_bytes(arguments.opaque_bytes),
            **options_of(arguments),
        )


def plan_data(target: Target, p: Plan) -> dict[str, Any]:
    """A plan as the documented fields of `--json`."""
    return {
        "target": target.name,
        "program": p.title,
        "method": target.method,
        "device": p.device,
        "machine": p.machine.name,
        "inputs": inputs_of(target),
        "budget_bytes": p.budget_bytes,
        "peak_bytes": p.peak_bytes,
        "reserved_bytes": p.reserved_bytes,
        "minimum_bytes": p.minimum_bytes,
        "unplanned_bytes": p.unplanned_bytes,
        "peak_at": p.peak_at,
        "peak_parts": p.peak_parts,
        "weight_bytes": p.weight_bytes,
        "resident_bytes": p.resident_bytes,
        "streamed_bytes": p.streamed_bytes,
        "band_bytes": p.band_bytes,
        "bundles": p.bundle_count,
        "step_seconds": p.step_seconds,
        "bound_seconds": p.bound_seconds,
        "limited_by": p.bound.limited_by,
        "lp_seconds": p.gap.lp_seconds,
        "resource": p.gap.resource,
        "seconds_with_1gb_more": p.gap.seconds_with_more,
        "profiled": p.profiled,
        "casts": p.cast_count,
        "cast_error": p.cast_error,
    }


def inputs_of(target: Target) -> dict[str, str]:
    """Every input of the call by name: the type of a tensor, the repr of anything else."""
    named: Any = {**{f"args[{i}]": value for i, value in enumerate(target.args)}, **target.kwargs}
    leaves, _ = tree_flatten_with_path(named)
    return {
        keystr(path).removeprefix("['").replace("']", "", 1): str(TensorSpec.of(leaf)) if _is_tensor(leaf) else repr(leaf)
        for path, leaf in leaves
    }


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


def _inputs_text(target: Target) -> str:
    inputs = inputs_of(target)
    width = max(map(len, inputs), default=0)
    return "\n".join(["  inputs", *(f"    {name:<{width}}  {kind}" for name, kind in inputs.items())])


def _opaque_bytes(given: list[str]) -> dict[str, str] | str | None:
    """`SIZE` for every module, or `PATTERN=SIZE` once or more."""
    sizes = dict(text.rpartition("=")[::2] for text in given)
    return sizes[""] if set(sizes) == {""} else sizes or None


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"
