"""What `print(plan)` says: budget, peak and what it is made of, seconds against the bound, decisions by module."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from passes.program import Program, Weight, module_path
from planner.conv_layouts import convolutions_in
from planner.dynamic_plan import describe_sizes
from planner.show_attention import attention_rows
from planner.show_host import host_rows
from planner.show_tiles import cast_rows, tile_rows
from planner.sizes import format_bytes, format_seconds

if TYPE_CHECKING:
    from planner.plan import Plan

WIDTH = 100
MAX_GROUPS = 14
_STAGING = {"arena": "a static arena", "allocator": "allocator blocks"}


@dataclass
class _Group:
    """Weights of modules that are shown in one line: their names, and bytes by where they are."""

    names: set[str] = field(default_factory=set)
    shares: dict[str, int] = field(default_factory=lambda: {"looked up": 0, "streamed": 0, "resident": 0})


def describe(plan: Plan) -> str:
    """The plan as text of at most 100 columns; the same plan always gives the same text."""
    rows = [
        ("budget", f"{format_bytes(plan.budget_bytes)} on {plan.device}, planned for {plan.machine.name}"),
        ("peak", f"{_peak(plan)} (the least possible budget is {format_bytes(plan.minimum_bytes)})"),
        ("at", where(plan)),
        ("made of", " + ".join(f"{name} {format_bytes(n)}" for name, n in plan.peak_parts.items() if n)),
        ("step", f"{format_seconds(plan.step_seconds)} predicted, {ratio(plan)}"),
        *_gap(plan),
        ("weights", _weights(plan)),
        *host_rows(plan),
        *cast_rows(plan),
        *tile_rows(plan),
        *attention_rows(plan),
    ]
    if plan.symbols:
        rows.insert(1, ("sizes", f"{describe_sizes(plan)}: {plan.problem.in_symbols.doubtful[1]}"))  # type: ignore[union-attr]
    size = f"{_count(len(plan.problem.names), 'operator')}, {_count(len(plan.program.weights), 'weight')}"
    if plan.profiled is not None:
        rows.append(("times", measured_times(plan.profiled)))
    if plan.validation is not None:
        rows.append(("validated", str(plan.validation)))
    lines = [f"{plan.program.name}: {size}"]
    for label, text in rows:
        lines += wrap(label, text)
    lines.append("  decisions")
    lines += _layout(plan)
    lines += _decisions(plan)
    return "\n".join(lines)


def where(plan: Plan) -> str:
    """The operator at which the peak is, with its module."""
    node = next((n for n in plan.problem.program.graph.nodes if n.name == plan.proof.peak_node), None)
    name = plan.proof.peak_node
    owner = module_path(node) if node is not None else ""
    return f"{name} in {owner}" if owner else name


def _peak(plan: Plan) -> str:
    if plan.reserved_bytes == plan.peak_bytes:
        return format_bytes(plan.peak_bytes)
    return f"{format_bytes(plan.peak_bytes)} allocated, {format_bytes(plan.reserved_bytes)} reserved"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def ratio(plan: Plan) -> str:
    ratio = plan.step_seconds / plan.bound_seconds if plan.bound_seconds else 1.0
    return f"{ratio:.2f} x the bound of {format_seconds(plan.bound_seconds)} set by the {plan.bound.limited_by}"


def measured_times(profiled: tuple[int, int]) -> str:
    """`measured for 38 of 40 distinct operators on this device`."""
    measured, distinct = profiled
    return f"measured for {measured} of {_count(distinct, 'distinct operator')} on this device"


def _gap(plan: Plan) -> list[tuple[str, str]]:
    """What limits the step, and what more memory would buy; nothing where everything stays on the device."""
    return plan.gap.rows() if plan.gap.schedule.placements else []


def _weights(plan: Plan) -> str:
    total, streamed = format_bytes(plan.weight_bytes), plan.layout.streamed_bytes
    looked_up = sum(looked_up_bytes(plan.problem.program).values())
    shares = []
    if streamed or looked_up:
        shares.append(f"{format_bytes(plan.resident_bytes)} resident")
    if streamed:
        how = f"in {_count(len(plan.layout.bundles), 'bundle')} staged in {_STAGING[plan.decisions.staging]}"
        shares.append(f"{format_bytes(streamed)} streamed per step {how}")
    if looked_up:
        shares.append(f"{format_bytes(looked_up)} on the host, where rows are looked up")
    return f"{total}: {', '.join(shares)}" if shares else f"{total}, all resident"


def _layout(plan: Plan) -> list[str]:
    """`channels-last: 62 convolutions in 3 regions`; nothing where there are none."""
    regions = plan.decisions.tiling.channels_last
    if not regions:
        return []
    count = convolutions_in(plan.program, regions)
    return [f"    channels-last: {_count(count, 'convolution')} in {_count(len(regions), 'region')}"]


def _decisions(plan: Plan) -> list[str]:
    depth = 4
    groups = _groups(plan, depth)
    while len(groups) > MAX_GROUPS and depth > 1:
        depth -= 1
        groups = _groups(plan, depth)
    width = max((len(name) for name in groups), default=0)
    lines = []
    for name, group in groups.items():
        label = name if len(name) <= 48 else name[:45] + "..."
        size = f"{_count(len(group.names), 'weight'):>12}  {format_bytes(sum(group.shares.values())):>8}"
        lines.append(f"    {label:<{min(width, 48)}}  {size}  {_share(group)}"[:WIDTH])
    return lines


def looked_up_bytes(program: Program) -> dict[str, int]:
    """Bytes of the tables that are on the host alone: of which nothing but rows is read."""
    kept = {weight.name for weight in program.weights.values()}
    return {name: table.nbytes for name, table in program.tables.items() if name not in kept}


def _share(group: _Group) -> str:
    """`resident`; `1.2 GB streamed, 3.4 GB resident`."""
    found = {how: nbytes for how, nbytes in group.shares.items() if nbytes}
    if not found or set(found) == {"resident"}:
        return "resident"
    return ", ".join(f"{format_bytes(nbytes)} {how}" for how, nbytes in found.items())


def _groups(plan: Plan, depth: int) -> dict[str, _Group]:
    program = plan.problem.program
    streamed = {s.weight for b in plan.layout.bundles for s in b.slots}
    groups: dict[str, _Group] = {}

    def add(weight: Weight, how: str, nbytes: int) -> None:
        parts = ["*" if part.isdigit() else part for part in weight.name.split(".")[:-1][:depth]]
        group = groups.setdefault(".".join(parts) or "(root)", _Group())
        group.names.add(weight.name)
        group.shares[how] += nbytes

    only = looked_up_bytes(program)
    for name, table in program.tables.items():
        add(table, "looked up", only.get(name, 0))
    for node, weight in program.weights.items():
        add(weight, "streamed" if node in streamed else "resident", weight.nbytes)
    return groups


def wrap(label: str, text: str) -> list[str]:
    lines, line = [], f"  {label:<9} "
    for word in text.split(" "):
        if len(line) + len(word) > WIDTH and line.strip():
            lines.append(line.rstrip())
            line = " " * 12
        line += word + " "
    return [*lines, line.rstrip()]
