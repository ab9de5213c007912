"""`vramplan calibrate`."""

from __future__ import annotations

import dataclasses
from argparse import Namespace

import torch

from planner.cli.commands import Answer
from planner.machine import Machine
from planner.measure_machine import calibrate
from planner.show import wrap
from planner.sizes import format_bytes, format_seconds


def run(arguments: Namespace) -> Answer:
    """Measures the device and says what was found and where it is kept."""
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    found = calibrate(device)
    data = {"device": device, "file": str(found.file), "machine": dataclasses.asdict(found.machine)}
    return Answer(f"{describe_machine(found.machine)}\nkept as {found.file}", data)


def describe_machine(machine: Machine) -> str:
    """Every rate in words."""
    flops = ", ".join(f"{dtype} {_rate(rate, 'FLOP/s')}" for dtype, rate in machine.flops.items())
    copies = ", ".join(f"{format_bytes(n)} in {format_seconds(s)}" for n, s in machine.link_seconds)
    rows = [
        ("capacity", format_bytes(machine.capacity_bytes)),
        ("memory", _rate(machine.memory_bandwidth, "B/s")),
        ("products", flops),
        ("launch", format_seconds(machine.launch_seconds)),
        ("link", f"at most {_rate(machine.link_peak_bandwidth, 'B/s')}" + (f": {copies}" if copies else "")),
        ("pageable", _rate(machine.pageable_bandwidth, "B/s")),
        ("disk", _rate(machine.disk_bandwidth, "B/s")),
    ]
    return "\n".join([f"{machine.name}: {machine.description}", *(line for row in rows for line in wrap(*row))])


def _rate(value: float, unit: str) -> str:
    for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"
