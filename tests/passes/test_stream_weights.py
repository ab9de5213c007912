"""`StreamWeights` with decisions written by hand."""

from __future__ import annotations

import pytest

from passes.program import Program
from passes.stream_weights import Stream, StreamWeights
from passes.verify import verify
from tests.passes.programs import canonical, layers, text


def _program() -> Program:
    module, args, _ = layers()
    return canonical(module, *args)


def test_copies_arrivals_and_evictions_are_inserted() -> None:
    streams = (
        Stream(("w_a_weight",), "linear", "linear", "linear"),
        Stream(("w_b_weight", "w_b_bias"), "linear", "linear_1", "linear_1"),
        Stream(("w_a_weight",), "linear_2", "linear_3", "linear_3"),
    )
    program = StreamWeights(streams).apply(_program())
    verify(program, "stream_weights")
    assert (
        text(program)
        == """\
weight w_a_bias: f32[8]
weight w_c_weight: f32[8, 8]
input arg_0: f32[4, 8]
prefetch(0)
prefetch(1)
onload = onload(0)
w_a_weight = onload[0]
linear = linear(arg_0, w_a_weight, w_a_bias)
evict(0)
relu = relu(linear)
onload_1 = onload(1)
w_b_weight = onload_1[0]
w_b_bias = onload_1[1]
linear_1 = linear(relu, w_b_weight, w_b_bias)
evict(1)
relu_1 = relu(linear_1)
prefetch(2)
linear_2 = linear(relu_1, w_c_weight)
relu_2 = relu(linear_2)
add = add.Tensor(relu_2, arg_0)
onload_2 = onload(2)
w_a_weight_again = onload_2[0]
linear_3 = linear(add, w_a_weight_again, w_a_bias)
evict(2)
return linear_3"""
    )


def test_a_stream_that_misses_a_use_is_refused() -> None:
    only = (Stream(("w_a_weight",), "linear", "linear", "linear"),)
    with pytest.raises(ValueError, match=r"^w_a_weight is used outside of its streams, by linear_3$"):
        StreamWeights(only).apply(_program())


def test_unknown_nodes_are_named() -> None:
    wrong = (Stream(("w_nothing",), "linear", "nowhere", "linear"),)
    with pytest.raises(ValueError, match=r"names unknown nodes: w_nothing, nowhere$"):
        StreamWeights(wrong).apply(_program())


def test_the_program_given_is_not_changed() -> None:
    program = _program()
    before = text(program)
    StreamWeights((Stream(("w_c_weight",), "linear", "linear_2", "linear_2"),)).apply(program)
    assert text(program) == before
