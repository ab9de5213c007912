"""The autoencoders of diffusers: encoding and decoding is one program each, whatever Python loops and caches there are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from planner import Plan, plan
from planner.frontends.caches import register_containers

diffusers = pytest.importorskip("diffusers")

Shape = tuple[int, ...]
_TWO = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
_CAUSAL = {
    "base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1], "num_res_blocks": 1, "attn_scales": [],
    "temperal_downsample": [False, True], "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4,
}  # fmt: skip
_LTX = {
    "latent_channels": 8, "block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4, "layers_per_block": (1,) * 5,
    "decoder_layers_per_block": (1,) * 5, "spatio_temporal_scaling": (True, True, False, False), "patch_size": 1,
    "decoder_spatio_temporal_scaling": (True, True, False, False),
}  # fmt: skip
_DC = {
    "latent_channels": 4, "attention_head_dim": 2, "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "EfficientViTBlock"), "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8), "encoder_qkv_multiscales": ((), (5,)), "decoder_qkv_multiscales": ((), (5,)),
    "encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1), "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
}  # fmt: skip
_TINY = {
    "encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "num_encoder_blocks": (1, 2),
    "num_decoder_blocks": (2, 1),
}  # fmt: skip
_COG = {
    "down_block_types": ("CogVideoXDownBlock3D",) * 4, "up_block_types": ("CogVideoXUpBlock3D",) * 4,
    "block_out_channels": (8, 8, 8, 8), "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2,
}  # fmt: skip
_ASYMMETRIC = {
    **_TWO, "down_block_out_channels": (8, 16), "layers_per_down_block": 1, "up_block_out_channels": (8, 16),
    "layers_per_up_block": 1, "norm_num_groups": 4,
}  # fmt: skip
_PATCHES = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "decoder_base_dim": 4}

# Class, config, shapes of what is encoded and decoded: batches of two, odd sizes.
MODELS: dict[str, tuple[str, dict[str, Any], Shape, Shape]] = {
    "kl": ("AutoencoderKL", {**_TWO, "block_out_channels": (8, 16), "norm_num_groups": 4}, (2, 3, 18, 26), (2, 4, 9, 13)),
    "asymmetric": ("AsymmetricAutoencoderKL", _ASYMMETRIC, (2, 3, 18, 26), (2, 4, 9, 13)),
    "vq": ("VQModel", {**_TWO, "block_out_channels": (8, 16), "norm_num_groups": 4}, (2, 3, 18, 26), (2, 3, 9, 13)),
    "dc": ("AutoencoderDC", _DC, (2, 3, 18, 26), (2, 4, 9, 13)),
    "tiny": ("AutoencoderTiny", _TINY, (2, 3, 18, 26), (2, 4, 9, 13)),
    "cogvideox": ("AutoencoderKLCogVideoX", _COG, (2, 3, 9, 8, 24), (2, 4, 3, 1, 3)),
    "cogvideox, even": ("AutoencoderKLCogVideoX", _COG, (1, 3, 8, 8, 24), (1, 4, 4, 1, 3)),
    "ltx": ("AutoencoderKLLTXVideo", _LTX, (2, 3, 9, 12, 20), (2, 8, 3, 3, 5)),
    "wan": ("AutoencoderKLWan", _CAUSAL, (2, 3, 5, 12, 20), (2, 4, 2, 3, 5)),
    "wan 2.2": ("AutoencoderKLWan", {**_CAUSAL, **_PATCHES}, (2, 3, 9, 24, 40), (2, 4, 3, 3, 5)),
    "qwen": ("AutoencoderKLQwenImage", _CAUSAL, (2, 3, 1, 12, 20), (2, 4, 1, 3, 5)),
    "qwen, frames": ("AutoencoderKLQwenImage", _CAUSAL, (1, 3, 5, 12, 20), (1, 4, 2, 3, 5)),
}
# What the others have too, at length.
SLOW = {"cogvideox, even", "wan 2.2", "qwen, frames"}


def model(name: str) -> Any:
    torch.manual_seed(0)
    kind, config, *_ = MODELS[name]
    return getattr(diffusers, kind)(**config).eval()


def tensors(result: Any) -> list[Tensor]:
    register_containers()
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def planned(module: Any, method: str, value: Tensor, **kwargs: Any) -> Plan:
    streamed = ("offload",)  # bit for bit: tiles are exact to 1e-12
    most = plan(module, "1GB", method=method, inputs=(value,), kwargs=kwargs, device="accounting", allow=streamed)
    return most.replan(most.minimum_bytes)


def leftovers(module: Any) -> dict[str, Any]:
    return {key: value for key, value in vars(module).items() if "conv_" in key or "feat_" in key}


@pytest.mark.parametrize("method", ["encode", "decode"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in MODELS])
def test_whole_and_exact(name: str, method: str) -> None:
    module = model(name)
    reference = copy.deepcopy(module)
    shape = MODELS[name][2 if method == "encode" else 3]
    p = planned(module, method, torch.randn(shape), return_dict=False)
    assert type(p) is Plan, "not in parts"
    built: Any = p.build()
    for _ in range(2):
        value = torch.randn(shape)
        with torch.no_grad():
            mine = getattr(built, method)(value, return_dict=False)
            own = getattr(reference, method)(value, return_dict=False)
        assert len(tensors(mine)) == len(tensors(own)) > 0
        assert all(map(torch.equal, tensors(mine), tensors(own)))
        assert leftovers(module) == leftovers(reference)
    assert built.report().peak_bytes <= p.peak_bytes <= p.budget_bytes


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_results_with_names(method: str) -> None:
    """What a pipeline asks for: `.latent_dist.sample(generator)`, `.sample`."""
    module = model("wan")
    reference = copy.deepcopy(module)
    value = torch.randn(MODELS["wan"][2 if method == "encode" else 3])
    built: Any = planned(module, method, value).build()
    with torch.no_grad():
        mine, own = getattr(built, method)(value), getattr(reference, method)(value)
    assert type(mine) is type(own)
    if method == "encode":
        draw: Callable[[Any], Any] = lambda out: out.latent_dist.sample(torch.Generator().manual_seed(1))  # noqa: E731
        assert torch.equal(draw(mine), draw(own))
        assert torch.equal(mine.latent_dist.mode(), own.latent_dist.mode())
    else:
        assert torch.equal(mine.sample, own.sample)


def test_other_sizes_and_methods_in_between() -> None:
    """Another number of frames is planned anew; encoding and slicing run as Python, which leaves its caches."""
    module = model("wan")
    reference = copy.deepcopy(module)
    built: Any = plan(module, "1GB", method="decode", inputs=(torch.randn(1, 4, 2, 3, 5),), device="accounting").build()
    with torch.no_grad():
        for frames in (2, 1, 2):
            value, video = torch.randn(1, 4, frames, 3, 5), torch.randn(1, 3, 5, 12, 20)
            assert torch.equal(built.decode(value).sample, reference.decode(value).sample)
            assert torch.equal(built.encode(video).latent_dist.mean, reference.encode(video).latent_dist.mean)


def test_switches_are_constants() -> None:
    """A program knows neither tiling nor slicing that is switched on later: it is refused."""
    module = model("wan")
    value = torch.randn(2, 4, 1, 3, 5)
    built: Any = planned(module, "decode", value).build()
    built.decode(value)
    module.use_slicing = True
    with pytest.raises(Exception, match="an attribute of the module changed since the plan was made"):
        built.decode(value)
