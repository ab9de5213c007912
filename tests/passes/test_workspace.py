"""`passes.workspace`: every rule against numbers worked out by hand. Buffers are rounded up to 512 B on CUDA."""

from __future__ import annotations

import pytest
import torch

from passes.workspace import (
    CUDNN_WORKSPACE_CAP_BYTES,
    RULES,
    OpCall,
    cublas_workspace_bytes,
    workspace_bytes,
)
from runtime.errors import UnknownSize
from tests.passes.calls import BF16, F16, F32, F64, MIB, cuda, nhwc, rounded, sdpa, spec

# --- the table -------------------------------------------------------------------------------------------------------


def test_every_entry_names_a_real_operator_and_its_source() -> None:
    for (device, name), rule in RULES.items():
        assert (rule.device, rule.operator) == (device, name)
        assert device in ("cuda", "accounting", "cpu")
        assert rule.source.strip()
        assert not rule.confirmed, "say where and how it was measured, then change this test"
        namespace, operator, overload = name.split(".")
        assert str(getattr(getattr(getattr(torch.ops, namespace), operator), overload)) == name


def test_an_operator_without_a_rule_is_none_not_zero() -> None:
    assert cuda(torch.ops.aten.topk.default, spec(4, 4), 2) is None
    assert workspace_bytes("cpu", OpCall("aten.mm.default", (spec(2, 2), spec(2, 2)))) is None
    assert workspace_bytes("tpu", OpCall("aten.linear.default", (spec(2, 2), spec(2, 2)))) is None


@pytest.mark.parametrize("device", ["cpu", "accounting"])
def test_linear_is_a_leaf_on_the_host(device: str) -> None:
    assert workspace_bytes(device, OpCall(torch.ops.aten.linear.default, (spec(2, 3, 4), spec(5, 4)))) == 0


def test_cublas_workspace() -> None:
    assert cublas_workspace_bytes((8, 9)) == cublas_workspace_bytes((7, 5)) == 2 * 4096 * 1024 + 8 * 16 * 1024 == 8_519_680
    assert cublas_workspace_bytes((9, 0)) == cublas_workspace_bytes((12, 0)) == 32 * MIB


def test_what_is_not_known_is_an_error_not_a_guess() -> None:
    with pytest.raises(UnknownSize, match=r"compute capability, as in \(8, 9\)"):
        workspace_bytes("cuda", sdpa(spec(1, 1, 64, 64, dtype=F16), gpu=None))
    with pytest.raises(UnknownSize, match=r"argument 'input' is 's0', not a tensor"):
        cuda(torch.ops.aten.layer_norm.default, "s0", [4])
    with pytest.raises(UnknownSize, match="num_groups is 's0'"):
        cuda(torch.ops.aten.group_norm.default, spec(1, 4, 2, 2), "s0")
    with pytest.raises(UnknownSize, match="normalized_shape is None"):
        cuda(torch.ops.aten.layer_norm.default, spec(2, 4))


# --- norms -----------------------------------------------------------------------------------------------------------

WEIGHT = spec(320, dtype=F16)


def test_group_norm() -> None:
    x = spec(2, 320, 64, 64, dtype=F16)
    group_norm = torch.ops.aten.group_norm.default
    statistics = 2 * rounded(2 * 2 * 32) + 2 * rounded(4 * 2 * 32)
    assert cuda(group_norm, x, 32, WEIGHT, WEIGHT) == statistics + 2 * rounded(4 * 2 * 320)
    assert cuda(group_norm, x, 32) == statistics
    assert cuda(group_norm, spec(2, 320, 64, 64), 32) == 2 * rounded(4 * 2 * 32)
    assert cuda(group_norm, spec(2, 320, 1, 1, dtype=F16), 32, WEIGHT) == statistics
    assert cuda(group_norm, nhwc(2, 320, 64, 64, dtype=F16), 32) == statistics + 2 * 2 * 320 * 64 * 64
    large = spec(1024, 512, 2, 2, dtype=F64)
    assert cuda(group_norm, large, 64, WEIGHT) == 2 * 8 * 1024 * 64 + 2 * 8 * 1024 * 512


def test_statistics_of_groups_take_no_copy_of_the_input() -> None:
    """Four buffers of numbers of groups, 16 B and a counter of each block; whatever the layout."""
    statistics = torch.ops.vramplan.group_statistics.default
    blocks = 2 * 32 + 2048 + 2 * 320 * 64 * 64 // 131_072
    expected = 4 * rounded(4 * 2 * 32) + rounded(16 * blocks) + rounded(4 * blocks)
    for x in (spec(2, 320, 64, 64, dtype=F16), nhwc(2, 320, 64, 64, dtype=F16), spec(2, 320, 64, 64)):
        assert cuda(statistics, x, 32) == expected
    with pytest.raises(UnknownSize, match="groups is 's0'"):
        cuda(statistics, spec(1, 4, 2, 2), "s0")


def test_native_group_norm_returns_its_statistics() -> None:
    x = spec(2, 320, 64, 64, dtype=F16)
    native = torch.ops.aten.native_group_norm.default
    assert cuda(native, x, WEIGHT, WEIGHT, 2, 320, 4096, 32, 1e-5) == 2 * rounded(4 * 2 * 32) + 2 * rounded(4 * 2 * 320)
    assert cuda(native, spec(2, 320, 64, 64), None, None, 2, 320, 4096, 32, 1e-5) == 0
    with pytest.raises(UnknownSize, match="group is None"):
        cuda(native, x, None, None, 2, 320, 4096)


def test_layer_norm() -> None:
    x = spec(2, 4096, 320, dtype=F16)
    layer_norm = torch.ops.aten.layer_norm.default
    assert cuda(layer_norm, x, [320]) == 8 * 2 * 4096
    assert cuda(layer_norm, x, [4096, 320]) == 1024
    assert cuda(layer_norm, spec(2, 4096, 320, dtype=F64), [320]) == 16 * 2 * 4096
    turned = spec(2, 4096, 320, dtype=F16, stride=(4096 * 320, 1, 4096))
    assert cuda(layer_norm, turned, [320]) == 8 * 2 * 4096 + x.nbytes
    assert cuda(torch.ops.aten.native_layer_norm.default, x, [320], None, None, 1e-5) == 0
    assert cuda(torch.ops.aten.native_layer_norm.default, turned, [320], None, None, 1e-5) == x.nbytes


def test_rms_norm() -> None:
    x = spec(2, 4096, 3072, dtype=BF16)
    rms_norm = torch.ops.aten.rms_norm.default
    assert cuda(rms_norm, x, [3072], spec(3072, dtype=BF16)) == 4 * 2 * 4096
    assert cuda(rms_norm, x, [3072]) == 4 * 2 * 4096
    assert cuda(rms_norm, x, [3072], spec(3072)) == 4 * 2 * 4096 + 3 * 4 * 2 * 4096 * 3072  # mixed types: not fused
    assert cuda(torch.ops.aten._fused_rms_norm.default, x, [3072], None, None) == 0


# --- products --------------------------------------------------------------------------------------------------------


def test_products_of_dense_matrices_need_nothing() -> None:
    a, b, batch = spec(64, 32), spec(32, 16), spec(4, 64, 64)
    assert cuda(torch.ops.aten.mm.default, a, b) == 0
    assert cuda(torch.ops.aten.mm.default, a, spec(32, 16, stride=(1, 32))) == 0
    assert cuda(torch.ops.aten.bmm.default, batch, batch) == 0
    assert cuda(torch.ops.aten.addmm.default, spec(16), a, b) == 0
    assert cuda(torch.ops.aten.baddbmm.default, batch, batch, batch) == 0
    assert cuda(torch.ops.aten.matmul.default, batch, spec(64, 8)) == 0
    assert cuda(torch.ops.aten.matmul.default, batch, batch) == 0
    assert cuda(torch.ops.aten.matmul.default, spec(64), spec(64)) == 0
    for shape in ((32,), (5, 32), (2, 5, 32), (2, 3, 5, 32)):
        assert cuda(torch.ops.aten.linear.default, spec(*shape), spec(16, 32), spec(16)) == 0


def test_products_copy_what_no_gemm_can_read() -> None:
    gaps = spec(64, 32, stride=(128, 2))
    copy = 4 * 64 * 32
    assert cuda(torch.ops.aten.mm.default, gaps, spec(32, 16)) == copy
    assert cuda(torch.ops.aten.addmm.default, spec(16), gaps, spec(32, 16)) == copy
    assert cuda(torch.ops.aten.linear.default, gaps, spec(16, 32)) == copy
    turned = spec(2, 64, 32, stride=(32, 64, 1))  # (64, 2, 32) transposed
    assert cuda(torch.ops.aten.linear.default, turned, spec(16, 32)) == 2 * copy
    assert cuda(torch.ops.aten.matmul.default, turned, spec(32, 16)) == 2 * copy


def test_matmul_copies_operands_that_it_repeats() -> None:
    left, right = spec(2, 8, 64, 32), spec(2, 1, 32, 64)
    assert cuda(torch.ops.aten.matmul.default, left, right) == 4 * 2 * 8 * 32 * 64
    assert cuda(torch.ops.aten.matmul.default, left, spec(8, 32, 64)) == 4 * 2 * 8 * 32 * 64
    heads_inside = spec(2, 8, 64, 32, stride=(64 * 8 * 32, 32, 8 * 32, 1))
    assert cuda(torch.ops.aten.matmul.default, heads_inside, spec(2, 8, 32, 64)) == 4 * 2 * 8 * 64 * 32


# --- convolutions ----------------------------------------------------------------------------------------------------


def test_a_small_convolution_is_bounded_by_its_im2col() -> None:
    x, weight, out = spec(1, 4, 64, 64, dtype=F16), spec(8, 4, 3, 3, dtype=F16), spec(1, 8, 64, 64, dtype=F16)
    expected = rounded(2 * 4 * 9 * 64 * 64 + 2 * 8 * 4 * 9 + 2 * 8 * 64 * 64)
    assert cuda(torch.ops.aten.conv2d.default, x, weight, None, out=(out,)) == expected
    assert cuda(torch.ops.aten.conv2d.padding, x, weight, None, [1, 1], "same", out=(out,)) == expected
    args = (None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    assert cuda(torch.ops.aten.convolution.default, x, weight, *args, out=(out,)) == expected


def test_a_large_convolution_is_bounded_by_the_cap() -> None:
    x, weight = spec(1, 512, 512, 512, dtype=F16), spec(512, 512, 3, 3, dtype=F16)
    assert cuda(torch.ops.aten.conv2d.default, x, weight, None, out=(x,)) == CUDNN_WORKSPACE_CAP_BYTES == 64 * MIB


def test_a_strided_convolution_counts_the_input_if_that_is_more() -> None:
    x, weight, out = spec(1, 4, 64, 64), spec(8, 4, 1, 1), spec(1, 8, 16, 16)
    plan = 4 * 4 * 64 * 64 + 4 * 8 * 4 + 4 * 8 * 16 * 16
    assert cuda(torch.ops.aten.conv2d.default, x, weight, None, [4, 4], out=(out,)) == rounded(plan)


def test_transposed_and_other_dimensions() -> None:
    x, weight, out = spec(1, 4, 16, 16), spec(4, 8, 2, 2), spec(1, 8, 32, 32)
    expected = rounded(4 * 8 * 4 * 16 * 16 + 4 * 4 * 8 * 4 + 4 * 8 * 32 * 32)
    assert cuda(torch.ops.aten.conv_transpose2d.input, x, weight, None, [2, 2], out=(out,)) == expected
    args = (None, [2, 2], [0, 0], [1, 1], True, [0, 0], 1)
    assert cuda(torch.ops.aten.convolution.default, x, weight, *args, out=(out,)) == expected
    line, taps = spec(4, 100), spec(8, 4, 3)  # without a batch
    out = spec(8, 98)
    assert cuda(torch.ops.aten.conv1d.default, line, taps, None, out=(out,)) == rounded(
        4 * 4 * 3 * 98 + 4 * 8 * 4 * 3 + 4 * 8 * 98
    )


def test_convolutions_copy_into_one_layout() -> None:
    weight = spec(64, 64, 3, 3, dtype=F16)
    plain = cuda(torch.ops.aten.conv2d.default, spec(1, 64, 512, 512, dtype=F16), weight, None, out=(weight,))
    x = nhwc(1, 64, 512, 512, dtype=F16)
    assert plain is not None
    assert cuda(torch.ops.aten.conv2d.default, x, weight, None, out=(weight,)) == plain + weight.nbytes
    rows = nhwc(64, 64, 3, 3, dtype=F16)
    assert cuda(torch.ops.aten.conv2d.default, x, rows, None, out=(weight,)) == plain
    assert cuda(torch.ops.aten.conv2d.default, spec(*x.shape, dtype=F16), rows, None, out=(weight,)) == plain + x.nbytes


# --- the rest --------------------------------------------------------------------------------------------------------


def test_softmax() -> None:
    x = spec(8, 64, 64, dtype=F16)
    softmax = torch.ops.aten.softmax.int
    assert cuda(softmax, x, -1) == cuda(softmax, x, -1, F32) == cuda(torch.ops.aten._softmax.default, x, -1, False) == 0
    assert cuda(softmax, x, -1, F64) == 8 * 8 * 64 * 64
    assert cuda(softmax, spec(8, 64, 64, dtype=F16, stride=(4096, 1, 64)), -1) == 2 * 8 * 64 * 64


def test_copies_only_for_odd_layouts() -> None:
    assert cuda(torch.ops.aten.cat.default, [spec(2, 2), spec(2, 2)], 0) == 0
    table, indices = spec(100, 8), spec(4, 16, dtype=torch.int64)
    assert cuda(torch.ops.aten.embedding.default, table, indices) == 0
    assert cuda(torch.ops.aten.embedding.default, table, spec(4, 16, dtype=torch.int64, stride=(1, 4))) == 512
    upsample = torch.ops.aten.upsample_nearest2d
    assert cuda(upsample.vec, spec(1, 8, 16, 16), None, [2.0, 2.0]) == 0
    assert cuda(upsample.default, nhwc(1, 8, 16, 16), [32, 32]) == 0
    assert cuda(upsample.default, spec(1, 8, 16, 16, stride=(4096, 512, 32, 1)), [32, 32]) == 4 * 8 * 16 * 16
