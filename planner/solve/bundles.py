"""Bundles: which weights travel together. Candidates for the solver, none of which depends on the budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from planner.solve.problem import Problem

# Small copies reach a fraction of the link; what is this small costs more to move than to keep.
TINY_BYTES = 64 * 1024


@dataclass(frozen=True)
class BundleSpan:
    """Weights needed by operators in [first, last]; `nbytes` as they are packed."""

    weights: tuple[str, ...]
    nbytes: int
    first: int
    last: int


def make_bundles(problem: Problem, target_bytes: int, tiny_bytes: int) -> tuple[BundleSpan, ...]:
    """Neighbouring visits joined up to `target_bytes`; 0 keeps each visit apart (the finest there is).

    Weights of at most `tiny_bytes` and pinned ones are left out: they are resident.
    """
    spans: list[BundleSpan] = []
    names: list[str] = []
    nbytes, first, last = 0, 0, -1

    def close() -> None:
        if names:
            spans.append(BundleSpan(tuple(names), nbytes, first, last))

    for visit in problem.visits:
        size = problem.weight_bytes[visit.weight]
        if visit.weight in problem.pinned or size <= tiny_bytes:
            continue
        same = (visit.first, visit.last) == (first, last)
        if names and visit.weight not in names and (same or (nbytes + size <= target_bytes)):
            names.append(visit.weight)
            nbytes, last = nbytes + size, max(last, visit.last)
            continue
        close()
        names, nbytes, first, last = [visit.weight], size, visit.first, visit.last
    close()
    return tuple(spans)


def hold_tiny(problem: Problem, spans: Sequence[BundleSpan]) -> tuple[BundleSpan, ...]:
    """Of bundles of single visits those of a tiny weight made one, which holds it over all: another copy costs more."""
    lasts = {v.weight: v.last for v in problem.visits if problem.weight_bytes[v.weight] <= TINY_BYTES}
    held: dict[str, BundleSpan] = {}
    result: list[BundleSpan] = []
    for span in spans:
        weights = tuple(w for w in span.weights if w not in held)
        if not weights:
            continue
        last = max([span.last, *(lasts[w] for w in weights if w in lasts)])
        result.append(BundleSpan(weights, sum(problem.weight_bytes[w] for w in weights), span.first, last))
        held.update((w, result[-1]) for w in weights if w in lasts)
    return tuple(result)


def spread_evenly(
    problem: Problem, spans: Sequence[BundleSpan], target_bytes: float, largest_bytes: float = math.inf, phase: float = 0.5
) -> tuple[BundleSpan, ...]:
    """Chooses bundles of about `target_bytes` evenly by compute time (error diffusion); the rest stays resident.

    Those above `largest_bytes` are left out. A bundle is chosen once `phase` of it is due: the larger, the later. Where the
    program has fewer bytes than are due they are all chosen and the debt is carried on. A weight with several visits is
    streamed in all of them or in none.
    """
    elapsed = problem.elapsed
    due = target_bytes * elapsed / max(elapsed[-1], 1e-30)
    chosen: list[BundleSpan] = []
    sent = 0.0
    for span in spans:
        if span.nbytes <= largest_bytes and due[span.last + 1] - sent >= span.nbytes * phase:
            chosen.append(span)
            sent += span.nbytes
    return _whole_weights(problem, spans, chosen)


def spread_fractions(
    problem: Problem, spans: Sequence[BundleSpan], fractions: Mapping[str, float], needed_bytes: int
) -> tuple[BundleSpan, ...]:
    """Rounds fractions of weights to whole bundles by error diffusion, in program order.

    Where less than `needed_bytes` come out, the bundles that came closest to being chosen are added.
    """
    chosen: set[int] = set()
    due = sent = 0.0
    missed: list[tuple[float, int]] = []
    for index, span in enumerate(spans):
        wanted = sum(fractions.get(w, 0.0) * problem.weight_bytes[w] for w in span.weights)
        due += wanted
        if wanted > 0 and due - sent >= span.nbytes / 2:
            chosen.add(index)
            sent += span.nbytes
        else:
            missed.append((-wanted / span.nbytes, index))
    for _, index in sorted(missed):
        if sent >= needed_bytes:
            break
        chosen.add(index)
        sent += spans[index].nbytes
    return _whole_weights(problem, spans, [span for index, span in enumerate(spans) if index in chosen])


def _whole_weights(problem: Problem, spans: Sequence[BundleSpan], chosen: Sequence[BundleSpan]) -> tuple[BundleSpan, ...]:
    """Takes weights out of the chosen bundles that some bundle left behind needs too."""
    if not problem.revisited:
        return tuple(chosen)
    picked = set(map(id, chosen))
    resident = {w for span in spans if id(span) not in picked for w in span.weights} & problem.revisited
    result = []
    for span in chosen:
        weights = tuple(w for w in span.weights if w not in resident)
        if weights:
            nbytes = sum(problem.weight_bytes[w] for w in weights)
            result.append(BundleSpan(weights, nbytes, span.first, span.last))
    return tuple(result)
