"""The timeline of a call on the CPU, from what its threads noted."""

from __future__ import annotations

import time

from runtime.devices.call_log import CallLog
from runtime.devices.readers import Arrival


def test_a_thread_may_begin_a_copy_before_the_program_goes_on() -> None:
    log, arrival = CallLog(time.perf_counter()), Arrival(1)
    arrival.begin()
    arrival.finished(None)
    log.copy(0, 64, arrival)
    (copy,) = log.timeline(1.0).copies
    assert copy.issued <= copy.start <= copy.stop
