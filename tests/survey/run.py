"""One model of the survey: built, planned at half of its memory, run three times, compared with eager bit for bit."""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from planner import Plan, plan
from planner.parted import PartedPlan
from runtime.errors import CaptureError, PlannerError, UnknownSize

SEEDS = (1, 2, 3)
PLENTY = 10**15
# What modules whose sizes only data knows are said to take.
STATED = "20MB"


@dataclass(frozen=True)
class Subject:
    """A module in eval mode and its calls; `inputs(seed)` has the same shapes for every seed."""

    module: nn.Module
    inputs: Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]
    method: str = "forward"


@dataclass(frozen=True)
class Case:
    """`make` builds the subject, in the process that examines it."""

    name: str
    library: str
    make: Callable[[], Subject]


@dataclass
class Row:
    """What came out. `status` is one of:

    equal         bits of eager, within budget, measured == predicted
    random        as equal, where eager itself draws random numbers (compared under the same seed)
    export        bits of `torch.export`'s own program, which differs from eager by itself
    differs       neither: a bug
    mispredicted  measured != predicted: a bug
    over budget   a bug
    refused       a PlannerError: cannot be captured, with the cause
    failed        another exception: a bug
    eager         the module cannot be built or run here without any plan
    timeout       took too long
    crash         ended the process
    """

    name: str
    library: str
    kind: str = ""
    status: str = "failed"
    nodes: int = 0
    parts: int = 0
    unplanned_bytes: int = 0
    budget_bytes: int = 0
    measured_bytes: int = 0
    predicted_bytes: int = 0
    equal: bool = False
    seconds: float = 0.0
    cause: str = ""
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def examine(case: Case) -> Row:
    """The row of this case; whatever happens is written into it."""
    row, started = Row(case.name, case.library), time.perf_counter()
    try:
        torch.manual_seed(0)
        subject = case.make()
        row.kind = type(subject.module).__name__
        if subject.method != "forward":
            row.kind += f".{subject.method}"
        wanted = [call(subject.module, subject, seed) for seed in SEEDS]
        again = call(subject.module, subject, SEEDS[0], draw=99)
    except Exception as error:  # noqa: BLE001 - third-party code that fails before anything of ours runs is a row, not an end
        row.status, row.cause = "eager", _cause(error)
        row.seconds = round(time.perf_counter() - started, 2)
        return row
    try:
        _compare(row, subject, wanted, random=difference(wanted[0], again) != "")
    except PlannerError as error:
        row.status, row.cause = "refused" if isinstance(error, (CaptureError, UnknownSize)) else "failed", _cause(error)
        if type(error) is PlannerError:
            row.status = "refused"
    except Exception as error:  # noqa: BLE001 - the survey's purpose is to collect failures of any kind
        row.status, row.cause = "failed", _cause(error)
    row.seconds = round(time.perf_counter() - started, 2)
    return row


def call(module: nn.Module, subject: Subject, seed: int, draw: int | None = None) -> Any:
    """One call; what the module draws at random it draws from a generator seeded by `draw`."""
    args, kwargs = subject.inputs(seed)
    torch.manual_seed(seed if draw is None else draw)
    with torch.no_grad():
        return getattr(module, subject.method)(*args, **kwargs)


def _compare(row: Row, subject: Subject, wanted: list[Any], random: bool) -> None:
    args, kwargs = subject.inputs(SEEDS[0])
    torch.manual_seed(7)
    whole = _plan(row, subject, args, kwargs)
    parts = whole.parts.values() if isinstance(whole, PartedPlan) else [whole]
    row.nodes, row.parts = sum(len(part.problem.names) for part in parts), len(parts) if isinstance(whole, PartedPlan) else 0
    row.unplanned_bytes = whole.unplanned_bytes
    row.budget_bytes = max(whole.minimum_bytes, whole.unplanned_bytes // 2)
    half = whole.replan(row.budget_bytes)
    exported = _exported(subject) if random else None
    built = half.build()
    row.predicted_bytes = half.peak_bytes
    got, peaks = [], []
    for seed in SEEDS:
        got.append(call(built, subject, seed))
        peaks.append(built.report().peak_bytes)
    row.measured_bytes = max(peaks)
    found = [difference(a, b) for a, b in zip(wanted, got, strict=True)]
    row.equal = not any(found)
    built.close()
    row.status = "random" if random else "equal"
    if not row.equal:
        row.cause = next(f for f in found if f)
        exported = exported or _exported(subject)
        same = exported is not None and not any(difference(a, b) for a, b in zip(exported, got, strict=True))
        row.status = "export" if same else "differs"
    elif any("nan" in note for note in [nan_note(wanted)]):
        row.notes.append("outputs are NaN")
    if row.measured_bytes > row.budget_bytes:
        row.status = "over budget"
    elif any(peak > row.predicted_bytes or (not row.parts and peak != row.predicted_bytes) for peak in peaks):
        row.status = "mispredicted"
        row.cause = row.cause or f"measured {peaks}, predicted {row.predicted_bytes}"


def _plan(row: Row, subject: Subject, args: Any, kwargs: Any) -> Plan:
    """The plan with room for everything; bytes that only data knows are stated where that is asked for."""
    options = {"inputs": args, "kwargs": kwargs, "method": subject.method, "device": "accounting"}
    try:
        return plan(subject.module, PLENTY, **options)
    except UnknownSize as error:
        row.notes.append(f"opaque_bytes={STATED!r} was asked for: {_cause(error)[:200]}")
        return plan(subject.module, PLENTY, opaque_bytes=STATED, **options)


def _exported(subject: Subject) -> list[Any] | None:
    """What `torch.export`'s own program gives, None where it cannot be had."""
    args, kwargs = subject.inputs(SEEDS[0])
    try:
        with torch.no_grad():
            program = torch.export.export(_Method(subject.module, subject.method), args, kwargs, strict=False).module()
            return [call(program, Subject(program, subject.inputs), seed) for seed in SEEDS]
    except Exception:  # noqa: BLE001 - torch.export raises anything; there is then nothing to compare with
        return None


class _Method(nn.Module):
    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module, self._method = module, method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.module, self._method)(*args, **kwargs)


def difference(a: Any, b: Any) -> str:
    """What the first difference between two results is; empty where they are the same to the bit."""
    first, spec = tree_flatten(a)
    second, other = tree_flatten(b)
    if spec != other:
        return f"another structure: {str(spec)[:120]} and {str(other)[:120]}"
    for index, (x, y) in enumerate(zip(first, second, strict=True)):
        if type(x) is not type(y):
            return f"output {index} is {type(x).__name__} and {type(y).__name__}"
        if isinstance(x, Tensor):
            if (text := _tensors(x, y)) != "":
                return f"output {index}: {text}"
        elif isinstance(x, (int, float, bool, str)) and x != y:
            return f"output {index} is {x!r} and {y!r}"
    return ""


def _tensors(x: Tensor, y: Tensor) -> str:
    if (x.shape, x.dtype) != (y.shape, y.dtype):
        return f"{tuple(x.shape)} {x.dtype} and {tuple(y.shape)} {y.dtype}"
    if _strides(x) != _strides(y):
        return f"strides {x.stride()} and {y.stride()}"
    if torch.equal(bits(x), bits(y)):
        return ""
    if x.is_complex() or not x.dtype.is_floating_point:
        return f"{int((x != y).sum())} of {x.numel()} values differ"
    return f"{int((bits(x) != bits(y)).sum())} bytes of {x.nbytes} differ, by at most {float((x - y).abs().max()):.3g}"


def bits(tensor: Tensor) -> Tensor:
    """The values' bytes."""
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8)


def _strides(tensor: Tensor) -> list[int]:
    return [s for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1] if tensor.numel() else []


def nan_note(results: list[Any]) -> str:
    for leaf in tree_flatten(results)[0]:
        if isinstance(leaf, Tensor) and leaf.dtype.is_floating_point and leaf.numel() and bool(leaf.isnan().all()):
            return "nan"
    return ""


def _cause(error: BaseException) -> str:
    """One line: the error, and the innermost place outside torch."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename]
    place = ""
    if frames and not isinstance(error, PlannerError):
        place = f" @ {_short(frames[-1].filename)}:{frames[-1].lineno}"
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return re.sub(r"\S*site-packages/", "", f"{type(error).__name__}: {text}"[:400]) + place


def _short(path: str) -> str:
    return path.rpartition("site-packages/")[2] if "site-packages/" in path else "/".join(path.split("/")[-2:])
