"""Machines: presets are complete and plausible, files round trip, and everything impossible names its field."""

import inspect
import json
import math
import pickle
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from planner.machine import Machine, MachineError
from runtime.errors import PlannerError

DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int8")
RTX_4090 = Machine.preset("rtx-4090")


def test_names() -> None:
    assert Machine.names() == (
        *("rtx-3060", "rtx-4060-ti", "rtx-4070", "rtx-4090", "rtx-5090"),
        *("t4", "l4", "a10g", "a100-80gb", "h100", "h200", "cpu"),
    )


@pytest.mark.parametrize("name", Machine.names())
def test_presets_are_complete_and_plausible(name: str) -> None:
    machine = Machine.preset(name)
    assert machine.name == name
    assert machine.description
    assert set(machine.flops) == set(DTYPES)
    assert machine.flops["float32"] <= machine.flops["bfloat16"] <= machine.flops["int8"]
    assert 10**9 < machine.capacity_bytes < 10**12
    assert machine.pageable_bandwidth <= machine.link_bandwidth < machine.memory_bandwidth < machine.flops["float32"]
    assert 0 < machine.launch_seconds < 1e-4
    assert (machine.capability is None) == (name == "cpu")


@pytest.mark.parametrize(
    ("name", "link", "bfloat16"),
    [
        ("t4", 11.3e9, 8.1e12),
        ("rtx-4060-ti", 12.5e9, 44e12),
        ("rtx-4090", 25e9, 165e12),
        ("rtx-5090", 55e9, 210e12),
        ("a100-80gb", 25e9, 312e12),
    ],
)
def test_preset_values(name: str, link: float, bfloat16: float) -> None:
    machine = Machine.preset(name)
    assert (machine.link_bandwidth, machine.flops["bfloat16"]) == (link, bfloat16)


FACTS = {  # capacity GB, memory GB/s, dense half-precision TFLOP/s, link GB/s: published or measured, see machines.toml
    "rtx-3060": (12, 360, 25.6, 25), "rtx-4060-ti": (16, 288, 44, 12.5), "rtx-4070": (12, 504, 58, 25),
    "rtx-4090": (24, 1008, 165, 25), "rtx-5090": (32, 1792, 210, 55), "t4": (16, 320, 65, 11.3), "l4": (24, 300, 121, 25),
    "a10g": (24, 600, 70, 25), "a100-80gb": (80, 2039, 312, 25), "h100": (80, 3350, 750, 55), "h200": (141, 4300, 780, 55),
}  # fmt: skip


@pytest.mark.parametrize("name", FACTS)
def test_presets_say_what_is_known_of_the_cards(name: str) -> None:
    m = Machine.preset(name)
    got = (m.capacity_bytes / 1e9, m.memory_bandwidth / 1e9, m.flops["float16"] / 1e12, m.link_bandwidth / 1e9)
    assert got == pytest.approx(FACTS[name])
    assert set(FACTS) == set(Machine.names()) - {"cpu"}


def test_unknown_preset_lists_close_names() -> None:
    with pytest.raises(MachineError) as caught:
        Machine.preset("RTX 4091")
    message = str(caught.value)
    assert message.startswith("no machine is called 'RTX 4091'; did you mean 'rtx-4090' or ")
    assert "Write Machine.preset('rtx-4090'), or Machine.load(path) for one of your own." in message
    assert isinstance(caught.value, PlannerError)


def test_unknown_preset_without_a_close_name_lists_all() -> None:
    with pytest.raises(MachineError, match=r"no machine is called 'zzz'; known are rtx-3060, .*, h200, cpu\. Write"):
        Machine.preset("zzz")


def test_copy_seconds() -> None:
    machine = replace(RTX_4090, link_bandwidth=10.0, link_latency_seconds=3.0)
    assert machine.copy_seconds(40) == 7.0
    assert machine.copy_seconds(0) == 3.0


def test_copies_between_measured_sizes_are_interpolated() -> None:
    machine = replace(RTX_4090, link_latency_seconds=1.0, link_seconds=((100, 2.0), (200, 4.0), (1000, 5.0)))
    assert [machine.copy_seconds(n) for n in (0, 50, 100, 150, 200, 600, 1000, 2000)] == [1, 1.5, 2, 3, 4, 4.5, 5, 10]
    assert machine.link_peak_bandwidth == 200.0
    assert RTX_4090.link_peak_bandwidth == RTX_4090.link_bandwidth


SECONDS = st.floats(1e-9, 1e3)
LINKS = st.dictionaries(st.integers(1, 10**11), SECONDS, max_size=6).map(
    lambda points: tuple(zip(sorted(points), sorted(points.values()), strict=True))
)


@given(LINKS, st.floats(0, 1.0), st.floats(1.0, 1e12), st.lists(st.integers(0, 10**12), min_size=2, max_size=20))
def test_more_bytes_never_take_less_time_and_none_beats_the_peak(
    points: tuple[tuple[int, float], ...], latency: float, bandwidth: float, sizes: list[int]
) -> None:
    machine = replace(RTX_4090, link_seconds=points, link_latency_seconds=latency, link_bandwidth=bandwidth)
    sizes = sorted([*sizes, *(n + d for n, _ in points for d in (-1, 0, 1))])
    seconds = [machine.copy_seconds(n) for n in sizes]
    assert seconds == sorted(seconds)
    assert all(0 <= s < math.inf for s in seconds)
    for nbytes, taken in zip(sizes, seconds, strict=True):
        assert nbytes / machine.link_peak_bandwidth <= taken * (1 + 1e-12)
    assert dict(points).items() <= dict(zip(sizes, seconds, strict=True)).items()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (7, "link_seconds must be pairs of bytes and seconds such as ((65536, 1.3e-5), (1048576, 5e-5)), not 7."),
        (((1.5, 1.0),), "link_seconds must be pairs of bytes and seconds such as ((65536, 1.3e-5), (1048576, 5e-5)), not "
                        "((1.5, 1.0),)."),
        (((5, 0.0),), "link_seconds at 5 bytes must be a positive number, not 0.0."),
        (((5, math.inf),), "link_seconds at 5 bytes must be a positive number, not inf."),
        (((5, 2.0), (5, 3.0)), "link_seconds must ascend: (5, 3.0) comes after (5, 2.0). More bytes take as long or longer."),
        (((5, 2.0), (6, 1.0)), "link_seconds must ascend: (6, 1.0) comes after (5, 2.0). More bytes take as long or longer."),
        (((0, 2.0),), "link_seconds must ascend: (0, 2.0) comes after (0, 0.0). More bytes take as long or longer."),
    ],
)  # fmt: skip
def test_measured_copies_are_checked(value: Any, message: str) -> None:
    with pytest.raises(MachineError) as caught:
        replace(RTX_4090, link_seconds=value)
    assert str(caught.value) == f"machine 'rtx-4090': {message}"


def test_on_a_cpu_the_link_is_the_disk() -> None:
    card = replace(RTX_4090, link_seconds=((100, 1.0),))
    assert card.on("cuda:1") is card.on("accounting") is card
    disk = card.on("cpu")
    assert (disk.link_bandwidth, disk.link_seconds) == (card.disk_bandwidth, ())
    calibrated = replace(Machine.preset("cpu"), link_seconds=((100, 1.0),))
    assert calibrated.on("cpu") is calibrated  # what was measured is the disk


def test_a_machine_is_a_value() -> None:
    rates = {"float32": 1.0}
    machine = replace(RTX_4090, flops=rates)
    rates["float32"] = 2.0
    assert machine.flops["float32"] == 1.0
    assert hash(RTX_4090) == hash(Machine.preset("rtx-4090"))
    assert pickle.loads(pickle.dumps(machine)) == machine


@pytest.mark.parametrize("field", ["memory_bandwidth", "link_bandwidth", "pageable_bandwidth", "disk_bandwidth"])
@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, True, "fast", None])
def test_rates_are_positive(field: str, value: Any) -> None:
    with pytest.raises(MachineError) as caught:
        replace(RTX_4090, **{field: value})
    assert str(caught.value) == f"machine 'rtx-4090': {field} must be a positive number, not {value!r}."


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("launch_seconds", -1.0, "launch_seconds must be zero or a positive number, not -1.0."),
        ("link_latency_seconds", math.nan, "link_latency_seconds must be zero or a positive number, not nan."),
        ("capacity_bytes", 0, "capacity_bytes must be a positive number, not 0."),
        ("capacity_bytes", 1.5, "capacity_bytes must be an integer, not 1.5."),
        ("capacity_bytes", True, "capacity_bytes must be a positive number, not True."),
        ("flops", {"float32": 1.0, "int8": 0.0}, "flops['int8'] must be a positive number, not 0.0."),
        (
            "flops",
            {"int8": 1.0},
            "flops must map dtype names to FLOP/s and have 'float32', not {'int8': 1.0}. "
            'Write for example flops={"float32": 12.7e12, "bfloat16": 25.6e12}.',
        ),
        (
            "flops",
            7,
            "flops must map dtype names to FLOP/s and have 'float32', not 7. "
            'Write for example flops={"float32": 12.7e12, "bfloat16": 25.6e12}.',
        ),
        ("capability", (8,), "capability must be two integers such as (8, 9), not (8,)."),
        ("capability", "8.9", "capability must be two integers such as (8, 9), not '8.9'."),
    ],
)
def test_other_fields_are_checked(field: str, value: Any, message: str) -> None:
    with pytest.raises(MachineError) as caught:
        replace(RTX_4090, **{field: value})
    assert str(caught.value) == f"machine 'rtx-4090': {message}"


def test_names_are_text() -> None:
    with pytest.raises(MachineError, match=r"^machine: name must be text, not 7\.$"):
        replace(RTX_4090, name=7)  # type: ignore[arg-type]


def test_no_launch_cost_is_allowed() -> None:
    assert replace(RTX_4090, launch_seconds=0, link_latency_seconds=0).copy_seconds(0) == 0


POSITIVE = st.floats(min_value=1e-300, max_value=1e300)


@given(
    numbers=st.tuples(*[POSITIVE] * 6),
    capacity=st.integers(1, 2**62),
    flops=st.dictionaries(st.sampled_from(DTYPES), POSITIVE).flatmap(
        lambda rates: POSITIVE.map(lambda rate: {**rates, "float32": rate})
    ),
    name=st.text(max_size=10).filter(str.isprintable),
    capability=st.none() | st.tuples(st.integers(0, 12), st.integers(0, 9)),
    points=LINKS,
)
def test_files_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    numbers: tuple[float, ...],
    capacity: int,
    flops: dict[str, float],
    name: str,
    capability: tuple[int, int] | None,
    points: tuple[tuple[int, float], ...],
) -> None:
    bandwidth, launch, link, latency, pageable, disk = numbers
    machine = Machine(name, "", capacity, bandwidth, flops, launch, link, latency, pageable, disk, capability, points)
    path = tmp_path_factory.mktemp("machine") / "machine.json"
    machine.save(path)
    assert Machine.load(path) == machine


def _edited(tmp_path: Path, **changes: Any) -> Path:
    """The file of a good machine with some of its entries replaced."""
    path = tmp_path / "machine.json"
    RTX_4090.save(path)
    document = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version 2; this release reads version 1. Write it again with Machine.save(path)."),
        ({"format": "other"}, "not a machine file. Write it with Machine.save(path)."),
        ({"machine": [1]}, "the machine must be a table of fields, not [1]."),
        (
            {"machine": {"name": "x", "colour": 1}},
            "the machine lacks capacity_bytes, description, disk_bandwidth, flops, launch_seconds, link_bandwidth, "
            "link_latency_seconds, memory_bandwidth, pageable_bandwidth and has the unknown colour; the fields are "
            "capability, capacity_bytes, channels_last, description, disk_bandwidth, flops, launch_seconds, link_bandwidth, "
            "link_latency_seconds, link_seconds, memory_bandwidth, name, pageable_bandwidth.",
        ),
    ],
)
def test_load_refuses(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = _edited(tmp_path, **changes)
    with pytest.raises(MachineError) as caught:
        Machine.load(path)
    assert str(caught.value) == f"{path}: {message}"


def test_load_refuses_what_is_not_json(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    path.write_text("name = 3", encoding="utf-8")
    with pytest.raises(MachineError, match=r"machine\.json: not JSON \(.*\)\. Write it with Machine\.save\(path\)\."):
        Machine.load(path)


BY_HAND = """
name = "rtx-3060-x4"
description = "GeForce RTX 3060 in a riser, PCIe gen3 x4"
capacity_bytes = 12_000_000_000
memory_bandwidth = 3.6e11
flops = { float32 = 1.27e13, bfloat16 = 2.56e13, float16 = 2.56e13 }
launch_seconds = 4e-6
link_bandwidth = 2.8e9
link_latency_seconds = 10e-6
pageable_bandwidth = 2.0e9
disk_bandwidth = 3.4e9
capability = [8, 6]
link_seconds = [[65536, 3.5e-5], [1048576, 3.9e-4], [67108864, 0.0241]]
"""


def test_a_machine_by_hand(tmp_path: Path) -> None:
    assert inspect.cleandoc(BY_HAND) in inspect.cleandoc(Machine.__doc__ or "").replace(
        "\n    ", "\n"
    )  # where it is documented
    toml, by_json = tmp_path / "mine.toml", tmp_path / "mine.json"
    toml.write_text(BY_HAND)
    machine = Machine.load(toml)
    assert machine.link_seconds[0] == (65536, 3.5e-5)
    by_json.write_text(json.dumps(tomllib.loads(BY_HAND)))
    assert Machine.load(by_json) == Machine.of(str(toml)) == Machine.of(toml) == Machine.of(machine) == machine
    toml.write_text('name = "x"\n')
    with pytest.raises(MachineError, match=r"mine\.toml: the machine lacks capacity_bytes, .* the fields are capability, "):
        Machine.load(toml)
    toml.write_text("name = ")
    with pytest.raises(MachineError, match=r"mine\.toml: not TOML \("):
        Machine.load(toml)


def test_what_is_no_machine() -> None:
    with pytest.raises(MachineError, match=r"^nowhere/mine\.toml: the machine cannot be read: No such file .*help\(Machine\)"):
        Machine.of("nowhere/mine.toml")
    with pytest.raises(MachineError, match="no machine is called 'rtx-4091'; did you mean"):
        Machine.of("rtx-4091")
    with pytest.raises(MachineError, match=r"machine=5 is no machine: write machine='rtx-4090'"):
        Machine.of(5)  # type: ignore[arg-type]


def test_save_writes_json_or_says_why_not(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"mine\.toml: save writes JSON\. Write machine\.save\('.*mine\.json'\)\."):
        RTX_4090.save(tmp_path / "mine.toml")
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match=r"the machine cannot be written: "):
        RTX_4090.save(tmp_path / "file" / "mine.json")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("device", ["cpu", "accounting"])
def test_detect_cpu_takes_the_physical_ram(device: str) -> None:
    machine = Machine.detect(device)
    assert machine.capacity_bytes > 2**28
    assert replace(machine, capacity_bytes=1) == replace(Machine.preset("cpu"), capacity_bytes=1)


def test_detect_refuses_an_unknown_device() -> None:
    with pytest.raises(MachineError, match=r"""^unknown device 'tpu'; known are "cuda", "cuda:1", "cpu" and "acc"""):
        Machine.detect("tpu")


def test_detect_without_cuda_points_at_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MachineError) as caught:
        Machine.detect("cuda")
    assert str(caught.value) == (
        "this machine has no CUDA device that PyTorch can use. "
        'To plan for one that is elsewhere, name it: machine="rtx-4090" (see Machine.names()).'
    )


def _pretend(monkeypatch: pytest.MonkeyPatch, **properties: Any) -> None:
    """Let PyTorch report one CUDA device with these properties."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: SimpleNamespace(**properties))


@pytest.mark.parametrize(
    ("reported", "preset"),
    [("NVIDIA GeForce RTX 4090", "rtx-4090"), ("Tesla T4", "t4"), ("NVIDIA H200", "h200")],
)
def test_detect_takes_the_preset_that_names_the_device(monkeypatch: pytest.MonkeyPatch, reported: str, preset: str) -> None:
    _pretend(monkeypatch, name=reported, total_memory=12345)
    assert Machine.detect("cuda") == replace(Machine.preset(preset), capacity_bytes=12345)


def test_detect_builds_an_unknown_device_from_its_properties(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(
        monkeypatch,
        name="NVIDIA GeForce RTX 4070 Ti",
        total_memory=12 * 2**30,
        major=8,
        minor=9,
        multi_processor_count=60,
        clock_rate=2_610_000,
        memory_clock_rate=10_501_000,
        memory_bus_width=192,
    )
    machine = Machine.detect("cuda:0")
    assert machine.name == "nvidia-geforce-rtx-4070-ti"
    assert machine.capability == (8, 9)
    assert machine.memory_bandwidth == pytest.approx(504e9, rel=1e-3)
    assert machine.flops["float32"] == pytest.approx(40.1e12, rel=1e-2)
    assert machine.flops["bfloat16"] == 2 * machine.flops["float32"]
    assert machine.description == (
        "NVIDIA GeForce RTX 4070 Ti, built from the driver's properties; "
        "assumed: half precision at 2 times the float32 rate, a PCIe gen4 x16 link"
    )


def test_detect_states_what_it_assumes_where_the_driver_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, name="Quadro X", total_memory=2**33, major=6, minor=1, multi_processor_count=10)
    machine = Machine.detect("cuda")
    assert machine.flops["bfloat16"] == machine.flops["float16"] == machine.flops["float32"]
    assert machine.description.endswith(
        "assumed: a clock of 1.5 GHz, a memory bandwidth of 300 GB/s, "
        "half precision at 1 times the float32 rate, a PCIe gen3 x16 link"
    )


def test_detect_refuses_an_index_beyond_the_last_device(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch)
    with pytest.raises(MachineError, match=r"^there is no device 'cuda:3': this machine has 1\.$"):
        Machine.detect("cuda:3")


def test_the_link_of_a_cpu_is_its_disk() -> None:
    machine = Machine.preset("cpu")
    assert machine.link_bandwidth == machine.disk_bandwidth == machine.pageable_bandwidth
