"""Small real models whose tiling is compared with the whole: odd sizes, not square, more than one sample, in float64.

`MODELS[name]()` gives a `Subject`: a module, the method that is planned and its inputs. Every parameter is redrawn, as in
`tests.zoo`: norms whose weights are one would hide that a tile took those of other channels.
"""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from passes.program import storage_id, tensors_of
from planner import Plan, plan
from runtime import ops


class _Doubles(TorchFunctionMode):
    """float32 in any call becomes float64: what a model computes in float32 to be exact in half precision."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args, kwargs = tree_map(lambda leaf: torch.float64 if leaf is torch.float32 else leaf, (args, kwargs or {}))
        return func(*args, **kwargs)


class InDouble(nn.Module):
    """A method of a module, in float64 throughout."""

    def __init__(self, module: nn.Module, method: str = "forward") -> None:
        super().__init__()
        self.inner, self.method = module, method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _Doubles():
            return getattr(self.inner, self.method)(*args, **kwargs)


@dataclass(frozen=True)
class Subject:
    """What is planned: a module and its inputs."""

    module: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @torch.no_grad()
    def whole(self) -> list[Tensor]:
        """What the module gives, untiled."""
        return tensors_in(self.module(*self.args, **self.kwargs))

    def plan(self, budget: int | str = "4GB", **said: Any) -> Plan:
        return plan(self.module, budget, inputs=self.args, kwargs=self.kwargs, device="accounting", **said)

    @torch.no_grad()
    def run(self, p: Plan) -> list[Tensor]:
        """What the plan gives; what it measured is what it predicted, and within the budget."""
        try:
            given = tensors_in(p.build()(*self.args, **self.kwargs))
            assert p.report().peak_bytes == p.peak_bytes <= p.budget_bytes
        finally:
            p.restore()
        return given


def tensors_in(given: Any) -> list[Tensor]:
    """All tensors of a result; those of a distribution are its parameters."""
    found = [leaf.parameters if hasattr(leaf, "logvar") else leaf for leaf in tree_leaves(given)]
    return [leaf for leaf in found if isinstance(leaf, Tensor)]


def error_of(given: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference over the largest value of each tensor; infinite where shapes differ or values are lost."""
    assert len(given) == len(expected) > 0
    worst = 0.0
    for mine, own in zip(given, expected, strict=True):
        if mine.shape != own.shape or not torch.isfinite(mine).all():
            return math.inf
        if own.numel():
            worst = max(worst, float((mine.double() - own.double()).abs().max() / own.double().abs().max()))
    return worst


def tiled_share(p: Plan, untiled: Plan) -> float:
    """Of the operators that compute something, untiled, the share that runs in loops.

    What runs whole keeps its name, which what loops write takes over too; a result merged from parts counts as whole. Operators
    that come to write in place compute as before, so they are counted in the program that does not write in place yet.
    """
    names = {node.name for node in untiled._tilings.base.problem.liveness.nodes if _computes(node)}
    written = torch.ops.aten.empty_strided.default, torch.ops.aten.alias.default, ops.host
    whole = [n for n in p.problem.liveness.nodes if n.name in names and n.target not in written]
    return 1 - len(whole) / len(names)


def tile_counts(p: Plan) -> list[int]:
    """How many tiles each loop has."""
    return [node.meta["loop"].count for node in p.problem.liveness.nodes if "loop" in node.meta]


def _computes(node: fx.Node) -> bool:
    """Not a view, nor a member of a result."""
    if node.target is operator.getitem or not isinstance(node.target, torch._ops.OpOverload):
        return False
    before = {storage_id(t) for n in node.all_input_nodes for t in tensors_of(n)}
    return any(storage_id(t) not in before for t in tensors_of(node))


@torch.no_grad()
def finish(module: nn.Module, method: str = "forward", seed: int = 0) -> nn.Module:
    """Redrawn parameters, all in float64, eval mode."""
    g = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=g)
        p.copy_(noise / math.sqrt(p[0].numel()) if p.ndim > 1 else noise * 0.2 + (1.0 if name.endswith("weight") else 0.0))
    return InDouble(nn.Module.to(module, torch.float64), method).eval()


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def autoencoder_kl() -> nn.Module:
    return diffusers.AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
    )


def autoencoder_dc() -> nn.Module:
    return diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=[1, 1],
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    )


def autoencoder_tiny() -> nn.Module:
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(16, 16),
        decoder_block_out_channels=(16, 16),
        num_encoder_blocks=(1, 2),
        num_decoder_blocks=(2, 1),
    )


def vq_model() -> nn.Module:
    return diffusers.VQModel(
        block_out_channels=[16, 32],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=8,
    )


def asymmetric_kl() -> nn.Module:
    return diffusers.AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        down_block_out_channels=(32, 64),
        layers_per_down_block=1,
        up_block_types=("UpDecoderBlock2D",) * 2,
        up_block_out_channels=(32, 64),
        layers_per_up_block=1,
        latent_channels=4,
        sample_size=32,
    )


def cogvideox() -> nn.Module:
    return diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2, temporal_compression_ratio=4
    )


def wan_vae() -> nn.Module:
    return diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )


def qwen_vae() -> nn.Module:
    return diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )


def ltx_vae() -> nn.Module:
    return diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        patch_size=1,
        patch_size_t=1,
    )


def _part(make: Callable[[], nn.Module], name: str, *shape: int) -> Subject:
    """The encoder or decoder of an autoencoder."""
    return Subject(finish(getattr(make(), name)), (normal(*shape),))


def _method(make: Callable[[], nn.Module], name: str, *shape: int) -> Subject:
    """`encode` or `decode`, caches between frames and all."""
    return Subject(finish(make(), name), (normal(*shape),), {"return_dict": False})


def unet() -> Subject:
    """Two resolutions, skip connections, cross attention."""
    module = diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    args = normal(2, 4, 14, 18), torch.tensor([7]), normal(2, 5, 24, seed=2)
    return Subject(finish(module), args, {"return_dict": False})


def sd3() -> Subject:
    """Joint attention of image and text tokens."""
    module = diffusers.SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=3,
        joint_attention_dim=16,
        caption_projection_dim=24,
        pooled_projection_dim=12,
        out_channels=4,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    kwargs = {
        "hidden_states": normal(2, 4, 14, 18),
        "encoder_hidden_states": normal(2, 5, 16, seed=2),
        "pooled_projections": normal(2, 12, seed=3),
        "timestep": torch.tensor([500.0, 20.0], dtype=torch.float64),
        "return_dict": False,
    }
    return Subject(finish(module), (), kwargs)


def flux() -> Subject:
    """Double and single blocks, rotary positions."""
    module = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    rows, columns = 7, 5
    image = torch.zeros(rows * columns, 3, dtype=torch.float64)
    image[:, 1] = torch.arange(rows).repeat_interleave(columns)
    image[:, 2] = torch.arange(columns).repeat(rows)
    kwargs = {
        "hidden_states": normal(2, rows * columns, 16),
        "encoder_hidden_states": normal(2, 6, 32, seed=2),
        "pooled_projections": normal(2, 32, seed=3),
        "timestep": torch.tensor([0.5, 0.25], dtype=torch.float64),
        "img_ids": image,
        "txt_ids": torch.zeros(6, 3, dtype=torch.float64),
        "return_dict": False,
    }
    return Subject(finish(module), (), kwargs)


def wan_transformer() -> Subject:
    """Video tokens, rotary positions in three dimensions."""
    module = diffusers.WanTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    args = normal(2, 4, 3, 10, 14), torch.tensor([3, 40]), normal(2, 5, 16, seed=2)
    return Subject(finish(module), args, {"return_dict": False})


def clip_text() -> Subject:
    """A text encoder with causal attention, its last tokens hidden."""
    config = transformers.CLIPTextConfig(
        vocab_size=99,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=98,
    )
    ids = torch.randint(3, 98, (3, 19), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, -4:] = 0
    return Subject(
        finish(transformers.CLIPTextModel(config)), (), {"input_ids": ids, "attention_mask": mask, "return_dict": False}
    )


def t5_encoder() -> Subject:
    """A text encoder whose position bias all blocks share."""
    config = transformers.T5Config(
        vocab_size=99, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu"
    )
    ids = torch.randint(3, 98, (3, 19), generator=torch.Generator().manual_seed(1))
    return Subject(finish(transformers.T5EncoderModel(config)), (), {"input_ids": ids, "return_dict": False})


def oobleck() -> Subject:
    """A decoder of sound: transposed convolutions in one dimension, weights as they are after training."""
    module = diffusers.AutoencoderOobleck(
        encoder_hidden_size=8,
        downsampling_ratios=[2, 4],
        channel_multiples=[1, 2],
        decoder_channels=8,
        decoder_input_channels=4,
    ).decoder
    for part in module.modules():
        if hasattr(part, "weight_g"):
            nn.utils.remove_weight_norm(part)
    return Subject(finish(module), (normal(2, 4, 45),))


def hifigan() -> Subject:
    """A vocoder: dilated convolutions, sums of residual blocks."""
    config = transformers.SpeechT5HifiGanConfig(
        model_in_dim=10,
        upsample_initial_channel=16,
        upsample_rates=[4, 2],
        upsample_kernel_sizes=[8, 4],
        resblock_kernel_sizes=[3, 5],
        resblock_dilation_sizes=[[1, 3], [1, 3]],
    )
    return Subject(finish(transformers.SpeechT5HifiGan(config)), (normal(2, 45, 10),))


MODELS: dict[str, Callable[[], Subject]] = {
    "kl.decoder": partial(_part, autoencoder_kl, "decoder", 2, 4, 13, 19),
    "kl.encoder": partial(_part, autoencoder_kl, "encoder", 2, 3, 27, 39),
    "kl.decode": partial(_method, autoencoder_kl, "decode", 2, 4, 13, 19),
    "dc.decoder": partial(_part, autoencoder_dc, "decoder", 2, 4, 13, 19),
    "dc.encoder": partial(_part, autoencoder_dc, "encoder", 2, 3, 26, 38),
    "dc.decode": partial(_method, autoencoder_dc, "decode", 2, 4, 13, 19),
    "tiny.decoder": partial(_part, autoencoder_tiny, "decoder", 2, 4, 13, 19),
    "tiny.encoder": partial(_part, autoencoder_tiny, "encoder", 2, 3, 27, 39),
    "vq.decoder": partial(_part, vq_model, "decoder", 2, 4, 13, 19),
    "vq.encoder": partial(_part, vq_model, "encoder", 2, 3, 27, 39),
    "asymmetric.decoder": partial(_part, asymmetric_kl, "decoder", 2, 4, 13, 19),
    "asymmetric.encoder": partial(_part, asymmetric_kl, "encoder", 2, 3, 27, 39),
    "cogvideox.decoder": partial(_part, cogvideox, "decoder", 2, 4, 3, 5, 7),
    "cogvideox.encoder": partial(_part, cogvideox, "encoder", 2, 3, 9, 33, 49),
    "cogvideox.decode": partial(_method, cogvideox, "decode", 2, 4, 3, 5, 7),
    "wan.decoder": partial(_part, wan_vae, "decoder", 2, 16, 3, 5, 7),
    "wan.encoder": partial(_part, wan_vae, "encoder", 2, 3, 5, 33, 49),
    "wan.decode": partial(_method, wan_vae, "decode", 2, 16, 2, 5, 7),
    "qwen.decode": partial(_method, qwen_vae, "decode", 2, 16, 2, 5, 7),
    "ltx.decoder": partial(_part, ltx_vae, "decoder", 2, 8, 2, 5, 7),
    "ltx.encoder": partial(_part, ltx_vae, "encoder", 2, 3, 9, 20, 28),
    "ltx.decode": partial(_method, ltx_vae, "decode", 2, 8, 2, 5, 7),
    "unet": unet,
    "sd3": sd3,
    "flux": flux,
    "wan_transformer": wan_transformer,
    "clip_text": clip_text,
    "t5_encoder": t5_encoder,
    "oobleck": oobleck,
    "hifigan": hifigan,
}
