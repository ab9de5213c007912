"""What the emitted program costs over the exported graph and over eager when everything is resident, on the CPU.

    python -m tests.benchmarks.overhead

The compiled program function runs by itself, with its resident weights bound and without the accounting device's counter.
The three take turns; printed are the median of the ratios and their middle half.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import BertConfig, BertModel

from planner import plan
from runtime.emit import attribute_names, compile_source
from runtime.origins import named_tensors
from runtime.signature import bind_call

REPEATS = 15
Example = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


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


def runners(example: Example) -> dict[str, Callable[[], Any]]:
    """Planned, exported and eager, on the same inputs; their results are compared once."""
    module, args, kwargs = example
    made = plan(module, "64GB", inputs=args, kwargs=kwargs, device="accounting")
    program, layout = made.executable, made.layout
    assert not layout.bundles
    slots = [*layout.resident, *layout.state]
    names, tensors = attribute_names([s.weight for s in slots]), named_tensors(module)
    w = SimpleNamespace()
    for slot in slots:
        own = program.constants.get(slot.weight)
        setattr(w, names[slot.weight], (tensors[program.weights[slot.weight].name] if own is None else own).detach())
    function = compile_source(program.source, program.name)
    leaves = tree_leaves(bind_call(module.forward, args, kwargs), is_leaf=lambda x: x is None)
    exported = torch.export.export(module, args, kwargs, strict=False).module()
    device = torch.device("cpu")
    result: dict[str, Callable[[], Any]] = {
        "planned": lambda: function(None, w, device, *leaves),
        "exported": lambda: exported(*args, **kwargs),
        "eager": lambda: module(*args, **kwargs),
    }
    outputs = [[t for t in tree_leaves(run()) if isinstance(t, torch.Tensor)] for run in result.values()]
    for other in outputs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs[0], other, strict=True))
    return result


def measure(name: str, example: Example) -> None:
    turns = runners(example)
    seconds: dict[str, list[float]] = {key: [] for key in turns}
    for repeat in range(REPEATS + 2):
        for key, run in turns.items():
            started = time.perf_counter()
            run()
            if repeat >= 2:
                seconds[key].append(time.perf_counter() - started)
    for other in ("exported", "eager"):
        ratios = sorted(a / b for a, b in zip(seconds["planned"], seconds[other], strict=True))
        low, high = ratios[len(ratios) // 4], ratios[-len(ratios) // 4]
        print(f"{name}: planned / {other:<8} = {statistics.median(ratios):.3f}  ({low:.3f} to {high:.3f})")
    print(f"{name}: planned {statistics.median(seconds['planned']) * 1e3:.1f} ms")


def main() -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        measure("BERT-base 4 x 128", bert_base())
        measure("UNet 2 x 32 x 32", unet())


if __name__ == "__main__":
    main()
