"""`p.emit(folder)`: a package that runs where neither the planner nor the model's library is (`runtime.load`).

    program.py                          the emitted program, as `p.code` prints it
    plan.json                           everything else that running it takes; which tensor is where
    weights-00001-of-00002.safetensors  what the program reads, each tensor once and as it is stored
    weights.safetensors.index.json      which tensor is in which of them

A package is written beside its place and moved there when it is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from planner.checkpoint_weights import Checkpoint
from planner.dynamic_plan import dynamic_signature
from planner.package_weights import PackageWeights, write_shards
from planner.sizes import format_bytes, parse_size
from planner.weights import open_weights
from runtime.errors import PackageError, PlannerError
from runtime.executable import Executable
from runtime.package_format import FORMAT, PLAN_FILE, PRELUDE, dump_document, encode_program, encode_signature
from runtime.signature import CallSignature, Signature, bind_call, sees_spelling

if TYPE_CHECKING:
    from planner.plan import Plan

_OURS = re.compile(r"plan\.json|program(_\d+)?\.py|weights(-\d+-of-\d+)?\.safetensors(\.index\.json)?|__pycache__")


def emit_package(plan: Plan, folder: str | Path, weights: Any, max_shard_size: int | str, *, copy: bool) -> None:
    """See `Plan.emit`."""
    _refuse_python(plan)
    most = parse_size(max_shard_size, what="max_shard_size")
    target = Path(os.path.realpath(folder))
    _check_target(target, folder)
    built = plan.runner is not None
    if weights is None and plan.options.folder is not None and not (built and copy):
        weights = plan.options.folder.require_weights()
    if not copy and not isinstance(weights, (str, os.PathLike, Checkpoint)):
        raise PlannerError(
            "copy=False refers to files of a checkpoint: say which, p.emit(folder, weights='path/of/a/checkpoint', copy=False)"
        )
    programs = _programs(plan)
    lookup = None if weights is None else open_weights(weights)
    with torch.no_grad():
        tensors = PackageWeights(plan.target, [program for _, program in programs], lookup, _states(plan), refer=not copy)
        for path in tensors.references:
            if Path(os.path.realpath(path)).is_relative_to(target):
                raise PackageError(
                    f"the checkpoint's {path} lies in {target}, which the package replaces; emit to another folder"
                )
        data = _facts(plan) | {"programs": [_program(i, program, s, tensors) for i, (s, program) in enumerate(programs)]}
        with _replacing(target, tensors.nbytes) as scratch:
            files, entries = write_shards(scratch, tensors, most)
            for i, (_, program) in enumerate(programs):
                (scratch / _source_name(i)).write_text(PRELUDE + program.source, encoding="utf-8")
            (scratch / PLAN_FILE).write_text(dump_document({**data, "files": files, "tensors": entries}), encoding="utf-8")


def _refuse_python(plan: Plan) -> None:
    """Raises PlannerError for what runs Python of the model's own, which a package has none of."""
    from planner.parted import PartedPlan

    if isinstance(plan, PartedPlan):
        parts = sorted({key for key in plan.parts if key})
        example = f"plan(model.get_submodule({parts[0]!r}), ...)" if parts else "plan(model.part, ...)"
        raise PlannerError(
            f"{plan.title} is planned in parts, between which its own Python runs, and a package holds no Python of a model: "
            f"emit its parts, each planned by itself: {example}.emit(folder)"
        )
    target, method = plan.target, plan.options.method
    if method == "forward" and (target._forward_hooks or target._forward_pre_hooks):
        raise PlannerError(
            f"the {type(target).__name__} has forward hooks, which run around its program as Python, and a package holds "
            "none: remove them (handle.remove()), or plan a module that calls it, whose program has in it what they do"
        )


def _programs(plan: Plan) -> list[tuple[Signature, Executable]]:
    """The plan's own program; of a built one also those that were planned since for other calls, within the same arenas.

    Not with attributes that programs leave behind: which of several may run depends on them.
    """
    runner = plan._runner
    known = [] if runner is None or runner.closed else runner.programs
    if len(known) > 1 and all(program.leftovers is None for _, program in known):
        return known
    call = bind_call(getattr(plan.target, plan.options.method), plan.options.args, plan.options.kwargs)
    signature: Signature = CallSignature.of(*call)[0]
    if plan.program.origin is not None:
        signature = dynamic_signature(plan.program.origin, call)
    return [(signature, plan.executable)]


def _states(plan: Plan) -> Mapping[str, torch.Tensor]:
    """What programs of a built plan write, as it is now; of others the module has it."""
    runner = plan._runner
    return {} if runner is None or runner.closed else dict(runner.state)


def _facts(plan: Plan) -> dict[str, Any]:
    """What a package says of the plan as a whole."""
    module, method = plan.target, plan.options.method
    return {
        "class": type(module).__name__,
        "method": method,
        "parameters": _parameters(module, method),
        "sees_spelling": sees_spelling(getattr(module, method)),
        "device": plan.device,
        "machine": plan.machine.name,
        "link_bandwidth": plan.machine.link_peak_bandwidth,
        "budget_bytes": plan.budget_bytes,
        "disk_bytes": plan.budget.disk_bytes,
        "torch": torch.__version__,
    }


def _parameters(module: nn.Module, method: str) -> list[dict[str, str]]:
    """How the method is called; of defaults, which the program has in it, the text."""
    found = []
    for parameter in inspect.signature(getattr(module, method)).parameters.values():
        data = {"name": parameter.name, "kind": parameter.kind.name}
        if parameter.default is not inspect.Parameter.empty:
            data["default"] = repr(parameter.default)
        found.append(data)
    return found


def _source_name(index: int) -> str:
    return "program.py" if index == 0 else f"program_{index + 1}.py"


def _program(index: int, program: Executable, signature: Signature, tensors: PackageWeights) -> dict[str, Any]:
    digest = hashlib.sha256((PRELUDE + program.source).encode()).hexdigest()
    try:
        served, data = encode_signature(signature), encode_program(program, tensors.name_of)
    except TypeError as error:
        raise PlannerError(
            f"{program.name} cannot be emitted, for JSON cannot say what it takes or gives: {error}. Plan a method whose "
            "inputs and outputs are tensors, plain values and containers of them"
        ) from error
    return {"source": _source_name(index), "sha256": digest, "signature": served, **data}


# Where it goes.


def _check_target(target: Path, given: str | Path) -> None:
    """Raises PackageError for a folder that holds something else, or that cannot be made."""
    if not target.parent.is_dir():
        raise PackageError(f"cannot emit to {str(given)!r}: there is no folder {target.parent}; make it first")
    if not target.exists():
        return
    if not target.is_dir():
        raise PackageError(f"cannot emit to {str(given)!r}: that is a file; name a folder")
    others = sorted(path.name for path in target.iterdir() if not _OURS.fullmatch(path.name))
    if others or (any(target.iterdir()) and not _is_package(target)):
        raise PackageError(
            f"cannot emit to {str(given)!r}: that folder is not empty, and what is in it would be lost "
            f"({', '.join(others[:3]) or 'no package'}); name a new folder, or one with a package that may be replaced"
        )


def _is_package(folder: Path) -> bool:
    """Whether a package was emitted there, damaged or of another version though it may be."""
    try:
        beginning = (folder / PLAN_FILE).read_bytes()[:200]
    except OSError:
        return False
    return json.dumps(FORMAT).encode() in beginning


@contextlib.contextmanager
def _replacing(target: Path, nbytes: int) -> Iterator[Path]:
    """Gives a new folder beside `target`, which takes its place when the block ends without an error; else it is removed.

    Raises:
        PackageError: the disk has no room or refuses.
    """
    free = shutil.disk_usage(target.parent).free
    if nbytes > free:
        raise PackageError(
            f"the package takes {format_bytes(nbytes)} on disk, and {target.parent} has {format_bytes(free)} free; emit to "
            "another disk, or refer to a checkpoint's files: p.emit(folder, weights='path/of/a/checkpoint', copy=False)"
        )
    scratch = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        scratch.mkdir()
        yield scratch
        _exchange(scratch, target)
    except OSError as error:
        raise PackageError(
            f"cannot write the package {target}: {error.strerror or error}; nothing is left of it; emit to another folder"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _exchange(fresh: Path, target: Path) -> None:
    """Moves a folder to its place; a package that is there goes only when that has worked."""
    if not target.exists():
        os.rename(fresh, target)
        return
    old = fresh.with_suffix(".old")
    os.rename(target, old)
    try:
        os.rename(fresh, target)
    except BaseException:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)
