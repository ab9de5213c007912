"""Timing of short work on a device: medians of repeated runs, bounded in time, always positive and finite."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

Clock = Callable[[], float]

# No run is faster than this: what a clock cannot tell from nothing is not infinitely fast.
LEAST_SECONDS = 1e-9


class Stopwatch:
    """Seconds of work on one device: by CUDA events on the current stream, by a clock on a CPU."""

    def __init__(self, device: torch.device, clock: Clock = time.perf_counter) -> None:
        self.device, self.clock = device, clock

    def once(self, run: Callable[[], object], times: int = 1) -> float:
        """Seconds per run of `times` runs in a row, to the end of the last on the device."""
        if self.device.type == "cuda":
            return self._on_cuda(run, times)
        begin = self.clock()
        for _ in range(times):
            run()
        return max((self.clock() - begin) / times, LEAST_SECONDS)

    def median(
        self,
        run: Callable[[], object],
        *,
        repeats: int = 7,
        seconds: float = 1.0,
        warm_ups: int = 1,
        times: int = 1,
        before: Callable[[], object] | None = None,
    ) -> float:
        """The median of up to `repeats` timings of `run`, of which no further one begins once `seconds` have passed.

        Args:
            warm_ups: runs that do not count: first runs allocate and choose kernels.
            times: runs per timing.
            before: what to do before each, not timed.
        """
        started, samples = self.clock(), list[float]()
        for i in range(warm_ups + repeats):
            if before is not None:
                before()
            sample = self.once(run, times if i >= warm_ups else 1)
            if i >= warm_ups:
                samples.append(sample)
            if samples and self.clock() - started > seconds:
                break
        return max(statistics.median(samples), LEAST_SECONDS)

    def _on_cuda(self, run: Callable[[], object], times: int) -> float:
        with torch.cuda.device(self.device):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(times):
                run()
            end.record()
            end.synchronize()
        return max(begin.elapsed_time(end) / 1e3 / times, LEAST_SECONDS)
