"""`p.emit`: what is written, and that it runs as the plan does."""

from __future__ import annotations

import inspect
import json
import os
import pickletools
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import runtime
from planner import Plan, PlannerError, plan
from planner.cli import main
from runtime.package_format import PRELUDE
from runtime.stored import Stored
from tests.planner import test_conv_layouts as conv_layouts
from tests.planner.test_casting import Residual
from tests.planner.test_casting import model as residual
from tests.planner.test_casting import planned as cast_plan
from tests.planner.toys import Counter, Lookup, Mlp, planned, x
from tests.properties.test_plans import budget_at, same
from tests.properties.test_plans import planned as streamed
from tests.properties.test_tiling import forced
from tests.properties.test_tiling import planned as resident
from tests.strategies.modules import Case, cases
from tests.strategies.nets import Case as Net
from tests.strategies.nets import nets
from tests.zoo import ZOO

SHARES = st.sampled_from([0.0, 0.25, 0.5, 1.0])


def assert_package_is_plan(p: Plan, calls: list[tuple[tuple[Any, ...], dict[str, Any]]], folder: Path, **options: Any) -> None:
    """Outputs bit for bit, peaks, bytes and seconds, call by call; the package is emitted before the plan is built."""
    p.emit(folder, **options)
    m = p.build()
    mine = []
    for args, kwargs in calls:
        result = m(*args, **kwargs)
        mine.append((result, m.report().peak_bytes, m.report().copied_bytes, m.report().step_seconds))
    state = {name: buffer.clone() for name, buffer in m.named_buffers()}
    p.restore()
    loaded = runtime.load(folder)
    for (args, kwargs), (wanted, *measured) in zip(calls, mine, strict=True):
        found = loaded(*args, **kwargs)
        assert same(found, wanted)
        assert [t.stride() for t in tree_leaves(found) if isinstance(t, Tensor)] == [
            t.stride() for t in tree_leaves(wanted) if isinstance(t, Tensor)
        ]
        report = loaded.report()
        assert [report.peak_bytes, report.copied_bytes, report.step_seconds] == measured
        assert report.peak_bytes <= report.predicted_peak_bytes == p.peak_bytes <= report.budget_bytes == p.budget_bytes
    kept = dict(loaded.named_buffers())
    assert same({name: kept[name] for name in kept if name in state}, {name: state[name] for name in kept if name in state})
    loaded.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "package"


# That it runs as the plan does.


@settings(max_examples=max(3, settings().max_examples // 3))
@given(cases(), SHARES)
def test_a_package_of_any_module_runs_as_its_plan(case: Case, share: float) -> None:
    p = streamed(case, case.fresh())
    if p is None:
        return
    with tempfile.TemporaryDirectory() as root:
        assert_package_is_plan(p.replan(budget_at(p, share)), [(case.args, case.kwargs)] * 2, Path(root, "package"))


@settings(max_examples=max(3, settings().max_examples // 10))
@given(nets(), SHARES, st.integers(2, 4))
def test_a_package_of_a_tiled_net_runs_as_its_plan(net: Net, share: float, count: int) -> None:
    p = forced(resident(net, net.module()), count, None)
    p = p.replan(max(p.minimum_bytes, budget_at(p, share)))
    event("tiled" if p.decisions.tiling.tiles else "whole")
    with tempfile.TemporaryDirectory() as root:
        assert_package_is_plan(p, [((net.input(),), {})], Path(root, "package"))


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_real_models_at_half_their_memory_with_carried_bundles(name: str, folder: Path) -> None:
    module, args, kwargs = ZOO[name]()
    p = plan(module, "1GB", inputs=args, kwargs=kwargs, device="accounting", machine="rtx-4090", repeats=3)
    p = p.replan((p.minimum_bytes + p.unplanned_bytes) // 2)
    assert_package_is_plan(p, [(args, kwargs)] * 3, folder, max_shard_size="100KB")


@settings(max_examples=max(3, settings().max_examples // 10))
@given(st.sampled_from(["float8_e4m3fn", "float8_e5m2", "int8"]), st.sampled_from([0.3, 0.45, 0.6]), st.integers(0, 99))
def test_a_package_with_casts_runs_as_its_plan(dtype: str, share: float, seed: int) -> None:
    module, given_ = residual(seed)
    p = cast_plan(module, given_, share, allow_cast=dtype)
    assert p.decisions.tiling.casts
    with tempfile.TemporaryDirectory() as root:
        assert_package_is_plan(p, [((given_,), {})] * 2, Path(root, "package"))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
def test_casts_are_written_as_they_are_stored(dtype: str, folder: Path) -> None:
    module, given_ = residual()
    p = cast_plan(module, given_, allow_cast=dtype)
    cast = p.program.weights[p.decisions.tiling.casts[0].weight].name
    assert_package_is_plan(p, [((given_,), {})] * 2, folder)
    data = json.loads((folder / "plan.json").read_text())
    values, scales = data["tensors"][f"{cast}:values"], data["tensors"][f"{cast}:scales"]
    assert (values["dtype"], scales["dtype"]) == (dtype, "float32")
    assert values["stored"] == {"weight": cast, "part": "values", "dtype": dtype, "dim": 0}
    assert cast not in data["tensors"]  # what it was made from is not there
    with safe_open(folder / values["file"], framework="pt") as shard:
        weight = module.get_parameter(cast)
        found = shard.get_tensor(f"{cast}:values")
        wanted = Stored(cast, "values", found.dtype, 0).make(weight)
        assert found.dtype == getattr(torch, dtype)
        assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))


def test_convolutions_in_another_layout(folder: Path) -> None:
    p = conv_layouts.planned()
    assert p.decisions.tiling.channels_last
    assert_package_is_plan(p, [((conv_layouts.X,), {})], folder)
    entries = json.loads((folder / "plan.json").read_text())["tensors"]
    assert any(entry.get("stored", {}).get("part") == "layout" for entry in entries.values())


def test_strides_that_safetensors_does_not_know(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transposed = nn.Parameter(torch.randn(8, 16).t())
            self.gaps = nn.Parameter(torch.randn(8, 32)[:, ::2])
            self.register_buffer("phase", torch.randn(16, dtype=torch.complex64))
            self.register_buffer("none", torch.empty(0, 16))

        def forward(self, v: Tensor) -> Any:
            return v @ self.transposed.t() @ self.transposed @ self.gaps, self.phase * 2, torch.cat([self.none, self.gaps])

    module = Odd().eval()
    p = planned(module, x(), least=True)
    assert_package_is_plan(p, [((x(),), {})], folder)
    loaded = runtime.load(folder)
    assert loaded.get_parameter("transposed").stride() == module.transposed.stride()
    loaded.close()
    plan(module, "1MB", inputs=(x(),), device="cpu").emit(folder)
    monkeypatch.setattr("runtime.homes.ScratchFolder", None)  # they are read where they are
    loaded = runtime.load(folder)
    assert same(loaded(x()), module(x()))
    loaded.close()


def test_rows_of_tables_and_slices(folder: Path) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(16000, 64), nn.Linear(64, 16000)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.table(ids))

    ids = torch.tensor([[3, 7, 15999]])
    p = planned(Words(), ids, budget="1GB", least=True)
    assert p.decisions.tiling.lookups
    assert p.decisions.tiling.slices
    assert_package_is_plan(p, [((ids,), {})] * 2, folder)


def test_one_program_for_many_sizes(folder: Path) -> None:
    p = planned(Mlp(), x(8), dynamic={"x": {0: "batch"}})
    assert_package_is_plan(p.replan(p.minimum_bytes), [((x(n),), {}) for n in (8, 2, 5)], folder)
    loaded = runtime.load(folder)
    with pytest.raises(
        PlannerError, match=r"runs Mlp.forward for x .* with batch 2 to 8, and was called with x float32\[9, 8\]"
    ):
        loaded(x(9))
    loaded.close()


def test_tied_weights_are_there_once(folder: Path) -> None:
    ids = torch.arange(4)
    p = planned(Lookup(), ids, least=True)
    assert_package_is_plan(p, [((ids,), {})], folder)
    loaded = runtime.load(folder)
    assert loaded.head.weight is loaded.table.weight
    entries = json.loads((folder / "plan.json").read_text())["tensors"]
    assert len([entry for entry in entries.values() if entry["shape"] == [11, 8]]) == 1
    assert set(loaded.state_dict()) == set(Lookup().state_dict())
    loaded.close()


def test_state_begins_as_it_is_when_it_is_emitted(folder: Path) -> None:
    module = Counter().eval()
    module.constant = module.constant.clone()
    p = planned(module, x(), least=True)
    m = p.build()
    for _ in range(3):
        m(x())
    p.emit(folder)
    wanted = [m(x()) for _ in range(2)]
    p.restore()
    for _ in range(2):  # a package is not written
        loaded = runtime.load(folder)
        assert loaded.count.item() == 3
        assert [torch.equal(loaded(x()), y) for y in wanted] == [True, True]
        loaded.close()


def test_all_calls_that_a_built_plan_knows(folder: Path) -> None:
    module = Mlp().eval()
    p = planned(module, x(), budget="2KB")
    m = p.build()
    wanted = [m(x(n)) for n in (3, 5, 4)]
    p.emit(folder)
    p.restore()
    assert sorted(path.name for path in folder.glob("*.py")) == ["program.py", "program_2.py", "program_3.py"]
    loaded = runtime.load(folder)
    assert all(torch.equal(loaded(x(n)), y) for n, y in zip((3, 5, 4), wanted, strict=True))
    with pytest.raises(PlannerError, match=r"float32\[3, 8\]; or x float32\[5, 8\]; or x float32\[4, 8\], and was called with"):
        loaded(x(6))
    loaded.close()


def test_attributes_that_a_call_leaves(folder: Path) -> None:
    class Says(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            self.last, self.log = tuple(x.shape), ["ran", 0.5]
            return super().forward(x)

    p = planned(Says(), x())
    p.emit(folder)
    loaded = runtime.load(folder)
    wanted = Says.forward(p.target, x())  # type: ignore[arg-type]
    assert torch.equal(loaded(x()), wanted)
    assert torch.equal(loaded(x()), wanted)
    assert (loaded.last, loaded.log) == ((3, 8), ["ran", 0.5])
    loaded.close()


def test_another_method(folder: Path) -> None:
    class Coder(Mlp):
        def encode(self, x: Tensor, *, scale: float = 1.5) -> Tensor:
            return self.up(x) * scale

    p = planned(Coder(), x(), method="encode")
    p.emit(folder)
    loaded: Any = runtime.load(folder)
    assert str(inspect.signature(loaded.encode)) == "(x, *, scale=1.5)"
    assert torch.equal(loaded.encode(x()), p.target.encode(x()))  # type: ignore[operator]
    with pytest.raises(PlannerError, match=r"Coder.encode for x float32\[3, 8\], and was called with x .*, scale 2.0"):
        loaded.encode(x(), scale=2.0)
    loaded.close()


# What is written.


def test_what_is_in_a_package(folder: Path) -> None:
    p = planned(Residual(), torch.randn(4, 32), machine="rtx-4090", least=True)
    p.emit(folder, max_shard_size="200KB")
    names = sorted(path.name for path in folder.iterdir())
    shards = [name for name in names if name.endswith(".safetensors")]
    assert names == ["plan.json", "program.py", *shards, "weights.safetensors.index.json"]
    assert shards[0] == f"weights-00001-of-{len(shards):05}.safetensors"
    assert len(shards) > 3
    assert all((folder / name).stat().st_size <= 200_000 + 8192 for name in shards)
    index = json.loads((folder / "weights.safetensors.index.json").read_text())
    state = p.target.state_dict()
    assert set(index["weight_map"]) == set(state)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in state.values())
    for name, file in index["weight_map"].items():
        with safe_open(folder / file, framework="pt") as shard:
            assert torch.equal(shard.get_tensor(name), state[name])
    assert (folder / "program.py").read_text() == PRELUDE + p.code
    mode = os.stat(folder / shards[0]).st_mode
    assert mode & 0o777 == os.stat(folder / "plan.json").st_mode & 0o777  # the user's own


def test_a_weight_larger_than_a_shard_is_alone(folder: Path) -> None:
    p = planned(Mlp(hidden=64), x())
    p.emit(folder, max_shard_size=1)
    assert len(list(folder.glob("*.safetensors"))) == 6
    assert torch.equal(runtime.load(folder)(x()), p.target(x()))
    with pytest.raises(PlannerError, match="max_shard_size"):
        p.emit(folder, max_shard_size="many")


def test_nothing_is_pickled(folder: Path) -> None:
    planned(Counter(), x()).emit(folder)
    for path in folder.iterdir():
        with pytest.raises((ValueError, UnicodeDecodeError)):
            list(pickletools.genops(path.read_bytes()))
        if path.suffix == ".json":
            json.loads(path.read_text())


def test_the_program_can_be_imported(folder: Path) -> None:
    p = planned(Mlp(), x())
    p.emit(folder)
    scope: dict[str, Any] = {"__name__": "program"}
    exec(compile((folder / "program.py").read_text(), "program.py", "exec"), scope)
    weights = type("W", (), {name.replace(".", "_"): value for name, value in p.target.state_dict().items()})
    assert torch.equal(scope["program"](None, weights, torch.device("cpu"), x())[0], p.target(x()))


def test_two_packages_of_one_plan_are_the_same_bytes(tmp_path: Path) -> None:
    p = planned(Mlp(), x(), least=True)
    p.emit(tmp_path / "one")
    p.emit(tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


# In a process of its own.

ALONE = """
import json, sys
import torch
torch.set_num_threads(1)
import runtime
m = runtime.load(sys.argv[1])
inputs = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    out = m(**inputs)
torch.save({"keys": list(out), "hidden": out.last_hidden_state, "first": out[0], "unset": out.attentions}, sys.argv[3])
names = {"planner", "passes", "transformers", "diffusers", "accelerate"}
foreign = sorted({name.partition(".")[0] for name in sys.modules} & names)
print(json.dumps({"peak": m.report().peak_bytes, "foreign": foreign, "class": repr(type(out)), "text": repr(out)[:40]}))
m.close()
"""


@pytest.fixture
def bert_plan() -> tuple[Plan, dict[str, Any]]:
    module, args, kwargs = ZOO["bert"]()
    p = plan(module, "1GB", inputs=args, kwargs=kwargs, device="accounting", machine="rtx-4090")
    return p.replan((p.minimum_bytes + p.unplanned_bytes) // 2), kwargs


def test_in_a_process_without_planner_and_libraries(
    bert_plan: tuple[Plan, dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    p, kwargs = bert_plan
    p.emit(folder)
    m = p.build()
    wanted = m(**kwargs)
    peak = m.report().peak_bytes
    p.restore()
    torch.save(kwargs, tmp_path / "in.pt")
    environment = {**os.environ, "PYTHONPATH": str(Path(runtime.__file__).parent.parent), "PYTHONWARNINGS": "error"}
    argv = [sys.executable, "-c", ALONE, str(folder), str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["foreign"] == []
    assert said["peak"] == peak == p.peak_bytes
    assert "runtime.structures.Output" in said["class"]
    assert said["text"].startswith(f"{type(wanted).__name__}"[:40])
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert found["keys"] == list(wanted)
    assert torch.equal(found["hidden"], wanted.last_hidden_state)
    assert torch.equal(found["first"], wanted[0])
    assert found["unset"] is None


# From the shell.


def test_from_the_shell(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "emit_factory.py").write_text(
        "from tests.planner.toys import Mlp, x\n\ndef make(): return Mlp().eval(), (x(),)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    argv = ["emit", "emit_factory:make", str(folder), "--budget", "1MB", "--device", "accounting"]
    assert main([*argv, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["folder"], data["weights"]) == (str(folder), "factory")
    assert data["package_bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    runtime.load(folder)(x())
    assert main(argv) == 0
    assert "runtime.load" in capsys.readouterr().out
    (folder / "notes").write_text("")
    assert main(argv) == 2
    assert "that folder is not empty" in capsys.readouterr().err
    assert main([*argv, "--reference"]) == 2
    assert "--reference is for a checkpoint folder" in capsys.readouterr().err
