"""Sizes at the top of a program, and programs with their sizes fixed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from passes.base import run_passes
from passes.concretise import Concretise
from passes.program import Program, storage_id
from planner.dynamic import capture_dynamic, read_dynamic
from runtime import ops
from runtime.errors import UnknownSize


class Patches(nn.Module):
    """[B, 4, H] to patches of two columns, with sizes read off intermediates, a float and a number among the outputs."""

    def forward(self, x: Tensor) -> Any:
        y = torch.relu(x)
        b, c, h = y.shape
        z = y.reshape(b, c * (h // 2), 2)
        return (
            z.transpose(1, 2).contiguous() * (1.0 / h),
            nn.functional.dropout(y.to(torch.float32), 0.5, False),
            y.shape[2] + 1,
        )


def program(module: nn.Module | None = None) -> Program:
    chosen = module or Patches().eval()
    inputs = (torch.empty(6, 4, 16),)
    shapes = read_dynamic(chosen, "forward", inputs, {}, {"x": {0: "batch", 2: "height"}})
    return capture_dynamic(chosen, "forward", inputs, {}, shapes)


def test_numbers_come_first_and_from_inputs() -> None:
    nodes = list(program().graph.nodes)
    numbers = [i for i, n in enumerate(nodes) if n.target in ops.NUMBERS]
    operators = [i for i, n in enumerate(nodes) if n.op == "call_function" and i not in numbers]
    assert max(numbers) < min(operators)
    assert [n.name for n in nodes if n.target is ops.size] == ["batch", "height"]
    assert all(n.op == "placeholder" or n.target in ops.NUMBERS for i in numbers for n in nodes[i].all_input_nodes)
    assert not any("sym_size" in str(n.target) or "built-in" in str(n.target) for n in nodes)


@pytest.mark.parametrize("sizes", [{"batch": 6, "height": 16}, {"batch": 3, "height": 10}, {"batch": 2, "height": 4}])
def test_the_values_are_those_of_a_run(sizes: dict[str, int]) -> None:
    symbolic = program()
    concrete = run_passes(symbolic, (Concretise(sizes),))
    assert concrete.origin is symbolic
    assert [n.name for n in concrete.ops()] == [n.name for n in symbolic.ops() if n.target not in ops.NUMBERS]
    x = torch.randn(sizes["batch"], 4, sizes["height"])
    values: dict[Any, Any] = {}
    for node in concrete.graph.nodes:
        if node.op == "placeholder":
            values[node] = x
        elif node.op == "call_function":
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
            known = node.meta["val"]
            assert (known.shape, known.stride(), known.dtype) == (
                values[node].shape, values[node].stride(), values[node].dtype,
            )  # fmt: skip
            pairs = [(storage_id(n.meta["val"]) == storage_id(known), storage_id(values[n]) == storage_id(values[node]))
                     for n in node.all_input_nodes]  # fmt: skip
            assert all(fake == real for fake, real in pairs)
    leaves = [values.get(leaf, leaf) if isinstance(leaf, torch.fx.Node) else leaf for leaf in concrete.output.args[0]]
    expected = Patches()(x)
    assert torch.equal(leaves[0], expected[0])
    assert leaves[2] == expected[2] == sizes["height"] + 1


def test_a_size_that_depends_on_data_is_refused() -> None:
    class Select(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros(torch.nonzero(x).shape[0] + 1)

    with pytest.raises(UnknownSize, match="depends on data"):
        program(Select().eval())


def test_sizes_that_the_program_cannot_have() -> None:
    class Halves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(x.shape[0], 4, 2, x.shape[2] // 2)

    symbolic = program(Halves().eval())
    assert symbolic.dims is not None
    assert dict(symbolic.dims.multiples) == {"height": 2}
    with pytest.raises(UnknownSize, match=r"aten\.view\.default does not run at batch=2, height=7"):
        run_passes(symbolic, (Concretise({"batch": 2, "height": 7}),))
