"""Where it pays to nest slicing: what binds at the least budget, predicted at full size without weights.

    python -m tests.benchmarks.nesting             # all of it
    python -m tests.benchmarks.nesting --only images
    python -m tests.benchmarks.nesting --update    # writes tests/benchmarks/results/nesting.{md,json}

Every row is the plan of least memory on the memory model of CUDA, for rtx-4090: solved, not emitted; nothing here is measured.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformerBlock
from torch import nn

from passes.loop import Loop
from passes.program import tensors_of
from planner import Plan, plan
from planner.presets import Preset
from planner.solve.decide import Solver
from planner.solve.tilings import Tilings
from tests.benchmarks.tiling import main, sections

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]
TITLE = """\
# Where it pays to nest slicing

Written by `python -m tests.benchmarks.nesting --update`. Predicted for rtx-4090 on the memory model of CUDA, not measured. At
the least budget one operator or loop needs the most. `there` is what it needs itself: of a loop, a tile's values and workspace.
`around` are values that are there whole because something else reads them. Another loop inside of a loop could only lower
`there`, and only where a tile cannot be cut further: where `elements a tile` of the dimension that is cut are one. Slices
around whole stretches lower `around`, where samples are independent: these are made (`slices`).
"""
BUDGETS = ("6GB", "4GB", "2GB", "1GB", "0.4GB", "0.2GB")


def images() -> Iterator[Row]:
    """AutoencoderKL's decoder (that of FLUX, bf16), 1024 x 1024, by images at once, with values on the host and without."""
    for count in (1, 2, 4):
        p = captured("flux-vae-decoder", count, height=1024, width=1024)
        for hosting in (True, False):
            tilings = replace(p._tilings, freedom=replace(p._tilings.freedom, hosting=hosting))
            yield from rows(f"{count} images" if count > 1 else "1 image", p, tilings, {"host": "yes" if hosting else "no"})


def budgets() -> Iterator[Row]:
    """The same for four images: the step over the arithmetic of whole operators, all four together and in slices."""
    p = captured("flux-vae-decoder", 4, height=1024, width=1024)
    together = replace(p._tilings)
    together.__dict__["_slicings"] = _Nothing()
    for budget in BUDGETS:
        begun, found = time.perf_counter(), {}
        nbytes = int(float(budget.removesuffix("GB")) * 1e9)
        for name, tilings in (("together", together), ("in slices", p._tilings)):
            fits = tilings.least_bytes(nbytes) <= nbytes
            solver, schedule = tilings.solve(nbytes) if fits else (None, None)
            found[name] = f"{schedule.time.step_seconds / p.untiled_seconds:.3f}" if schedule else "does not fit"
            if name == "in slices" and solver is not None:
                found |= _means(solver)
        yield {"budget": budget, **found, "seconds": round(time.perf_counter() - begun, 1)}


def others() -> Iterator[Row]:
    """Other programs at their least budget: a video decoder, a block at 75,000 tokens, a text encoder, a language model."""
    for name, sizes in (
        ("wan-vae-decoder", {"frames": 9}), ("t5-xxl-encoder", {}), ("llama-3.1-8b", {"tokens": 512}),
    ):  # fmt: skip
        p = captured(name, 1, **sizes)
        yield from rows(name, p, p._tilings, {})
    with torch.device("meta"):
        block = FluxTransformerBlock(3072, 24, 128).to(torch.bfloat16).eval()
        rotary = tuple(torch.empty(75_000, 128) for _ in range(2))
        made = {name: torch.empty(1, n, 3072, dtype=torch.bfloat16) for name, n in (("hidden_states", 74_488), ("text", 512))}
        temb = torch.empty(1, 3072, dtype=torch.bfloat16)
    kwargs = {"hidden_states": made["hidden_states"], "encoder_hidden_states": made["text"], "temb": temb}
    p = _planned(block, "forward", (), {**kwargs, "image_rotary_emb": rotary})
    yield from rows("FLUX.1, a joint block, 75,000 tokens", p, p._tilings, {})


def captured(name: str, samples: int, **sizes: int) -> Plan:
    """A preset for so many samples at once."""
    preset = Preset.load(name)
    module, args, kwargs = preset.build(**sizes)
    if samples > 1:
        kwargs = {k: v.new_empty((samples, *v.shape[1:])) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    return _planned(module, preset.method, args, kwargs)


def _planned(module: nn.Module, method: str, args: Any, kwargs: Any) -> Plan:
    return plan(module, "1TB", inputs=args, kwargs=kwargs, method=method, machine="rtx-4090", device="cuda")


def rows(what: str, p: Plan, tilings: Tilings, about: Row) -> Iterator[Row]:
    """The least that all samples together need, and where they can be sliced the least in slices."""
    begun = time.perf_counter()
    own = min((tilings.branch(start).minimum for start in tilings._starts), key=lambda solver: solver.minimum.peak_bytes)
    solvers = [own] if tilings.minimum is own else [own, tilings.minimum]
    for solver in solvers:
        seconds = round(time.perf_counter() - begun, 1) if solver is solvers[-1] else None
        yield {"program": what, **about, **_means(solver), **bound_by(solver), "seconds": seconds}


def _means(solver: Solver) -> Row:
    tiling = solver.problem.tiling
    slices = tiling.unrolled[0].count if tiling.unrolled else 1
    return {"slices": slices, "regions": len(tiling.tiles), "values on the host": len(tiling.hosted)}


def bound_by(solver: Solver) -> Row:
    """What is there where the least schedule needs the most."""
    problem, least = solver.problem, solver.minimum
    i = least.peak_position
    node = problem.liveness.nodes[i]
    loop, inner = node.meta.get("loop"), problem.liveness.bodies.get(i, ())
    there = max((max(run.bytes_at) for run in inner), default=0)
    if loop is None:
        there = problem.liveness.costs[i].workspace_bytes + sum(nbytes for _, nbytes in problem.liveness.born[i])
    live = int(problem.activation_bytes[i])
    given = problem.liveness.input_bytes + sum(t.nbytes for n in problem.program.output.all_input_nodes for t in tensors_of(n))
    return {
        "least": least.peak_bytes, "at": node.name, "there": there, "around": live - there, "inputs, results": int(given),
        "weights, libraries": least.peak_bytes - live, "tiles": loop.count if loop else None,
        "elements a tile": _elements(loop) if loop else None,
    }  # fmt: skip


def _elements(loop: Loop) -> int:
    """The most elements of the dimension that is cut which a tile writes."""
    sizes = []
    for run in loop.runs:
        names = [node.name for node in run.placeholders[len(run.placeholders) - len(run.table[0]) :]]
        starts = [i for i, name in enumerate(names) if name.partition("_")[0] == "lo"]
        sizes.append(max((row[i + 1] - row[i] for row in run.table for i in starts), default=0))
    return max(sizes)


class _Nothing(dict[Any, None]):
    """No program can be sliced."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: object) -> None:
        return None


TABLES = {"images": images, "budgets": budgets, "others": others}


def text(found: dict[str, list[Row]]) -> str:
    """The tables, and what they say together."""
    lines = [TITLE, *sections(TABLES, found)]
    bound = [row for each in found.values() for row in each if "there" in row]
    single = sum(row["elements a tile"] == 1 for row in bound)
    whole = sum(row["around"] > row["there"] for row in bound)
    said = f"Of these {len(bound)} plans {single} are bound by a tile of one element, where a loop in a loop would pay"
    return "\n".join([*lines, f"{said}; in {whole} most is around.", ""])


if __name__ == "__main__":
    main(__doc__, "nesting", TABLES, text)
