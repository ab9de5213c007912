"""Plans of `generate`: the tokens of the unplanned model, in the bytes that were predicted."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaForCausalLM,
    LogitsProcessor,
    MambaConfig,
    MambaForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.generation import BaseStreamer

from planner import InfeasibleBudget, Plan, PlanFileError, PlannerError, plan
from planner.generation import GenerationPlan
from tests.planner.generations import SLOW, llama, mistral, planned, prompt
from tests.planner.test_casting import with_stored_values


@pytest.fixture(scope="module")
def base() -> GenerationPlan:
    """64 tokens after a prompt of ten, everything resident."""
    return planned(llama(), "1GB", prompt(), max_new_tokens=64)


def check(p: Any, ids: torch.Tensor, **call: Any) -> torch.Tensor:
    """Builds and runs the plan; gives the tokens, which are the unplanned model's, in the bytes that were predicted."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        want = p.target.generate(ids, **call)
    m = p.build()
    try:
        for _ in range(2):  # the second begins in the arenas that the first has left
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(3)
                got = m.generate(ids, **call)
            assert torch.equal(got, want)
            assert m.report().peak_bytes == p.peak_bytes <= p.budget_bytes
    finally:
        p.restore()
    return got


@pytest.mark.parametrize("share", [1.0, 0.5, 0.0], ids=["all", "half", "least"])
def test_greedy_tokens_equal_the_unplanned_models(base: GenerationPlan, share: float) -> None:
    p = base.replan(max(int(share * base.unplanned_bytes), base.minimum_bytes))
    assert isinstance(p, GenerationPlan)
    assert check(p, prompt(), max_new_tokens=64).shape == (1, 74)
    assert p.cache_bytes == 2 * 2 * (2 * 73 * 8 * 4) + 2 * 8  # layers, keys and values of two heads, and a count each
    assert set(p.phases) == {"prefill", "decode"}
    assert sum(p.peak_parts.values()) == p.peak_bytes


def test_less_than_the_least_budget_is_refused(base: GenerationPlan) -> None:
    with pytest.raises(InfeasibleBudget, match=r"the least possible is .*cache 18.7 KB for 1 x 73 tokens") as caught:
        base.replan(base.minimum_bytes - 1)
    assert caught.value.minimum_bytes == base.minimum_bytes


def test_a_window_that_fills_up_while_tokens_come() -> None:
    ids = prompt(batch=2)
    call = {"attention_mask": torch.tensor([[0] * 4 + [1] * 6, [1] * 10]), "max_new_tokens": 9}
    p = planned(mistral(window=14), "1GB", ids, **call)
    assert {name: moment.calls for name, moment in p.rehearsal.moments.items()} == {"prefill": 1, "decode": 4, "decode_2": 4}
    check(p.replan(p.unplanned_bytes // 2), ids, **call)


def test_a_window_that_the_prompt_fills() -> None:
    p = planned(mistral(window=6), "1GB", prompt(), max_new_tokens=5)
    check(p.replan(p.minimum_bytes), prompt(), max_new_tokens=5)


def test_a_batch_that_is_padded_on_the_left() -> None:
    ids = prompt(batch=3)
    ids[0, :3] = 0  # found by the id of padding, without a mask
    p = planned(llama(), "1GB", ids, max_new_tokens=6)
    assert p.padded
    check(p.replan(p.unplanned_bytes // 2), ids, max_new_tokens=6)


def test_sampling_draws_what_the_unplanned_model_draws() -> None:
    call: dict[str, Any] = {"do_sample": True, "top_p": 0.9, "num_return_sequences": 2, "max_new_tokens": 6}
    p = planned(llama(), "1GB", prompt(), **call)
    before = torch.get_rng_state()
    check(p.replan(p.minimum_bytes), prompt(), **call)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_prompt_in_chunks_takes_less() -> None:
    ids = prompt(tokens=36)
    whole, chunked = (planned(llama(), "1GB", ids, max_new_tokens=4, **more) for more in ({}, {"prefill_chunk_size": 12}))
    assert chunked.minimum_bytes < whole.minimum_bytes
    check(chunked.replan(chunked.minimum_bytes), ids, max_new_tokens=4, prefill_chunk_size=12)


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What is logged."""
    log, handler = logging.getLogger("vramplan"), _Lines()
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield handler.texts
    log.removeHandler(handler)
    log.setLevel(before)


def test_other_calls_are_planned_once_each_and_tokens_never(base: GenerationPlan, lines: list[str]) -> None:
    p = base.replan(base.unplanned_bytes)
    wanted = {tokens: p.target.generate(prompt(tokens=tokens), max_new_tokens=12) for tokens in (7, 80)}
    m = p.build()
    for _ in range(2):
        for tokens, want in wanted.items():  # a shorter prompt, on the same cache, and one that needs another
            assert torch.equal(m.generate(prompt(tokens=tokens), max_new_tokens=12), want)
            assert m.report().peak_bytes == m.report().predicted_peak_bytes <= p.budget_bytes
    p.restore()
    assert sum("planning again" in line for line in lines) == 2


def test_what_does_not_fit_says_so_and_the_module_goes_on(base: GenerationPlan) -> None:
    p = base.replan(base.minimum_bytes)
    m = p.build()
    with pytest.raises(InfeasibleBudget, match="a shorter prompt"):
        m.generate(prompt(tokens=300), max_new_tokens=64)
    assert torch.equal(m.generate(prompt(), max_new_tokens=64)[:, :10], prompt())
    p.restore()


def test_the_module_is_as_before() -> None:
    model = llama()
    names, hooks = set(vars(model)), dict(model._modules)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    p = planned(model, "1GB", prompt(), max_new_tokens=3)
    m = p.build()
    assert type(m).generate is not type(model).generate
    assert isinstance(m, type(model))
    m.generate(prompt(), max_new_tokens=3)
    assert p.restore() is model
    assert set(vars(model)) == names
    assert dict(model._modules) == hooks
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert model.generation_config.cache_implementation is None


class _Streamer(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


class _Only(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = torch.full_like(scores, -1.0)
        scores[:, 55] = 1.0
        return scores


def test_streamers_and_processors_are_the_users_own() -> None:
    streamer = _Streamer()
    p = planned(llama(), "1GB", prompt(), max_new_tokens=3, streamer=streamer, logits_processor=[_Only()])
    assert streamer.tokens == []  # nothing of the user's is called to plan
    m = p.build()
    m.generate(prompt(), max_new_tokens=3, streamer=streamer, logits_processor=[_Only()])
    assert streamer.tokens == [*prompt()[0].tolist(), 55, 55, 55, -1]
    p.restore()


def test_generation_ends_where_the_model_ends_it() -> None:
    model = llama()
    ends = int(model.generate(prompt(), max_new_tokens=4)[0, 12])
    model.generation_config.eos_token_id = ends
    p = planned(model, "1GB", prompt(), max_new_tokens=8)
    assert p.tokens == 8
    m = p.build()
    assert torch.equal(m.generate(prompt(), max_new_tokens=8), model.generate(prompt(), max_new_tokens=8))
    assert m.report().tokens < 8
    p.restore()


def test_a_plan_is_saved_and_loaded(tmp_path: Path, base: GenerationPlan) -> None:
    p = base.replan(base.unplanned_bytes // 2)
    p.save(tmp_path / "llama.json")
    q = Plan.load(tmp_path / "llama.json", p.target)
    assert q == p
    assert q.peak_bytes == p.peak_bytes
    check(q, prompt(), max_new_tokens=64)
    with pytest.raises(PlanFileError, match="another model"):
        Plan.load(tmp_path / "llama.json", llama(num_hidden_layers=1))


def test_a_padded_plan_is_loaded_as_one(tmp_path: Path) -> None:
    ids = prompt(batch=2)
    mask = torch.tensor([[0] * 4 + [1] * 6, [1] * 10])
    p = planned(llama(), "1GB", ids, attention_mask=mask, max_new_tokens=3)
    p.save(tmp_path / "padded.json")
    assert Plan.load(tmp_path / "padded.json", p.target) == p


def test_weights_come_from_a_folder_or_a_module(tmp_path: Path) -> None:
    model = llama()
    want = model.generate(prompt(), max_new_tokens=4)
    model.save_pretrained(tmp_path)
    p = planned(tmp_path, "1GB", prompt(), max_new_tokens=4)
    q = planned(LlamaForCausalLM(model.config).to("meta").eval(), "1GB", prompt(), max_new_tokens=4)
    for built, weights in ((p, None), (q, model)):
        r = built.replan(built.minimum_bytes)
        m = r.build(weights=weights)
        assert torch.equal(m.generate(prompt(), max_new_tokens=4), want)
        assert m.report().peak_bytes == r.peak_bytes
        r.restore()


def test_validate_compares_tokens(base: GenerationPlan) -> None:
    p = planned(llama(), "1GB", prompt(), max_new_tokens=3)
    assert p.validate().equal


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_casts_are_those_of_stored_values(share: float) -> None:
    model = llama(hidden_size=128, intermediate_size=256)
    p = planned(model, "1GB", prompt(), max_new_tokens=8, allow_cast="float8_e4m3fn", machine=SLOW)
    q = p.replan(int(share * p.unplanned_bytes))
    assert q.cast_count > 0
    assert 0 < q.cast_error < 0.2
    m = q.build()
    got = m.generate(prompt(), max_new_tokens=8)
    assert m.report().peak_bytes == q.peak_bytes <= q.budget_bytes
    q.restore()
    assert len({frozenset(phase.decisions.tiling.casts) for phase in q.phases.values()}) == 1
    assert torch.equal(got, with_stored_values(model, q.decode).generate(prompt(), max_new_tokens=8))


def test_ram_budgets_hold() -> None:
    p = planned(llama(hidden_size=64, intermediate_size=256), "1GB", prompt(), device="cpu", max_new_tokens=4)
    q = p.replan((p.unplanned_bytes + p.minimum_bytes) // 2)
    want = q.target.generate(prompt(), max_new_tokens=4)
    m = q.build()
    assert torch.equal(m.generate(prompt(), max_new_tokens=4), want)
    assert m.report().peak_bytes <= q.peak_bytes <= q.budget_bytes
    q.restore()


def test_weights_that_stay_are_copied_once(base: GenerationPlan) -> None:
    m = base.build()
    m.generate(prompt(), max_new_tokens=64)
    assert m.report().copied_bytes == base.decode.layout.resident_bytes
    m.generate(prompt(), max_new_tokens=64)
    assert m.report().copied_bytes == 0
    base.restore()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"num_beams": 2}, "num_beams=1"),
        ({"use_cache": False}, "leave it out"),
        ({"cache_implementation": "quantized"}, "leave cache_implementation out"),
        ({"past_key_values": StaticCache(llama().config, max_cache_len=32)}, "the plan's own"),
        ({"assistant_model": llama()}, "assistant_model"),
    ],
    ids=["beams", "no cache", "another cache", "own cache", "assistant"],
)
def test_calls_that_no_fixed_cache_serves_are_refused(call: dict[str, Any], words: str, base: GenerationPlan) -> None:
    with pytest.raises(PlannerError, match=words):
        planned(base.target, "1GB", prompt(), max_new_tokens=4, **call)
    m = base.build()
    with pytest.raises(PlannerError, match=words):
        m.generate(prompt(), max_new_tokens=4, **call)
    base.restore()


def test_models_of_another_kind_are_refused() -> None:
    mamba = MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=99)).eval()
    with pytest.raises(PlannerError, match=r"LinearAttentionLayer.*use_cache"):
        planned(mamba, "1GB", prompt(), max_new_tokens=4)
    t5 = T5ForConditionalGeneration(T5Config(d_model=16, d_ff=16, d_kv=8, num_heads=2, num_layers=1, vocab_size=99)).eval()
    with pytest.raises(PlannerError, match="get_encoder"):
        planned(t5, "1GB", prompt(), max_new_tokens=4)
    with pytest.raises(PlannerError, match="dynamic="):
        plan(llama(), "1GB", method="generate", inputs=(prompt(2),), device="accounting", dynamic={"inputs": {0: "batch"}})
    with pytest.raises(PlannerError, match=r"method='generate', kwargs="):
        plan(llama(), "1GB", method="generate", device="accounting")


def test_what_one_program_has_is_asked_of_a_phase(base: GenerationPlan, tmp_path: Path) -> None:
    for ask in (base.compare, base.frontier, lambda: base.plot(tmp_path / "x.png"), lambda: base.save_trace(tmp_path / "x")):
        with pytest.raises(PlannerError, match=r"p\.phases\['decode'\]"):
            ask()
    with pytest.raises(PlannerError, match="max_new_tokens"):
        base.largest("batch")
    with pytest.raises(PlannerError, match=r"use_cache': False}\)\.emit"):
        base.emit(tmp_path / "package")
    with pytest.raises(AttributeError, match=r"p\.phases"):
        _ = base.layout
    assert base.phases["decode"].frontier(points=2)


def test_the_print(golden: Any) -> None:
    with torch.device("meta"):
        model = llama(hidden_size=1024, intermediate_size=2048).to(torch.bfloat16)
    ids = torch.empty(2, 32, dtype=torch.int64, device="meta")
    p = plan(
        model, "45MB", method="generate", inputs=(ids,), kwargs={"max_new_tokens": 16}, machine="rtx-4090", allow=("offload",)
    )
    golden("plan_generation", str(p))
    assert "# decode: 15 times in a call of generate" in p.code
