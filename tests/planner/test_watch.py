"""What Python is told when it asks fakes for values, and what it is counted to hold."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from planner.watch import Answers, Numbers, UnknownFloat, Watch
from runtime.errors import UnknownSize

SITES = st.lists(st.sampled_from(["a", "b", "c"]), max_size=5)


def walk(sites: list[str]) -> list[tuple[bool, ...]]:
    """All paths through code that asks at these places, whatever it is told."""
    current: Answers | None = Answers()
    paths = []
    while current is not None:
        for site in sites:
            current.decide(site)
        paths.append(tuple(answer for _, answer in current.taken))
        current = current.following()
    return paths


@given(SITES)
def test_every_path_is_walked_once(sites: list[str]) -> None:
    paths = walk(sites)
    assert len(set(paths)) == len(paths)
    turned = [i for i, site in enumerate(sites) if sites[:i].count(site) < 2]
    assert {tuple(path[i] for i in turned) for path in paths} == {
        tuple(bool(bits >> k & 1) for k in range(len(turned))) for bits in range(2 ** len(turned))
    }


def test_loops_end() -> None:
    for goes_on in (True, False):
        answers = Answers()
        turns = 0
        while answers.decide("while") is goes_on:
            turns += 1
        assert turns <= 1


def test_asking_without_end() -> None:
    answers = Answers()

    def ask() -> None:
        while True:
            answers.decide("here")

    with pytest.raises(UnknownSize, match="asks for values without end"):
        ask()


def watched(function: Callable[..., Any], *shapes: tuple[int, ...], answers: Answers | None = None) -> tuple[Any, int, int]:
    """(result, bytes live after it, most bytes) of a function on fakes."""
    peaks = [0]
    mode = FakeTensorMode()
    with mode:
        inputs = [torch.empty(shape) for shape in shapes]
    watch = Watch(answers or Answers(), set(), lambda storage: None, lambda nbytes: peaks.append(nbytes))
    for tensor in inputs:
        watch.count(tensor)
    with torch.no_grad(), mode, watch, Numbers():
        result = function(*inputs)
    live = watch.live_bytes
    watch.detach()
    return result, live, max(peaks)


def test_bytes_come_and_go() -> None:
    result, live, peak = watched(lambda x: (x * 2 + 1).sum(), (8, 4))
    assert isinstance(result, FakeTensor)
    assert (live, peak) == (128 + 4, 128 * 3)


@pytest.mark.parametrize(
    ("choose", "rows"),
    [
        (lambda x: (x > 0).nonzero(), 32),
        (lambda x: x[x > 0], 32),
        (lambda x: x[x[:, 0] > 0], 8),
        (lambda x: torch.masked_select(x, x[:, :1] > 0), 32),
        (lambda x: torch.unique(x), 32),
    ],
)
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_most_that_can_be_chosen(choose: Callable[..., Any], rows: int, share: float) -> None:
    answers = Answers(share=share)
    result, _, _ = watched(choose, (8, 4), answers=answers)
    assert result.shape[0] == int(rows * share)
    assert answers.sizes == 1
    real = choose(torch.randn(8, 4))
    assert real.shape[0] <= rows
    assert real.shape[1:] == result.shape[1:]


def test_what_is_known_stays_known() -> None:
    def padded(x: torch.Tensor) -> torch.Tensor:
        lengths = torch.tensor([3, 5])
        positions = torch.arange(8) < lengths.max()
        return x[: int(positions.sum())]

    assert watched(padded, (8, 4))[0].shape == (5, 4)


@pytest.mark.parametrize(
    "size",
    [
        lambda x: int(x.sum()),
        lambda x: int(x.sum().item()),
        lambda x: math.ceil(x.mean().item() * 8),
        lambda x: (x > 0).sum().item(),
        lambda x: (x > 0).sum().tolist(),
        lambda x: round(2 * x.max().item() + 1),
    ],
)
def test_sizes_that_only_data_knows(size: Callable[..., Any]) -> None:
    with pytest.raises(UnknownSize, match=r"test_watch\.py:\d+ (takes|makes) an integer"):
        watched(lambda x: x[: size(x)], (8, 4))


def test_an_unknown_number_scales() -> None:
    number = UnknownFloat(1.0)
    assert type(number * 2 + 1 - 0.5) is UnknownFloat
    assert type(3 * number / 2) is UnknownFloat
    result, _, _ = watched(lambda x: x * x.max().item() / 2, (8, 4))
    assert result.shape == (8, 4)
