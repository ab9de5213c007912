"""Dry runs of toy pipelines: what is recorded, what is answered, what is counted, and that nothing is left."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from passes.spec import TensorSpec
from planner.dry_run import record
from planner.dry_run_calls import ComponentCall, DryRun, Phase, Step, phases_of
from planner.pretend_device import Held
from runtime.errors import PlannerError


class Net(nn.Module):
    """Four numbers to four; with helpers such as models have."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.shape_only = nn.Identity()
        self.register_buffer("mean", torch.full((4,), 3.0))
        self.context = ""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.inner(x) * scale

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        return {"first": self.forward(x), "second": self(x)[:, :2]}

    @contextlib.contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        self.context = name
        yield
        self.context = ""

    def table(self, length: int) -> Tensor:
        return self.inner.weight[:length] + 1


class Outer(nn.Module):
    """Calls another component, which it holds."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net.encode(self.net(x))["first"]


def dry(run: Callable[..., Any], call: dict[str, Any] | None = None, **components: nn.Module) -> DryRun:
    for component in components.values():
        component.eval()
    return record("Toy", components, run, call or {})


def names(run: DryRun) -> list[str]:
    return [run.calls[index].name for index in run.sequence]


def test_outermost_calls_are_recorded_whatever_the_method() -> None:
    net = Net()

    def run() -> None:
        x = torch.ones(2, 4)
        net.encode(x)
        net(x)
        net.forward(x)
        net.inner(x)
        net.shape_only(x)
        net.inner.forward(x)  # past the call: runs as it is, on weights that are zeros here

    assert names(dry(run, net=net)) == ["net.encode", "net.forward", "net.forward", "net.inner.forward"]


def test_a_component_that_calls_another_one_counts_alone() -> None:
    net = Net()
    outer = Outer(net)
    run = dry(lambda: net(outer(torch.ones(2, 4))), outer=outer, net=net)
    assert names(run) == ["outer.forward", "net.forward"]


def test_answers_are_zeros_of_the_right_shapes_that_share_memory() -> None:
    net, seen = Net(), {}

    def run() -> None:
        seen.update(net.encode(torch.ones(2, 4)))

    dry(run, net=net)
    assert {key: (tuple(t.shape), t.stride()) for key, t in seen.items()} == {
        "first": ((2, 4), (4, 1)),
        "second": ((2, 2), (4, 1)),
    }
    assert not any(tensor.any() or tensor.is_meta for tensor in seen.values())


def test_what_is_passed_through_stays_itself() -> None:
    class Same(Net):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return x[1:]

    net, seen = Same(), []
    dry(lambda: seen.append(net(torch.arange(8.0).reshape(2, 4))), net=net)
    assert seen[0].tolist() == [[4.0, 5.0, 6.0, 7.0]]


def test_helpers_without_tensors_run_as_they_are() -> None:
    net, seen = Net(), []

    def run() -> None:
        with net.cache_context("cond"):
            seen.append(net.context)
            net(torch.ones(1, 4))
        seen.append(net.inner.in_features)
        seen.append(net.mean.tolist())

    assert names(dry(run, net=net)) == ["net.forward"]
    assert seen == ["cond", 4, [3.0] * 4]


def test_a_method_without_tensors_that_gives_one_is_a_call() -> None:
    net, seen = Net(), []
    run = dry(lambda: seen.append(net.table(2)), net=net)
    assert names(run) == ["net.table"]
    assert (run.calls[0].args, seen[0].shape, seen[0].is_meta) == ((2,), (2, 4), False)


@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_the_pipeline_may_read_and_cast_weights(place: str) -> None:
    net, seen = Net(), []
    if place == "meta":
        net.to("meta")

    @torch.no_grad()
    def run() -> None:
        net.to(torch.float64)
        x = torch.ones(2, 4, dtype=torch.float64) + net.inner.bias
        seen.append((float(x.sum()), next(net.parameters()).device.type))
        net(x)
        net.to(torch.float32)

    before = dict(net.named_parameters())
    calls = dry(run, net=net).calls
    assert seen == [(8.0, "cpu")]
    assert calls[0].dtypes == (torch.float64,)
    assert all(before[name] is parameter and parameter.dtype == torch.float32 for name, parameter in net.named_parameters())


def test_where_an_argument_lies_in_its_storage_makes_no_new_call() -> None:
    net = Net()
    steps = torch.rand(5, 1, 4)
    run = dry(lambda: [net(step) for step in steps], net=net)
    assert (len(run.calls), run.sequence) == (1, (0,) * 5)
    assert run.calls[0].args[0] == TensorSpec((1, 4), (4, 1), torch.float32, 0, 0)


def test_arguments_that_share_memory_do_so_in_the_record() -> None:
    class Two(Net):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
            return x + y

    net, base = Two(), torch.rand(4, 4)
    run = dry(lambda: (net(base[1:2], base[2:3]), net(base[1:2], base[2:3].clone())), net=net)
    args, _ = run.calls[0].inputs()
    assert args[0].untyped_storage()._cdata == args[1].untyped_storage()._cdata
    assert [spec.offset for spec in run.calls[0].args] == [0, 4]
    assert run.sequence == (0, 1)


def test_floats_that_vary_are_one_call_and_noted() -> None:
    net, x = Net(), torch.ones(1, 4)
    run = dry(lambda: [net(x, scale=scale) for scale in (1.0, 0.5, 0.25)], net=net)
    assert (len(run.calls), run.varying_floats(0)) == (1, ("scale",))
    assert [step.floats for step in run.steps] == [(1.0,), (0.5,), (0.25,)]
    assert "numbers that vary: scale" in str(run)


def test_a_float_that_decides_a_shape_makes_two_calls() -> None:
    class Grow(Net):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return nn.functional.interpolate(x[None], scale_factor=scale)

    net, x = Grow(), torch.ones(1, 4)
    run = dry(lambda: [net(x, scale=scale) for scale in (1.0, 2.0)], net=net)
    assert [call.result_leaves[0].shape for call in run.calls] == [(1, 1, 4), (1, 1, 8)]


def test_attributes_that_are_set_around_a_call_make_another_one() -> None:
    """Where they are set back they are as before; what is no plain data is not noted."""
    net: Any = Net()
    x, net.styles, net.hidden = torch.ones(1, 4), {"style": 1.0}, torch.tanh

    def run() -> None:
        net(x)
        net.styles["style"] *= 0.5
        net.hidden = torch.sin
        net(x)
        net.styles["style"] /= 0.5
        net(x)

    found = dry(run, net=net)
    assert found.sequence == (0, 1, 0)
    assert [dict(call.settings) for call in found.calls] == [{}, {("", "styles"): {"style": 0.5}}]


# Bytes.


def test_bytes_beside_and_between_calls() -> None:
    net = Net()

    def run(latents: Tensor) -> None:
        device = net.mean.device
        x = latents.to(device)  # 64 bytes
        noise = torch.randn(8, 4, device=device)  # 128
        y = net(x)  # 64 more, then
        del noise
        z = (y + 1) * 2  # 64 for a moment, 64 that stay
        net(z)

    found = dry(run, {"latents": torch.ones(4, 4)}, net=net)
    first, second = found.steps
    assert (first.held, first.arguments, first.between) == (Held(128, 64), Held(64, 0), Held(192, 64))
    assert (second.held, second.arguments, second.between) == (Held(128, 64), Held(64, 0), Held(256, 64))
    assert found.last == Held(256, 64)


def test_what_is_on_the_host_does_not_count_on_the_device() -> None:
    net = Net()

    def run() -> None:
        host = torch.randn(4, 4, generator=torch.Generator())
        moved = host.to(net.mean.device)
        result = net(moved)
        back = result.cpu().float()
        assert (host.device, moved.device.type, result.device == moved.device) == (torch.device("cpu"), "cpu", True)
        assert moved.device != host.device == back.device
        assert result.to(moved.device) is result
        moved.numpy()

    found = dry(run, net=net)
    assert found.steps[0].held == Held(0, 64)
    assert found.last == Held(128, 128)


def test_devices_follow_arguments_and_names() -> None:
    net, places = Net(), {}

    def run() -> None:
        here = net.mean.device
        on = torch.ones(2, device=here)
        off = torch.ones(2)
        places.update(
            named=torch.tensor([1.0], device=here), like=torch.zeros_like(on), scalar=on * 2, mixed=torch.stack([on, on]),
            number=on.to("cuda"), other=off.to(on), cuda=torch.zeros(2, device="cuda"), new=on.new_zeros(3),
        )  # fmt: skip
        assert all(tensor.device == here for tensor in places.values())
        hosts = [off * 2, torch.tensor([1.0]), on.to("cpu"), on.cpu(), on.new_zeros(3, device="cpu"), on.to(off)]
        assert all(tensor.device == torch.device("cpu") != here for tensor in hosts)
        assert on.to(torch.float64).device == here

    dry(run, net=net)
    assert len(places) == 8


def test_tensors_of_the_call_on_another_device_are_held_all_the_time() -> None:
    net = Net()
    found = dry(lambda x: net(x[:1]), {"x": torch.ones(8, 4, device="meta")}, net=net)
    assert (found.steps[0].arguments, found.steps[0].held) == (Held(128, 0), Held())


# Values.


def test_a_line_that_asks_for_an_answer_is_reported() -> None:
    net = Net()

    def run(limit: float) -> None:
        y = net(torch.ones(1, 4))
        if torch.tensor(limit) > 0 and (y * 2).sum() > 0:
            net(y)

    found = dry(run, {"limit": 1.0}, net=net)
    assert len(found.asked) == 1
    assert found.asked[0].startswith(__file__)
    assert not found.is_certain
    assert "may go another way" in str(found)
    assert dry(run, {"limit": -1.0}, net=net).is_certain


ASKS = {"tolist": Tensor.tolist, "nonzero": Tensor.nonzero, "mask": lambda y: y[y > 0], "item": Tensor.item}


@pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS.keys())
def test_ways_to_ask(ask: Any) -> None:
    net = Net()
    assert not dry(lambda: ask(net(torch.ones(1, 4))[0, 0]), net=net).is_certain


def test_indexing_an_answer_with_known_values_asks_nothing() -> None:
    net = Net()
    assert dry(lambda: net(torch.ones(1, 4))[torch.tensor([[True, False, True, True]])], net=net).is_certain


class Rows(nn.Module):
    """As many rows as the mask has ones; with `check`, a question about values that shapes do not depend on."""

    def __init__(self, check: bool = False, size: int = 4) -> None:
        super().__init__()
        self.inner, self.check = nn.Linear(4, size), check

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.check and x.isnan().any():
            x = x.nan_to_num()
        return self.inner(x[mask.bool()])


@pytest.mark.parametrize("check", [False, True])
def test_integers_keep_their_values(check: bool) -> None:
    net, rows = Rows(check), []

    def run() -> None:
        for ones in (1, 3, 1):
            rows.append(net(torch.ones(4, 4), torch.tensor([1] * ones + [0] * (4 - ones))).shape)

    found = dry(run, net=net)
    assert rows == [(1, 4), (3, 4), (1, 4)]
    assert found.sequence == (0, 1, 0)


class Numpy(nn.Module):
    def __init__(self, rows: bool = False) -> None:
        super().__init__()
        self.inner, self.rows = nn.Linear(4, 4), rows

    def forward(self, x: Tensor) -> Any:
        y = torch.from_numpy(self.inner(x).numpy() * 2)
        return y[y > 0] if self.rows else (y, [bool(row.sum() > 1) for row in y])


def test_python_that_must_have_values_gets_zeros() -> None:
    net, results = Numpy(), []
    found = dry(lambda: results.append(net(torch.ones(2, 4))), net=net)
    assert results[0][1] == [False, False]
    assert (results[0][0].shape, bool(results[0][0].any())) == ((2, 4), False)
    assert found.calls[0].by_values


def test_shapes_that_depend_on_values_are_refused_by_name() -> None:
    net = Numpy(rows=True)
    with pytest.raises(PlannerError, match=r"what net\.forward \(Numpy\) gives cannot be known .* its shapes depend on values"):
        dry(lambda: net(torch.ones(2, 4)), net=net)


def test_large_components_do_not_run_for_real(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planner.component_results.MOST_REAL_BYTES", 10)
    net = Numpy()
    with pytest.raises(PlannerError, match=r"net\.forward .* too large to be run for real \(80 B\)"):
        dry(lambda: net(torch.ones(2, 4)), net=net)


def test_arguments_that_a_component_changes_are_refused() -> None:
    class Pops(Net):
        def forward(self, x: Tensor, more: dict[str, Any]) -> Tensor:  # type: ignore[override]
            more.pop("scale")
            return x

    net = Pops()
    with pytest.raises(PlannerError, match=r"net\.forward \(Pops\) changes a list, dict or cache that it is given"):
        dry(lambda: net(torch.ones(1, 4), {"scale": 1.0}), net=net)


# Nothing is left.


@pytest.mark.parametrize("fails", [False, True])
def test_components_are_as_before(fails: bool) -> None:
    class Remembers(Net):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            self.last = x
            return x

    net = Remembers().eval()
    tables = {path: dict(vars(module)) for path, module in net.named_modules()}
    values = {name: value.clone() for name, value in net.state_dict().items()}

    def run() -> None:
        net.context = "changed"
        net.inner.extra = 1
        net.mean.add_(1)
        net(torch.ones(1, 4))
        if fails:
            raise KeyError("gone")

    with pytest.raises(PlannerError, match="KeyError: 'gone'") if fails else contextlib.nullcontext():
        dry(run, net=net)
    assert {path: dict(vars(module)) for path, module in net.named_modules()} == tables
    assert all(torch.equal(value, values[name]) for name, value in net.state_dict().items())


def test_state_objects_are_put_back_deeply() -> None:
    class Scheduler:
        def __init__(self) -> None:
            self.sigmas, self.history, self.index = torch.arange(3.0), [None, [1]], 0

    scheduler = Scheduler()
    sigmas = scheduler.sigmas

    def run() -> None:
        scheduler.index += 1
        scheduler.history[1].append(2)  # type: ignore[union-attr]
        scheduler.sigmas.add_(1)
        scheduler.sigmas = scheduler.sigmas * 2
        scheduler.extra = 1  # type: ignore[attr-defined]

    record("Toy", {}, run, {}, state=[scheduler])
    assert (scheduler.index, scheduler.history, vars(scheduler).keys()) == (0, [None, [1]], {"sigmas", "history", "index"})
    assert scheduler.sigmas is sigmas
    assert sigmas.tolist() == [0.0, 1.0, 2.0]


def test_the_call_keeps_its_tensors_generators_and_callbacks() -> None:
    generator, image, called = torch.Generator().manual_seed(1), torch.ones(3), []

    def run(generator: torch.Generator, nested: dict[str, Tensor], callback_on_end: Any) -> None:
        assert callback_on_end is None
        torch.randn(2, generator=generator)
        nested["image"].mul_(5)
        nested.clear()

    state, nested = generator.get_state(), {"image": image}
    record("Toy", {}, run, {"generator": generator, "nested": nested, "callback_on_end": called.append})
    assert torch.equal(generator.get_state(), state)
    assert nested == {"image": image}
    assert image.tolist() == [1.0] * 3


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda net: net.train(), "in training mode"),
        (lambda net: setattr(net, "_hf_hook", object()), "accelerate hook"),
        (lambda net: net.compile(), "is compiled"),
    ],
)
def test_components_that_cannot_be_planned_are_refused_when_they_are_called(spoil: Any, message: str) -> None:
    net, other = Net().eval(), Net().eval()
    spoil(net)
    components = {"net": net, "other": other}
    assert names(record("Toy", components, lambda: other(torch.ones(1, 4)), {})) == ["other.forward"]
    with pytest.raises(PlannerError, match=message):
        record("Toy", components, lambda: net(torch.ones(1, 4)), {})


# Phases.


@pytest.mark.parametrize(
    ("sequence", "phases"),
    [
        ("", []),
        ("a", [("a", 1)]),
        ("aab", [("a", 2), ("b", 1)]),
        ("abttttv", [("a", 1), ("b", 1), ("t", 4), ("v", 1)]),
        ("acucucuv", [("a", 1), ("cu", 3), ("v", 1)]),
        ("ttttuuuu", [("t", 4), ("u", 4)]),
        ("tututt", [("tu", 2), ("t", 2)]),
        ("ttututu", [("t", 1), ("tu", 3)]),
        ("ttvttvttv", [("ttv", 3)]),
    ],
)
def test_phases(sequence: str, phases: list[tuple[str, int]]) -> None:
    found = phases_of([ord(letter) for letter in sequence])
    assert [("".join(map(chr, phase.cycle)), phase.times) for phase in found] == phases


@given(st.lists(st.integers(0, 2), max_size=24))
def test_phases_give_the_sequence_again(sequence: list[int]) -> None:
    phases = list(phases_of(sequence))
    assert [call for phase in phases for _ in range(phase.times) for call in phase.cycle] == sequence


@given(st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True), st.integers(2, 9))
def test_a_repeated_cycle_is_one_phase(cycle: list[int], times: int) -> None:
    assert list(phases_of(cycle * times)) == [Phase(tuple(cycle), times)]


def test_the_table_of_cycles(golden: Callable[[str, str], None]) -> None:
    net, x = Net(), torch.ones(2, 4)

    def run() -> None:
        with torch.no_grad():
            net.encode(x)
            for step in range(3):
                net(x.to(net.mean.device), scale=step / 4)
                net(x[:1])
                net(x[:1])
            if net.inner(x).sum() > 0:
                net.table(1)

    text = str(dry(run, net=net))
    golden("dry_run", re.sub(rf"{re.escape(__file__)}:\d+", "test_dry_run.py:LINE", text))


def test_inputs_are_on_meta_with_strides() -> None:
    net = Net()
    run = dry(lambda: net(torch.ones(4, 2).t(), scale=2.0), net=net)
    args, kwargs = run.calls[0].inputs()
    assert (args[0].shape, args[0].stride(), args[0].device.type, kwargs) == ((2, 4), (1, 2), "meta", {"scale": 2.0})
    assert isinstance(run.calls[0], ComponentCall)
    assert isinstance(run.steps[0], Step)
