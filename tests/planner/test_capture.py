"""Capture: what a program knows of its module, from any kind of weights, with the module left alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.modeling_outputs import BaseModelOutput

from planner.capture import capture, fake_inputs
from planner.plan_file import fingerprint
from runtime.errors import CaptureError, PlannerError
from tests.planner.toys import Counter, Lookup, Mlp, planned, snapshot, x
from tests.zoo import ZOO


@dataclass
class Pair:
    """An output of two tensors."""

    first: Tensor
    second: Tensor | None = None


torch.utils._pytree.register_dataclass(Pair)


class _Everything(nn.Module):
    """Buffers of both kinds, constants of both kinds, optional and keyword inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("kept", torch.ones(8))
        self.register_buffer("derived", torch.full((8,), 2.0), persistent=False)
        self.attribute = torch.full((8,), 3.0)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, options: dict[str, Any] | None = None) -> Tensor:
        y = self.layer(x) * self.kept + self.derived + self.attribute + torch.tensor([4.0] * 8)
        if mask is not None:
            y = y * mask
        return y * options["scale"] + options["bias"] if options else y


def test_kinds_of_weights() -> None:
    module = _Everything().eval()
    program = capture(module, (x(),))
    found = {w.name: (w.kind, w.persistent) for w in program.weights.values()}
    lifted = next(name for name in found if name.startswith("lifted"))
    assert found == {
        "layer.weight": ("parameter", True),
        "layer.bias": ("parameter", True),
        "kept": ("buffer", True),
        "derived": ("buffer", False),
        "attribute": ("constant", True),
        lifted: ("constant", True),
    }
    values = {program.weights[node].name: value for node, value in program.constants.items()}
    assert torch.equal(values["attribute"], module.attribute)
    assert values["attribute"].data_ptr() == module.attribute.data_ptr()  # named, not copied
    assert torch.equal(values[lifted], torch.tensor([4.0] * 8))


def test_every_kind_runs() -> None:
    module = _Everything().eval()
    mask, options = torch.ones(8), {"scale": 2.0, "bias": torch.ones(8)}
    built = planned(module, x(), mask, kwargs={"options": options}, least=True).build()
    assert torch.equal(built(x(), mask, options=options), module(x(), mask, options=options))


def test_tied_weights_are_one() -> None:
    program = capture(Lookup().eval(), (torch.arange(4),))
    tied = next(w for w in program.weights.values() if "table.weight" in (w.name, *w.aliases))
    assert {tied.name, *tied.aliases} == {"table.weight", "head.weight"}
    assert len({w.name for w in program.weights.values()}) == len(program.weights) == 7


def test_tied_modules_are_one() -> None:
    shared = nn.Linear(8, 8)
    program = capture(nn.Sequential(shared, nn.ReLU(), shared).eval(), (x(),))
    names = [{w.name, *w.aliases} for w in program.weights.values()]
    assert sorted(map(sorted, names)) == [["0.bias", "2.bias"], ["0.weight", "2.weight"]]


def test_inputs_are_named_and_flat() -> None:
    module = _Everything().eval()
    program = capture(module, (x(), None), {"options": {"scale": 2.0, "bias": torch.ones(8)}})
    assert len(program.inputs) == 4
    assert program.inputs[0] == "arg_0"
    assert program.inputs[-2:] == ("options_scale", "options_bias")
    assert program.in_spec.num_leaves == 4


class _Outputs(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.kind = nn.Linear(8, 8), kind

    def forward(self, x: Tensor) -> Any:
        y = self.layer(x)
        if self.kind == "dict":
            return {"a": y, "b": [y + 1, None], "n": 3, "s": "text", "w": self.layer.weight, "x": x}
        if self.kind == "dataclass":
            return Pair(y)
        return BaseModelOutput(last_hidden_state=y, hidden_states=(y, x))


@pytest.mark.parametrize("kind", ["dict", "dataclass", "model output"])
def test_outputs(kind: str) -> None:
    module = _Outputs(kind).eval()
    value, got, wanted = x(), None, None
    built = planned(module, value, least=True).build()
    got, wanted = built(value), module(value)
    assert type(got) is type(wanted)
    mine, spec = torch.utils._pytree.tree_flatten(got)
    theirs, other = torch.utils._pytree.tree_flatten(wanted)
    assert spec == other
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b) if isinstance(b, Tensor) else a == b
    if kind == "dict":
        assert got["x"] is value


def test_a_named_method() -> None:
    module = AutoencoderKL(
        block_out_channels=(8,), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=8
    ).eval()
    latent = torch.randn(1, 4, 4, 4)
    program = capture(module, (latent,), {"return_dict": False}, "decode")
    assert program.name == "AutoencoderKL.decode"
    assert not any(w.name.startswith("encoder") for w in program.weights.values())
    made = planned(module, latent, kwargs={"return_dict": False}, method="decode")
    built = made.replan(made.minimum_bytes).build()
    with torch.no_grad():
        assert torch.equal(built.decode(latent, return_dict=False)[0], module.decode(latent, return_dict=False)[0])


def test_planned_decode_with_weights_never_read_by_it() -> None:
    module = AutoencoderKL(
        block_out_channels=(8,), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=8
    ).eval()
    built = planned(module, torch.randn(1, 4, 4, 4), method="decode").build()
    image = torch.randn(1, 3, 4, 4)
    assert torch.equal(built.encode(image).latent_dist.mean, module.encode(image).latent_dist.mean)


@pytest.mark.parametrize("name", ["bert", "flux", "lstm"])
def test_real_meta_and_fake_weights_give_the_same_program(name: str) -> None:
    module, args, kwargs = ZOO[name]()
    real = fingerprint(capture(module, args, kwargs))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    assert fingerprint(capture(module, *fake_inputs((args, kwargs), mode))) == real
    meta_args, meta_kwargs = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to("meta"), (args, kwargs))
    assert fingerprint(capture(module, meta_args, meta_kwargs)) == real
    assert fingerprint(capture(module.to("meta"), args, kwargs)) == real


def test_fake_weights() -> None:
    torch.manual_seed(0)
    real = fingerprint(capture(Mlp().eval(), (x(),)))
    with FakeTensorMode():
        module = Mlp().eval()
    assert fingerprint(capture(module, (x(),))) == real
    made, weights = planned(module, x()), Mlp().eval()
    with pytest.raises(PlannerError, match="build\\(weights="):
        made.build()
    assert torch.equal(made.build(weights=weights)(x()), weights(x()))


@pytest.mark.parametrize("name", sorted(ZOO))
def test_the_module_is_untouched_and_names_are_deterministic(name: str) -> None:
    module, args, kwargs = ZOO[name]()
    before = snapshot(module)
    first = capture(module, args, kwargs)
    assert snapshot(module) == before
    second = capture(ZOO[name]()[0], args, kwargs)
    assert [n.name for n in first.graph.nodes] == [n.name for n in second.graph.nodes]
    assert fingerprint(first) == fingerprint(second)


class _Fails(nn.Module):
    """Sets an attribute and grows a list, then fails."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.seen, self.last = Counter(), [1], None

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(2)
        self.last = self.inner(x)
        self.extra = 3
        return x if self.last.sum() > 0 else -x


def test_the_module_is_untouched_after_a_failure() -> None:
    module = _Fails().eval()
    before = snapshot(module)
    with pytest.raises(CaptureError, match=r"test_capture\.py:\d+ .*self\.last\.sum\(\) > 0"):
        capture(module, (x(),))
    assert snapshot(module) == before
    assert module.seen == [1]
    assert not hasattr(module, "extra")


class _Assigns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        return self.layer(x) + self.count


def test_an_assigned_buffer_is_state() -> None:
    module, reference = _Assigns().eval(), _Assigns().eval()
    reference.load_state_dict(module.state_dict())
    program = planned(module, x()).program
    assert [w.name for w in program.weights.values() if w.state] == ["count"]
    built = planned(module, x(), least=True).build()
    for calls in (1, 2, 3):
        assert torch.equal(built(x()), reference(x()))
        assert module.count.item() == calls


def test_root_hooks_are_left_out_and_child_hooks_are_not_captured() -> None:
    module = Mlp().eval()
    plain = len(list(capture(module, (x(),)).ops()))
    module.register_forward_hook(lambda m, a, out: out * 2)
    assert len(list(capture(module, (x(),)).ops())) == plain
    module.up.register_forward_hook(lambda m, a, out: out * 2)
    with pytest.raises(CaptureError, match="runs a forward hook on 'up'"):
        capture(module, (x(),))


def test_a_size_that_depends_on_values_is_named() -> None:
    class Nonzero(nn.Module):
        def forward(self, v: torch.Tensor) -> torch.Tensor:
            return torch.nonzero(v)

    with pytest.raises(CaptureError, match="a size or number depends on the data there"):
        capture(Nonzero().eval(), (torch.ones(3),))


def test_aliased_inputs() -> None:
    class Add(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            a.mul_(2)
            return self.layer(b)

    module = Add().eval()
    base = x(4)
    wanted = module(base.clone()[:3], base.clone()[1:])
    one, two = base.clone(), base.clone()
    built = planned(module, one[:3], one[1:]).build()
    shared = built(one[:3], one[1:])
    assert torch.equal(shared, module(two[:3], two[1:]))
    assert not torch.equal(shared, wanted)
    apart = base.clone()[:3].clone(), base.clone()[1:].clone()
    assert torch.equal(built(*apart), wanted)


def test_a_method_that_is_not_there() -> None:
    with pytest.raises(PlannerError, match="has no method 'decode'"):
        capture(Mlp().eval(), (x(),), method="decode")
