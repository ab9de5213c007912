"""`RefreshValues`: recorded values as operators really behave."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from passes.program import storage_id
from passes.refresh_values import RefreshValues, value_of
from runtime.errors import CaptureError
from tests.passes.programs import text, traced


def test_dropout_in_eval_gives_its_argument_and_so_do_views_of_it() -> None:
    def function(x: Tensor) -> Tensor:
        first, second = F.dropout(x, 0.0, False).split(2)
        return first + second

    program = traced(function, torch.ones(4))
    fresh = RefreshValues().apply(program)
    assert text(fresh) == text(program)
    source = storage_id(fresh.node("arg_0").meta["val"])
    assert {storage_id(fresh.node(n).meta["val"]) for n in ("dropout", "getitem", "getitem_1")} == {source}
    assert storage_id(fresh.node("add").meta["val"]) != source


def test_what_is_right_is_kept() -> None:
    program = traced(lambda x: x.sin().view(2, 2).cos(), torch.ones(4))
    fresh = RefreshValues().apply(program)
    assert all(a.meta["val"] is b.meta["val"] for a, b in zip(program.ops(), fresh.ops(), strict=True))


def test_an_operator_that_cannot_run_on_fakes_is_named() -> None:
    """Such as nearest upsampling of no samples in torch 2.13, whose TypeError says nothing to anybody."""

    def refuses(*args: object) -> None:
        raise TypeError("cond must be a bool")

    program = traced(lambda x: x.sin(), torch.ones(4))
    with pytest.raises(CaptureError, match=r"sin \(aten.sin.default\) does not run on tensors without values: cond must be"):
        value_of(program.node("sin"), refuses)
