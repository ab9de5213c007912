"""Policies of today in the simulator: what they cost against a walk through the hooks, and against our own plans."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from torch import nn

from planner import plan
from planner.baselines import Baseline, baselines, pageable
from planner.budget import Budget
from planner.machine import Machine
from planner.module_groups import Held, block_groups, held_by, owner_groups
from planner.options import Options
from planner.prepare import prepare
from planner.presets import Preset
from planner.solve.decide import Solver
from tests.zoo import ZOO

# A link so slow against compute that small models stream like large ones; pageable memory is slower still.
MACHINE = replace(
    Machine.preset("rtx-4090"),
    name="slow link",
    link_latency_seconds=1e-7,
    launch_seconds=1e-7,
    link_bandwidth=5e9,
    pageable_bandwidth=3e9,
)
SHARES = (0.5, 0.7, 0.9, 1.0)


@cache
def solver(name: str, device: str = "accounting", repeats: int = 1) -> tuple[Solver, nn.Module]:
    module, args, kwargs = ZOO[name]()
    options = Options(Budget.parse("1GB"), MACHINE, device, args=args, kwargs=kwargs, repeats=repeats)
    return prepare(module, options).base, module


def between(solved: Solver, share: float) -> int:
    return int(solved.minimum.peak_bytes + share * (solved.resident.peak_bytes - solved.minimum.peak_bytes))


def policies(solved: Solver, module: nn.Module, share: float = 0.5) -> dict[str, Baseline]:
    return {found.policy: found for found in baselines(solved, module, between(solved, share))}


def copies(solved: Solver, held: Held) -> float:
    """Seconds of pageable copies, one tensor after the other."""
    machine = pageable(MACHINE)
    return sum(machine.copy_seconds(solved.problem.weight_bytes[w]) for w in held.weights)


def walk(solved: Solver, held: tuple[Held, ...]) -> float:
    """What the hooks of diffusers do, operator by operator: the host waits for its stream before every onload.

    After each group it waits for compute, so that there is one clock.
    """
    problem, chain = solved.problem, [h for h in held if not h.synchronous]
    now = sum(copies(solved, h) for h in held if h.synchronous)
    arrival = 0.0

    def onload(index: int) -> None:
        nonlocal now, arrival
        now = max(now, arrival)
        if index < len(chain):
            arrival = now + MACHINE.copy_seconds(sum(problem.weight_bytes[w] for w in chain[index].weights))

    onload(0)
    following = 0
    for i, seconds in enumerate(problem.seconds.tolist()):
        while following < len(chain) and chain[following].first == i:
            following += 1
            onload(following)
        now += seconds
    return now + sum(copies(solved, h) for h in held if h.synchronous)


@pytest.mark.parametrize("name", sorted(ZOO))
def test_seconds_of_synchronous_policies(name: str) -> None:
    solved, module = solver(name)
    compute, found = solved.problem.compute_seconds, policies(solved, module)
    assert found["everything resident"].step_seconds == pytest.approx(compute)
    leaves = held_by(solved.problem, module, owner_groups(module, buffers=bool(module._parameters)))
    assert found["sequential offload"].step_seconds == pytest.approx(compute + sum(copies(solved, h) for h in leaves))
    blocks = held_by(solved.problem, module, block_groups(module))
    assert found["group offload, blocks"].step_seconds == pytest.approx(compute + 2 * sum(copies(solved, h) for h in blocks))


@pytest.mark.parametrize("name", sorted(ZOO))
def test_seconds_of_streams_are_those_of_the_hooks(name: str) -> None:
    solved, module = solver(name)
    found = policies(solved, module)
    for policy, groups in (("blocks", block_groups(module)), ("leaves", owner_groups(module))):
        expected = walk(solved, held_by(solved.problem, module, groups))
        assert found[f"group offload, {policy}, stream"].step_seconds == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["flux", "unet", "vae_decoder"])
def test_memory_of_streams_is_that_of_two_groups(name: str) -> None:
    """On `accounting`, where bytes are live bytes: at every operator what runs, what comes next, and what is in no block."""
    solved, module = solver(name)
    problem, found = solved.problem, policies(solved, module)
    held = held_by(problem, module, block_groups(module))
    chain = [h for h in held if not h.synchronous]
    moved = {w for h in held for w in h.weights}
    stays = problem.total_weight_bytes - problem.arena_bytes(moved)
    peak = 0
    for i, activations in enumerate(problem.activation_bytes.tolist()):
        here = sum(h.synchronous for h in held if h.first <= i <= h.last)
        assert here == 1
        there = [h for h in held if h.synchronous]
        there += [h for index, h in enumerate(chain) if (chain[index - 1].first if index else 0) <= i <= h.last]
        peak = max(peak, activations + stays + sum(problem.arena_bytes(set(h.weights)) for h in there))
    assert found["group offload, blocks, stream"].peak_bytes == peak
    assert found["group offload, blocks"].peak_bytes < peak < solved.resident.peak_bytes


def test_without_blocks_the_whole_model_goes_back_and_forth() -> None:
    """As T5, CLIP and BERT, whose layers are not right below the module."""
    solved, module = solver("bert")
    found = policies(solved, module)
    for policy in ("group offload, blocks", "group offload, blocks, stream"):
        assert found[policy].peak_bytes == solved.resident.peak_bytes
        assert found[policy].note == "100% of the weights in no block"
        assert found[policy].step_seconds > found["model offload"].step_seconds


def test_model_offload_is_shared_by_the_calls() -> None:
    (once, module), (often, other) = solver("bert"), solver("bert", repeats=10)
    compute = once.problem.compute_seconds
    first, tenth = (policies(*pair)["model offload"] for pair in ((once, module), (often, other)))
    assert first.peak_bytes == tenth.peak_bytes == once.resident.peak_bytes
    assert (first.step_seconds - compute) == pytest.approx(10 * (tenth.step_seconds - compute))
    assert tenth.note == "its weights come once in 10 calls"


@pytest.mark.parametrize("repeats", [1, 8])
@pytest.mark.parametrize("name", ["flux", "llama", "vae_decoder"])
def test_prefix_residency_uses_the_budget(name: str, repeats: int) -> None:
    solved, module = solver(name, repeats=repeats)
    found = [policies(solved, module, share)["prefix residency"] for share in SHARES]
    for share, one in zip(SHARES, found, strict=True):
        assert one.peak_bytes <= between(solved, share)
    seconds = [one.step_seconds for one in found]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[-1] == pytest.approx(solved.problem.compute_seconds)
    assert policies(solved, module, 0.0)["prefix residency"].note == "this is the least that it takes"


@pytest.mark.parametrize("device", ["accounting", "cuda"])
@pytest.mark.parametrize("name", sorted(ZOO))
def test_no_policy_beats_the_bound_of_its_memory(name: str, device: str) -> None:
    solved, module = solver(name, device)
    for found in policies(solved, module).values():
        assert found.step_seconds >= found.bound_seconds * (1 - 1e-9), found
        assert found.peak_bytes >= solved.problem.activation_bytes.max()


def never_slower(solved: Solver, module: nn.Module, share: float) -> list[str]:
    """The policies that are faster than our plan in their memory."""
    faster = []
    for found in baselines(solved, module, between(solved, share)):
        if found.peak_bytes < solved.minimum.peak_bytes:
            continue
        ours = solved.solve(found.peak_bytes).time.step_seconds
        if ours > found.step_seconds * (1 + 1e-9):
            faster.append(f"{found.policy}, {found.peak_bytes} B: {found.step_seconds:.6g} s, ours {ours:.6g} s")
    return faster


@pytest.mark.parametrize("repeats", [1, 8])
@pytest.mark.parametrize("share", [0.25, 0.8])
@pytest.mark.parametrize("name", sorted(ZOO))
def test_ours_is_never_slower_in_the_same_memory(name: str, share: float, repeats: int) -> None:
    assert not never_slower(*solver(name, repeats=repeats), share)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ZOO))
def test_ours_is_never_slower_in_the_same_memory_on_cuda(name: str) -> None:
    assert not never_slower(*solver(name, "cuda"), 0.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "machine", "repeats"),
    [("clip-l-text", "rtx-3060", 1), ("t5-xxl-encoder", "rtx-4090", 1), ("sdxl-unet", "rtx-3060", 30)],
)
def test_ours_is_never_slower_for_presets(preset: str, machine: str, repeats: int) -> None:
    module, args, kwargs = Preset.load(preset).build()
    p = plan(module, "80GB", inputs=args, kwargs=kwargs, machine=machine, repeats=repeats)
    assert not never_slower(p._solver, module, 0.5)
