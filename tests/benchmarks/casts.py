"""What scaled casts lose and what they give: error tables, a pretrained model, full-size steps.

    python -m tests.benchmarks.casts             # all of it
    python -m tests.benchmarks.casts --only weights
    python -m tests.benchmarks.casts --update    # writes tests/benchmarks/results/casts.{md,json}

`weights` and `sentences` are measured; `steps` are predicted at full size, on the memory model of CUDA and on machine models.
`unscaled` is `weight.to(float8_e4m3fn)`, which is what layerwise casting does today.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn

from planner import Machine, plan
from planner.presets import Preset
from planner.sizes import format_bytes, format_seconds
from runtime.stored import quantise, scales_of, upcast
from tests.pretrained import minilm

RESULTS = Path(__file__).parent / "results"
E4M3, E5M2, INT8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8

# A link on which everything that may be cast is worth casting.
SLOW = replace(Machine.preset("rtx-4090"), name="slow link", link_bandwidth=1e8)

Row = dict[str, Any]
TITLE = """\
# What casts lose and give

Written by `python -m tests.benchmarks.casts --update`.
"""


def _scaled(dtype: torch.dtype, dim: int | None) -> Callable[[Tensor], Tensor]:
    def stored(weight: Tensor) -> Tensor:
        scales = scales_of(weight, dtype, dim)
        return upcast(quantise(weight, scales, dtype), scales, weight.dtype)

    return stored


HOWS: dict[str, Callable[[Tensor], Tensor]] = {
    "e4m3, a scale a row": _scaled(E4M3, 0),
    "e4m3, one scale": _scaled(E4M3, None),
    "e4m3, unscaled": lambda weight: weight.to(E4M3).to(weight.dtype),
    "e5m2, a scale a row": _scaled(E5M2, 0),
    "int8, a scale a row": _scaled(INT8, 0),
    "int8, one scale": _scaled(INT8, None),
}


def weights() -> Iterator[Row]:
    """Relative error |stored - w| / |w| of a weight of 1024 x 1024, and the share of it that becomes zero."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(1024, 1024, generator=generator)
    heavy = torch.distributions.StudentT(2.5)
    torch.manual_seed(0)
    outlier = normal * 0.02
    outlier[17] *= 100
    kinds = {
        "N(0, 0.02)": normal * 0.02,
        "N(0, 4e-4)": normal * 4e-4,
        "heavy tails (Student t, 2.5)": heavy.sample((1024, 1024)) * 0.02,
        "one row 100 x larger": outlier,
    }
    for kind, weight in kinds.items():
        for how, stored in HOWS.items():
            back = stored(weight)
            rows = (back - weight).norm(dim=1) / weight.norm(dim=1)
            yield {
                "weights": kind,
                "stored as": how,
                "error": float((back - weight).norm() / weight.norm()),
                "worst row": float(rows.max()),
                "zero": float((back == 0).float().mean()),
            }


def pretrained() -> Iterator[Row]:
    """Sentence embeddings of MiniLM (real weights, fp32): cosine similarity to its own, of the worst of the sentences."""
    module, call = minilm()
    own = _embed(module, call)
    chosen: set[str] = set()
    types: dict[str, Any] = {"e4m3": E4M3, "e5m2": E5M2, "int8": INT8, "of e4m3 and int8 the better": (E4M3, INT8)}
    for name, allowed in types.items():
        p = plan(module, "20MB", kwargs=call, device="accounting", machine=SLOW, allow_cast=allowed)
        planned = p.build()
        found = _embed(planned, call)
        p.restore()
        count = len(p.decisions.tiling.casts)
        yield _similarity(f"{name}, scaled", own, found) | {"weights": count, "estimated error": p.cast_error}
        chosen = {p.program.weights[cast.weight].name for cast in p.decisions.tiling.casts}
    kept = {name: weight.clone() for name, weight in module.named_parameters()}
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if name in chosen:
                weight.copy_(weight.to(E4M3).to(weight.dtype))
    yield _similarity("e4m3, unscaled", own, _embed(module, call)) | {"weights": len(chosen), "estimated error": None}
    with torch.no_grad():
        for name, weight in module.named_parameters():
            weight.copy_(kept[name])


def _embed(module: nn.Module, call: dict[str, Tensor]) -> Tensor:
    """Means over the tokens that are there."""
    with torch.no_grad():
        hidden = module(**call).last_hidden_state
    mask = call["attention_mask"].unsqueeze(-1)
    return (hidden * mask).sum(1) / mask.sum(1)


def _similarity(name: str, own: Tensor, found: Tensor) -> Row:
    cosines = nn.functional.cosine_similarity(own, found)
    return {"stored as": name, "cosine": float(cosines.min()), "error": float((found - own).norm() / own.norm())}


def steps() -> Iterator[Row]:
    """Predicted, one of 28 steps, with and without `allow_cast="float8_e4m3fn"`; `resident`: everything on the device."""
    for name, machines, budgets in (
        ("flux1-dev", ("rtx-4090", "rtx-4060-ti"), ("6GB", "3GB")),
        ("sdxl-unet", ("rtx-4060-ti",), ("2GB",)),
        ("t5-xxl-encoder", ("rtx-4090",), ("3GB",)),
    ):
        preset = Preset.load(name)
        module, args, kwargs = preset.build()
        for machine in machines:
            for budget in budgets:
                common: dict[str, Any] = {"method": preset.method, "device": "cuda", "machine": machine, "repeats": 28}
                common |= {"inputs": args, "kwargs": kwargs}
                plain = plan(module, budget, **common)
                cast = plan(module, budget, **common, allow_cast="float8_e4m3fn")
                yield {
                    "model": name,
                    "machine": machine,
                    "budget": budget,
                    "resident": plain.untiled_seconds,
                    "step": plain.step_seconds,
                    "with casts": cast.step_seconds,
                    "over resident": cast.step_seconds / plain.untiled_seconds,
                    "weights cast": len(cast.decisions.tiling.casts),
                    "streamed": plain.streamed_bytes,
                    "streamed with casts": cast.streamed_bytes,
                    "estimated error": cast.cast_error,
                }


SECTIONS: dict[str, Callable[[], Iterator[Row]]] = {"weights": weights, "pretrained": pretrained, "steps": steps}
_BYTES, _SECONDS, _SHARES = {"streamed", "streamed with casts"}, {"resident", "step", "with casts"}, {"zero"}


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name in _BYTES:
        return format_bytes(value)
    if name in _SECONDS:
        return format_seconds(value)
    if name in _SHARES:
        return f"{value:.0%}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(section: str, rows: list[Row]) -> str:
    names = list(rows[0])
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    lines += [f"| {' | '.join(_cell(name, row[name]) for name in names)} |" for row in rows]
    return f"## {section.capitalize()}\n\n{SECTIONS[section].__doc__}\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SECTIONS)
    parser.add_argument("--update", action="store_true", help="write the tables and their JSON")
    chosen = parser.parse_args()
    path = RESULTS / "casts.json"
    known: dict[str, list[Row]] = json.loads(path.read_text()) if path.exists() else {}
    for section, rows in SECTIONS.items():
        if chosen.only in (None, section):
            known[section] = list(rows())
            print(table(section, known[section]), flush=True)
    if chosen.update:
        path.write_text(json.dumps(known, indent=1) + "\n")
        text = TITLE + "\n" + "\n".join(table(section, known[section]) for section in SECTIONS if section in known)
        (RESULTS / "casts.md").write_text(text)


if __name__ == "__main__":
    main()
