"""Statistics of groups, merged or whole, and the norm by them: held against PyTorch's group norm."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from runtime import ops  # noqa: F401  # makes the operators
from runtime.statistics import _by_deviations, _by_variance
from tests.passes.tile_rules.drawing import LAYOUTS, laid_out
from tests.passes.tile_rules.harness import cuts_of

own = torch.ops.vramplan


def numbers(seed: int, shape: list[int], mean: float = 3.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + mean


@st.composite
def problems(draw: st.DrawFn) -> tuple[torch.Tensor, int, torch.Tensor | None, torch.Tensor | None]:
    """An input of 2 to 5 dimensions with at least 8 elements in a group, how many groups, weight and bias (fp64)."""
    groups, per_group, seed = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(0, 2**16))
    channels = groups * per_group
    sizes = [8 if per_group < 4 else 2, *draw(st.lists(st.integers(1, 4), max_size=2))]
    x = laid_out(numbers(seed, [draw(st.integers(1, 3)), channels, *sizes]), draw(st.sampled_from(LAYOUTS)))
    weight, bias = (numbers(seed + n, [channels]) if draw(st.booleans()) else None for n in (1, 2))
    return x, groups, weight, bias


def in_two_steps(
    x: torch.Tensor, groups: int, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float = 1e-5
) -> torch.Tensor:
    return own.group_normalise(x, own.group_statistics(x, groups), weight, bias, eps)


def merged(x: torch.Tensor, groups: int, dim: int, cuts: list[int]) -> torch.Tensor:
    parts = [own.group_statistics(x.narrow(dim, start, stop - start), groups) for start, stop in pairwise(cuts)]
    return own.merge_statistics(torch.stack(parts))


@given(problems())
def test_group_norm_in_fp64(problem: tuple[torch.Tensor, int, torch.Tensor | None, torch.Tensor | None]) -> None:
    whole = torch.group_norm(*problem)
    found = in_two_steps(*problem)
    assert (found.dtype, found.shape) == (whole.dtype, whole.shape)
    assert (found - whole).abs().max() <= 1e-12 * max(1.0, float(whole.abs().max()))


@given(problems(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.booleans())
def test_group_norm_in_less(
    problem: tuple[torch.Tensor, int, torch.Tensor | None, torch.Tensor | None], dtype: torch.dtype, mixed: bool
) -> None:
    """fp32 at fp32's level; half within one rounding of the exact result, with weights in half or fp32."""
    x, groups, weight, bias = problem
    wide = torch.float32 if mixed else dtype
    args = (x.to(dtype), groups, *(None if w is None else w.to(wide) for w in (weight, bias)))
    exact = torch.group_norm(args[0].double(), groups, *(None if w is None else w.double() for w in args[2:]))
    found = in_two_steps(*args)
    assert (found.dtype, found.shape) == (dtype, x.shape)
    scale = max(1.0, float(exact.abs().max()))
    if dtype == torch.float32:
        assert (found - exact).abs().max() <= 4e-6 * scale
        return
    rounded = exact.to(dtype)
    spacing = torch.finfo(dtype).eps * exact.abs().clamp_min(1e-3) + 2e-6 * scale
    assert ((found.double() - rounded.double()).abs() <= spacing).all()


def test_half_is_eager_within_one_rounding() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        x, w, b = (numbers(n, shape, 0.0).to(dtype) for n, shape in enumerate([[2, 8, 6, 5], [8], [8]]))
        eager, found = torch.group_norm(x, 4, w, b), in_two_steps(x, 4, w, b)
        assert (eager != found).float().mean() < 0.02
        spacing = torch.finfo(dtype).eps * eager.double().abs() + 1e-6
        assert ((eager.double() - found.double()).abs() <= spacing).all()


@given(st.data(), st.sampled_from([0.0, 1e4]))
def test_merged_is_whole(data: st.DataObject, mean: float) -> None:
    """Also where the mean is far larger than the deviations, which sums of squares would lose."""
    x = numbers(data.draw(st.integers(0, 2**16)), [2, 4, data.draw(st.integers(1, 6)), data.draw(st.integers(2, 6))], mean)
    dim = data.draw(st.sampled_from([2, 3]))
    cuts = data.draw(cuts_of(x.shape[dim]))
    grouped = x.unflatten(1, (2, 2)).flatten(2)
    exact = torch.stack(
        [torch.full((2, 2), grouped.shape[2]), grouped.mean(2), grouped.var(2, correction=0) * grouped.shape[2]], -1
    )
    for found in (own.group_statistics(x, 2), merged(x, 2, dim, cuts)):
        torch.testing.assert_close(found, exact, rtol=1e-12 + 1e-15 * mean, atol=1e-12)
    single = x.float()
    for found in (own.group_statistics(single, 2), merged(single, 2, dim, cuts)):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found[..., :2].double(), exact[..., :2], rtol=1e-6, atol=1e-6)
        wide = single.double().unflatten(1, (2, 2)).flatten(2)
        squares = wide.var(2, correction=0) * wide.shape[2]
        # The means of parts are rounded to fp32, by up to 6e-8 of them: that times how far they are apart, twice, per element.
        apart = float(wide.amax() - wide.amin())
        rounding = 2 * wide.shape[2] * 6e-8 * mean * (apart + 6e-8 * mean)
        torch.testing.assert_close(found[..., 2].double(), squares, rtol=2e-6, atol=rounding + 1e-6)


@given(problems(), st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
def test_both_formulas_are_one(
    problem: tuple[torch.Tensor, int, torch.Tensor | None, torch.Tensor | None], dtype: torch.dtype
) -> None:
    """What CUDA takes and what a CPU takes: the choice is of speed and memory alone."""
    x, groups = problem[0].to(dtype), problem[1]
    wide = torch.promote_types(dtype, torch.float32)
    assume(wide == dtype or x.shape[0] * groups > 1)  # PyTorch on a CPU has no variance of all of a half tensor in fp32
    grouped = x.unflatten(1, (groups, x.shape[1] // groups))
    exact = grouped.double().flatten(2)
    rtol = 1e-12 if dtype == torch.float64 else 4e-6
    for formula in (_by_deviations, _by_variance):
        mean, squares = formula(grouped, wide)
        assert (mean.dtype, squares.dtype) == (wide, wide)
        torch.testing.assert_close(mean.double(), exact.mean(2), rtol=rtol, atol=rtol)
        torch.testing.assert_close(squares.double(), exact.var(2, correction=0) * exact.shape[2], rtol=rtol, atol=rtol)


def test_parts_without_elements_do_not_count() -> None:
    x = numbers(0, [2, 4, 6], 5.0)
    torch.testing.assert_close(merged(x, 2, 2, [0, 0, 3, 3, 6]), own.group_statistics(x, 2), rtol=1e-12, atol=1e-12)
    assert torch.equal(own.group_statistics(x[:, :, :0], 2), torch.zeros(2, 2, 3, dtype=torch.float64))
    assert torch.equal(merged(x, 2, 2, [0, 0]), torch.zeros(2, 2, 3, dtype=torch.float64))
    assert own.group_normalise(x[:0], own.group_statistics(x[:0], 2), None, None, 1e-5).shape == (0, 4, 6)


def test_averaged_variances_would_be_wrong() -> None:
    """What per-tile statistics lose is the term between the tiles."""
    x = torch.cat([torch.zeros(1, 1, 4), torch.ones(1, 1, 4)], 2)
    assert torch.equal(merged(x, 1, 2, [0, 4, 8]), torch.tensor([[[8.0, 0.5, 2.0]]]))


def test_groups_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="10 channels cannot be divided into 4 groups; take a divisor of 10"):
        own.group_statistics(torch.ones(1, 10, 2), 4)
    with pytest.raises(ValueError, match="10 channels cannot be divided into 4 groups; take a divisor of 10"):
        own.group_normalise(torch.ones(1, 10, 2), torch.ones(1, 4, 3), None, None, 1e-5)


class _Seen(TorchDispatchMode):
    """Keeps the names of operators and everything that they give."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.tensors: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        self.tensors += [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        return result


@pytest.mark.parametrize("fake", [False, True])
def test_modes_and_fakes_see_the_inner_operators(fake: bool) -> None:
    """The norm of half numbers makes nothing in fp32 that is as large as its input: only its result is."""
    with FakeTensorMode() if fake else torch.no_grad(), torch.no_grad():
        x, w = torch.ones(1, 8, 64, 64, dtype=torch.bfloat16), torch.ones(8, dtype=torch.bfloat16)
        statistics = own.group_statistics(x, 4)
        assert (statistics.shape, statistics.dtype) == ((1, 4, 3), torch.float32)
        with _Seen() as seen:
            y = own.group_normalise(x, statistics, w, w, 1e-5)
    assert (y.shape, y.dtype, y.stride()) == (x.shape, x.dtype, x.stride())
    assert not any(name.startswith("vramplan") for name in seen.names)
    large = {t.untyped_storage()._cdata for t in seen.tensors if t.untyped_storage().nbytes() >= x.nbytes}
    assert large - {x.untyped_storage()._cdata} == {y.untyped_storage()._cdata}
