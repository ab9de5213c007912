"""`passes.attention_workspace`: bytes of every kernel against numbers worked out by hand."""

from __future__ import annotations

from passes.attention_workspace import flash_splits
from passes.workspace import workspace_bytes
from tests.passes.calls import BF16, BOOL, F16, F64, HOPPER, TURING, rounded, sdpa, spec

HALF = spec(1, 8, 4096, 64, dtype=F16)
FULL = spec(1, 8, 4096, 64)
MASK = spec(1, 1, 4096, 4096, dtype=BOOL)


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
