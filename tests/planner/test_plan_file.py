"""Plan files: what is loaded is what was saved, nothing half-written, no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from planner import Machine, Plan, PlanFileError, plan
from planner.plan_file import fingerprint
from tests.planner.toys import Box, Counter, Mlp, Unboxes, planned, x
from tests.zoo import ZOO


@pytest.mark.parametrize("name", ["vit", "lstm"])
@pytest.mark.parametrize("device", ["accounting", "cuda"])
def test_round_trip(tmp_path: Path, name: str, device: str) -> None:
    module, args, kwargs = ZOO[name]()
    machine = Machine.preset("rtx-4090")
    made = plan(module, "1GB", inputs=args, kwargs=kwargs, device=device, machine=machine)
    for p in (made, made.replan((made.minimum_bytes + made.unplanned_bytes) // 2), made.replan(made.minimum_bytes)):
        p.save(tmp_path / "p.json")
        loaded = Plan.load(tmp_path / "p.json", module)
        assert loaded == p
        assert loaded.code == p.code
        assert (loaded.peak_bytes, loaded.step_seconds, loaded.minimum_bytes) == (
            p.peak_bytes, p.step_seconds, p.minimum_bytes,
        )  # fmt: skip
        assert str(loaded) == str(p)


def test_a_loaded_plan_runs(tmp_path: Path) -> None:
    module = Mlp().eval()
    planned(module, x(), least=True).save(tmp_path / "p.json")
    other = Mlp().eval()
    loaded = Plan.load(tmp_path / "p.json", other)
    built = loaded.build()
    assert torch.equal(built(x()), other(x()))
    assert built.report().peak_bytes == loaded.peak_bytes
    assert torch.equal(built(x(3).repeat(1, 1)), other(x(3)))


def test_constraints_survive(tmp_path: Path) -> None:
    module = Mlp(hidden=64).eval()
    made = planned(module, x(), keep={"up.*": {"resident": True}}, least=True)
    made.save(tmp_path / "p.json")
    loaded = Plan.load(tmp_path / "p.json", module)
    assert loaded.replan(made.minimum_bytes) == made
    assert "w_up_weight" in {s.weight for s in loaded.layout.resident}
    pinned = planned(module, x(), allow=("tile",))
    pinned.save(tmp_path / "p.json")
    assert Plan.load(tmp_path / "p.json", module).minimum_bytes == pinned.minimum_bytes == pinned.unplanned_bytes


def test_the_file_is_small_json_without_weights(tmp_path: Path) -> None:
    module = Mlp(hidden=4096).eval()
    planned(module, x(), budget="1GB", least=True).save(tmp_path / "p.json")
    text = (tmp_path / "p.json").read_text()
    assert len(text) < 20_000 < sum(p.nbytes for p in module.parameters())
    data = json.loads(text)
    assert set(data) == {
        "format", "version", "program", "method", "device", "budget", "machine", "call", "keep", "offload", "tile", "decisions",
        "fingerprint", "opaque_bytes", "repeats",
    }  # fmt: skip


def test_nothing_is_left_of_a_failed_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, path = planned(Mlp(), x()), tmp_path / "p.json"
    made.save(path)
    before = path.read_bytes()

    def fails(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("planner.plan_file.os.replace", fails)
    with pytest.raises(OSError, match="disk full"):
        made.replan(made.minimum_bytes).save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["p.json"]
    assert path.read_bytes() == before
    with pytest.raises(OSError, match="No such file"):
        made.save(tmp_path / "nowhere" / "p.json")


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    planned(Mlp(), x()).save(tmp_path / "a.json")
    planned(Mlp(), x()).save(str(tmp_path / "b.json"))
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_inputs_that_json_cannot_hold(tmp_path: Path) -> None:
    module = Unboxes().eval()
    inputs = (Box(x()),)
    planned(module, *inputs).save(tmp_path / "p.json")
    with pytest.raises(PlanFileError, match=r"Plan\.load\(path, model, inputs="):
        Plan.load(tmp_path / "p.json", module)
    assert Plan.load(tmp_path / "p.json", module, inputs=inputs) == planned(module, *inputs)


def test_fingerprint_is_of_the_program_and_not_of_the_values() -> None:
    torch.manual_seed(1)
    one = planned(Counter(), x()).program
    torch.manual_seed(2)
    two = planned(Counter(), x()).program
    assert fingerprint(one) == fingerprint(two)
    assert fingerprint(one) != fingerprint(planned(Counter(), x(4)).program)
