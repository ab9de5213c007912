"""FLUX.1-dev, all four components as large as they are published, planned phase by phase for an RTX 4090: no weights, no GPU.

python examples/flux_pipeline.py                        # 28 steps at 1024 x 1024 within 6 GB
python examples/flux_pipeline.py --budget 10GB --steps 4
python examples/flux_pipeline.py --quick                # a tiny FLUX: some seconds
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from planner import plan

CLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
T5 = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"}
TRANSFORMER: dict[str, Any] = {"guidance_embeds": True}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "sample_size": 1024,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
TINY = {
    "CLIP": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    "T5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 2},
    "TRANSFORMER": {
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "axes_dims_rope": (4, 4, 8),
    },
    "VAE": {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="6GB")
    parser.add_argument("--machine", default="rtx-4090")
    parser.add_argument("--side", type=int, default=1024, help="height and width of the picture")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--quick", action="store_true", help="a tiny FLUX in its place")
    args = parser.parse_args()
    began = time.perf_counter()
    pipe = flux(TINY if args.quick else {})
    side, budget = (64, "2MB") if args.quick and args.budget == "6GB" else (args.side, args.budget)
    call = {"prompt": "a cat that looks at the sea", "height": side, "width": side, "num_inference_steps": args.steps}
    device = "accounting" if args.quick else None
    p = plan(pipe, budget, call=call, machine=args.machine, device=device)
    print(p)
    parts = p.weight_bytes / 1e9
    print(f"\n{parts:.3g} GB of weights, a picture in {p.step_seconds:.3g} s predicted, no less than {p.bound_seconds:.3g} s")
    print(f"planned in {time.perf_counter() - began:.0f} s")


def flux(tiny: dict[str, dict[str, Any]]) -> FluxPipeline:
    """The pipeline with its components on the meta device, in bfloat16; `tiny` replaces what it says of their configs."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            clip = CLIPTextModel(CLIPTextConfig(vocab_size=49408, **{**CLIP, **tiny.get("CLIP", {})})).eval()
            t5 = T5EncoderModel(T5Config(vocab_size=32128, **{**T5, **tiny.get("T5", {})})).eval()
            transformer = FluxTransformer2DModel(**{**TRANSFORMER, **tiny.get("TRANSFORMER", {})}).eval()
            vae = AutoencoderKL(scaling_factor=0.3611, shift_factor=0.1159, **{**VAE, **tiny.get("VAE", {})}).eval()
    finally:
        torch.set_default_dtype(before)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=clip,
        tokenizer=words(77),
        text_encoder_2=t5,
        tokenizer_2=words(512),
        transformer=transformer,
    )


def words(length: int) -> PreTrainedTokenizerFast:
    """A tokenizer that knows no word: only lengths matter here."""
    unknown = Tokenizer(WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=unknown, unk_token="<unk>", pad_token="<pad>", model_max_length=length)


if __name__ == "__main__":
    main()
