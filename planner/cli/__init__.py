"""`vramplan`: plans, plan files, presets and machine models from the shell."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Sequence

from planner.cli.commands import COMMANDS
from planner.cli.parser import make_parser
from runtime.errors import CaptureError, CheckError, InfeasibleBudget, PlannerError, UnknownSize

__all__ = ["main"]

OK, UNEXPECTED, WRONG_INPUT, INFEASIBLE, NO_CAPTURE = range(5)
INTERRUPTED = 130  # as shells say it


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; see `vramplan --help` for what the codes mean."""
    arguments = make_parser().parse_args(argv)
    try:
        answer = COMMANDS[arguments.command](arguments)
    except KeyboardInterrupt:
        print("vramplan: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001  the outermost frame: whatever went wrong becomes one message and a code
        return _fail(error, arguments.json, arguments.debug)
    print(json.dumps(answer.data, indent=1) if arguments.json else answer.text)
    return OK


def exit_code(error: Exception) -> int:
    """The code for an error: the first of the kinds in `--help` that it is."""
    match error:
        case InfeasibleBudget():
            return INFEASIBLE
        case CaptureError() | UnknownSize():
            return NO_CAPTURE
        case CheckError():
            return UNEXPECTED  # a plan that its own checker refuses is our bug
        case PlannerError():
            return WRONG_INPUT
    return UNEXPECTED


def _fail(error: Exception, as_json: bool, debug: bool) -> int:
    code = exit_code(error)
    expected = isinstance(error, PlannerError) and code != UNEXPECTED
    message = str(error) if expected else f"{type(error).__name__}: {error} (unexpected; --debug shows where)"
    if debug:
        traceback.print_exception(error)
    print(f"vramplan: {message}", file=sys.stderr)
    if as_json:
        data: dict[str, object] = {"error": message, "kind": type(error).__name__, "exit_code": code}
        if isinstance(error, InfeasibleBudget):
            data |= {"budget_bytes": error.budget_bytes, "minimum_bytes": error.minimum_bytes, "node": error.node}
            data["memory"] = error.memory
        print(json.dumps(data, indent=1))
    return code
