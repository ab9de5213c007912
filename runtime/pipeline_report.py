"""What was measured of the last call of a planned pipeline."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.report import Report


@dataclass(frozen=True)
class PhaseReport:
    """Of one planned call of a component: how often it was called, and the seconds of all these, by the host's clock.

    On `cuda` the host goes on before the device has finished: there they say when work was issued.
    """

    name: str
    calls: int
    seconds: float


@dataclass(frozen=True)
class PipelineReport(Report):
    """As of a module, for the whole call: `peak_bytes` has the tensors of the pipeline's own Python too.

    Attributes:
        phases: the components' calls, in the order of their first.
    """

    phases: tuple[PhaseReport, ...] = ()
