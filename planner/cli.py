"""`vramplan`: look at plan files and machine models from the shell."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from importlib.metadata import version

from planner.machine import Machine
from planner.plan_file import read_plan
from planner.sizes import format_bytes
from runtime.errors import PlannerError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; 0 on success, 2 for anything the user can put right (printed without a traceback)."""
    parser = argparse.ArgumentParser(prog="vramplan", description="PyTorch programs within a byte budget.")
    parser.add_argument("--version", action="version", version=f"vramplan {version('vramplan')}")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="say what a plan file decides")
    show.add_argument("file")
    show.add_argument("--json", action="store_true")
    machines = commands.add_parser("machines", help="list machine models")
    machines.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    try:
        print(_show(arguments.file, arguments.json) if arguments.command == "show" else _machines(arguments.json))
    except PlannerError as error:
        print(f"vramplan: {error}", file=sys.stderr)
        return 2
    return 0


def _show(path: str, as_json: bool) -> str:
    data = read_plan(path)
    if as_json:
        return json.dumps(data)
    streams = data["decisions"]["streams"]
    lines = [
        f"{data['program']} on {data['device']}, planned for {data['machine']['name']}",
        f"  budget    {format_bytes(data['budget']['device_bytes'])}",
        f"  program   {len(data['fingerprint'])} nodes",
        f"  streams   {len(streams)} bundles through the {data['decisions']['staging']}",
    ]
    lines += [f"    before {s['prefetch']} for {s['first']}: {', '.join(s['weights'])}" for s in streams]
    return "\n".join(lines)


def _machines(as_json: bool) -> str:
    machines = [Machine.preset(name) for name in Machine.names()]
    if as_json:
        return json.dumps([dataclasses.asdict(m) for m in machines])
    rows = [f"{m.name:<14} {format_bytes(m.capacity_bytes):>8}  link {m.link_bandwidth / 1e9:>5.1f} GB/s" for m in machines]
    return "\n".join(rows)
