"""Tiling is exact on real models: what is computed in tiles is what is computed whole, up to rounding in float64.

Batches of two could simply be cut in two samples, so every case says along which dimension things are cut, in how many tiles:
`keep={"*": {"tile": {"dim": -2, "count": 3}}}`. Most cases are slow; the fast ones are the cheapest of every kind.
"""

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from planner import Plan, PlannerError
from planner.solve.decisions import UNTILED
from tests.properties.tiled import (
    MODELS,
    Subject,
    autoencoder_kl,
    autoencoder_tiny,
    error_of,
    finish,
    normal,
    tile_counts,
    tiled_share,
)

EXACT = 1e-12

IMAGE, VIDEO = {-2: 0.9, -1: 0.9}, {-3: 0.6, -2: 0.9, -1: 0.9}
# By model and the dimension of what operators read that is cut: the share of operators that then run in tiles at least.
DIMS: dict[str, dict[int, float]] = {
    "kl": IMAGE,
    "dc": IMAGE,
    "tiny": IMAGE,
    "vq": IMAGE,
    "asymmetric": IMAGE,
    "cogvideox": VIDEO,
    "wan": {**VIDEO, -3: 0.3},  # decoded frame by frame
    "qwen": {**VIDEO, -3: 0.3},
    "ltx": VIDEO,
    "unet": {-2: 0.9, -1: 0.5},
    "sd3": {1: 0.8, 2: 0.5},
    "flux": {1: 0.6, 2: 0.4},
    "wan_transformer": {1: 0.8, 2: 0.6},
    "clip_text": {1: 0.7, 2: 0.6},
    "t5_encoder": {1: 0.9, 2: 0.4},
    "oobleck": {-1: 0.6},
    "hifigan": {-1: 0.9},
}
FAST = {
    ("kl.decoder", -2, 3),
    ("dc.encoder", -1, 2),
    ("tiny.decoder", -2, 7),
    ("tiny.encoder", -1, 2),
    ("clip_text", 1, 3),
    ("hifigan", -1, 7),
}


def _cases() -> list[Any]:
    """A model, a dimension and a number of tiles."""
    found: list[Any] = []
    for name in MODELS:
        for case in itertools.product([name], DIMS[name.partition(".")[0]], (2, 3, 7)):
            found.append(pytest.param(*case, marks=() if case in FAST else pytest.mark.slow))
    return found


def in_tiles(count: int, dim: int = -2) -> dict[str, Any]:
    return {"*": {"tile": {"dim": dim, "count": count}}}


@pytest.mark.parametrize(("name", "dim", "count"), _cases())
def test_tiles_give_what_the_whole_gives(name: str, dim: int, count: int) -> None:
    subject = MODELS[name]()
    p = subject.plan(keep=in_tiles(count, dim))
    assert error_of(subject.run(p), subject.whole()) <= EXACT
    untiled = subject.plan(allow=("offload",))
    assert tiled_share(untiled, untiled) == 0
    assert tiled_share(p, untiled) >= DIMS[name.partition(".")[0]][dim]
    assert 1 < max(tile_counts(p)) <= count
    assert max(tile_counts(p)) == count or dim == -3  # there are few frames


# Of the least that the plan without tiles needs, the budget.
BUDGETS = {
    "kl.decoder": 0.6,
    "kl.encoder": 0.9,
    "dc.decoder": 0.8,
    "dc.encoder": 0.9,
    "tiny.decoder": 0.6,
    "tiny.encoder": 0.6,
    "vq.decoder": 0.6,
    "vq.encoder": 0.9,
    "asymmetric.decoder": 0.6,
    "asymmetric.encoder": 0.9,
    "hifigan": 0.6,
}


@pytest.mark.parametrize("name", [n if n == "kl.decoder" else pytest.param(n, marks=pytest.mark.slow) for n in BUDGETS])
def test_a_budget_below_what_the_whole_needs_is_kept_by_tiles(name: str) -> None:
    subject = MODELS[name]()
    untiled = subject.plan(allow=("offload",))
    budget = int(BUDGETS[name] * untiled.minimum_bytes)
    p = subject.plan(budget)
    assert p.minimum_bytes <= p.peak_bytes <= budget < untiled.minimum_bytes
    assert tile_counts(p) or p.decisions.tiling.unrolled  # the two samples in turn may be enough
    assert error_of(subject.run(p), subject.whole()) <= EXACT
    found = p._tilings.branch(UNTILED).solve(budget, None)
    assert found is not None
    together = Plan(p.target, p.options, p._tilings, found[1].decisions(found[0].problem))
    assert tile_counts(together)
    assert together.peak_bytes <= budget
    assert error_of(subject.run(together), subject.whole()) <= EXACT


# What makes diffusers decode images of this size in tiles of its own.
THEIRS: dict[str, dict[str, float]] = {
    "kl.decode": {"tile_latent_min_size": 8, "tile_sample_min_size": 16},
    "dc.decode": dict.fromkeys(("tile_sample_min_height", "tile_sample_min_width"), 16)
    | dict.fromkeys(("tile_latent_min_height", "tile_latent_min_width"), 8)
    | dict.fromkeys(("tile_sample_stride_height", "tile_sample_stride_width"), 12),
    "cogvideox.decode": dict.fromkeys(("tile_sample_min_height", "tile_sample_min_width"), 32)
    | dict.fromkeys(("tile_latent_min_height", "tile_latent_min_width"), 4)
    | dict.fromkeys(("tile_overlap_factor_height", "tile_overlap_factor_width"), 0.25),
    "wan.decode": dict.fromkeys(("tile_sample_min_height", "tile_sample_min_width"), 32)
    | dict.fromkeys(("tile_sample_stride_height", "tile_sample_stride_width"), 24),
    "ltx.decode": dict.fromkeys(("tile_sample_min_height", "tile_sample_min_width"), 16)
    | dict.fromkeys(("tile_sample_stride_height", "tile_sample_stride_width"), 12),
}


@pytest.mark.parametrize("name", [n if n == "dc.decode" else pytest.param(n, marks=pytest.mark.slow) for n in THEIRS])
def test_the_tiles_of_diffusers_give_something_else(name: str) -> None:
    subject = MODELS[name]()
    expected = subject.whole()
    ours = error_of(subject.run(subject.plan(keep=in_tiles(3))), expected)
    vae: Any = subject.module.inner
    vae.enable_tiling()
    for setting, size in THEIRS[name].items():
        assert hasattr(vae, setting)
        setattr(vae, setting, size)
    theirs = error_of(subject.whole(), expected)
    print(f"\n{name}: error of our tiles {ours:.1e}, of enable_tiling() {theirs:.1e}")
    assert ours <= EXACT
    assert 1e-3 < theirs < math.inf


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [pytest.param(torch.float32, 1e-5, marks=pytest.mark.slow), (torch.bfloat16, 5e-2)]
)
@pytest.mark.parametrize("count", [3, pytest.param(7, marks=pytest.mark.slow)])
def test_lower_precision_is_as_close_to_float64_as_the_whole(dtype: torch.dtype, tolerance: float, count: int) -> None:
    """Within the tolerance, and at most twice as far off as the module itself in this precision."""
    module = finish(autoencoder_kl().decoder).inner.to(dtype)
    low = Subject(module, (normal(2, 4, 13, 19).to(dtype),))
    expected = Subject(copy.deepcopy(module).double(), (low.args[0].double(),)).whole()
    p = low.plan(keep=in_tiles(count))
    given = low.run(p)
    assert given[0].dtype == dtype
    assert max(tile_counts(p)) == count
    assert error_of(given, expected) <= min(tolerance, 2 * error_of(low.whole(), expected))


ODD_INPUTS: dict[str, Callable[[], Tensor]] = {
    "fewer rows than tiles": lambda: normal(2, 4, 5, 6),
    "one row": lambda: normal(2, 4, 1, 9),
    "one column": lambda: normal(1, 4, 9, 1),
    "one pixel": lambda: normal(1, 4, 1, 1),
    "no samples": lambda: normal(0, 4, 6, 5),
    "channels last": lambda: normal(2, 4, 6, 5).to(memory_format=torch.channels_last),
    "transposed": lambda: normal(2, 4, 5, 6).transpose(2, 3),
    "every other row": lambda: normal(2, 4, 12, 5)[:, :, ::2],
    "one sample twice": lambda: normal(1, 4, 6, 5).expand(2, -1, -1, -1),
}


@pytest.mark.parametrize("part", ["decoder", pytest.param("encoder", marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", [autoencoder_tiny, pytest.param(autoencoder_kl, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dim", [-2, pytest.param(-1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ODD_INPUTS)
def test_odd_inputs_give_the_right_image_or_an_error(name: str, dim: int, make: Callable[[], Any], part: str) -> None:
    given = ODD_INPUTS[name]()
    subject = Subject(finish(getattr(make(), part)), (given if part == "decoder" else given[:, :3],))
    try:
        p = subject.plan(keep=in_tiles(50, dim))
    except PlannerError:
        if name != "no samples":  # of which PyTorch cannot say how large they are upsampled
            with pytest.raises(RuntimeError):
                subject.whole()
        return
    assert error_of(subject.run(p), subject.whole()) <= EXACT
