"""Files of pipelines' plans: decisions by part, what they were made for, and a fingerprint of every program. All of it JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.budget import Budget
from planner.frontends import pipelines
from planner.machine import machine_from_mapping
from planner.options import Options, check_keep
from planner.pipeline_calls import Components
from planner.pipeline_folder import open_pipeline_target
from planner.pipeline_problem import Analyses, programs_of
from planner.plan_file import FORMAT, PIPELINE_FORMAT, check_fingerprint, fingerprint
from planner.solve.early import Early
from runtime.errors import PlanFileError
from runtime.write_file import replacing

if TYPE_CHECKING:
    from planner.pipeline_plan import PipelinePlan

VERSION = 1
_DECLARED = ("offload", "tile", "layout", "attention", "profile", "max_error")


def save_pipeline(plan: PipelinePlan, path: str | Path) -> None:
    """Writes atomically: a crash leaves the old file or none."""
    options = plan.options
    parts = {}
    for key, part in plan.parts.items():
        own: dict[str, Any] = {
            "stay": plan.stays[key],
            "budget_bytes": part.budget_bytes,
            "fingerprint": fingerprint(part.program),
        }
        if plan.spills:
            own["host_bytes"] = part.budget.host_bytes
        parts[key] = {**own, **part.decisions.to_json()}
    data = {
        "format": PIPELINE_FORMAT,
        "version": VERSION,
        "pipeline": plan.title,
        "device": plan.device,
        "budget": asdict(plan.budget),
        "machine": asdict(plan.machine),
        "call": _plain(options.kwargs),
        "keep": {pattern: dict(rule) for pattern, rule in options.keep.items()},
        "casts": list(options.casts),
        **{name: getattr(options, name) for name in _DECLARED},
        "parts": parts,
        "early": [each.to_json() for each in plan.early],
    }
    if options.opaque_bytes:
        data["opaque_bytes"] = dict(options.opaque_bytes)
    if plan.held is not None:
        data["held"] = dict(plan.held)
    if plan.folder is not None:  # not where it is: how it is opened
        data["folder"] = {"dtype": plan.folder.dtype, "variant": plan.folder.variant}
    with replacing(path, "the plan") as target:
        target.write_text(json.dumps(data, indent=1))


def load_pipeline(path: str | Path, pipe: Any, call: Mapping[str, Any] | None) -> PipelinePlan:
    """As `PipelinePlan.load`."""
    from planner.pipeline_plan import PipelinePlan

    data = read_pipeline_plan(path)
    how = data.get("folder", {})
    opened = open_pipeline_target(pipe, how.get("dtype"), how.get("variant"))
    pipe = pipe if opened is None else opened.pipe
    if call is None and data["call"] is None:
        raise PlanFileError(
            "the planned call had more than plain values, which JSON cannot hold; pass it: "
            "PipelinePlan.load(path, pipe, call=dict(...))"
        )
    try:
        declared = {name: data[name] for name in _DECLARED}
        options = Options(
            Budget(**data["budget"]),
            machine_from_mapping(data["machine"], origin=str(path)),
            data["device"],
            kwargs=dict(data["call"] if call is None else call),
            keep=check_keep(data["keep"]),
            casts=tuple(data["casts"]),
            opaque_bytes={str(p): int(n) for p, n in data.get("opaque_bytes", {}).items()},
            held=None if "held" not in data else {str(name): int(nbytes) for name, nbytes in data["held"].items()},
            **declared,
        )
        Budget.parse(options.budget, options.device)
        parts = dict(data["parts"])
        early = tuple(Early.from_json(each) for each in data.get("early", ()))
        saved = {key: [str(entry) for entry in part["fingerprint"]] for key, part in parts.items()}
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise PlanFileError(f"{str(path)!r} is damaged ({error!r}); save it again with p.save(...)") from error
    analyses = Analyses.of(Components(pipelines.components_of(pipe)))
    run = pipelines.record(pipe, options.kwargs)
    made, _ = analyses.captures.of_run(run, options)
    for key, program in zip(parts, programs_of(made), strict=False):
        check_fingerprint(saved[key], fingerprint(program.program))
    try:
        return PipelinePlan(pipe, options, analyses, run, parts, early, opened)
    except (ValueError, KeyError) as error:
        raise PlanFileError(f"the decisions in {str(path)!r} do not fit the pipeline ({error}); plan it again") from error


def is_pipeline_plan(path: str | Path) -> bool:
    """Whether a file is, or was, the plan of a pipeline."""
    try:
        data = json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and data.get("format") == PIPELINE_FORMAT


def read_pipeline_plan(path: str | Path) -> dict[str, Any]:
    """The content of a plan's file.

    Raises:
        PlanFileError: it cannot be read, is damaged, of another version, or no plan of a pipeline.
    """
    try:
        data = json.loads(Path(path).read_text())
    except OSError as error:
        raise PlanFileError(f"cannot read the plan {str(path)!r}: {error.strerror}; check the path given to load") from error
    except ValueError as error:
        raise PlanFileError(f"{str(path)!r} is damaged or no plan file ({error}); save it again with p.save(...)") from error
    if isinstance(data, dict) and data.get("format") == FORMAT:
        raise PlanFileError(f"{str(path)!r} is the plan of one model, not of a whole pipeline: Plan.load(path, model)")
    if not isinstance(data, dict) or data.get("format") != PIPELINE_FORMAT:
        raise PlanFileError(f"{str(path)!r} is no plan of a pipeline; PipelinePlan.load takes what its p.save(...) wrote")
    if data.get("version") != VERSION:
        raise PlanFileError(
            f"{str(path)!r} has plan version {data.get('version')}, this library reads version {VERSION}; "
            "plan the pipeline again"
        )
    missing = {"device", "budget", "machine", "call", "keep", "casts", "parts", *_DECLARED} - data.keys()
    if missing:
        raise PlanFileError(f"{str(path)!r} lacks {', '.join(sorted(missing))}; save it again with p.save(...)")
    return data


def _plain(call: Mapping[str, Any]) -> dict[str, Any] | None:
    """The call as JSON has it; None where it holds anything else than plain values."""
    try:
        known = json.loads(json.dumps(dict(call)))
    except (TypeError, ValueError):
        return None
    return known if known == dict(call) else None
