"""The arguments of `vramplan`, and what its `--help` says."""

from __future__ import annotations

import argparse
from importlib.metadata import PackageNotFoundError, version

from planner.presets import MODEL_DTYPES
from planner.recipes import SIZES

EXIT_CODES = """\
exit codes:
  0  done
  1  unexpected: a bug here or in a library; --debug shows where
  2  wrong usage or input: arguments, files, sizes, devices
  3  infeasible: no plan fits the budget; the message says the least that does
  4  the model cannot be captured, or a size in it cannot be known
130  interrupted
An error is one message on standard error. With --json standard output has an object besides:
  {"error", "kind", "exit_code"}, for code 3 also {"budget_bytes", "minimum_bytes", "node", "memory"}
"""

TARGETS = """\
TARGET is one of
  a preset        sdxl-unet (vramplan presets lists them): published models at full size, no weights
  a folder        ./flux/transformer: a checkpoint with a config.json, of transformers or diffusers;
                  `plan` does not read its weights, `run` does; ./flux, a whole pipeline with a
                  model_index.json, for `plan` alone
  module:factory  my_models:make: called with those of --batch, --height, ... that are given; returns
                  a module, (module, args) or (module, args, kwargs), on the meta device or real;
                  the working directory can be imported
"""

PLAN_FIELDS = """\
fields of --json (bytes and seconds, all but budget_bytes predicted):
  target, program, method, device, machine, inputs, budget_bytes, peak_bytes, reserved_bytes,
  minimum_bytes, unplanned_bytes, peak_at, peak_parts, weight_bytes, resident_bytes,
  streamed_bytes, band_bytes, bundles, step_seconds, bound_seconds, limited_by, lp_seconds (of
  the linear program), resource (compute, link or memory), seconds_with_1gb_more, profiled (null,
  or how many of how many distinct operators were measured), casts (how many weights are stored in a
  smaller type), cast_error (of the result, relative, estimated); file with -o, code with --code
"""

PIPELINE_FIELDS = """\
of a whole pipeline, with --height, --width, --frames and --call for what it is called with:
  target, program, device, machine, call, budget_bytes, peak_bytes, reserved_bytes, minimum_bytes,
  unplanned_bytes, peak_at, weight_bytes, locked_bytes (of the host; null where it has no budget),
  read_bytes (from disk in a run), step_seconds (of the whole call), bound_seconds, phases (names of
  parts), parts (a list: name, calls, stay, seconds, bytes, weight_bytes, streamed_bytes), early (a
  list: during, of, pieces), file with -o, code with --code
"""

RUN_FIELDS = """\
fields of --json:
  plan (as of `vramplan plan --json`), weights ("checkpoint", "random" or "factory"),
  call_seconds (a list), and measured: device, calls, peak_bytes, reserved_bytes, step_seconds
  (the last call), copied_bytes (streamed_bytes, what aligns them, band_bytes), copy_seconds,
  link_fraction, host_bytes; file with --trace
"""

EMIT_FIELDS = """\
fields of --json: plan (as of `vramplan plan --json`), weights ("checkpoint", "random" or "factory"),
  folder, package_bytes (without what it refers to)
"""

PLOT_FIELDS = """\
fields of --json: those of `vramplan plan --json`, and file (the picture), files (all that was written)
"""

SHOW_FIELDS = """\
--json prints the file itself, of a module: format, version, program, method, device, budget, machine, call,
  keep, offload, opaque_bytes, repeats, decisions, fingerprint, dynamic (where sizes vary), profile
  (where true)
"""

COMPARE_FIELDS = """\
fields of --json (nothing measured): target, program, device, machine, budget_bytes, minimum_bytes,
  repeats, rows (the plan first): policy, peak_bytes, step_seconds, bound_seconds (within the row's own
  peak), fits, ours_seconds (of a plan with that peak as its budget, or null), ratio, speedup, note
"""

FRONTIER_FIELDS = """\
fields of --json (bytes and seconds, predicted): target, program, device, machine, repeats,
  minimum_bytes, resident_bytes, budget_bytes (or null), rows: budget_bytes, reserved_bytes,
  step_seconds, bound_seconds, streamed_bytes, ratio (null where infeasible); bound (pairs of a budget
  and seconds), baselines (with --compare; as rows of `vramplan compare`); file with --plot
"""

MACHINE_FIELDS = """\
fields of --json (a list; bandwidths in bytes per second): name, description, capacity_bytes,
  memory_bandwidth, flops (by dtype), launch_seconds, link_bandwidth, link_latency_seconds,
  pageable_bandwidth, disk_bandwidth, capability, link_seconds (pairs of bytes and seconds)
--machine takes the path of a TOML or JSON file with these fields too: a machine of your own
"""

CALIBRATE = """\
Measures what predicted seconds are computed from, in under a minute: products by dtype, memory,
launches, copies over the link by size (on a CPU: reads of a scratch file), the disk. Kept in
$VRAMPLAN_CACHE or ~/.cache/vramplan, and used from then on where no machine is named, on exactly
this device (for a CPU: with as many threads).
fields of --json: device, file, machine (as of vramplan machines)
"""

PRESET_FIELDS = """\
fields of --json (a list): name, description, library, class, method, dtype, parameters, sizes
  (by name: default, step, offset, most; text is arithmetic over the model's config)
"""


def make_parser() -> argparse.ArgumentParser:
    """The parser; every command has `json` and `debug`."""
    parser = argparse.ArgumentParser(
        prog="vramplan",
        description="PyTorch programs within a byte budget.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vramplan {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    plan = _command(
        commands, "plan", "plan a model for a budget and say what was decided", f"{TARGETS}\n{PLAN_FIELDS}{PIPELINE_FIELDS}"
    )
    _add_target(plan)
    plan.add_argument("-o", "--output", metavar="FILE", help="save the plan there, for Plan.load and `vramplan show`")
    _add_call(plan)
    plan.add_argument("--code", action="store_true", help="print the emitted program too")

    run = _command(commands, "run", "plan, build and call a model; measured beside predicted", f"{TARGETS}\n{RUN_FIELDS}")
    _add_target(run)
    run.add_argument("--calls", type=int, default=2, metavar="N", help="how often (default 2); the last one is reported")
    run.add_argument("--trace", metavar="FILE", help="write predicted and measured timelines there, for ui.perfetto.dev")

    emit = _command(
        commands, "emit", "plan a model and write a package that runs without vramplan's planner", f"{TARGETS}\n{EMIT_FIELDS}"
    )
    _add_target(emit)
    emit.add_argument("folder", metavar="FOLDER", help="a new one, or a package to replace; runtime.load(FOLDER) runs it")
    emit.add_argument("--max-shard-size", metavar="SIZE", default="5GB", help="of a file with weights (default 5GB)")
    emit.add_argument("--reference", action="store_true", help="leave weights in the checkpoint's files, and refer to them")

    compare = _command(
        commands, "compare", "what the offloading switches of today would do, beside the plan", f"{TARGETS}\n{COMPARE_FIELDS}"
    )
    _add_target(compare)
    _add_call(compare)

    frontier = _command(commands, "frontier", "the step against the budget", f"{TARGETS}\n{FRONTIER_FIELDS}")
    _add_target(frontier, budget=False)
    frontier.add_argument("--budgets", metavar="SIZE,...", help="which ones, 4GB,6GB; default: from the least to all resident")
    frontier.add_argument("--points", type=int, metavar="N", help="how many, where --budgets does not say it (default 12)")
    frontier.add_argument("--compare", action="store_true", help="simulate other policies too")
    frontier.add_argument("--plot", metavar="FILE", help="draw it there: png, svg or pdf")

    plot = _command(
        commands, "plot", "draw memory over predicted time: what is on the device, copies, waits", f"{TARGETS}\n{PLOT_FIELDS}"
    )
    _add_target(plot)
    plot.add_argument("-o", "--output", metavar="FILE", default="memory.png", help=".png, .svg or .pdf (default memory.png)")
    plot.add_argument("--trace", metavar="FILE", help="write the timeline there too, for ui.perfetto.dev")
    plot.add_argument("--history", metavar="FILE", help="write allocations there too, for pytorch.org/memory_viz")

    show = _command(commands, "show", "say what a plan file decides", SHOW_FIELDS)
    show.add_argument("file", metavar="FILE")
    _command(commands, "presets", "list presets", PRESET_FIELDS)
    _command(commands, "machines", "list machine models", MACHINE_FIELDS)
    calibrate = _command(commands, "calibrate", "measure this machine", CALIBRATE)
    calibrate.add_argument("--device", metavar="DEVICE", help="cuda, cuda:1 or cpu; default: cuda where it is, else cpu")
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, help_: str, epilog: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name, help=help_, description=help_, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return command


def _add_target(command: argparse.ArgumentParser, budget: bool = True) -> None:
    command.add_argument("target", metavar="TARGET")
    command.add_argument(
        "--opaque-bytes",
        action="append",
        default=[],
        metavar="[MODULES=]SIZE",
        help="what modules that cannot be captured take at most, where vramplan asks for it: 'blocks.*.moe=200MB'",
    )
    if budget:
        command.add_argument(
            "--budget",
            required=True,
            metavar="SIZE",
            help="6GB (powers of 1000), 6GiB (of 1024), or by memory: cuda=6GB,cpu=8GB,disk=99GB",
        )
    command.add_argument("--repeats", type=int, default=1, metavar="N", help="how many calls follow each other (default 1)")
    command.add_argument(
        "--machine", metavar="NAME", help="plan for that one (vramplan machines), or that of a file; default: this one"
    )
    command.add_argument(
        "--device",
        metavar="DEVICE",
        help="cuda, cuda:1, cpu (RAM) or accounting (every byte counted)",
    )
    command.add_argument("--profile", action="store_true", help="measure the operators on this device, and plan with that")
    command.add_argument(
        "--allow-cast",
        action="append",
        metavar="DTYPE",
        help="weights may be stored so, with scales (float8_e4m3fn, float8_e5m2, int8; may be repeated)",
    )
    command.add_argument(
        "--max-error", type=float, metavar="X", help="largest relative error of the result that casts may cause"
    )
    command.add_argument("--dtype", metavar="DTYPE", help=f"of the weights: {', '.join(MODEL_DTYPES)}")
    command.add_argument("--method", metavar="NAME", help="which method of the module (default: the preset's, or forward)")
    sizes = command.add_argument_group(
        "sizes of the call", "where the model has them; defaults are the preset's or the config's"
    )
    for name in SIZES:
        sizes.add_argument(f"--{name}", type=int, metavar="N")


def _add_call(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--call",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of a whole pipeline's folder: what it is called with (num_inference_steps=28); JSON or text; may be repeated",
    )


def _version() -> str:
    try:
        return version("vramplan")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"
