"""`passes.workspace`: every rule against numbers worked out by hand. Buffers are rounded up to 512 B on CUDA."""

from __future__ import annotations

import pytest
import torch

from passes.spec import TensorSpec
from passes.workspace import (
    CUDNN_WORKSPACE_CAP_BYTES,
    RULES,
    OpCall,
    attention_backend,
    cublas_workspace_bytes,
    flash_splits,
    workspace_bytes,
)
from runtime.errors import UnknownSize

MIB = 2**20
F16, BF16, F32, F64, BOOL = torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool
ADA, TURING, HOPPER = (8, 9), (7, 5), (9, 0)


def spec(*shape: int, dtype: torch.dtype = F32, stride: tuple[int, ...] | None = None, offset: int = 0) -> TensorSpec:
    """A contiguous spec unless `stride` says otherwise."""
    return TensorSpec(shape, stride or torch.empty(shape, device="meta").stride(), dtype, offset)


def nhwc(*shape: int, dtype: torch.dtype = F32) -> TensorSpec:
    return spec(*shape, dtype=dtype, stride=torch.empty(shape, device="meta").to(memory_format=torch.channels_last).stride())


def cuda(target: object, *args: object, out: tuple[TensorSpec, ...] = (), **kwargs: object) -> int | None:
    return workspace_bytes("cuda", OpCall(target, args, kwargs, out, ADA))


def sdpa(
    q: TensorSpec,
    k: TensorSpec | None = None,
    v: TensorSpec | None = None,
    mask: TensorSpec | None = None,
    gpu: tuple[int, int] | None = ADA,
    **kwargs: object,
) -> OpCall:
    k = k or q
    v = v or k
    out = spec(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    return OpCall(torch.ops.aten.scaled_dot_product_attention.default, (q, k, v, mask), kwargs, (out,), gpu)


def rounded(*sizes: int) -> int:
    return sum((size + 511) // 512 * 512 for size in sizes)


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


# --- attention -------------------------------------------------------------------------------------------------------

HALF = spec(1, 8, 4096, 64, dtype=F16)
FULL = spec(1, 8, 4096, 64)
MASK = spec(1, 1, 4096, 4096, dtype=BOOL)


@pytest.mark.parametrize(
    ("call", "backend"),
    [
        (sdpa(HALF), "flash"),
        (sdpa(spec(1, 8, 4096, 64, dtype=BF16), gpu=(8, 0)), "flash"),
        (sdpa(HALF, gpu=HOPPER), "cudnn"),
        (sdpa(HALF, mask=MASK, gpu=HOPPER), "cudnn"),
        (sdpa(spec(1, 8, 64, 160, dtype=F16), gpu=HOPPER), "flash"),
        (sdpa(HALF, spec(1, 8, 1, 64, dtype=F16), gpu=HOPPER), "flash"),
        (sdpa(HALF, gpu=(12, 0)), "flash"),
        (sdpa(HALF, gpu=TURING), "efficient"),
        (sdpa(spec(1, 8, 4096, 64, dtype=BF16), gpu=TURING), "math"),
        (sdpa(HALF, mask=MASK), "efficient"),
        (sdpa(HALF, spec(1, 8, 77, 64, dtype=F16), is_causal=True), "efficient"),
        (sdpa(HALF, is_causal=True), "flash"),
        (sdpa(spec(1, 1, 4096, 512, dtype=F16)), "efficient"),
        (sdpa(spec(1, 1, 4096, 260, dtype=F16)), "math"),
        (sdpa(spec(1, 8, 4096, 44, dtype=F16)), "flash"),
        (sdpa(FULL), "efficient"),
        (sdpa(FULL, gpu=(5, 0)), "efficient"),
        (sdpa(FULL, gpu=(3, 7)), "math"),
        (sdpa(spec(1, 8, 4096, 44)), "efficient"),
        (sdpa(spec(1, 8, 4096, 42)), "math"),
        (sdpa(spec(1, 8, 4096, 42), gpu=TURING), "efficient"),
        (sdpa(spec(1, 8, 4096, 64, dtype=F64)), "math"),
        (sdpa(spec(8, 4096, 64, dtype=F16)), "math"),
        (sdpa(HALF, spec(1, 2, 4096, 64, dtype=F16), enable_gqa=True), "flash"),
        (sdpa(HALF, spec(1, 2, 4096, 64, dtype=F16), mask=MASK, enable_gqa=True), "math"),
        (sdpa(HALF, spec(1, 1, 4096, 64, dtype=F16)), "math"),
        (sdpa(spec(1, 8, 64, 64, offset=2)), "math"),
        (sdpa(spec(1, 8, 64, 64, stride=(32768, 4096, 1, 64))), "math"),
        (sdpa(spec(1, 8, 0, 64, dtype=F16)), "math"),
    ],
)
def test_attention_backend(call: OpCall, backend: str) -> None:
    assert attention_backend(call) == backend


def test_flash_keeps_the_log_sum_exp_and_two_random_words() -> None:
    # 8 heads x 64 query blocks = 512 blocks fill an RTX 4090 class GPU: no split
    assert workspace_bytes("cuda", sdpa(HALF)) == 4 * 8 * 4096 + 512 + 512
    q = spec(2, 24, 4608, 128, dtype=BF16)
    assert workspace_bytes("cuda", sdpa(q, gpu=HOPPER)) == 4 * 2 * 24 * 4608 + 1024


def test_flash_pads_odd_head_dims() -> None:
    q = spec(1, 8, 4096, 44, dtype=F16)
    padded = 2 * 8 * 4096 * 48
    assert workspace_bytes("cuda", sdpa(q)) == 4 * 8 * 4096 + 1024 + 4 * padded - 2 * 8 * 4096 * 44


def test_flash_splits_long_keys_when_there_are_few_queries() -> None:
    # A100: 108 multiprocessors, 216 slots. 8 blocks and 64 blocks of keys: 22 parts fill 176/216 = 0.81 (waves 0.81),
    # 16 parts 128/216 = 0.59, 27 would fill all but do not divide anew (64/27 and 64/26 both need 3); 22 is the first
    # with ceil(64 / parts) = 3, next is 32 with 256/216 = 1.19 waves, 0.59 full; 64 has 2.37 waves, 0.79 full.
    # 85 % of 0.81 is 0.69: 22 is the fewest.
    assert flash_splits(8, 64, 108) == 22
    assert flash_splits(173, 64, 108) == 1  # 173 >= 0.8 * 216
    assert flash_splits(8, 1, 108) == 1
    q, k = spec(1, 8, 16, 128, dtype=F16), spec(1, 8, 8192, 128, dtype=F16)
    size = 4 * 8 * 16
    assert workspace_bytes("cuda", sdpa(q, k, gpu=(8, 0))) == rounded(size, 16, 8, 22 * size, 22 * size * 128)


def test_one_query_with_grouped_heads_swaps_groups_for_queries() -> None:
    q, k = spec(1, 32, 1, 128, dtype=F16), spec(1, 8, 8192, 128, dtype=F16)
    size = 4 * 32
    expected = rounded(size, 16, 8, 2 * 32 * 128, 2 * 32 * 128, 22 * size, 22 * size * 128)  # 8 blocks, as above
    assert workspace_bytes("cuda", sdpa(q, k, gpu=(8, 0), enable_gqa=True)) == expected


def test_efficient_needs_nothing_in_fp32_and_an_accumulator_for_wide_half() -> None:
    assert workspace_bytes("cuda", sdpa(FULL)) == 0
    assert workspace_bytes("cuda", sdpa(spec(1, 1, 16384, 512))) == 0
    assert workspace_bytes("cuda", sdpa(spec(1, 1, 16384, 512, dtype=F16))) == 4 * 16384 * 512
    assert workspace_bytes("cuda", sdpa(spec(1, 8, 4096, 128, dtype=F16), gpu=TURING)) == 0


def test_efficient_converts_and_pads_masks() -> None:
    q = spec(1, 8, 1024, 64, dtype=F16)
    scores = 1024 * 1024
    aligned = sdpa(q, mask=spec(1, 1, 1024, 1024, dtype=BOOL))
    assert workspace_bytes("cuda", aligned) == 2 * scores + scores + 512  # as half, inverted, a scalar
    k = spec(1, 8, 77, 64, dtype=F16)
    ragged = sdpa(q, k, mask=spec(1, 1, 1024, 77, dtype=BOOL))
    assert workspace_bytes("cuda", ragged) == rounded(2 * 1024 * 77) + 2 * 1024 * 80  # as half, then padded
    assert workspace_bytes("cuda", sdpa(q, k, mask=spec(1, 1, 1024, 77, dtype=F16))) == 2 * 1024 * 80
    assert workspace_bytes("cuda", sdpa(q, mask=spec(1, 1, 1024, 1024, dtype=F16))) == 0
    sliced = spec(1, 1, 1024, 77, dtype=F16, stride=(81920, 81920, 80, 1))
    assert workspace_bytes("cuda", sdpa(q, k, mask=sliced)) == 0


def test_cudnn_is_bounded_by_flash_plus_the_mask() -> None:
    assert workspace_bytes("cuda", sdpa(HALF, gpu=HOPPER)) == 4 * 8 * 4096 + 1024
    mask = 2 * 4096 * 4096
    assert workspace_bytes("cuda", sdpa(HALF, mask=MASK, gpu=HOPPER)) == max(
        mask + 4096 * 4096 + 512, mask + 4 * 8 * 4096 + 1024
    )


def test_math_in_double() -> None:
    q = spec(1, 2, 64, 32, dtype=F64)
    scores, size = 2 * 64 * 64, 8 * 2 * 64 * 32
    # scaled q; then softmax: scores, softmax, where, the comparison, one flag per row
    assert workspace_bytes("cuda", sdpa(q)) == size + 3 * 8 * scores + scores + 512


def test_math_in_half_works_on_fp32_copies() -> None:
    q = spec(2, 64, 36, dtype=BF16)
    scores, size = 2 * 64 * 64, 4 * 2 * 64 * 36
    assert workspace_bytes("cuda", sdpa(q)) == 4 * size + 3 * 4 * scores + scores + 512


def test_math_with_a_causal_mask_and_with_grouped_heads() -> None:
    q = spec(1, 4, 64, 32, dtype=F64)
    k = spec(1, 2, 64, 32, dtype=F64)
    scores, size = 4 * 64 * 64, 8 * 4 * 64 * 32
    softmax = 3 * 8 * scores + scores + 512
    causal = 2 * 64 * 64 + 8 * 64 * 64
    assert workspace_bytes("cuda", sdpa(q, is_causal=True)) == size + causal + softmax
    assert workspace_bytes("cuda", sdpa(q, k, enable_gqa=True)) == size + 2 * size + softmax


def test_math_with_a_bool_mask_and_strided_inputs() -> None:
    scores, size = 2 * 8 * 8, 8 * 2 * 8 * 1024
    strided = spec(2, 2, 8, 512, dtype=F64, stride=(8192, 512, 1024, 1))  # batch and heads do not collapse
    mask = spec(8, 8, dtype=BOOL)
    # scores + scaled keys, and both copied, outweigh the softmax of these few scores
    expected = size + 8 * 64 + 512 + 512 + rounded(8 * 2 * scores) + size + 2 * size
    assert workspace_bytes("cuda", sdpa(strided, mask=mask)) == expected


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
