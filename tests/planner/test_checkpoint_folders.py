"""Folders as targets: a planned folder gives what the library's own `from_pretrained` model gives, to the bit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import BertForMaskedLM, BertModel, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from planner import CheckpointError, Plan, PlanFileError, PlannerError, plan
from planner.checkpoint import open_folder, open_target
from tests.planner.checkpoints import (
    MODELS,
    SIZES,
    bert,
    bert_with_head,
    call_of,
    configure,
    equal,
    llama,
    llama_untied,
    loaded,
    outputs,
    rewrite,
    saved,
    unet,
    vae,
)

# Nothing but streaming: what an exact rewrite may round otherwise is tested elsewhere.
EXACT: dict[str, Any] = {"allow": ("offload",)}


def halves(folder: Path, kwargs: dict[str, Any], method: str, device: str, **options: Any) -> Plan:
    """A plan for half of what the module needs unplanned."""
    p = plan(folder, "1GB", kwargs=kwargs, method=method, device=device, **EXACT, **options)
    return p.replan(max(p.minimum_bytes, p.unplanned_bytes // 2))


# In bfloat16 each weight of these float32 files is converted as it is read: into the host's memory, or into a file of ours.
CASES = [(name, "cpu", torch.float32) for name in MODELS]
CASES += [("llama", "accounting", torch.float32), ("bert", "cpu", torch.bfloat16), ("wan", "accounting", torch.bfloat16)]


@pytest.mark.parametrize(("name", "device", "dtype"), CASES)
def test_outputs_are_those_of_the_library(name: str, device: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = saved(MODELS[name], tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    own = loaded(model, tmp_path, dtype)
    method, kwargs = call_of(own)
    m: Any
    p = halves(tmp_path, kwargs, method, device, dtype=dtype)
    assert p.streamed_bytes > 0
    m = p.build()
    assert isinstance(m, type(model))
    assert equal(outputs(m, method, kwargs), outputs(own, method, kwargs))
    state, other = own.state_dict(), m.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(t, other[n]) and t.dtype == other[n].dtype for n, t in state.items())
    buffers, others = dict(own.named_buffers()), dict(m.named_buffers())
    assert buffers.keys() == others.keys()
    assert all(torch.equal(t, others[n]) and t.dtype == others[n].dtype for n, t in buffers.items())
    assert all(t.is_meta for t in p.restore().parameters())


def test_inputs_come_from_the_recipe(tmp_path: Path) -> None:
    saved(vae, tmp_path / "vae")
    saved(llama, tmp_path / "llama")
    p = plan(str(tmp_path / "llama"), "1GB", device="accounting")
    m: Any = p.build()
    assert m(input_ids=torch.ones(1, 16, dtype=torch.int64), use_cache=False, logits_to_keep=1).logits.shape == (1, 1, 99)
    assert m.name_or_path == str(tmp_path / "llama")
    assert m.generation_config.eos_token_id == 2
    assert len(p._runner.programs) == 1  # type: ignore[union-attr]  # no replan: this was the call
    assert plan(tmp_path / "vae", "1GB", device="accounting").title == "AutoencoderKL.decode"
    with pytest.raises(PlannerError, match=r"inputs of 'decode' are known, not those of 'encode'; give them: .*kwargs="):
        plan(tmp_path / "vae", "1GB", method="encode")


def test_read_from_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On cpu nothing is copied where file and module have the same dtype; buffers are, which are in no file."""
    monkeypatch.setenv("VRAMPLAN_SCRATCH", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    model = saved(bert, tmp_path / "bert")
    method, kwargs = call_of(model)
    m = halves(tmp_path / "bert", kwargs, method, "cpu").build()
    scratch = sum(path.stat().st_size for path in (tmp_path / "scratch").rglob("*") if path.is_file())
    assert scratch < 16_384 < sum(p.nbytes for p in model.parameters())
    assert equal(outputs(m, method, kwargs), outputs(model, method, kwargs))
    m.close()
    assert not list((tmp_path / "scratch").iterdir())


def test_mixed_dtypes(tmp_path: Path) -> None:
    """The config of diffusers names no dtype: that of most weights, the others are converted."""

    def mixed() -> nn.Module:
        model = unet().half()
        model.conv_norm_out.float()
        return model

    saved(mixed, tmp_path)
    folder = open_folder(tmp_path)
    assert folder.dtype == torch.float16
    assert {p.dtype for p in folder.module.parameters()} == {torch.float16}
    assert open_folder(tmp_path, "float32").dtype == torch.float32


class TestVariants:
    def test_files(self, tmp_path: Path) -> None:
        model = saved(vae, tmp_path, shard="1GB", variant="fp16")
        assert (tmp_path / "diffusion_pytorch_model.fp16.safetensors").is_file()
        method, kwargs = call_of(model)
        wanted = outputs(model, method, kwargs)
        m = plan(tmp_path, "1GB", kwargs=kwargs, method=method, device="accounting", **EXACT).build()
        assert equal(outputs(m, method, kwargs), wanted)  # of the only ones there are
        assert open_folder(tmp_path, variant="fp16").weights is not None
        with pytest.raises(PlannerError, match=r"no weights of the variant 'ema'; it has variant='fp16'"):
            plan(tmp_path, "1GB", kwargs=kwargs, method=method, variant="ema")

    @pytest.mark.parametrize("make", [unet, llama])
    def test_shards_and_the_plain_ones_beside_them(self, tmp_path: Path, make: Any) -> None:
        plain = saved(make, tmp_path / "a")
        other = make().eval()
        other.save_pretrained(tmp_path / "b", max_shard_size="20KB", variant="fp16")
        for path in (tmp_path / "b").iterdir():
            if path.name not in ("config.json", "generation_config.json"):
                os.rename(path, tmp_path / "a" / path.name)
        for variant, model in ((None, plain), ("fp16", other)):
            weights = open_folder(tmp_path / "a", variant=variant).weights
            assert weights is not None
            assert all(torch.equal(weights(n), p) for n, p in model.named_parameters())  # type: ignore[arg-type]

    def test_several_and_no_plain_one(self, tmp_path: Path) -> None:
        model = saved(vae, tmp_path, shard="1GB", variant="fp16")
        model.save_pretrained(tmp_path, variant="ema")
        with pytest.raises(PlannerError, match="several variants; name one: variant='ema', variant='fp16'"):
            open_folder(tmp_path)


class TestNames:
    """As `from_pretrained` finds weights under other names."""

    def test_gamma_and_beta(self, tmp_path: Path) -> None:
        model = saved(bert, tmp_path)

        def old(name: str) -> str:
            return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

        rewrite(tmp_path, lambda state: {old(n): t for n, t in state.items()} | {"embeddings.position_ids": torch.arange(16)})
        self.check(tmp_path, BertModel, model)

    def test_deprecated_attention(self, tmp_path: Path) -> None:
        model = saved(vae, tmp_path)
        names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

        def old(name: str) -> str:
            for new, before in names.items():
                name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
            return name

        rewrite(tmp_path, lambda state: {old(n): t for n, t in state.items()}, "diffusion_pytorch_model")
        self.check(tmp_path, AutoencoderKL, model)

    def test_a_model_with_a_head_from_names_without_the_prefix(self, tmp_path: Path) -> None:
        model = saved(bert_with_head, tmp_path)
        rewrite(tmp_path, lambda state: {n.removeprefix("bert."): t for n, t in state.items()})
        self.check(tmp_path, BertForMaskedLM, model)

    def test_the_headless_model_of_one_with_a_head(self, tmp_path: Path) -> None:
        saved(bert_with_head, tmp_path)
        configure(tmp_path, architectures=["BertModel"])
        with pytest.raises(CheckpointError, match=r"lacks 'pooler\.dense\.weight'"):  # the library would make it up
            open_folder(tmp_path)
        model = loaded(BertModel, tmp_path, add_pooling_layer=False)
        with torch.device("meta"):
            empty = BertModel(model.config, add_pooling_layer=False).eval()
        method, kwargs = call_of(model)
        p = plan(empty, "1GB", kwargs=kwargs, device="accounting", **EXACT)
        assert equal(outputs(p.build(weights=tmp_path), method, kwargs), outputs(model, method, kwargs))

    def test_weights_that_a_converter_makes(self, tmp_path: Path) -> None:
        """Experts are saved one by one, and the module has them in one tensor."""

        def mixtral() -> nn.Module:
            return MixtralForCausalLM(MixtralConfig(vocab_size=99, num_key_value_heads=1, num_local_experts=3, **SIZES))

        saved(mixtral, tmp_path)
        own = MixtralForCausalLM.from_pretrained(tmp_path)
        weights = open_folder(tmp_path).weights
        assert weights is not None
        assert weights.place("model.layers.0.mlp.experts.gate_up_proj") is None
        for name, value in own.named_parameters():
            assert weights.shape(name) == tuple(value.shape)
            assert torch.equal(weights(name), value)  # type: ignore[arg-type]

    def test_tied_by_the_config_and_not_by_the_files(self, tmp_path: Path) -> None:
        saved(llama_untied, tmp_path)
        configure(tmp_path, tie_word_embeddings=True)
        self.check(tmp_path, LlamaForCausalLM, None)

    def test_tied_and_in_the_files_twice(self, tmp_path: Path) -> None:
        model = saved(llama, tmp_path)
        rewrite(tmp_path, lambda state: {**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()})
        module: Any = open_folder(tmp_path).module
        assert module.lm_head.weight is module.model.embed_tokens.weight
        self.check(tmp_path, LlamaForCausalLM, model)

    def check(self, folder: Path, kind: Any, model: Any) -> None:
        own = kind.from_pretrained(folder)
        opened = open_folder(folder)
        for name, value in own.named_parameters():
            assert opened.weights is not None
            assert torch.equal(opened.weights(name), value)  # type: ignore[arg-type]
            assert model is None or torch.equal(model.get_parameter(name), value)
        assert [n for n, _ in opened.module.named_parameters()] == [n for n, _ in own.named_parameters()]  # tied ones once


def test_buffers_of_a_model_that_is_on_meta_as_a_whole(tmp_path: Path) -> None:
    """Rotary tables are in no checkpoint: they are computed as the library computes them."""
    model = saved(llama, tmp_path)
    with torch.device("meta"):
        empty: Any = LlamaForCausalLM(model.config).eval()
    assert empty.model.rotary_emb.inv_freq.is_meta
    method, kwargs = call_of(model)
    m: Any = plan(empty, "1GB", kwargs=kwargs, device="accounting", **EXACT).build(weights=tmp_path)
    assert torch.equal(m.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert equal(outputs(m, method, kwargs), outputs(model, method, kwargs))


def test_another_shape_is_planned_again(tmp_path: Path) -> None:
    model = saved(bert, tmp_path)
    m = plan(tmp_path, "1GB", device="cpu", **EXACT).build()
    for batch in (1, 3):
        kwargs = {"input_ids": torch.arange(batch * 4).view(batch, 4)}
        assert equal(outputs(m, "forward", kwargs), outputs(model, "forward", kwargs))


class TestPlanFiles:
    def test_with_folders(self, tmp_path: Path) -> None:
        model = saved(bert, tmp_path / "bert")
        method, kwargs = call_of(model)
        p = halves(tmp_path / "bert", kwargs, method, "accounting", dtype="bfloat16")
        p.save(tmp_path / "x.plan.json")
        loaded = Plan.load(tmp_path / "x.plan.json", str(tmp_path / "bert"))
        assert loaded == p  # opened in bfloat16, as it was then
        assert equal(outputs(loaded.build(), method, kwargs), outputs(p.build(), method, kwargs))

    def test_another_model_is_refused(self, tmp_path: Path) -> None:
        model = saved(bert, tmp_path / "bert")
        method, kwargs = call_of(model)
        halves(tmp_path / "bert", kwargs, method, "accounting").save(tmp_path / "x.plan.json")
        saved(bert_with_head, tmp_path / "other")
        with pytest.raises(PlanFileError, match="made for another model"):
            Plan.load(tmp_path / "x.plan.json", tmp_path / "other")


class TestRefusals:
    def test_what_is_no_model(self, tmp_path: Path) -> None:
        saved(vae, tmp_path / "pipe" / "vae")
        (tmp_path / "pipe" / "model_index.json").write_text("{}")
        with pytest.raises(PlannerError, match=r"model_index\.json' names no class of a pipeline"):
            plan(tmp_path / "pipe", "1GB")
        with pytest.raises(PlannerError, match=r"is a whole pipeline.*\n  Plan\.load\(path, '.*pipe/vae'\)"):
            open_target(tmp_path / "pipe", None, None)
        with pytest.raises(PlannerError, match="there is no folder"):
            plan(tmp_path / "nowhere", "1GB")
        with pytest.raises(PlannerError, match=r"dtype= and variant= are for a folder"):
            plan(nn.Linear(2, 2).eval(), "1GB", inputs=(torch.ones(2),), dtype="bfloat16")

    def test_quantised(self, tmp_path: Path) -> None:
        saved(bert, tmp_path)
        configure(tmp_path, quantization_config={"quant_method": "bitsandbytes"})
        with pytest.raises(PlannerError, match=r"are quantised \(bitsandbytes\).*allow_cast='float8_e4m3fn'"):
            plan(tmp_path, "1GB")

    def test_pickled(self, tmp_path: Path) -> None:
        model = saved(bert, tmp_path)
        rewrite(tmp_path, lambda state: state)
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        p = plan(tmp_path, "1GB", device="accounting")  # that needs no weights
        with pytest.raises(PlannerError, match=r"pytorch_model\.bin is pickled.*safe_serialization=True"):
            p.build()
        assert equal(outputs(p.build(weights=model), *call_of(model)), outputs(model, *call_of(model)))

    def test_inputs_that_are_not_known(self, tmp_path: Path) -> None:
        blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (16,)}
        saved(lambda: UNet2DConditionModel(norm_num_groups=8, addition_embed_type="text", **blocks), tmp_path)
        with pytest.raises(
            PlannerError, match=r"the inputs of UNet2DConditionModel in .* are not known here; give them: plan\("
        ):
            plan(tmp_path, "1GB")
