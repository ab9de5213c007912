"""What tiling gives, predicted at full size without weights: images, weights too large for a budget, long sequences.

    python -m tests.benchmarks.tiling             # all of it
    python -m tests.benchmarks.tiling --only images
    python -m tests.benchmarks.tiling --update    # writes tests/benchmarks/results/tiling.{md,json}

Every row is a plan that was solved, emitted, checked and simulated on the memory model of CUDA; nothing here is measured.
`slowdown` is the step over the arithmetic of whole operators, weights resident: what a device without a limit would take.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformerBlock
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from planner import InfeasibleBudget, Plan, plan
from planner.presets import Preset
from planner.sizes import format_bytes, format_seconds
from planner.solve.decisions import UNTILED

RESULTS = Path(__file__).parent / "results"
MACHINES = ("rtx-3060", "rtx-4090")
IMAGES = {
    (1024, 1024): ("4GB", "2GB", "1GB", "0.5GB"),
    (2048, 2048): ("4GB", "2GB", "1GB"),
    (2176, 3840): ("4GB", "2GB", "1GB"),
}
TOKENS = 75_000

Row = dict[str, Any]
TITLE = """\
# What tiling gives

Written by `python -m tests.benchmarks.tiling --update`. Predicted on the memory model of CUDA and on machine models, not
measured. `slowdown` is the step over the arithmetic of whole operators with all weights resident.
"""


def images() -> Iterator[Row]:
    """AutoencoderKL's decoder (that of FLUX, bf16), by size of the image, machine and budget."""
    preset = Preset.load("flux-vae-decoder")
    for (height, width), budgets in IMAGES.items():
        module, args, kwargs = preset.build(height=height, width=width)
        roomy = plan(module, "1TB", inputs=args, kwargs=kwargs, method=preset.method, machine=MACHINES[0], device="cuda")
        for machine in MACHINES:
            captured = roomy.replan("1TB", machine=machine)
            half = captured.unplanned_bytes // 2
            about = {"image": f"{width} x {height}", "machine": machine, "unplanned": captured.unplanned_bytes}
            for budget in (*budgets, half):
                yield about | {"budget": "half of unplanned" if budget == half else budget} | outcome(captured, budget)


def weights() -> Iterator[Row]:
    """The least budget of programs with large tables and heads: with whole weights, and with rows where they pay."""
    yield least("T5-XXL encoder, 512 tokens", *_preset("t5-xxl-encoder"))
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128_256, max_position_embeddings=8192, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        module = LlamaForCausalLM(config).to(torch.bfloat16).eval()
        ids = torch.empty(1, 512, dtype=torch.int64)
    yield least(
        "8B language model, prefill of 512 tokens", module, "forward", (ids,), {"use_cache": False, "logits_to_keep": 1}
    )


def sequences() -> Iterator[Row]:
    """One block of FLUX and of Wan-14B at 75,000 tokens."""
    with torch.device("meta"):
        flux = FluxTransformerBlock(3072, 24, 128).to(torch.bfloat16).eval()
        wan = WanTransformerBlock(5120, 13824, 40, cross_attn_norm=True).to(torch.bfloat16).eval()
    text = 512
    rotary = tuple(torch.empty(TOKENS, 128, device="meta") for _ in range(2))
    own = {
        "hidden_states": _bf16(1, TOKENS - text, 3072), "encoder_hidden_states": _bf16(1, text, 3072), "temb": _bf16(1, 3072),
        "image_rotary_emb": rotary,
    }  # fmt: skip
    yield from sequence("FLUX.1, a joint block", flux, own)
    tables = tuple(torch.empty(1, TOKENS, 1, 128, device="meta") for _ in range(2))
    others = {
        "hidden_states": _bf16(1, TOKENS, 5120), "encoder_hidden_states": _bf16(1, text, 5120),
        "temb": torch.empty(1, 6, 5120, device="meta"), "rotary_emb": tables,
    }  # fmt: skip
    yield from sequence("Wan-14B, a block", wan, others)


def sequence(model: str, module: nn.Module, kwargs: dict[str, Any]) -> Iterator[Row]:
    for machine in MACHINES:
        roomy = plan(module, "1TB", kwargs=kwargs, machine=machine, device="cuda")
        whole = roomy._tilings.of(UNTILED).minimum.peak_bytes
        about = {"block": model, "machine": machine, "unplanned": roomy.unplanned_bytes, "least untiled": whole}
        for share in (0.9, 0.75):
            yield about | {"budget": format_bytes(int(share * whole))} | outcome(roomy, int(share * whole))


def least(model: str, module: nn.Module, method: str, args: Any, kwargs: Any) -> Row:
    begun = time.perf_counter()
    p = plan(module, "1TB", inputs=args, kwargs=kwargs, method=method, machine="rtx-4090", device="cuda")
    before, largest = p._tilings.base.minimum.peak_bytes, max(w.nbytes for w in p.program.weights.values())
    found = {"model": model, "weights": p.weight_bytes, "largest weight": largest, "least before": before}
    p = p.replan(p.minimum_bytes)
    tiling = p.decisions.tiling
    counts = {"tables looked up": len(tiling.lookups), "weights in slices": len(tiling.slices), "regions": len(tiling.tiles)}
    return found | {"least": p.minimum_bytes} | counts | {"seconds": round(time.perf_counter() - begun, 1)}


def outcome(captured: Plan, budget: int | str) -> Row:
    """What planning for a budget gives."""
    begun = time.perf_counter()
    try:
        p = captured.replan(budget)
    except InfeasibleBudget as error:
        return {"reserved": None, "least": error.minimum_bytes, "seconds": round(time.perf_counter() - begun, 1)}
    loops = [node.meta["loop"].count for node in p.problem.liveness.nodes if "loop" in node.meta]
    return {
        "reserved": p.reserved_bytes, "step": p.step_seconds, "slowdown": p.step_seconds / p.untiled_seconds,
        "regions": len(loops), "most tiles": max(loops, default=1), "on the host": p.layout.host_bytes,
        "seconds": round(time.perf_counter() - begun, 1),
    }  # fmt: skip


def _preset(name: str) -> tuple[nn.Module, str, Any, Any]:
    preset = Preset.load(name)
    module, args, kwargs = preset.build()
    return module, preset.method, args, kwargs


def _bf16(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


TABLES = {"images": images, "weights": weights, "sequences": sequences}
_BYTES = {
    "unplanned", "reserved", "least", "least before", "least untiled", "on the host", "weights", "largest weight",
    "there", "around", "inputs, results", "weights, libraries",
}  # fmt: skip


def table(rows: list[Row]) -> list[str]:
    """Markdown."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join("planned in" if name == "seconds" else name for name in names) + " |", "|---" * len(names) + "|"]
    return lines + ["| " + " | ".join(_cell(name, row.get(name)) for name in names) + " |" for row in rows]


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "does not fit" if name == "reserved" else ""
    if name in _BYTES:
        return format_bytes(value)
    if name == "step":
        return format_seconds(value)
    return f"{value:.3f}" if name == "slowdown" else f"{value:.1f} s" if name == "seconds" else str(value)


def main(
    doc: str | None, name: str, tables: Mapping[str, Callable[[], Iterator[Row]]], text: Callable[[dict[str, list[Row]]], str]
) -> None:
    """The command: makes the tables that it is asked for, and with `--update` writes results/<name>.{json,md}."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(tables), action="append", help="this table; may be given again")
    parser.add_argument("--update", action="store_true", help="write the results")
    arguments = parser.parse_args()
    found: dict[str, list[Row]] = {}
    for each in arguments.only or tables:
        found[each] = []
        for row in tables[each]():
            found[each].append(row)
            print(", ".join(f"{key} {_cell(key, value)}" for key, value in row.items()), flush=True)
    if arguments.update:
        path = RESULTS / f"{name}.json"
        found = {**(json.loads(path.read_text()) if path.exists() else {}), **found}
        path.write_text(json.dumps(found, indent=1) + "\n")
        (RESULTS / f"{name}.md").write_text(text(found))


def sections(tables: Mapping[str, Callable[[], Iterator[Row]]], found: dict[str, list[Row]]) -> list[str]:
    """Lines of Markdown for every table that was made."""
    lines: list[str] = []
    for name in (name for name in tables if name in found):
        lines += [f"## {name.capitalize()}", "", str(tables[name].__doc__), "", *table(found[name]), ""]
    return lines


def text(found: dict[str, list[Row]]) -> str:
    return "\n".join([TITLE, *sections(TABLES, found)])


if __name__ == "__main__":
    main(__doc__, "tiling", TABLES, text)
