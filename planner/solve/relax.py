"""The linear program: what no schedule can beat, and which fractions of the weights it would stream.

Design section 6, in cumulative bytes. Time goes by segments k = 0..K-1 of c_k seconds and A_k activation bytes; weight j of s_j
bytes is streamed by a fraction x_j. D_k: bytes copied when segment k begins; N_k: of them, needed by then; E_k: evicted by
then; w_k: seconds that compute waits before segment k. Minimise the sum of w_k, subject to

    arrival        D_k >= N_k
    link           D_{k+1} - D_k <= BW (c_k + w_{k+1})
    memory         sum_j s_j (1 - x_j) + D_k - E_k + A_k <= B      at the operator of segment k that holds the most
    seam           D_K = D_0 + N_K up to what is copied while compute waits at the seam; D_0 = 0 up to w_0 without one

D only grows, so taking it at the beginning of a segment for all of its operators relaxes the memory rows, as do fractions,
copies without latency and buffers that fill up byte by byte: the optimum is a lower bound for every schedule that is emitted.
So it is where a long program's segments are joined: what is first read within one has to be there by the next one's beginning.
Where the host's memory has a budget it is one too, for what is read from disk only comes later.
"""

from __future__ import annotations

from dataclasses import dataclass

import highspy
import numpy as np

from planner.solve.problem import Problem
from planner.solve.segments import Segments

# All weights, and the time to compute and to copy them once, are so many units: tolerances of the solver are absolute.
_UNITS = 1000.0
# What streaming a unit costs besides time: of equally fast solutions one is found that streams little, and in pieces that are
# small, for buffers are taken as a whole, but not so small that a copy is mostly latency.
_TIE = 1e-6
_MOST_TIE = 10.0
# The time that the simplex takes grows with the square of the segments.
_MOST_SEGMENTS = 2000


@dataclass(frozen=True)
class Relaxation:
    """`seconds`: the bound of one step. `streamed`: bytes of each weight that is streamed at least in part."""

    seconds: float
    streamed: dict[str, float]

    @property
    def streamed_bytes(self) -> float:
        return sum(self.streamed.values())


def relax(problem: Problem, segments: Segments, budget_bytes: int, *, seam: bool) -> Relaxation | None:
    """Solves the linear program; None where not even fractions fit the budget."""
    model = _Model(problem, segments)
    model.add_rows(budget_bytes, seam)
    return model.solve()


class _Model:
    """Columns: x (bytes streamed) by weight, their sum, then D, w, N and E by segment."""

    def __init__(self, problem: Problem, segments: Segments) -> None:
        self.problem, self.segments = problem, segments.joined(_MOST_SEGMENTS)
        self.visits = [v for v in problem.visits if v.weight not in problem.pinned]
        self.names = list(dict.fromkeys(v.weight for v in self.visits))
        self.byte_unit = max(problem.total_weight_bytes, 1) / _UNITS
        everything = problem.compute_seconds + problem.total_weight_bytes / problem.machine.link_peak_bandwidth
        self.second_unit = max(everything, 1e-30) / _UNITS
        count, m = len(self.segments), len(self.names)
        self.total = m
        self.copied = m + 1
        self.waits = self.copied + count + 1
        self.needed = self.waits + count
        self.evicted = self.needed + count
        self.columns = self.evicted + count
        self.rows: list[list[tuple[int, float]]] = []
        self.lower: list[float] = []
        self.upper: list[float] = []

    def row(self, terms: list[tuple[int, float]], lower: float = -highspy.kHighsInf, upper: float = highspy.kHighsInf) -> None:
        self.rows.append(terms)
        self.lower.append(lower)
        self.upper.append(upper)

    def add_rows(self, budget_bytes: int, seam: bool) -> None:
        problem, segments, count = self.problem, self.segments, len(self.segments)
        rate = problem.machine.link_peak_bandwidth * self.second_unit / self.byte_unit
        index = {name: j for j, name in enumerate(self.names)}
        begins: list[list[int]] = [[] for _ in range(count)]
        ends: list[list[int]] = [[] for _ in range(count + 1)]
        firsts = np.searchsorted(segments.starts, [v.first for v in self.visits], side="left")
        lasts = np.searchsorted(segments.peaks, [v.last for v in self.visits], side="right")
        for visit, first, last in zip(self.visits, firsts.tolist(), lasts.tolist(), strict=True):
            begins[first].append(index[visit.weight])
            ends[last].append(index[visit.weight])
        self.row([(self.total, 1.0), *((j, -1.0) for j in range(len(self.names)))], 0, 0)
        free = (budget_bytes - problem.memory.fixed_bytes - problem.total_weight_bytes) / self.byte_unit
        for k in range(count):
            needed, evicted, copied = self.needed + k, self.evicted + k, self.copied + k
            self.row([(needed, 1.0), *([(needed - 1, -1.0)] if k else []), *((j, -1.0) for j in begins[k])], 0, 0)
            self.row([(evicted, 1.0), *([(evicted - 1, -1.0)] if k else []), *((j, -1.0) for j in ends[k])], 0, 0)
            self.row([(copied, 1.0), (needed, -1.0)], lower=0)
            held = float(segments.activation_bytes[k]) / self.byte_unit
            self.row([(copied, 1.0), (evicted, -1.0), (self.total, -1.0)], upper=free - held)
            wait = [(self.waits + k + 1, -rate)] if k + 1 < count else []
            self.row([(copied + 1, 1.0), (copied, -1.0), *wait], upper=rate * float(segments.seconds[k]) / self.second_unit)
            self.row([(copied + 1, 1.0), (copied, -1.0)], lower=0)
        first, last = self.copied, self.copied + count
        if seam:
            visits = np.bincount([index[v.weight] for v in self.visits], minlength=len(self.names))
            streamed = [(j, float(n)) for j, n in enumerate(visits)]
            self.row([(first, 1.0), (last, -1.0), (self.waits, -rate), *streamed], upper=0)
            self.row([(first, -1.0), (last, 1.0), *((j, -n) for j, n in streamed)], upper=0)
        else:
            self.row([(first, 1.0), (self.waits, -rate)], upper=0)

    def solve(self) -> Relaxation | None:
        problem, count = self.problem, len(self.segments)
        cost, lower = np.zeros(self.columns), np.zeros(self.columns)
        upper = np.full(self.columns, highspy.kHighsInf)
        upper[: len(self.names)] = [problem.weight_bytes[name] / self.byte_unit for name in self.names]
        cost[self.waits : self.waits + count] = 1.0
        sizes = upper[: len(self.names)] * self.byte_unit
        latency = problem.machine.link_latency_seconds * problem.machine.link_peak_bandwidth
        ties = _TIE * np.minimum(sizes / max(sizes.max(initial=0.0), 1.0) + latency / np.maximum(sizes, 1.0), _MOST_TIE)
        cost[: len(self.names)] = ties
        linear = highspy.HighsLp()
        linear.num_col_, linear.num_row_ = self.columns, len(self.rows)
        linear.col_cost_, linear.col_lower_, linear.col_upper_ = cost, lower, upper
        linear.row_lower_, linear.row_upper_ = np.array(self.lower), np.array(self.upper)
        linear.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        linear.a_matrix_.start_ = np.cumsum([0, *(len(row) for row in self.rows)]).astype(np.int32)
        linear.a_matrix_.index_ = np.array([column for row in self.rows for column, _ in row], dtype=np.int32)
        linear.a_matrix_.value_ = np.array([value for row in self.rows for _, value in row])
        highs = highspy.Highs()
        highs.setOptionValue("output_flag", False)
        highs.setOptionValue("threads", 1)  # the same solution everywhere
        highs.passModel(linear)
        highs.run()
        if highs.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            return None
        values = np.array(highs.getSolution().col_value)
        # The optimum without the ties is at least this.
        most_ties = float(ties @ upper[: len(self.names)])
        waited = max(0.0, float(highs.getInfo().objective_function_value) - most_ties) * self.second_unit
        streamed = {name: float(x) * self.byte_unit for name, x in zip(self.names, values, strict=False) if x > 1e-6}
        return Relaxation(problem.compute_seconds + waited, streamed)
