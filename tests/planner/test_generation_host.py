"""Generations whose weights do not fit the host: the same tokens, every memory within its budget, reads as predicted."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from passes.check_host import check_hosts
from planner import InfeasibleBudget, Plan, PlanFileError, plan
from planner.generation import GenerationPlan
from planner.host_budget import all_bytes, module_tensors
from runtime.errors import CheckError
from runtime.origins import has_no_bytes
from tests.planner.generations import SLOW, llama, planned, prompt
from tests.planner.hosts import changed
from tests.planner.test_casting import with_stored_values

pytestmark = pytest.mark.usefixtures("scratch")

TOKENS = 16
SIZES = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3}


@functools.cache
def made(*, tied: bool = False) -> tuple[GenerationPlan, torch.Tensor]:
    """A plan for a large budget, and the tokens of the model itself."""
    model = llama(**SIZES, tie_word_embeddings=tied)
    return planned(model, "1GB", prompt(), max_new_tokens=TOKENS), model.generate(prompt(), max_new_tokens=TOKENS)


def weights_of(p: GenerationPlan) -> int:
    return all_bytes(module_tensors(p.target, None))


def budget_of(free: GenerationPlan, host: int, share: float = 0.5, **more: int) -> dict[str | int, int | str]:
    return {"accounting": max(free.minimum_bytes, int(share * free.unplanned_bytes)), "cpu": host, **more}


def replanned(free: GenerationPlan, host: int, share: float = 0.5, **more: int) -> GenerationPlan:
    p = free.replan(budget_of(free, host, share, **more))
    assert isinstance(p, GenerationPlan)
    return p


def least_of(free: GenerationPlan, share: float = 0.5) -> int:
    with pytest.raises(InfeasibleBudget, match=r"host budget 1 B .* Write budget=\{\.\.\., 'cpu': ") as caught:
        free.replan(budget_of(free, 1, share))
    assert caught.value.memory == "cpu"
    return caught.value.minimum_bytes


def carried_bytes(p: GenerationPlan) -> int:
    """What is fetched for a token that does not come."""
    return sum(bundle.nbytes for bundle in p.decode.layout.bundles if bundle.carried)


def check_runs(p: GenerationPlan, want: torch.Tensor, call: int = TOKENS) -> None:
    """Builds it and generates: all that is measured is as it was predicted."""
    m = p.build()
    count = sum(len(phase.program.weights) for phase in p.phases.values())
    assert p.locked_bytes is not None
    for number in range(2):
        assert torch.equal(m.generate(prompt(), max_new_tokens=call), want)
        report = m.report()
        assert report.peak_bytes == p.peak_bytes <= p.budget_bytes
        assert 0 < report.locked_bytes <= p.locked_bytes <= (p.budget.host_bytes or 0)
        if number == 1 or p.decode.layout.bundles:  # where all stays on the device, it is read once
            assert p.read_bytes <= report.read_bytes <= p.read_bytes + carried_bytes(p) + 64 * 3 * count


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0], ids=["least device", "half", "all on the device"])
@pytest.mark.parametrize("host", ["half", "least"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_same_tokens_within_the_hosts_budget(tied: bool, host: str, share: float, scratch: Path) -> None:
    free, want = made(tied=tied)
    before = {name: tensor.clone() for name, tensor in free.target.state_dict().items()}
    p = replanned(free, weights_of(free) // 2 if host == "half" else least_of(free, share), share)
    assert p.spills
    assert (p.read_bytes > 0) == (share < 1.0)
    check_runs(p, want)
    file = next(scratch.glob("*/*.safetensors"))
    assert 0 < p.written_bytes <= file.stat().st_size
    p.restore()
    assert all(torch.equal(tensor, before[name]) for name, tensor in p.target.state_dict().items())


def test_many_tokens_under_half_of_the_weights() -> None:
    free, _ = made()
    want = free.target.generate(prompt(), max_new_tokens=64)
    p = planned(free.target, budget_of(free, weights_of(free) // 2), prompt(), max_new_tokens=64)  # type: ignore[arg-type]
    assert p.spills
    check_runs(p, want, 64)
    p.restore()


def test_less_than_the_least_is_refused() -> None:
    free, _ = made()
    with pytest.raises(InfeasibleBudget, match="a ring through which in turn the weights of 2 programs come from disk"):
        replanned(free, least_of(free) - 1)


def test_where_all_weights_fit_nothing_is_read() -> None:
    free, want = made()
    p = replanned(free, weights_of(free))
    assert (p.spills, p.read_bytes, p.locked_bytes, p.held) == (False, 0, weights_of(free), None)
    check_runs(p, want)
    p.restore()
    assert p.step_seconds == free.replan(p.budget_bytes).step_seconds


def test_more_memory_never_reads_more() -> None:
    free, _ = made()
    least, most = least_of(free), weights_of(free)
    plans = [replanned(free, least + (most - least) * i // 6) for i in range(7)]
    reads = [p.read_bytes for p in plans]
    assert sorted(reads, reverse=True) == reads
    assert len(set(reads)) > 4
    for p in plans[:-1]:  # what every token streams comes first
        assert p.held is not None
        host = p.decode.layout.host
        assert host is not None
        assert not host.read_bytes or sum(p.held.values()) < p.decode.layout.streamed_bytes


@pytest.mark.parametrize("host", ["half", "least"])
def test_a_folder_is_read_where_it_lies(tmp_path: Path, host: str) -> None:
    free, want = made()
    free.target.save_pretrained(tmp_path / "llama")
    folder = planned(tmp_path / "llama", "1GB", prompt(), max_new_tokens=TOKENS)
    nbytes = weights_of(folder) // 2 if host == "half" else least_of(folder)
    written = replanned(folder, nbytes).written_bytes
    p = replanned(folder, nbytes, disk=written)
    assert p.written_bytes == written < weights_of(folder) // 50  # a table of frequencies that no file has
    if written:
        with pytest.raises(InfeasibleBudget, match="disk budget") as caught:
            replanned(folder, nbytes, disk=written - 1)
        assert (caught.value.memory, caught.value.minimum_bytes) == ("disk", written)
    check_runs(p, want)
    p.save(tmp_path / "plan.json")
    p.restore()
    assert all(has_no_bytes(t) for t in p.target.parameters())
    loaded = Plan.load(tmp_path / "plan.json", tmp_path / "llama")
    assert isinstance(loaded, GenerationPlan)
    assert (loaded.read_bytes, loaded.locked_bytes, str(loaded)) == (p.read_bytes, p.locked_bytes, str(p))
    check_runs(loaded, want)
    loaded.restore()


def test_a_folder_is_planned_in_one_call(tmp_path: Path) -> None:
    free, want = made()
    free.target.save_pretrained(tmp_path / "llama")
    p = planned(tmp_path / "llama", budget_of(free, weights_of(free) // 2), prompt(), max_new_tokens=TOKENS)  # type: ignore[arg-type]
    assert p.spills
    check_runs(p, want)
    p.restore()


def test_calls_that_were_not_planned_stay_within_the_hosts_budget() -> None:
    free, want = made()
    p = replanned(free, weights_of(free) // 2, 1.0)
    wanted = {tokens: p.target.generate(prompt(tokens=tokens), max_new_tokens=12) for tokens in (7, 40)}
    m = p.build()
    for _ in range(2):
        for tokens, own in wanted.items():  # a shorter prompt, on the same cache, and one that needs another
            assert torch.equal(m.generate(prompt(tokens=tokens), max_new_tokens=12), own)
            report = m.report()
            assert report.peak_bytes == report.predicted_peak_bytes <= p.budget_bytes
            assert report.locked_bytes <= (p.budget.host_bytes or 0)
        assert torch.equal(m.generate(prompt(), max_new_tokens=TOKENS), want)
    p.restore()


@pytest.mark.parametrize("from_folder", [False, True])
def test_weights_written_in_place_are_read_again(tmp_path: Path, from_folder: bool) -> None:
    model, other = llama(**SIZES), llama(**SIZES)
    model.save_pretrained(tmp_path / "llama")
    free = planned(tmp_path / "llama" if from_folder else model, "1GB", prompt(), max_new_tokens=4)
    p = replanned(free, least_of(free))
    m = p.build()
    for _ in range(2):
        assert torch.equal(m.generate(prompt(), max_new_tokens=4), other.generate(prompt(), max_new_tokens=4))
        with torch.no_grad():
            for mine, own in zip(m.parameters(), other.parameters(), strict=True):
                mine.add_(0.25)
                own.add_(0.25)
    assert torch.equal(m.generate(prompt(), max_new_tokens=4), other.generate(prompt(), max_new_tokens=4))
    assert m.report().peak_bytes == p.peak_bytes
    p.restore()


def test_weights_in_a_smaller_type_come_from_disk_too() -> None:
    model = llama(hidden_size=128, intermediate_size=256)
    p = planned(model, "1GB", prompt(), max_new_tokens=8, allow_cast="float8_e4m3fn", machine=SLOW)
    q = replanned(p, weights_of(p) // 4)
    assert q.spills
    assert q.cast_count > 0
    m = q.build()
    got = m.generate(prompt(), max_new_tokens=8)
    assert m.report().peak_bytes == q.peak_bytes <= q.budget_bytes
    assert m.report().locked_bytes <= (q.locked_bytes or 0) <= (q.budget.host_bytes or 0)
    q.restore()
    assert torch.equal(got, with_stored_values(model, q.decode).generate(prompt(), max_new_tokens=8))


def test_the_cache_is_on_no_disk() -> None:
    """On the device "cpu" every weight is on disk, and the cache is none: it is memory of the device."""
    free, want = made()
    with pytest.raises(InfeasibleBudget, match="disk budget") as caught:
        planned(free.target, {"cpu": "1GB", "disk": 1}, prompt(), device="cpu", max_new_tokens=TOKENS)  # type: ignore[arg-type]
    least = caught.value.minimum_bytes
    assert least == sum(-(-t.nbytes // 64) * 64 for t in module_tensors(free.target, None))
    p = planned(free.target, {"cpu": "1GB", "disk": least}, prompt(), device="cpu", max_new_tokens=TOKENS)  # type: ignore[arg-type]
    m = p.build()
    assert torch.equal(m.generate(prompt(), max_new_tokens=TOKENS), want)
    p.restore()


def test_saved_plans_keep_their_shares(tmp_path: Path) -> None:
    free, _ = made()
    p = replanned(free, least_of(free))
    p.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json", p.target)
    assert isinstance(loaded, GenerationPlan)
    assert loaded == p
    assert (loaded.held, loaded.locked_bytes, str(loaded)) == (p.held, p.locked_bytes, str(p))
    data = json.loads((tmp_path / "plan.json").read_text())
    phase = data["decisions"]["phases"]["decode"]
    phase["host_bytes"] *= 10
    phase["homes"]["slots"] += 40
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises((CheckError, PlanFileError), match="I1: the host's memory takes"):
        Plan.load(tmp_path / "plan.json", p.target)
    del phase["homes"]
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(PlanFileError, match="the decisions do not say what is there"):
        Plan.load(tmp_path / "plan.json", p.target)
    del data["decisions"]["held"]
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(PlanFileError, match=r"I1: .* nothing says which are on disk"):
        Plan.load(tmp_path / "plan.json", p.target)


def test_the_checker_takes_rings_in_turn() -> None:
    free, _ = made()
    p = replanned(free, weights_of(free) // 2)
    programs: dict[str, Any] = {name: phase.emitted for name, phase in p.phases.items()}
    host = p.decode.layout.host
    assert host is not None
    locked = check_hosts(programs, p.budget.host_bytes or 0, in_turn=True)
    assert locked == p.locked_bytes
    assert check_hosts(programs, 2 * locked) == locked + host.ring_bytes  # beside each other
    with pytest.raises(CheckError, match=f"takes {locked} B of {locked - 1} B.* of 2 programs in turn"):
        check_hosts(programs, locked - 1, in_turn=True)
    small = {**programs, "prefill": changed(programs["prefill"], slots=host.slots + 1)}
    with pytest.raises(CheckError, match=f"takes {locked + host.slot_bytes} B of {locked} B"):
        check_hosts(small, locked, in_turn=True)
    cache = next(key for key, weight in programs["decode"].weights.items() if weight.made)
    with pytest.raises(CheckError, match="is the program's own, and cannot have a home in memory"):
        check_hosts({**programs, "decode": changed(programs["decode"], held=(*host.held, cache))}, locked, in_turn=True)


def test_printing_says_what_comes_from_disk() -> None:
    free, _ = made()
    text = str(replanned(free, least_of(free)))
    assert "\n  host      16.4 KB, of which 16.4 KB are taken, 16.4 KB of them a ring\n" in text
    assert "read in a call; 791 KB written by build()\n" in text
    assert text.count(" read before it in ") == 2
    assert text.count(" read per step in ") == 2


@pytest.mark.slow
def test_seven_billion_weights_on_a_small_card_and_a_small_host() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig()).to(torch.bfloat16).eval()
    ids = torch.empty(1, 512, dtype=torch.int64, device="meta")
    p = plan(
        model, {"cuda": "6GB", "cpu": "8GB"}, method="generate", inputs=(ids,), kwargs={"max_new_tokens": 64},
        machine="rtx-4090", allow=("offload",),
    )  # fmt: skip
    assert isinstance(p, GenerationPlan)
    assert p.spills
    assert p.reserved_bytes <= 6 * 10**9
    assert 7.9e9 < (p.locked_bytes or 0) <= 8 * 10**9
    free = p.replan("6GB")
    assert free.step_seconds <= p.step_seconds < 1.02 * free.step_seconds  # what tokens stream is in memory
    assert str(p).count(" read before it in ") == 2
