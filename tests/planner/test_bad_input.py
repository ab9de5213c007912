"""Wrong input gives an error that says what would be right, and leaves the module alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn

from planner import (
    BudgetError,
    CaptureError,
    InfeasibleBudget,
    InputError,
    Machine,
    Plan,
    PlanFileError,
    PlannerError,
    plan,
)
from planner.capture import capture
from tests.planner.toys import Counter, Lookup, Mlp, planned, snapshot, x


def refused(module: nn.Module, action: Callable[[], Any], kind: type[PlannerError], *texts: str) -> str:
    """The action raises an error of that kind with all the texts, and the module is as before."""
    before = snapshot(module)
    with pytest.raises(kind) as caught:
        action()
    message = str(caught.value)
    for text in texts:
        assert text in message, message
    assert snapshot(module) == before
    return message


@pytest.mark.parametrize(
    ("budget", "correct"),
    [
        ("6 gigs", 'budget="6GB"'),
        ("-1GB", 'budget="6GB"'),
        ("0", 'budget="0GB"'),
        (0, 'budget="6GB"'),
        ("0GB", 'budget="6GB"'),
        (float("nan"), 'budget="6GB"'),
        (float("inf"), 'budget="6GB"'),
        (2**70, 'budget="6GB"'),
        ("2000000000000GB", 'budget="6GB"'),
        ([1], 'budget="6GB"'),
        ({}, 'budget="6GB"'),
        ({"cuda:0": "8GB", 1: "8GB"}, 'budget={"cuda:0": 8000000000}'),
        ({"tpu": "8GB"}, 'budget={"cuda:0": "8GB"'),
        ({"disk": "8GB"}, "6GB"),
    ],
)
def test_budget(budget: Any, correct: str) -> None:
    module = Mlp().eval()
    if budget == "0":
        correct = "budget="
    device = None if isinstance(budget, dict) else "accounting"
    refused(module, lambda: plan(module, budget, inputs=(x(),), device=device), BudgetError, correct)


@pytest.mark.parametrize("device", ["tpu", "cpu:0", "cuda:x", "accounting:1", "meta"])
def test_no_such_device(device: str) -> None:
    module = Mlp().eval()
    refused(module, lambda: plan(module, "1GB", inputs=(x(),), device=device), BudgetError, "device='cuda'")


def test_cuda_device_that_is_not_here() -> None:
    module = Mlp().eval()
    action = lambda: plan(module, "1GB", inputs=(x(),), device="cuda:77")  # noqa: E731
    refused(module, action, BudgetError, "cuda:77", "machine='rtx-4090'")


def test_unknown_machine() -> None:
    module = Mlp().eval()
    action = lambda: plan(module, "1GB", inputs=(x(),), machine="rtx-409")  # noqa: E731
    refused(module, action, PlannerError, "Machine.preset('rtx-4090')")


class _Same(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("module", [nn.Module(), nn.Sequential(), _Same()], ids=["module", "sequential", "identity"])
def test_nothing_to_plan(module: nn.Module) -> None:
    module.eval()
    message = refused(module, lambda: planned(module, x()), CaptureError)
    assert "computes nothing" in message or "forward" in message


def test_training_mode() -> None:
    module = Mlp().eval()
    module.training = True
    refused(module, lambda: plan(module, "1GB", inputs=(x(),), device="accounting"), PlannerError, "plan(module.eval()")


@pytest.mark.parametrize(
    ("child", "acts"),
    [
        (nn.Dropout(0.1), True),
        (nn.Dropout(0.0), False),
        (nn.BatchNorm1d(8), True),
        (nn.BatchNorm1d(8, track_running_stats=False), True),
        (nn.InstanceNorm1d(8, track_running_stats=True), True),
        (nn.InstanceNorm1d(8), False),
        (nn.RReLU(), True),
        (nn.LSTM(8, 8, 2, dropout=0.5), True),
        (nn.MultiheadAttention(8, 2, 0.5), True),
        (nn.Linear(8, 8), False),
    ],
    ids=lambda case: type(case).__name__ if isinstance(case, nn.Module) else "",
)
def test_training_mode_below_the_root(child: nn.Module, acts: bool) -> None:
    """Loaders of adapters leave what they add in training mode; only what computes something else then is refused."""
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), child).eval()
    child.train()
    action = lambda: plan(module, "1GB", inputs=(torch.ones(4, 8),), device="accounting")  # noqa: E731
    if acts:
        refused(module, action, PlannerError, "plan(module.eval()", f"2 ({type(child).__name__})")
    else:
        want = module(torch.ones(4, 8, 8))
        p = plan(module, "1GB", inputs=(torch.ones(4, 8, 8),), device="accounting")
        assert torch.equal(p.build()(torch.ones(4, 8, 8)), want)


def test_target_is_no_module() -> None:
    with pytest.raises(PlannerError, match=r"plan\(model, budget='6GB', inputs=\(x,\)\)"):
        plan("a/repository", "6GB")  # type: ignore[arg-type]


def test_inputs_of_another_dtype() -> None:
    module = Mlp().eval()
    refused(
        module, lambda: planned(module, x().double()), CaptureError,
        "linear", "toys.py", "self.up(self.norm(x))" , "is float64", "is float32", "inputs=(x.to(",
    )  # fmt: skip


def test_float_ids() -> None:
    module = Lookup().eval()
    refused(module, lambda: planned(module, torch.zeros(3)), CaptureError, "toys.py", "self.table(ids)")


@pytest.mark.parametrize("inputs", [(), (1, 2, 3)])
def test_inputs_that_do_not_fit(inputs: tuple[Any, ...]) -> None:
    module = Mlp().eval()
    refused(module, lambda: planned(module, *inputs), InputError, "forward(x:", "pass inputs=(...)")


def test_input_of_a_wrong_shape() -> None:
    module = Mlp().eval()
    refused(module, lambda: planned(module, torch.zeros(3, 7)), CaptureError, "toys.py")


def test_input_that_is_no_tensor() -> None:
    module = Mlp().eval()
    refused(module, lambda: planned(module, object()), PlannerError, "register")


def test_overflowing_sizes() -> None:
    module = Mlp().eval()
    huge = torch.empty(2**50, 8, device="meta")
    message = refused(module, lambda: planned(module, huge), InfeasibleBudget, "PB")
    assert "smaller inputs" in message


def test_wrong_device_at_the_call() -> None:
    module = Mlp().eval()
    built = planned(module, x()).build()
    refused(module, lambda: built(x().to("meta")), InputError, "x.to('cpu')")
    assert torch.equal(built(x()), module(x()))


def test_autocast_at_the_call() -> None:
    built = planned(Mlp(), x()).build()
    with torch.autocast("cpu"), pytest.raises(InputError, match=r"outside torch\.autocast"):
        built(x())


class TestPlanFile:
    def saved(self, tmp_path: Path) -> tuple[Mlp, Path, dict[str, Any]]:
        module, path = Mlp().eval(), tmp_path / "p.json"
        planned(module, x(), least=True).save(path)
        return module, path, json.loads(path.read_text())

    def test_missing(self, tmp_path: Path) -> None:
        module = Mlp().eval()
        refused(module, lambda: Plan.load(tmp_path / "no.json", module), PlanFileError, "no.json", "Plan.load")

    @pytest.mark.parametrize("text", ["", "hello", "\x00\x01", '{"format": "vramplan plan"'])
    def test_not_json(self, tmp_path: Path, text: str) -> None:
        module, path, _ = self.saved(tmp_path)
        path.write_text(text)
        refused(module, lambda: Plan.load(path, module), PlanFileError, "p.save(")

    def test_truncated(self, tmp_path: Path) -> None:
        module, path, _ = self.saved(tmp_path)
        whole = path.read_text()
        for size in range(0, len(whole) - 1, 199):
            path.write_text(whole[:size])
            refused(module, lambda: Plan.load(path, module), PlanFileError, "p.save(")

    @pytest.mark.parametrize("text", ["[]", "3", '{"format": "other"}'])
    def test_other_json(self, tmp_path: Path, text: str) -> None:
        module, path, _ = self.saved(tmp_path)
        path.write_text(text)
        refused(module, lambda: Plan.load(path, module), PlanFileError, "p.save(")

    def test_other_version(self, tmp_path: Path) -> None:
        module, path, data = self.saved(tmp_path)
        path.write_text(json.dumps({**data, "version": 99}))
        refused(module, lambda: Plan.load(path, module), PlanFileError, "version 99", "plan the model again")

    def test_lacking_a_field(self, tmp_path: Path) -> None:
        module, path, data = self.saved(tmp_path)
        for key in data.keys() - {"format", "version", "program"}:
            path.write_text(json.dumps({k: v for k, v in data.items() if k != key}))
            refused(module, lambda: Plan.load(path, module), PlanFileError, key, "p.save(")

    @pytest.mark.parametrize("key", ["budget", "machine", "call", "decisions", "fingerprint", "keep", "device"])
    @pytest.mark.parametrize("value", [3, {}, {"x": 1}, [1]])
    def test_garbage_in_a_field(self, tmp_path: Path, key: str, value: Any) -> None:
        module, path, data = self.saved(tmp_path)
        if (key, value) == ("keep", {}):
            return  # that one is right
        path.write_text(json.dumps({**data, key: value}))
        refused(module, lambda: Plan.load(path, module), PlannerError)

    def test_another_model(self, tmp_path: Path) -> None:
        _, path, _ = self.saved(tmp_path)
        other = Mlp(hidden=32).eval()
        refused(other, lambda: Plan.load(path, other), PlanFileError, "'w_up_weight' differs", "plan(model, budget=...)")

    def test_a_model_with_one_more_layer(self, tmp_path: Path) -> None:
        module, path = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval(), tmp_path / "p.json"
        planned(module, x()).save(path)
        deeper = nn.Sequential(*module, nn.Linear(8, 8)).eval()
        refused(deeper, lambda: Plan.load(path, deeper), PlanFileError, "made for another model", "plan(model, budget=...)")

    def test_decisions_that_break_the_program(self, tmp_path: Path) -> None:
        module, path, data = self.saved(tmp_path)
        streams = data["decisions"]["streams"]
        streams[0]["prefetch"] = streams[-1]["last"]
        path.write_text(json.dumps(data))
        refused(module, lambda: Plan.load(path, module), PlannerError)

    def test_decisions_over_budget(self, tmp_path: Path) -> None:
        module, path, data = self.saved(tmp_path)
        data["decisions"]["streams"] = []
        path.write_text(json.dumps(data))
        refused(module, lambda: Plan.load(path, module), PlannerError, "plan the model again")


def test_accelerate_hook_on_the_module() -> None:
    module = Mlp().eval()
    add_hook_to_module(module, ModelHook())
    refused(module, lambda: planned(module, x()), PlannerError, "remove_hook_from_module(module, recurse=True)")


def test_accelerate_cpu_offload() -> None:
    module = Mlp().eval()
    accelerate.cpu_offload(module, execution_device=torch.device("cpu"))
    refused(module, lambda: planned(module, x()), PlannerError, "remove_hook_from_module(module, recurse=True)")


def test_forward_replaced_on_the_object() -> None:
    module = Mlp().eval()
    module.forward = lambda x: x * 2  # type: ignore[method-assign]
    refused(module, lambda: planned(module, x()), PlannerError, "del module.forward")


def test_compiled() -> None:
    module = Mlp().eval()
    wrapped = torch.compile(module)
    refused(module, lambda: planned(wrapped, x()), PlannerError, "plan(module._orig_mod")  # type: ignore[arg-type]


@pytest.mark.parametrize("child", [False, True])
def test_compiled_in_place(child: bool) -> None:
    module = Mlp().eval()
    (module.up if child else module).compile()
    refused(module, lambda: planned(module, x()), PlannerError, "before torch.compile / .compile()")


class _Wrapped(Tensor):
    """A subclass with nothing of its own."""


def test_tensor_subclass() -> None:
    module = Mlp().eval()
    module.up.weight = nn.Parameter(torch.zeros(16, 8).as_subclass(_Wrapped))
    refused(module, lambda: planned(module, x()), PlannerError, "up.weight", "load the model unquantised")


@pytest.mark.filterwarnings("ignore")  # quantised tensors are deprecated in PyTorch
def test_quantised_buffer() -> None:
    module = Mlp().eval()
    module.register_buffer("q", torch.quantize_per_tensor(torch.zeros(8), 0.1, 0, torch.qint8))
    refused(module, lambda: planned(module, x()), PlannerError, "q is a", "load the model unquantised")


@pytest.mark.filterwarnings("ignore")  # sparse tensors warn that they are in beta
def test_sparse_buffer() -> None:
    module = Mlp().eval()
    module.register_buffer("s", torch.eye(8).to_sparse())
    refused(module, lambda: planned(module, x()), PlannerError, "s has layout torch.sparse_coo", ".to_dense()")


class _Aliased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.zeros(8))
        self.register_buffer("front", self.state[:4])

    def forward(self, x: Tensor) -> Tensor:
        self.state.add_(1)
        return x[:, :4] + self.front


def test_written_buffer_that_shares_memory() -> None:
    module = _Aliased().eval()
    refused(module, lambda: planned(module, x()), PlannerError, "state", "shares memory with front", ".clone()")


class _Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # the line to be named
            return self.lstm(x)[0]
        return x


def test_data_dependent_control_flow() -> None:
    module = _Branch().eval()
    action = lambda: capture(module, (x(),))  # noqa: E731
    message = refused(module, action, CaptureError, "test_bad_input.py:", "if x.sum() > 0", "method=...")
    assert "`if x.sum() > 0:" in " ".join(str(planned(module, x())).split()), "a plan in parts says why"
    line = next(i for i, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "the line to be named" in text)
    assert f"test_bad_input.py:{line} " in message


class _Effect(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.layer, self.what = nn.Linear(8, 8), what
        self.calls, self.last, self.cache, self.seen = 0, None, {}, []
        self.plain = torch.zeros(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if self.what == "calls":
            self.calls += 1
        elif self.what == "last":
            self.last = y
        elif self.what == "cache":
            self.cache["y"] = y
        elif self.what == "seen":
            self.seen.append(y)
        else:
            self.plain.add_(1)
        return y


@pytest.mark.parametrize("what", ["calls", "last", "cache", "seen", "plain"])
def test_a_call_that_changes_attributes(what: str) -> None:
    module = _Effect(what).eval()
    refused(module, lambda: capture(module, (x(),)), CaptureError, repr(what), f"self.register_buffer({what!r}, ...)")
    planned(module, x())
    assert module.calls == 0
    assert module.last is None
    assert (module.cache, module.seen) == ({}, [])
    assert not module.plain.any()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"keep": {"up.*": {"precision": "fp32"}}}, "{'up.*': {'resident': True}}"),
        ({"keep": {"up.*": True}}, "{'up.*': {'resident': True}}"),
        ({"keep": {"upp.weihgt": {"resident": True}}}, "keep={'up.weight': {'resident': True}}"),
        ({"allow": ("compress",)}, "allow=('offload', 'tile', 'cast', 'layout', 'attention')"),
        ({"allow": "compress"}, "allow=('offload', 'tile', 'cast', 'layout', 'attention')"),
        ({"allow_cast": "float8_e4m3"}, "write allow_cast='float8_e4m3fn'"),
        ({"max_error": 0.1}, "nothing may be cast; write allow_cast="),
        ({"repeats": 0}, "write repeats=28"),
        ({"profile": 1}, "write profile=True"),
        ({"call": {"prompt": "a"}}, "leave it at None"),
        ({"dynamic": {}}, "names no dimension; write dynamic="),
        ({"method": "nope"}, "method='forward'"),
    ],
)
def test_options(options: dict[str, Any], text: str) -> None:
    module = Mlp().eval()
    refused(module, lambda: planned(module, x(), **options), PlannerError, text)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_building_for_cuda_without_cuda() -> None:
    module = Mlp().eval()
    made = plan(module, "1GB", inputs=(x(),), machine="rtx-4090")
    assert made.device == "cuda"
    refused(module, made.build, PlannerError, "no CUDA device here", "device='accounting'")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_free_memory_without_cuda() -> None:
    module = Mlp().eval()
    action = lambda: plan(module, None, inputs=(x(),), machine="rtx-4090")  # noqa: E731
    refused(module, action, BudgetError, "budget='6GB'")


@pytest.mark.parametrize(
    ("weights", "texts"),
    [
        (None, ("is on the meta device", "build(weights=<module, state dict or folder>)")),
        ({}, ("the weights given lack it",)),
        (3, ("weights=<module, state dict or checkpoint folder>",)),
        ("/nowhere", ("no folder", "checkpoint folder")),
        (Mlp(hidden=32), ("(32,", "(16,")),
        (Mlp().to("meta"), ("on the meta device too",)),
    ],
)
def test_building_from_meta(weights: Any, texts: tuple[str, ...]) -> None:
    module = Mlp().to("meta").eval()
    made = planned(module, x(), keep={"down.*": {"resident": True}}, least=True)
    message = refused(module, lambda: made.build(weights=weights), PlannerError)
    assert all(text in message for text in texts), message


def test_constant_on_meta() -> None:
    with torch.device("meta"):
        module = Counter().eval()
    made = planned(module, x())
    state = Counter().state_dict()
    refused(module, lambda: made.build(weights=state), PlannerError, "'constant'")
    real = Counter().eval()
    built = made.build(weights=real)
    assert torch.equal(built(x()), real(x()))


def test_folder_without_weights(tmp_path: Path) -> None:
    module = Mlp().to("meta").eval()
    made = planned(module, x())
    refused(module, lambda: made.build(weights=tmp_path), PlannerError, "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    refused(module, lambda: made.build(weights=tmp_path), PlannerError, "model.safetensors", "again")


def test_building_twice() -> None:
    module = Mlp().eval()
    made = planned(module, x())
    made.build()
    refused(module, made.build, PlannerError, "p.restore()")
    made.restore()
    assert made.build()(x()).shape == (3, 8)


def test_reports_before_anything_ran() -> None:
    made = planned(Mlp(), x())
    with pytest.raises(PlannerError, match=r"m = p\.build\(\)"):
        made.report()
    made.build()
    with pytest.raises(PlannerError, match="call the planned module once"):
        made.report()


class TestInfeasible:
    def test_says_what_is_possible(self) -> None:
        module = Mlp(hidden=512).eval()
        with pytest.raises(InfeasibleBudget) as caught:
            planned(module, x(), budget=100)
        error = caught.value
        minimum = error.minimum_bytes
        assert error.budget_bytes == 100
        assert error.node in str(error)
        for text in ("budget 100 B", f"({minimum} B)", f"at {error.node}", "activations", "weights", "what would help"):
            assert text in str(error), str(error)

    @pytest.mark.parametrize("device", ["accounting", "cuda"])
    def test_the_minimum_is_feasible_and_one_byte_less_is_not(self, device: str) -> None:
        module = Mlp(hidden=512).eval()
        machine = replace(Machine.preset("rtx-4090"), name="test")
        options: dict[str, Any] = {"inputs": (x(),), "device": device, "machine": machine}
        minimum = plan(module, "1GB", **options).minimum_bytes
        least = plan(module, minimum, **options)
        assert least.reserved_bytes == minimum == least.minimum_bytes
        with pytest.raises(InfeasibleBudget) as caught:
            plan(module, minimum - 1, **options)
        error = caught.value
        assert (error.minimum_bytes, error.budget_bytes) == (minimum, minimum - 1)
