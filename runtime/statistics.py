"""Group norm in two steps, as operators `vramplan::...`: statistics that parts can be merged of, then the norm itself.

Statistics are `[N, groups, 3]`: how many elements, their mean, and the sum of their squared deviations from it (M2), in fp32,
or fp64 for fp64. Each operator is written with PyTorch's own, which is what dispatch modes and fakes see.
"""

from __future__ import annotations

import torch

_LIBRARY = torch.library.Library("vramplan", "DEF")
_LIBRARY.define("group_statistics(Tensor x, int groups) -> Tensor")
_LIBRARY.define("merge_statistics(Tensor stacked) -> Tensor")
_LIBRARY.define("group_normalise(Tensor x, Tensor statistics, Tensor? weight, Tensor? bias, float eps) -> Tensor")


def group_statistics(x: torch.Tensor, groups: int) -> torch.Tensor:
    """`[N, groups, 3]` of `x: [N, C, ...]`: statistics over a sample's group of channels and all that follows them.

    In two passes, mean then deviations: exact however large the mean is against the deviations. On a CPU it takes one tensor
    of the size of `x` in fp32 (fp64), on CUDA none.

    Raises:
        ValueError: the groups do not divide the channels.
    """
    batch, channels = x.shape[:2]
    if groups < 1 or channels % groups:
        raise ValueError(
            f"group_statistics: {channels} channels cannot be divided into {groups} groups; take a divisor of {channels}"
        )
    dtype = torch.promote_types(x.dtype, torch.float32)
    if x.numel() == 0:
        return x.new_zeros((batch, groups, 3), dtype=dtype)
    grouped = x.unflatten(1, (groups, channels // groups))
    mean, squares = (_by_variance if x.is_cuda else _by_deviations)(grouped, dtype)
    count = torch.full_like(squares, x.numel() // (batch * groups))
    return torch.stack((count, mean, squares), -1)


def _by_deviations(grouped: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and M2 over all dimensions after the second, with vectors: PyTorch's variance on a CPU goes element by element."""
    dims = list(range(2, grouped.dim()))
    mean = grouped.mean(dims, keepdim=True, dtype=dtype)
    squares = grouped.sub(mean).square_().sum(dims)
    return mean.reshape(squares.shape), squares


def _by_variance(grouped: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by PyTorch's variance, Welford's method: its reductions on CUDA read half precision as fp32, with no copy."""
    dims = list(range(2, grouped.dim()))
    mean = grouped.mean(dims, dtype=dtype)
    variance = torch.var(grouped, dims, correction=0, out=torch.empty_like(mean))
    return mean, variance.mul_(grouped[0, 0].numel())


def merge_statistics(stacked: torch.Tensor) -> torch.Tensor:
    """`[N, G, 3]` of `stacked: [T, N, G, 3]`, the statistics of T parts; parts without elements do not count.

    The formula of Chan, Golub and LeVeque (1983) for T parts: `mean = sum n_t mean_t / n` and
    `M2 = sum M2_t + sum n_t (mean_t - mean)^2`, in fp64: there are few numbers, and the means may be far from 0.
    """
    count, mean, squares = stacked.double().unbind(-1)
    total = count.sum(0)
    merged = (count * mean).sum(0) / total.clamp_min(1)
    between = (count * (mean - merged).square()).sum(0)
    return torch.stack((total, merged, squares.sum(0) + between), -1).to(stacked.dtype)


def group_normalise(
    x: torch.Tensor, statistics: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """`(x - mean) / sqrt(M2 / n + eps) * weight + bias` for `x: [N, C, ...]`, in its type, by statistics `[N, groups, 3]`.

    One kernel, that of batch norm in evaluation with N·C channels: it computes in the type of the statistics and makes no
    tensor of it. Only where sample and channel cannot be viewed as one dimension (several samples, channels last) is `x`
    copied.

    Raises:
        ValueError: the groups do not divide the channels.
    """
    batch, channels = x.shape[:2]
    groups = statistics.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(
            f"group_normalise: {channels} channels cannot be divided into {groups} groups; take a divisor of {channels}"
        )
    if x.numel() == 0:
        return torch.empty_like(x)
    count, mean, squares = statistics.unbind(-1)
    folded = x.reshape(1, batch * channels, *x.shape[2:])
    per_channel = (batch, groups, channels // groups)
    means, variances = (each.unsqueeze(-1).expand(per_channel).reshape(-1) for each in (mean, squares / count))
    # Kernels for mixed types want weights: ones and zeros where there are none.
    weights = torch.ones_like(means) if weight is None else weight.to(means.dtype).repeat(batch)
    biases = torch.zeros_like(means) if bias is None else bias.to(means.dtype).repeat(batch)
    return torch.batch_norm(folded, weights, biases, means, variances, False, 0.0, eps, False).view(x.shape)


_LIBRARY.impl("group_statistics", group_statistics, "CompositeImplicitAutograd")
_LIBRARY.impl("merge_statistics", merge_statistics, "CompositeImplicitAutograd")
_LIBRARY.impl("group_normalise", group_normalise, "CompositeImplicitAutograd")
