"""Generation within a budget: a 7B language model planned for a card that is not here, and a small one run.

The large one is LLaMA-2's shape (6.7 B parameters in bfloat16) on the meta device: no weights are needed to plan it. Its prompt
of 512 tokens is one program, each token after it another, both within 6 GB, on one cache. The small one is random, and gives
the tokens that it gives unplanned, in half of the memory.

python examples/llm_generate.py
python examples/llm_generate.py --layers 4    # as wide, less deep: some seconds
"""

import argparse
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from planner import plan

TOKENS = 64


def seven_billion(layers: int) -> LlamaForCausalLM:
    """LLaMA-2-7B's shape without weights; it has 32 layers."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers)).eval()
    finally:
        torch.set_default_dtype(default)


def plan_a_large_one(layers: int) -> None:
    """Prefill and decode for an RTX 4090, as printed plans."""
    prompt = torch.empty(1, 512, dtype=torch.int64, device="meta")
    call = {"max_new_tokens": TOKENS}
    budget = "6GB" if layers > 8 else "1GB"
    print(plan(seven_billion(layers), budget, method="generate", inputs=(prompt,), kwargs=call, machine="rtx-4090"))


def run_a_small_one() -> None:
    """Greedy tokens under half of what everything takes, measured on `accounting`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=512
    )
    model = LlamaForCausalLM(config).eval()
    prompt = torch.randint(3, 512, (1, 16))
    unplanned = model.generate(prompt, max_new_tokens=TOKENS)

    p = plan(model, "1GB", method="generate", inputs=(prompt,), kwargs={"max_new_tokens": TOKENS}, device="accounting")
    p = p.replan(p.unplanned_bytes // 2)
    m = p.build()
    tokens = m.generate(prompt, max_new_tokens=TOKENS)  # transformers' own loop: sampling, streamers, criteria as ever
    assert torch.equal(tokens, unplanned)
    print(f"{tokens.shape[1] - prompt.shape[1]} tokens as unplanned, in half of {2 * p.budget_bytes:,} B:")
    print(f"measured peak {m.report().peak_bytes:,} B, predicted {p.peak_bytes:,} B")
    p.restore()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32, help="of the large one; with up to 8 of them it gets 1 GB")
    transformers_logging.set_verbosity_error()
    run_a_small_one()
    plan_a_large_one(parser.parse_args().layers)
