"""Ours beside what people use today, measured in one run: `make bench`.

    python -m tests.benchmarks.bench                                # all cases of the device that is here
    python -m tests.benchmarks.bench --cases flux --methods ours group-leaf     # beside unplanned, which always runs
    python -m tests.benchmarks.bench --device accounting            # small stand-ins of all cases, anywhere
    python -m tests.benchmarks.bench --simulated                    # CUDA cases on machine models; nothing runs
    python -m tests.benchmarks.bench --update                       # writes tests/benchmarks/results/ and the README's tables

Every contender has a process of its own. In each round every one of them, in turn, makes one call, so that what else the
machine does falls on all of them alike; where memory does not hold them all they go in groups, unplanned in each. On CUDA a
contender with a stated budget is held to it by `set_per_process_memory_fraction`. One that cannot run has a line that says why.

Written into build/bench/ are `bench-<device>.json`, with every number, `bench-<device>.md` and a picture for each case. Cases
that were not run keep what the file has of them, and so do contenders where `--methods` names others. The exit code is 1 where
a plan of ours took more than its budget, broke another promise (`promises.py`) or failed, but for budgets that it refused as
too small.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import torch

from tests.benchmarks.bench.about import about
from tests.benchmarks.bench.cases import Case, cases_for
from tests.benchmarks.bench.measure import Bench, Contender, contenders_of
from tests.benchmarks.bench.methods import methods
from tests.benchmarks.bench.picture import draw
from tests.benchmarks.bench.promises import broken, over_budget
from tests.benchmarks.bench.readme import README, refreshed, tables
from tests.benchmarks.bench.simulated import simulate
from tests.benchmarks.bench.tables import markdown

RESULTS = Path(__file__).parent.parent / "results"
UNSAVED = Path("build/bench")


def main() -> int:
    options = _options()
    out: Path = RESULTS if options.update else options.out
    out.mkdir(parents=True, exist_ok=True)
    if options.simulated:
        simulate(cases_for("cuda", options.cases), out)
        return _done(options, [])
    kind = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    wanted, chosen = cases_for(kind, options.cases), methods(options.methods)
    with tempfile.TemporaryDirectory(prefix="vramplan-bench-cache-") as cache:
        os.environ["VRAMPLAN_CACHE"] = cache  # what the machine and its operators were measured to take is of this run
        document = _read(out, kind)
        document["about"] = about(kind)
        if kind != "accounting":
            subprocess.run([sys.executable, "-m", "planner.cli", "calibrate", "--device", kind], check=True, stdout=sys.stderr)
        bench = Bench(kind, options.rounds)
        bad: list[str] = []
        for case in wanted:
            budgets = options.budgets or (["60%"] if kind == "accounting" else None)
            contenders = contenders_of(case, chosen, budgets)
            bench.case(case, contenders)
            found = entry(case, contenders, bench.rounds(case))
            document["cases"][case.name] = merged(document["cases"].get(case.name), found) if options.methods else found
            bad += judge(case, kind, found["contenders"])
            write(out, kind, document, document["cases"][case.name])
    print(markdown(document, command(kind)))
    return _done(options, bad)


def _done(options: argparse.Namespace, bad: list[str]) -> int:
    """The exit code; the README's tables are those of the results."""
    if options.update:
        README.write_text(refreshed(README.read_text(), tables(RESULTS)))
    return 1 if bad else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu", "accounting"), help="default: cuda where there is one, else cpu")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="by name; default: all of the device")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="by name or how it begins; default: all")
    parser.add_argument(
        "--budgets", nargs="+", metavar="SIZE", help='such as 6GB, or "60%%" of unplanned; default: the cases\''
    )
    parser.add_argument("--rounds", type=int, help="how often contenders take turns; default: the cases' own")
    parser.add_argument("--simulated", action="store_true", help="CUDA cases on machine models; nothing runs")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--out", type=Path, default=UNSAVED, help="the folder of what is written; default: build/bench")
    where.add_argument("--update", action="store_true", help="write into tests/benchmarks/results, and the README's tables")
    return parser.parse_args()


def command(kind: str) -> str:
    return f"python -m tests.benchmarks.bench --device {kind} --update"


def _read(out: Path, kind: str) -> dict[str, Any]:
    path = out / f"bench-{kind}.json"
    return json.loads(path.read_text()) if path.exists() else {"cases": {}}


def entry(case: Case, contenders: list[Contender], rounds: int) -> dict[str, Any]:
    """A case as it is kept."""
    rows = [
        {"name": each.name, "method": each.method.name, "label": each.method.label_at(each.budget)} | each.record
        for each in contenders
    ]
    return {"name": case.name, "title": case.title, "rounds": rounds, "load": list(os.getloadavg()), "contenders": rows}


def merged(before: dict[str, Any] | None, now: dict[str, Any]) -> dict[str, Any]:
    """Contenders of an earlier run that did not run now stay: where a case takes longer than a machine can be had."""
    ran = {row["name"] for row in now["contenders"]}
    kept = [] if before is None else [row for row in before["contenders"] if row["name"] not in ran]
    return {**now, "contenders": [*now["contenders"], *kept]}


def write(out: Path, kind: str, document: dict[str, Any], case: dict[str, Any]) -> None:
    """Everything so far, after each case: what stops later loses nothing."""
    picture = f"bench-{kind}-{case['name']}.svg"
    if kind != "accounting" and draw(case, kind, out / picture):
        case["picture"] = picture
    (out / f"bench-{kind}.json").write_text(json.dumps(document, indent=1) + "\n")
    (out / f"bench-{kind}.md").write_text(markdown(document, command(kind)))


def judge(case: Case, kind: str, rows: list[dict[str, Any]]) -> list[str]:
    """The names of plans of ours that broke a promise; every row that passed its budget or broke one says so from then on."""
    found = []
    for row in rows:
        own = row["method"] in ("ours", "casts")
        text = broken(case, kind, row) if own else over_budget(row)
        if text:
            row["broken"] = text
        if text and own:
            found.append(f"{row['name']} of {case.name}")
            print(f"{found[-1]}: {text}", file=sys.stderr)
    return found


if __name__ == "__main__":
    sys.exit(main())
