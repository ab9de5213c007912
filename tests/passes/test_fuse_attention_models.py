"""Models whose attention is written out: all of it is fused, and the function is the same where nothing is rounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor, fx, nn
from transformers import (
    BertConfig,
    BertModel,
    BloomConfig,
    BloomModel,
    DebertaV2Config,
    DebertaV2Model,
    GPT2Config,
    GPT2Model,
    GPTNeoConfig,
    GPTNeoModel,
    LlamaConfig,
    LlamaModel,
    Swinv2Config,
    Swinv2Model,
    T5Config,
    T5EncoderModel,
    XLNetConfig,
    XLNetModel,
)  # fmt: skip

from passes.fuse_attention import fusable_attentions
from passes.program import Program
from tests.passes.programs import canonical
from tests.passes.test_fuse_attention import SDPA, assert_same, fused, normal

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])
PADDED = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])
LEFT = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]])
EAGER = {"attn_implementation": "eager"}
SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}


def _llama() -> nn.Module:
    return LlamaModel(LlamaConfig(**SMALL, num_key_value_heads=2, intermediate_size=48, use_cache=False, **EAGER))


def _t5() -> nn.Module:
    return T5EncoderModel(T5Config(d_model=32, d_kv=8, num_layers=2, num_heads=4, d_ff=48, vocab_size=99, **EAGER))


def _bert() -> nn.Module:
    return BertModel(BertConfig(**SMALL, intermediate_size=48, **EAGER))


def _deberta() -> nn.Module:
    return DebertaV2Model(DebertaV2Config(**SMALL, intermediate_size=48))


def _diffusers(text: int) -> nn.Module:
    """As pipelines had it before PyTorch had the operator: baddbmm into an empty tensor."""
    return Attention(query_dim=32, cross_attention_dim=text, heads=4, dim_head=8, processor=AttnProcessor())


GPT: dict[str, Any] = {"n_layer": 2, "n_head": 4, "vocab_size": 99, "use_cache": False}
SWIN: dict[str, Any] = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4]}
KINDS = [[["global", "local"], 1]]
NEO: dict[str, Any] = {"attention_types": KINDS, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 99}
XL: dict[str, Any] = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "vocab_size": 99, "use_mems_eval": False}
IMAGE = normal(2, 7, 32, dtype=torch.float32)
TEXT = normal(2, 5, 16, dtype=torch.float32)
HIDDEN = normal(2, 1, 5, dtype=torch.float32)

Model = tuple[Callable[[], nn.Module], dict[str, Tensor], int]
MODELS: dict[str, Model] = {
    "bert": (_bert, {"input_ids": IDS, "attention_mask": PADDED}, 2),
    "t5": (_t5, {"input_ids": IDS, "attention_mask": PADDED}, 2),
    "llama": (_llama, {"input_ids": IDS, "attention_mask": LEFT}, 2),
    "llama in bfloat16": (lambda: _llama().bfloat16(), {"input_ids": IDS, "attention_mask": LEFT}, 2),
    "gpt2": (lambda: GPT2Model(GPT2Config(n_embd=32, **GPT, **EAGER)), {"input_ids": IDS, "attention_mask": LEFT}, 2),
    "gpt neo": (lambda: GPTNeoModel(GPTNeoConfig(**NEO, use_cache=False)), {"input_ids": IDS}, 2),
    "bloom": (lambda: BloomModel(BloomConfig(hidden_size=32, **GPT)), {"input_ids": IDS, "attention_mask": LEFT}, 2),
    "deberta": (_deberta, {"input_ids": IDS, "attention_mask": PADDED}, 2),
    "xlnet": (lambda: XLNetModel(XLNetConfig(**XL)), {"input_ids": IDS}, 2),
    "swin 2": (lambda: Swinv2Model(Swinv2Config(**SWIN, window_size=4)), {"pixel_values": normal(1, 3, 32, 32).float()}, 3),
    "diffusers": (lambda: _diffusers(32), {"hidden_states": IMAGE}, 1),
    "diffusers with a mask": (
        lambda: _diffusers(16),
        {"hidden_states": IMAGE, "encoder_hidden_states": TEXT, "attention_mask": HIDDEN},
        1,
    ),
}


def in_double(program: Program, module: nn.Module, inputs: list[Any]) -> list[Tensor]:
    """What a program gives where nothing is rounded to less than fp64: weights, inputs and casts are read as that."""
    named = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    given, env = iter(inputs), dict[fx.Node, Any]()

    def wide(value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return torch.float64 if value.is_floating_point else value
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    for node in program.graph.nodes:
        if node.op == "placeholder":
            weight = program.weights.get(node.name)
            constant = program.constants.get(node.name)
            env[node] = wide(next(given) if weight is None else named[weight.name] if constant is None else constant)
        elif node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
            env[node] = node.target(*map(wide, args), **{key: wide(value) for key, value in kwargs.items()})
    return [env[node] for node in program.output.all_input_nodes]


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    """All their attentions are fused, and without rounding the result is the same."""
    make, kwargs, count = MODELS[name]
    torch.manual_seed(0)
    module = make().eval()
    before = canonical(module, **kwargs)
    names = fusable_attentions(before)
    assert len(names) == count == sum("softmax" in str(node.target) for node in before.ops())
    after = fused(before)
    assert sum(node.target is SDPA for node in after.ops()) == count
    assert [n.name for n in before.output.all_input_nodes] == [n.name for n in after.output.all_input_nodes]
    inputs = list(kwargs.values())
    with torch.no_grad():
        assert_same(in_double(after, module, inputs), in_double(before, module, inputs))
