"""`vramplan emit`: plans a model and writes a package that runs without the planner."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from planner.cli.commands import Answer, make_plan, plan_data, target_of
from planner.cli.random_weights import RandomWeights
from planner.cli.run import lacks_weights, require_host_memory
from planner.sizes import format_bytes
from runtime.errors import PlannerError


def emit(arguments: Namespace) -> Answer:
    """Plans with the target's weights, and emits.

    Raises:
        PlannerError: the weights do not fit host memory, the folder cannot be written; and as `plan()`.
    """
    target = target_of(arguments)
    if arguments.reference and target.load is None:
        raise PlannerError(f"--reference is for a checkpoint folder with safetensors files, which {target.name!r} is not")
    origin = "checkpoint" if target.load is not None else "random" if lacks_weights(target.module) else "factory"
    if origin != "checkpoint":
        require_host_memory(target)
    p = make_plan(target, arguments)
    weights = target.load() if target.load is not None else RandomWeights(target.module) if origin == "random" else None
    p.emit(arguments.folder, weights, max_shard_size=arguments.max_shard_size, copy=not arguments.reference)
    nbytes = sum(path.stat().st_size for path in Path(arguments.folder).iterdir())
    text = (
        f"{p}\nemitted to {arguments.folder}, {format_bytes(nbytes)}, {origin} weights\nm = runtime.load({arguments.folder!r})"
    )
    data = {"plan": plan_data(target, p), "weights": origin, "folder": arguments.folder, "package_bytes": nbytes}
    return Answer(text, data)
