"""`passes.attention_backend`: which kernel a call takes on which GPU, and why not an earlier one."""

from __future__ import annotations

import pytest

from passes.attention_backend import CONDITIONS, attention_backend, why_not
from passes.op_call import OpCall
from runtime.errors import UnknownSize
from tests.passes.calls import BF16, BOOL, F16, F64, HOPPER, TURING, sdpa, spec

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
        (sdpa(HALF, gpu=(13, 0)), "math"),
        (sdpa(HALF, mask=MASK, dropout_p=0.1, gpu=HOPPER), "efficient"),
        (sdpa(HALF, mask=MASK, dropout_p=0.125, gpu=HOPPER), "cudnn"),
        (sdpa(HALF, mask=spec(8, 4096, 4096, dtype=F16), gpu=HOPPER), "efficient"),
        (sdpa(HALF, mask=spec(4096, 4096, dtype=F16), gpu=HOPPER), "cudnn"),
        (sdpa(HALF, mask=spec(1, 8, 4096, 4096, dtype=F16, stride=(1, 1, 32768, 8))), "math"),
        (sdpa(spec(1, 8, 64, 192, dtype=F16), v=spec(1, 8, 64, 128, dtype=F16), gpu=HOPPER), "cudnn"),
        (sdpa(spec(1, 8, 64, 192, dtype=F16), v=spec(1, 8, 64, 128, dtype=F16)), "efficient"),
        (sdpa(HALF, spec(2, 8, 4096, 64, dtype=F16)), "math"),
    ],
)
def test_attention_backend(call: OpCall, backend: str) -> None:
    assert attention_backend(call) == backend


def test_why_an_earlier_kernel_does_not_take_a_call() -> None:
    assert why_not(sdpa(HALF, gpu=HOPPER)) == {}
    found = why_not(sdpa(spec(1, 8, 4096, 64, dtype=F64)))
    assert list(found) == ["cudnn", "flash", "efficient"]
    assert found["flash"] == "it takes float16 and bfloat16"
    assert found["efficient"] == "it takes float16, float32 and, from compute capability 8.0 on, bfloat16"
    assert why_not(sdpa(HALF, mask=MASK))["flash"] == "it takes no mask"


def test_every_condition_names_its_source_and_none_was_confirmed_on_a_device() -> None:
    assert list(CONDITIONS) == ["cudnn", "flash", "efficient", "math"]
    for conditions in CONDITIONS.values():
        for condition in conditions:
            assert condition.text
            assert condition.check
            assert not condition.confirmed, "say where and how it was confirmed, then change this test"


def test_without_a_capability_there_is_no_choice() -> None:
    with pytest.raises(UnknownSize, match=r"compute capability, as in \(8, 9\)"):
        attention_backend(sdpa(HALF, gpu=None))
