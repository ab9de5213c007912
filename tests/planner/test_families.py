"""The table of families: complete, unambiguous, and its shares within (0, 1]."""

from __future__ import annotations

import fnmatch
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from planner import families as module
from planner.families import IDEAL, OTHER, Family, families, family_of, matching

aten = torch.ops.aten


def aten_operators() -> Iterator[tuple[str, Any]]:
    """Every operator of aten that Python can name, with its overloads."""
    names = {s.name.removeprefix("aten::") for s in torch._C._jit_get_all_schemas() if s.name.startswith("aten::")}
    for name in sorted(names):
        packet = getattr(aten, name, None)
        if packet is not None:
            yield name, [getattr(packet, overload) for overload in packet.overloads()]


def test_shares_are_shares() -> None:
    for family in families().values():
        assert 0 < family.arithmetic <= 1
        assert 0 < family.traffic <= 1
        assert family.reason
        assert not family.confirmed  # none was measured on a device yet
    assert (IDEAL.arithmetic, IDEAL.traffic) == (1, 1)
    assert not families()[OTHER].operators
    with pytest.raises(AssertionError, match=r"a share is in \(0, 1\], not 1.5"):
        Family("x", 1.5)


def test_every_operator_has_exactly_one_family() -> None:
    for name, overloads in aten_operators():
        assert len(matching(name)) <= 1, f"{name}: {[family.name for family in matching(name)]}"
        assert len({family_of(overload).name for overload in overloads}) == 1, name


def test_every_pattern_names_something() -> None:
    names = {name.strip("_") for name, _ in aten_operators()}
    for table in tomllib.loads(Path(module._PATH).read_text()).values():
        for pattern in table["operators"]:
            assert fnmatch.filter(names, pattern), pattern


@pytest.mark.parametrize(
    ("family", "operators"),
    [
        ("matmul", ["linear.default", "mm.default", "baddbmm.default", "addmm_.default", "_scaled_mm.default"]),
        ("convolution", ["conv2d.default", "conv2d.padding", "convolution.default", "conv_transpose1d.default"]),
        ("attention", ["scaled_dot_product_attention.default", "_scaled_dot_product_flash_attention_for_cpu.default"]),
        ("recurrent", ["lstm.input", "gru.input", "gru_cell.default"]),
        ("norm", ["layer_norm.default", "native_group_norm.default", "rms_norm.default", "batch_norm.default"]),
        ("reduction", ["softmax.int", "_softmax.default", "mean.dim", "argmax.default", "cumsum.default"]),
        ("gather", ["embedding.default", "index.Tensor", "gather.default", "upsample_nearest2d.vec", "index_put_.default"]),
        ("elementwise", ["add.Tensor", "gelu.default", "clone.default", "cat.default", "eq_.Tensor", "masked_fill_.Scalar",
                         "where.self", "zeros.default", "to.dtype", "copy_.default", "floor_divide.default", "tril.default"]),
        ("other", ["sort.default", "topk.default", "linalg_svd.default", "fft_fft.default", "multinomial.default"]),
    ],
)  # fmt: skip
def test_families_of_operators(family: str, operators: list[str]) -> None:
    for operator in operators:
        name, overload = operator.split(".")
        assert family_of(getattr(getattr(aten, name), overload)).name == family, operator


def test_operators_of_others() -> None:
    @torch.library.custom_op("vramplan_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    assert family_of(torch.ops.vramplan_test.twice.default).name == "other"
    assert family_of(torch.ops.vramplan.group_normalise.default).name == "norm"
    assert all(family_of(getattr(torch.ops.vramplan, name).default).name == family for name, family in module._OWN.items())
    assert family_of(len).name == "other"
