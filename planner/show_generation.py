"""What `print(plan)` says of a plan of a generation: the whole call, then each phase."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.show import looked_up_bytes, measured_times, ratio, wrap
from planner.show_host import disk_rows, shared_host_rows
from planner.show_tiles import cast_rows, tile_rows
from planner.sizes import format_bytes, format_seconds

if TYPE_CHECKING:
    from planner.generation import GenerationPlan
    from planner.plan import Plan


def describe_generation(plan: GenerationPlan) -> str:
    """The plan as text of at most 100 columns; the same plan always gives the same text."""
    shape = plan.rehearsal.shape
    sequences = "1 sequence" if shape.batch == 1 else f"{shape.batch} sequences"
    prompt = "a padded prompt" if plan.padded else "a prompt"
    cache = f"{format_bytes(plan.cache_bytes)}, static, on the device: {sequences} of up to {shape.length} tokens"
    rows = [
        ("budget", f"{format_bytes(plan.budget_bytes)} on {plan.device}, planned for {plan.machine.name}"),
        ("peak", f"{_peak(plan)} (the least possible budget is {format_bytes(plan.minimum_bytes)})"),
        ("at", plan.peak_at),
        ("made of", " + ".join(f"{name} {format_bytes(n)}" for name, n in plan.peak_parts.items() if n)),
        ("cache", cache),
        ("first", f"{format_seconds(plan.prefill_seconds)} predicted until the first token"),
        ("step", f"{format_seconds(plan.step_seconds)} predicted per token after it, {ratio(plan)}"),
        ("call", f"{format_seconds(plan.generate_seconds)} predicted for {plan.tokens} tokens, Python aside"),
    ]
    rows += _host(plan)
    if plan.profiled is not None:
        rows.append(("times", measured_times(plan.profiled)))
    if plan.validation is not None:
        rows.append(("validated", str(plan.validation)))
    tokens = "1 token" if plan.tokens == 1 else f"{plan.tokens} tokens"
    lines = [f"{plan.title}: {tokens} after {prompt} of {plan.prompt_tokens}"]
    for label, text in rows:
        lines += wrap(label, text)
    for name, phase in plan.phases.items():
        lines += _phase(plan, name, phase)
    return "\n".join(lines)


def _phase(plan: GenerationPlan, name: str, phase: Plan) -> list[str]:
    calls = plan.rehearsal.moments[name].calls
    outside, load = plan.outside_bytes(name), plan.load_seconds[name]
    beside = f", {format_bytes(outside)} of it held by Python" if outside else ""
    rows = [
        ("peak", f"{format_bytes(outside + phase.reserved_bytes)}{beside}, at {phase.peak_at}"),
        ("step", f"{format_seconds(phase.step_seconds)} predicted, {ratio(phase)}"),
    ]
    if load:
        loaded = format_bytes(phase.layout.resident_bytes)
        rows.append(("before it", f"{format_seconds(load)} in which the {loaded} that it keeps are copied"))
    rows += [
        ("weights", _weights(phase)),
        *disk_rows(phase, plan.loaded_read_bytes(name)),
        *cast_rows(phase),
        *tile_rows(phase),
    ]
    times = "called once" if calls == 1 else f"called {calls} times"
    lines = [f"  {name}, {times}: {len(phase.problem.names)} operators"]
    for label, text in rows:
        lines += [f"  {line}" for line in wrap(label, text)]
    return lines


def _host(plan: GenerationPlan) -> list[tuple[str, str]]:
    """A row for the host's memory, where that has a budget, and one for the disk, where some weights are there."""
    most = max((phase.layout.host.ring_bytes for phase in plan.phases.values() if phase.layout.host is not None), default=0)
    ring = f", {format_bytes(most)} of them a ring" if most else ""
    return shared_host_rows(plan, "call", ring)


def _weights(phase: Plan) -> str:
    layout, on_host = phase.layout, sum(looked_up_bytes(phase.problem.program).values())
    kept = f"{format_bytes(layout.resident_bytes)} resident"
    if on_host:
        kept += f", {format_bytes(on_host)} on the host, where rows are looked up"
    if not layout.bundles:
        return f"{kept}, nothing streamed"
    over = sum(bundle.carried for bundle in layout.bundles)
    ahead = f", {over} of them fetched while the token before is computed" if over else ""
    bundles = "1 bundle" if len(layout.bundles) == 1 else f"{len(layout.bundles)} bundles"
    return f"{kept}, {format_bytes(layout.streamed_bytes)} streamed in {bundles}{ahead}"


def _peak(plan: GenerationPlan) -> str:
    if plan.reserved_bytes == plan.peak_bytes:
        return format_bytes(plan.peak_bytes)
    return f"{format_bytes(plan.peak_bytes)} allocated, {format_bytes(plan.reserved_bytes)} reserved"
