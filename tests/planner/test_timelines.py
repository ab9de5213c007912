"""Timelines as files: what they say agrees with the proof, with the simulator, and with what is measured."""

from __future__ import annotations

import copy
import json
import pickle
import pickletools
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.cuda import _memory_viz

from planner import Plan, PlannerError, plan
from planner.memory_history import memory_history
from planner.memory_use import KINDS
from planner.timeline_files import predicted_events
from runtime.timeline import Copy, Stall, Timeline
from runtime.trace import COMPUTE, COPIES, MEASURED, PREDICTED, WAITS, bundle_label, measured_events, timeline_events
from tests.planner import toys
from tests.planner.routed import Branch, rows
from tests.planner.timelines import zoo_plans
from tests.planner.toys import Lookup, Mlp, planned, x
from tests.zoo import ZOO

DEVICES = [
    *((name, "accounting") for name in sorted(ZOO)),
    ("bert", "cuda"),
    ("wide", "cuda"),
    pytest.param("vae_decoder", "cuda", marks=pytest.mark.slow),
]
# What the visualiser's reader knows; another opcode, and it shows nothing.
OPCODES = {
    "PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "BINGET", "LONG_BINGET", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "APPEND",
    "APPENDS", "SETITEM", "SETITEMS", "SHORT_BINUNICODE", "BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
    "NEWTRUE", "NEWFALSE", "NONE", "TUPLE1", "TUPLE2", "TUPLE3",
}  # fmt: skip


@pytest.mark.parametrize(("name", "device"), DEVICES)
def test_memory_over_time_is_what_was_proved(name: str, device: str) -> None:
    for p in zoo_plans(name, device):
        use = p.memory_use
        total = use.total
        assert use.peak_bytes == total.max() == p.peak_bytes <= p.budget_bytes
        assert use.moments[use.peak].name == p.proof.peak_node
        assert sum(int(use.parts[kind][use.peak]) for kind in ("inputs", "activations")) == p.peak_parts["activations"]
        operators = {m.name: int(n) for m, n, wait in zip(use.moments, total, use.waits, strict=True) if not wait}
        assert list(operators) == list(p.problem.names)
        assert all(operators[node] == n for node, n in p.proof.live_bytes.items() if node in operators)
        assert all((use.parts[kind] >= 0).all() for kind in KINDS)


@pytest.mark.parametrize("name", sorted(ZOO))
def test_rows_follow_each_other_to_the_end_of_the_step(name: str) -> None:
    for p in zoo_plans(name):
        use = p.memory_use
        lasting = use.stops - use.starts
        assert use.starts[0] == 0
        assert (use.starts[1:] == use.stops[:-1]).all()
        assert use.stops[-1] == pytest.approx(p.step_seconds, rel=1e-9)
        assert use.waits.sum() == len(p.timeline.stalls)
        assert lasting[use.waits].sum() == pytest.approx(p.timeline.stall_seconds, rel=1e-9, abs=1e-15)
        assert lasting[~use.waits] == pytest.approx(p.problem.seconds, rel=1e-6, abs=1e-15)


class TestTraces:
    @pytest.mark.parametrize("name", sorted(ZOO))
    def test_lanes_and_counters(self, name: str) -> None:
        for p in zoo_plans(name):
            events = predicted_events(p)
            assert_valid(events)
            lanes = Counter(e["tid"] for e in events if e["ph"] == "X")
            assert lanes[COPIES] == p.bundle_count == len(p.timeline.copies)
            assert lanes[WAITS] == len(p.timeline.stalls)
            assert lanes[COMPUTE] == np.count_nonzero(p.problem.seconds)
            assert lanes.keys() <= {COMPUTE, COPIES, WAITS}
            live = [sum(e["args"].values()) for e in events if e["ph"] == "C" and e["name"] == "live bytes"]
            assert max(live) == p.peak_bytes <= p.budget_bytes
            waited = sum(e["dur"] for e in events if e["ph"] == "X" and e["tid"] == WAITS)
            assert waited == pytest.approx(p.timeline.stall_seconds * 1e6, abs=0.002 * (lanes[WAITS] + 1))

    def test_names(self, tmp_path: Path) -> None:
        p = zoo_plans("bert", allow=("offload",))[2]
        p.save_trace(tmp_path / "trace.json")
        data = json.loads((tmp_path / "trace.json").read_text())
        assert data["otherData"]["budget_bytes"] == p.budget_bytes
        spans = {e["name"]: e for e in data["traceEvents"] if e["ph"] == "X"}
        operator = spans["linear_5"]
        assert operator["args"]["module"] == "encoder.layer.0.output.dense"
        assert operator["args"]["operator"] == "aten.linear.default"
        assert operator["args"]["makes_bytes"] == 2 * 16 * 64 * 4
        copied = {name for e in spans.values() if e["cat"] == "copy" for name in e["args"]["weights"]}
        weights = p.emitted.weights
        assert copied == {weights[slot.weight].name for bundle in p.layout.bundles for slot in bundle.slots}
        assert {e["args"]["cause"] for e in spans.values() if e["cat"].startswith("wait")} == {"link", "space"}
        names = {e["args"]["name"] for e in data["traceEvents"] if e["name"] in ("thread_name", "process_name")}
        assert names == {"predicted: BertModel.forward on rtx-4090", "compute", "copies", "waits"}

    def test_measured_beside_predicted(self, tmp_path: Path) -> None:
        module, args, kwargs = ZOO["vit"]()
        p = plan(module, "1GB", inputs=args, kwargs=kwargs, device="accounting", machine="rtx-4090")
        p = p.replan(p.minimum_bytes)
        with pytest.raises(PlannerError, match="nothing was measured yet"):
            p.save_trace(tmp_path / "both.json", measured=True)
        p.build()(*args, **kwargs)
        p.save_trace(tmp_path / "both.json", measured=True)
        p.report().save_trace(tmp_path / "measured.json")
        both, alone = (json.loads((tmp_path / f"{n}.json").read_text())["traceEvents"] for n in ("both", "measured"))
        assert_valid(both)
        assert [e for e in both if e["pid"] == MEASURED] == alone
        assert {e["pid"] for e in both} == {PREDICTED, MEASURED}
        for lane in (COPIES, WAITS):  # the device's clock is the planned machine's
            mine, other = ([e for e in both if e["ph"] == "X" and (e["pid"], e["tid"]) == (pid, lane)] for pid in (1, 2))
            assert [(e["name"], e["args"]) for e in mine] == [(e["name"], e["args"]) for e in other]
            assert [e["ts"] for e in mine] == pytest.approx([e["ts"] for e in other], abs=0.002)
            assert mine
        computed = sum(e["dur"] for e in alone if e["ph"] == "X" and e["tid"] == COMPUTE)
        assert computed == pytest.approx(p.problem.compute_seconds * 1e6, rel=1e-3)
        p.restore()

    def test_measured_on_cpu(self, tmp_path: Path) -> None:
        p = plan(Mlp(hidden=4096).eval(), "1MB", inputs=(x(),), device="cpu", machine="rtx-4090")
        p = p.replan(p.minimum_bytes)
        built = p.build()
        for _ in range(2):
            built(x())
        p.save_trace(tmp_path / "both.json", measured=True)
        events = json.loads((tmp_path / "both.json").read_text())["traceEvents"]
        assert_valid(events)
        copied = [[e["name"] for e in events if e.get("cat") == "copy" and e["pid"] == pid] for pid in (PREDICTED, MEASURED)]
        assert sorted(copied[0]) == sorted(copied[1]) != []
        p.restore()

    def test_copies_that_overlap_get_lanes_of_their_own(self) -> None:
        copies = (Copy(0, 8, 0.0, 0.0, 2.0), Copy(1, 8, 0.0, 1.0, 3.0), Copy(2, 8, 0.0, 2.0, 4.0))
        timeline = Timeline(5.0, copies, (Stall(1, 2.5, 3.0, "link"),), ())
        events = measured_events(timeline, ())
        assert_valid(events)
        assert len({e["tid"] for e in events if e["ph"] == "X" and e["cat"] == "copy"}) == 2
        assert {"copies", "copies (2)"} <= {e["args"].get("name") for e in events if e["ph"] == "M"}
        assert [(e["ts"], e["dur"]) for e in events if e.get("cat") == "compute"] == [(0.0, 2.5e6), (3e6, 2e6)]
        assert next(e["name"] for e in timeline_events(1, "", timeline, ()) if e["ph"] == "X") == "bundle 0"

    def test_what_bundles_are_called(self) -> None:
        assert bundle_label(["a.b.weight"]) == "a.b.weight"
        assert bundle_label(["a.b.weight", "a.b.bias", "a.c"]) == "3 weights of a"
        assert bundle_label(["up.weight", "down.weight"]) == "2 weights from up.weight on"

    def test_no_timeline(self, tmp_path: Path) -> None:
        p = planned(Mlp().eval(), x())
        p.build()(x())
        report = replace(p.report(), timeline=None)
        with pytest.raises(PlannerError, match="no timeline"):
            report.save_trace(tmp_path / "trace.json")
        assert not list(tmp_path.iterdir())
        assert "Timeline" not in repr(p.report())
        p.restore()


def assert_valid(events: list[dict[str, Any]]) -> None:
    """The Trace Event Format, and no two spans of one lane overlap."""
    lanes: dict[tuple[int, int], list[tuple[float, float]]] = {}
    named = {(e["pid"], e["tid"]) for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    for event in events:
        assert event["ph"] in ("X", "C", "M")
        assert {"pid", "tid", "name", "ts", "args"} <= event.keys()
        assert event["ts"] >= 0
        if event["ph"] == "X":
            assert event["dur"] >= 0
            assert (event["pid"], event["tid"]) in named
            lanes.setdefault((event["pid"], event["tid"]), []).append((event["ts"], round(event["ts"] + event["dur"], 3)))
    for spans in lanes.values():
        assert all(one[1] <= other[0] for one, other in pairwise(sorted(spans)))


class TestHistories:
    @pytest.mark.parametrize(("name", "device"), DEVICES)
    def test_peak_and_reserved(self, name: str, device: str) -> None:
        for p in zoo_plans(name, device):
            live, reserved = peaks(memory_history(p))
            assert live == p.peak_bytes
            assert reserved <= p.reserved_bytes
            assert reserved >= sum(p.layout.pools)
            if device == "accounting":  # each storage is a segment of its own
                assert reserved == live

    @pytest.mark.parametrize(("name", "device"), [("bert", "accounting"), ("wide", "cuda")])
    def test_the_visualiser_reads_it(self, tmp_path: Path, name: str, device: str) -> None:
        for p in zoo_plans(name, device):
            p.save_memory_history(tmp_path / "history.pickle")
            written = (tmp_path / "history.pickle").read_bytes()
            assert {opcode.name for opcode, _, _ in pickletools.genops(written)} <= OPCODES
            history = pickle.loads(written)
            assert "cudaMalloc" in _memory_viz.trace(copy.deepcopy(history))
            assert "total_reserved" in _memory_viz.segsum(history)  # checks that the blocks of a segment fill it
            assert "Active Memory Timeline" in _memory_viz.trace_plot(history)
            stacks = _memory_viz.memory(history, format_flamegraph=str)
            assert f"input 0 {p.problem.liveness.input_storages[0]}\n" in stacks

    @pytest.mark.parametrize(("name", "device"), [("bert", "accounting"), ("flux", "accounting"), ("wide", "cuda")])
    def test_events_lie_in_segments_and_the_end_is_the_snapshot(self, name: str, device: str) -> None:
        for p in zoo_plans(name, device):
            history = memory_history(p)
            segments, blocks = replay(history)
            assert {s["address"]: s["total_size"] for s in history["segments"]} == segments
            active = {
                b["address"]: b["requested_size"]
                for s in history["segments"]
                for b in s["blocks"]
                if "inactive" not in b["state"]
            }
            assert active == blocks
            assert "unknown" in {e["category"] for e in history["device_traces"][0]}  # or the visualiser stumbles
            times = [e["time_us"] for e in history["device_traces"][0]]
            assert times == sorted(times)

    def test_frames_name_operator_and_modules(self) -> None:
        p = zoo_plans("bert", allow=("offload",))[2]
        events = memory_history(p)["device_traces"][0]
        made = [e["frames"] for e in events if e["action"] == "alloc" and e["frames"][0]["name"].startswith("linear_5 ")]
        assert [f["name"] for f in made[0]] == [
            "linear_5 aten.linear.default",
            "dense",
            "output",
            "0",
            "layer",
            "encoder",
            "BertModel.forward",
        ]
        assert made[0][0]["filename"] == "encoder.layer.0.output.dense"
        bundles = {e["frames"][0]["name"] for e in events if e["action"] == "alloc" and e["category"] == "staging"}
        assert len(bundles) == p.bundle_count
        assert any("2 weights of encoder.layer.0.output.dense" in name for name in bundles)

    def test_state_and_a_static_arena(self) -> None:
        counter = planned(toys.Counter(), x(), least=True)
        assert peaks(memory_history(counter))[0] == counter.peak_bytes
        assert any("state count" in e["frames"][0]["name"] for e in memory_history(counter)["device_traces"][0] if e["frames"])
        tied = planned(Lookup().eval(), torch.tensor([[1, 2]]), least=True)
        assert peaks(memory_history(tied))[0] == tied.peak_bytes


def replay(history: dict[str, Any]) -> tuple[dict[int, int], dict[int, int]]:
    """Segments and blocks after the events, which never name what is not there."""
    segments: dict[int, int] = {}
    blocks: dict[int, int] = {}
    requested: set[int] = set()
    for event in history["device_traces"][0]:
        at, nbytes = event["addr"], event["size"]
        match event["action"]:
            case "segment_alloc":
                assert at not in segments
                segments[at] = nbytes
            case "segment_free":
                assert segments.pop(at) == nbytes
                assert not any(at <= block < at + nbytes for block in blocks)
            case "alloc":
                assert any(start <= at and at + nbytes <= start + size for start, size in segments.items())
                assert at not in blocks
                blocks[at] = nbytes
            case "free_requested":
                assert blocks[at] == nbytes
                requested.add(at)
            case "free_completed":
                requested.remove(at)
                assert blocks.pop(at) == nbytes
            case other:
                assert other == "snapshot"
    assert not requested
    return segments, blocks


def peaks(history: dict[str, Any]) -> tuple[int, int]:
    """The most bytes allocated, and the most in segments."""
    signs = {"alloc": (1, 0), "free_completed": (-1, 0), "segment_alloc": (0, 1), "segment_free": (0, -1)}
    changes = [(np.array(signs.get(e["action"], (0, 0))) * e["size"]) for e in history["device_traces"][0]]
    live, reserved = np.cumsum(changes, axis=0).max(axis=0)
    return int(live), int(reserved)


class TestFiles:
    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        p = planned(Mlp().eval(), x())
        for save in (p.save_trace, p.save_memory_history):
            with pytest.raises(PlannerError, match="no such folder; make it first"):
                save(tmp_path / "nowhere" / "file")
            with pytest.raises(PlannerError, match="that is a folder"):
                save(tmp_path)

    def test_nothing_is_left_of_a_failed_save(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        p, path = planned(Mlp().eval(), x()), tmp_path / "trace.json"
        p.save_trace(path)
        before = path.read_bytes()

        def fails(*args: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("runtime.write_file.os.replace", fails)
        for save in (p.save_trace, p.save_memory_history):
            with pytest.raises(PlannerError, match="No space left on device; give another path"):
                save(path)
        assert [entry.name for entry in tmp_path.iterdir()] == ["trace.json"]
        assert path.read_bytes() == before

    def test_the_same_plan_gives_the_same_bytes(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            p = planned(Mlp().eval(), x(), least=True)
            p.save_trace(tmp_path / f"{name}.json")
            p.save_memory_history(tmp_path / f"{name}.pickle")
        assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
        assert (tmp_path / "a.pickle").read_bytes() == (tmp_path / "b.pickle").read_bytes()


def test_a_plan_in_parts_says_where_timelines_are(tmp_path: Path) -> None:
    p = plan(Branch().eval(), "1GB", inputs=(rows(),), device="accounting")
    part = next(iter(p.parts))  # type: ignore[attr-defined]
    for name in ("save_trace", "save_memory_history", "plot"):
        with pytest.raises(PlannerError, match="no timeline of its own") as caught:
            getattr(p, name)(tmp_path / "file.png")
        assert f"p.parts[{part!r}].{name}(" in str(caught.value)
        getattr(p.parts[part], name)(tmp_path / "file.png")  # type: ignore[attr-defined]
    for name in ("timeline", "memory_use", "engines"):
        with pytest.raises(AttributeError, match=f"no {name!r} of its own"):
            getattr(p, name)


def test_dynamic_sizes_are_drawn_at_the_largest() -> None:
    p: Plan = plan(Mlp().eval(), "1MB", inputs=(x(3),), device="accounting", dynamic={"x": {0: "batch"}})
    p = p.replan(p.minimum_bytes)
    assert p.memory_use.peak_bytes == p.peak_bytes
    assert peaks(memory_history(p))[0] == p.peak_bytes
