"""What a built plan costs over eager and over the exported graph when everything is resident: whole calls, arguments included.

    python -m tests.benchmarks.overhead [--device cpu|cuda] [--update]    # --update writes results/overhead-<device>.{json,md}

The three take turns. Printed are the medians of the ratios and their middle half, of the wall's seconds and of the process's
CPU seconds, which others on the machine change less. On CUDA the device is waited for around every call. The budget is
generous, so that nothing is streamed and nothing tiled; the results are those of eager, bit for bit. The last row is a model
of next to no arithmetic: what a call costs by itself.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import BertConfig, BertModel

from planner import plan

ROUNDS, WARM_UP = 15, 3
BUDGET = "64GB"
RESULTS = Path(__file__).parent / "results"
Example = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
Clock = Callable[[], float]


def bert_base() -> Example:
    """BERT-base: 12 layers, hidden 768, batch 4 of 128 tokens."""
    ids = torch.randint(30522, (4, 128))
    return BertModel(BertConfig()).eval(), (), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def unet() -> Example:
    """A quarter-width Stable Diffusion UNet at 32 by 32 latents."""
    module = UNet2DConditionModel(
        sample_size=32, block_out_channels=(80, 160, 320, 320), cross_attention_dim=256, attention_head_dim=8,
        norm_num_groups=16,
    )  # fmt: skip
    return module.eval(), (torch.randn(2, 4, 32, 32), torch.tensor([7]), torch.randn(2, 77, 256)), {"return_dict": False}


def tiny() -> Example:
    """Two linear layers of 8 features."""
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval(), (torch.randn(2, 8),), {}


CASES: dict[str, Callable[[], Example]] = {"BERT-base 4 x 128": bert_base, "UNet 2 x 32 x 32": unet, "two small layers": tiny}


def turns_of(example: Example, device: str) -> dict[str, Callable[[], Any]]:
    """Planned, exported and eager, on the same inputs; their results are compared once."""
    module, args, kwargs = example
    args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to(device), (args, kwargs))
    eager = copy.deepcopy(module).to(device)
    p = plan(module, BUDGET, inputs=args, kwargs=kwargs, device=device, allow=("offload",))
    built = p.build()
    assert not p.layout.bundles
    exported = torch.export.export(eager, args, kwargs, strict=False).module()
    turns: dict[str, Callable[[], Any]] = {
        "planned": lambda: built(*args, **kwargs),
        "exported": lambda: exported(*args, **kwargs),
        "eager": lambda: eager(*args, **kwargs),
    }
    outputs = [[t for t in tree_leaves(turn()) if isinstance(t, torch.Tensor)] for turn in turns.values()]
    for other in outputs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs[0], other, strict=True))
    return turns


def measure(example: Example, device: str) -> dict[str, Any]:
    """Ratios of planned to the others, by clock: (median, lower and upper quarter); and seconds of each."""
    turns = turns_of(example, device)
    clocks: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
    spent: dict[str, dict[str, list[float]]] = {clock: {turn: [] for turn in turns} for clock in clocks}
    for number in range(ROUNDS + WARM_UP):
        for name, turn in turns.items():
            _wait(device)
            begun = {clock: read() for clock, read in clocks.items()}
            turn()
            _wait(device)
            for clock, read in clocks.items():
                spent[clock][name] += [read() - begun[clock]] if number >= WARM_UP else []
    result: dict[str, Any] = {"seconds": {name: statistics.median(spent["wall"][name]) for name in turns}}
    for clock in clocks:
        for other in ("exported", "eager"):
            ratios = [a / b for a, b in zip(spent[clock]["planned"], spent[clock][other], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            result[f"{clock}, {other}"] = {"median": middle, "low": low, "high": high}
    return result


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def table(results: dict[str, dict[str, Any]], device: str) -> str:
    """The results as they are committed."""
    columns = [f"{clock}, {other}" for clock in ("wall", "cpu") for other in ("eager", "exported")]
    titles = [f"/ {column.split(', ')[1]}, {column.split(', ')[0]}" for column in columns]
    lines = [
        f"# What a plan with everything resident costs on {device}",
        "",
        f"Written by `python -m tests.benchmarks.overhead --device {device} --update`: seconds of a planned call over those of",
        f"eager and of the exported graph, medians of {ROUNDS} turns and their middle half. Load {os.getloadavg()[0]:.0f} on",
        f"{os.cpu_count()} cores.",
        "",
        f"| | planned | {' | '.join(titles)} |",
        "|---|" + "---|" * (len(titles) + 1),
    ]
    for name, result in results.items():
        cells = [f"{r['median']:.3f} ({r['low']:.3f} to {r['high']:.3f})" for r in (result[column] for column in columns)]
        lines.append(f"| {name} | {result['seconds']['planned'] * 1e3:.2f} ms | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--update", action="store_true", help="write results/overhead-<device>.{json,md}")
    options = parser.parse_args()
    torch.manual_seed(0)
    results = {}
    with torch.no_grad():
        for name, example in CASES.items():
            results[name] = measure(example(), options.device)
    text = table(results, options.device)
    print(text)
    if options.update:
        facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "load": os.getloadavg()}
        document = {"machine": facts, "results": results}
        (RESULTS / f"overhead-{options.device}.json").write_text(json.dumps(document, indent=2) + "\n")
        (RESULTS / f"overhead-{options.device}.md").write_text(text)


if __name__ == "__main__":
    main()
