"""Folders of whole pipelines on the command line: `vramplan plan` plans them, `vramplan show` reads their files."""

from __future__ import annotations

import inspect
import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planner.api import plan
from planner.checkpoint import is_pipeline
from planner.cli.values import budget_of, options_of
from planner.pipeline_folder import call_parameters
from planner.pipeline_plan import PipelinePlan
from planner.sizes import format_bytes
from runtime.errors import PlannerError

_PROMPT = "a photograph"  # its words do not matter
# What is a module's, by its argument and what that is when it is left out.
_OF_MODULES: dict[str, Any] = {"method": None, "repeats": 1, "opaque_bytes": [], "batch": None, "tokens": None}
# Sizes as calls of pipelines name them.
_SIZES = {"height": "height", "width": "width", "frames": "num_frames"}


def names_pipeline(arguments: Namespace) -> bool:
    """Whether the target is the folder of a pipeline."""
    return is_pipeline(Path(arguments.target))


def refuse_call(arguments: Namespace) -> None:
    """Raises PlannerError where a call is given to one model."""
    if arguments.call:
        raise PlannerError(f"--call is for folders of whole pipelines, which {arguments.target!r} is not; sizes have flags")


def make_pipeline_plan(arguments: Namespace) -> PipelinePlan:
    """The plan that the arguments ask for.

    Raises:
        PlannerError: an argument that pipelines do not have, a size or a value that its call does not take; and as `plan()`.
    """
    for name, default in _OF_MODULES.items():
        if getattr(arguments, name) != default:
            flag = name.replace("_", "-")
            hint = "; write --call num_images_per_prompt=2" if name == "batch" else ""
            raise PlannerError(f"--{flag} is for one model, and {arguments.target!r} is a whole pipeline{hint}")
    return plan(
        Path(arguments.target),
        budget_of(arguments.budget),
        call=_call(arguments),
        dtype=arguments.dtype,
        **options_of(arguments),
    )


def _call(arguments: Namespace) -> dict[str, Any]:
    """The keyword arguments that the pipeline is planned to be called with."""
    takes = call_parameters(Path(arguments.target))
    call = dict(_pair(text) for text in arguments.call)
    for size, name in _SIZES.items():
        if getattr(arguments, size) is not None:
            call[name] = getattr(arguments, size)
    unknown = [name for name in call if name not in takes]
    if unknown:
        raise PlannerError(
            f"the pipeline in {arguments.target!r} is not called with {', '.join(unknown)}; it takes {', '.join(takes)}"
        )
    if "prompt" in takes and not {"prompt", "prompt_embeds"} & call.keys():
        call["prompt"] = _PROMPT
    missing = [name for name, each in takes.items() if each.default is inspect.Parameter.empty and name not in call]
    if missing:
        raise PlannerError(
            f"the pipeline in {arguments.target!r} needs {', '.join(missing)}: write --call {missing[0]}=VALUE, and where that "
            "is a picture or a tensor, plan from Python: plan(folder, budget, call=dict(...))"
        )
    return call


def _pair(text: str) -> tuple[str, Any]:
    """`NAME=VALUE`, where the value is JSON or, if it is none, a string."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise PlannerError(f"--call takes NAME=VALUE, such as num_inference_steps=28 or prompt='a cat', not {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def pipeline_data(target: str, p: PipelinePlan) -> dict[str, Any]:
    """A pipeline's plan as the documented fields of `--json`."""
    parts = [
        {
            "name": key,
            "calls": p.calls_of(key),
            "stay": p.stays[key],
            "seconds": p.seconds_of(key),
            "bytes": p.bytes_at(key),
            "weight_bytes": part.weight_bytes,
            "streamed_bytes": part.streamed_bytes,
        }
        for key, part in p.parts.items()
    ]
    return {
        "target": target,
        "program": p.title,
        "device": p.device,
        "machine": p.machine.name,
        "call": {
            name: value if isinstance(value, (bool, int, float, str)) else repr(value)
            for name, value in p.options.kwargs.items()
        },
        "budget_bytes": p.budget_bytes,
        "peak_bytes": p.peak_bytes,
        "reserved_bytes": p.reserved_bytes,
        "minimum_bytes": p.minimum_bytes,
        "unplanned_bytes": p.unplanned_bytes,
        "peak_at": p.peak_at,
        "weight_bytes": p.weight_bytes,
        "locked_bytes": p.locked_bytes,
        "read_bytes": p.read_bytes,
        "step_seconds": p.step_seconds,
        "bound_seconds": p.bound_seconds,
        "phases": [list(phase) for phase in p.phases],
        "parts": parts,
        "early": [each.to_json() for each in p.early],
    }


def describe_file(data: Mapping[str, Any]) -> str:
    """What the file of a pipeline's plan decides; `data` is its JSON."""
    lines = [
        f"{data['pipeline']} on {data['device']}, planned for {data['machine']['name']}",
        f"  budget    {format_bytes(data['budget']['device_bytes'])}",
        f"  call      {'needs values that are in no file' if data['call'] is None else json.dumps(data['call'])}",
    ]
    for key, part in data["parts"].items():
        lines.append(f"  part      {key}, stays for: {part['stay']}, {len(part['fingerprint'])} nodes")
        lines.append(f"    streams {len(part['streams'])} bundles through the {part['staging']}")
    for each in data.get("early", ()):
        count = sum(weights for _, weights in each["pieces"])
        lines.append(f"  early     {count} weights of {each['of']} during {each['during']}")
    return "\n".join(lines)
