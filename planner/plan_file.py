"""Plan files: decisions, what they were made for, and a fingerprint of the program that they belong to. All of it JSON."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten, treespec_dumps, treespec_loads

from passes.program import Program, operator_name, tensors_of
from passes.spec import TensorSpec
from planner.budget import Budget
from planner.checkpoint import ModelFolder
from planner.machine import Machine
from runtime.errors import PlanFileError

FORMAT, VERSION = "vramplan plan", 2
PIPELINE_FORMAT = "vramplan pipeline plan"  # of `planner.pipeline_file`
_SCALARS = (bool, int, float, str, type(None))


def fingerprint(program: Program) -> list[str]:
    """One entry per node, `name:checksum` over operator, arguments and types: what makes two programs the same."""
    entries = []
    for node in program.graph.nodes:
        types = [str(TensorSpec.of(t)) + str(t.stride()) for t in tensors_of(node)]
        text = f"{node.op}|{operator_name(node.target)}|{node.args}|{node.kwargs}|{types}"
        entries.append(f"{node.name}:{zlib.crc32(text.encode()):08x}")
    if program.origin is not None:  # what was fixed at the largest sizes: how every size is computed
        formulas = [(n.name, f"{n.args}|{n.kwargs}") for n in program.origin.ops()]
        entries += [f"{name}:{zlib.crc32(text.encode()):08x}" for name, text in formulas]
    return entries


def check_fingerprint(saved: list[str], own: list[str]) -> None:
    """Raises PlanFileError that names the first node in which the saved plan's program and this one differ."""
    for before, now in zip(saved, own, strict=False):
        if before != now:
            name, other = before.rpartition(":")[0], now.rpartition(":")[0]
            what = f"{name!r} differs" if name == other else f"the plan has {name!r} where this model has {other!r}"
            raise PlanFileError(f"the plan was made for another model: {what}. Plan this model anew: plan(model, budget=...)")
    if len(saved) != len(own):
        raise PlanFileError(
            f"the plan was made for another model: it has {len(saved)} nodes, this one {len(own)}. "
            "Plan this model anew: plan(model, budget=...)"
        )


def write_plan(
    path: str | Path,
    *,
    name: str,
    fingerprint: Sequence[str],
    decisions: Mapping[str, Any],
    budget: Budget,
    machine: Machine,
    device: str,
    method: str,
    call: tuple[tuple[Any, ...], dict[str, Any]],
    keep: Mapping[str, Mapping[str, Any]],
    offload: bool,
    opaque_bytes: Mapping[str, int] | None = None,
    dynamic: Mapping[str, Any] | None = None,
    repeats: int = 1,
    profile: bool = False,
    tile: bool = True,
    casts: Sequence[str] = (),
    max_error: float | None = None,
    layout: bool = True,
    attention: bool = True,
    folder: ModelFolder | None = None,
) -> None:
    """Writes atomically: a crash leaves the old file or none."""
    data = {
        "format": FORMAT,
        "version": VERSION,
        "program": name,
        "method": method,
        "device": device,
        "budget": asdict(budget),
        "machine": asdict(machine),
        "call": _dump_call(call),
        "keep": {pattern: dict(rule) for pattern, rule in keep.items()},
        "offload": offload,
        "tile": tile,
        "opaque_bytes": dict(opaque_bytes or {}),
        "repeats": repeats,
        "decisions": dict(decisions),
        "fingerprint": list(fingerprint),
    }
    if dynamic is not None:
        data["dynamic"] = dynamic
    if profile:
        data["profile"] = True
    if casts:
        data |= {"casts": list(casts), "max_error": max_error}
    if not layout:
        data["layout"] = False
    if not attention:
        data["attention"] = False
    if folder is not None:  # not where it is: how it is opened
        data["folder"] = {"dtype": str(folder.dtype).removeprefix("torch."), "variant": folder.variant}
    target = Path(path)
    scratch = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        scratch.write_text(json.dumps(data, indent=1))
        os.replace(scratch, target)
    finally:
        scratch.unlink(missing_ok=True)


def read_plan(path: str | Path) -> dict[str, Any]:
    """The contents of a plan file.

    Raises:
        PlanFileError: no such file, not a plan, truncated, or of another version.
    """
    try:
        data = json.loads(Path(path).read_text())
    except OSError as error:
        raise PlanFileError(
            f"cannot read the plan {str(path)!r}: {error.strerror}; check the path given to Plan.load"
        ) from error
    except ValueError as error:
        raise PlanFileError(f"{str(path)!r} is damaged or no plan file ({error}); save it again with p.save(...)") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        if isinstance(data, dict) and data.get("format") == PIPELINE_FORMAT:
            raise PlanFileError(
                f"{str(path)!r} is the plan of a whole pipeline: PipelinePlan.load(path, pipe), where pipe may be its folder"
            )
        raise PlanFileError(f"{str(path)!r} is no plan file; Plan.load takes what p.save(...) wrote")
    if data.get("version") != VERSION:
        raise PlanFileError(
            f"{str(path)!r} has plan version {data.get('version')}, this library reads version {VERSION}; plan the model again"
        )
    missing = {
        "method",
        "device",
        "budget",
        "machine",
        "call",
        "keep",
        "offload",
        "tile",
        "decisions",
        "fingerprint",
        "repeats",
    } - data.keys()
    if missing:
        raise PlanFileError(f"{str(path)!r} lacks {', '.join(sorted(missing))}; save it again with p.save(...)")
    return data


def _dump_call(call: tuple[tuple[Any, ...], dict[str, Any]]) -> dict[str, Any] | None:
    leaves, spec = tree_flatten(call)
    saved: list[Any] = []
    groups: dict[int, int] = {}
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            storage = leaf.untyped_storage()
            saved.append(
                {
                    "shape": list(leaf.shape),
                    "stride": list(leaf.stride()),
                    "dtype": str(leaf.dtype).removeprefix("torch."),
                    "offset": int(leaf.storage_offset()),
                    "storage": groups.setdefault(storage._cdata, len(groups)),
                    "storage_bytes": storage.nbytes(),
                }
            )
        elif isinstance(leaf, _SCALARS):
            saved.append(leaf)
        else:
            return None
    try:
        return {"leaves": saved, "spec": treespec_dumps(spec)}
    except (NotImplementedError, TypeError, ValueError):
        return None  # a container type that pytree cannot write: the caller passes the inputs at load instead


def load_call(saved: dict[str, Any] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs on the meta device, as saved.

    Raises:
        PlanFileError: the inputs could not be written, so they have to be passed.
    """
    if saved is None:
        raise PlanFileError(
            "the plan's inputs have a type that JSON cannot hold; pass them: Plan.load(path, model, inputs=(...,))"
        )
    bases: dict[int, torch.Tensor] = {}

    def tensor(leaf: dict[str, Any]) -> torch.Tensor:
        dtype: torch.dtype = getattr(torch, leaf["dtype"])
        if leaf["storage"] not in bases:
            bases[leaf["storage"]] = torch.empty(leaf["storage_bytes"], dtype=torch.uint8, device="meta")
        storage = bases[leaf["storage"]].untyped_storage()
        return torch.empty(0, dtype=dtype, device="meta").set_(storage, leaf["offset"], leaf["shape"], leaf["stride"])

    leaves = [tensor(leaf) if isinstance(leaf, dict) else leaf for leaf in saved["leaves"]]
    args, kwargs = tree_unflatten(leaves, treespec_loads(saved["spec"]))
    return args, kwargs
