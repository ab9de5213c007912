"""`python -m tests.survey`: see `tests.survey`."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers or diffusers are imported
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import fnmatch
import importlib
import json
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.survey.run import Case, Row, examine

HERE = Path(__file__).parent
GOOD = ("equal", "random", "export")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.survey", description=__doc__)
    parser.add_argument("--only", default="*", help="names or classes that match this pattern, such as '*bert*'")
    parser.add_argument("--library", choices=("transformers", "diffusers"), help="one library only")
    parser.add_argument("--jobs", type=int, default=2, help="how many models at a time (default 2)")
    parser.add_argument("--limit", type=int, default=120, help="processor seconds for one model (default 120)")
    parser.add_argument("--redo", help="only those that came out like this last time, such as 'eager,refused,timeout'")
    parser.add_argument("--update", action="store_true", help="write results.md and results.json, which are the expectations")
    parser.add_argument("--json", type=Path, help="write what came out to this file too")
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    chosen = [c for c in all_cases(options.library) if fnmatch.fnmatch(c.name, options.only)]
    if options.redo:
        last = _read()
        chosen = [c for c in chosen if last.get(f"{c.library}/{c.name}", "new") in options.redo.split(",")]
    before = _read()
    rows = run_all(chosen, options.jobs, options.limit, _write if options.update else None)
    rows.sort(key=lambda r: (r["library"], r["name"].lower()))
    print(summary(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    worse = [
        f"{r['library']} {r['name']}: {before[_key(r)]} -> {r['status']} ({r['cause']})"
        for r in rows
        if before.get(_key(r)) in GOOD and r["status"] not in GOOD
    ]
    for line in worse:
        print("regressed:", line)
    if options.update:
        _write(rows)
    return 1 if worse else 0


def all_cases(library: str | None) -> list[Case]:
    from planner.frontends.caches import register_containers
    from tests.survey import diffusers_models, transformers_models

    for name in (
        "transformers.modeling_utils",
        "transformers.models.auto",
        "diffusers.models.transformers",
        "diffusers.models.unets",
        "diffusers.models.autoencoders",
        "diffusers.models.controlnets",
        "diffusers.models.adapter",
    ):
        if library is None or name.startswith(library):
            importlib.import_module(name)  # once, for all the processes forked from this one
    tables = {"transformers": transformers_models.cases, "diffusers": diffusers_models.cases}
    register_containers()
    return [case for name, table in tables.items() if library in (None, name) for case in table()]


def run_all(
    cases: list[Case], jobs: int, limit: int, save: Callable[[list[dict[str, Any]]], None] | None = None
) -> list[dict[str, Any]]:
    """Each case in a process of its own: neither a crash nor a hang ends the survey. `save` gets the rows at times."""
    queue, running, rows = list(cases), {}, []
    while queue or running:
        while queue and len(running) < jobs:
            case = queue.pop(0)
            pid, pipe = _start(case, limit)
            running[pid] = (case, pipe, time.perf_counter())
        pid, status = os.wait()
        case, pipe, started = running.pop(pid)
        with os.fdopen(pipe) as stream:
            text = stream.read()
        row = json.loads(text) if text else _lost(case, status, time.perf_counter() - started)
        rows.append(row)
        if save is not None and len(rows) % 20 == 0:
            save(rows)
        print(
            f"{len(rows):4d}/{len(cases)} {row['library']:12s} {row['name']:36s} {row['status']:12s} {row['seconds']:6.1f} s  "
            f"{row['cause'][:200]}",
            flush=True,
        )
    return rows


def _start(case: Case, limit: int) -> tuple[int, int]:
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return pid, read
    os.close(read)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries print whole graphs
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))  # of its own time: the machine may be busy with other things
    signal.alarm(6 * limit)  # not caught: it ends the process, like the one above
    text = json.dumps(examine(case).to_json())
    os.write(write, text.encode()[:60000])
    os._exit(0)


def _lost(case: Case, status: int, seconds: float) -> dict[str, Any]:
    row = Row(case.name, case.library, seconds=round(seconds, 2))
    late = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGALRM, signal.SIGXCPU, signal.SIGKILL)
    row.status, row.cause = ("timeout", "") if late else ("crash", f"wait status {status}")
    return row.to_json()


def summary(rows: list[dict[str, Any]]) -> str:
    lines = []
    for library in sorted({r["library"] for r in rows}):
        counts: dict[str, int] = {}
        for row in rows:
            if row["library"] == library:
                counts[row["status"]] = counts.get(row["status"], 0) + 1
        ran = sum(n for s, n in counts.items() if s != "eager")
        good = sum(counts.get(s, 0) for s in GOOD)
        detail = ", ".join(f"{n} {s}" for s, n in sorted(counts.items(), key=lambda item: -item[1]))
        lines.append(f"{library}: {good} of {ran} that run without a plan run planned at half of their memory ({detail})")
    return "\n".join(lines)


def _key(row: dict[str, Any]) -> str:
    return f"{row['library']}/{row['name']}"


def _read() -> dict[str, str]:
    path = HERE / "results.json"
    return {_key(r): r["status"] for r in json.loads(path.read_text())} if path.exists() else {}


def _write(rows: list[dict[str, Any]]) -> None:
    path = HERE / "results.json"
    old = {_key(r): r for r in json.loads(path.read_text())} if path.exists() else {}
    merged = sorted((old | {_key(r): r for r in rows}).values(), key=lambda r: (r["library"], r["name"].lower()))
    path.write_text("[\n" + ",\n".join(json.dumps(r) for r in merged) + "\n]\n")
    table = [
        "| model | class | operators | parts | unplanned B | budget B | measured B | result | s | cause |",
        "|---|---|--:|--:|--:|--:|--:|---|--:|---|",
    ]
    for r in merged:
        cause = "; ".join([*filter(None, [r["cause"]]), *r["notes"]]).replace("|", "\\|")[:160]
        sizes = " | ".join(f"{r[key]:,}" for key in ("unplanned_bytes", "budget_bytes", "measured_bytes"))
        table.append(
            f"| {r['name']} | {r['kind']} | {r['nodes']} | {r.get('parts') or ''} | {sizes} | {r['status']} | "
            f"{r['seconds']:.1f} | {cause} |"
        )
    (HERE / "results.md").write_text("# Survey\n\n" + summary(merged).replace("\n", "  \n") + "\n\n" + "\n".join(table) + "\n")


if __name__ == "__main__":
    sys.exit(main())
