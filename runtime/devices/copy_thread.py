"""A thread that issues copies whose sources have to be waited for: compute goes on being launched meanwhile."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any


class Issued:
    """A copy that the thread will issue, and then the device's event of its end."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._event: Any = None
        self._error: BaseException | None = None

    def finish(self, event: Any, error: BaseException | None = None) -> None:
        self._event, self._error = event, error
        self._done.set()

    def event(self) -> Any:
        """The event, once the copy was issued.

        Raises:
            PlannerError: what was to be copied could not be read; names the file.
        """
        self._done.wait()
        if self._error is not None:
            raise self._error
        return self._event

    def settled(self) -> Any:
        """As `event`; None where the copy failed."""
        self._done.wait()
        return self._event if self._error is None else None


class CopyThread:
    """Issues one copy after the other; started when the first one comes."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Callable[[], Any], Issued] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._last: Issued | None = None

    @property
    def busy(self) -> bool:
        """Whether something is still to be issued."""
        return self._last is not None and not self._last._done.is_set()

    def put(self, issue: Callable[[], Any]) -> Issued:
        """Has `issue` called in turn; it gives the event of the copy's end."""
        if self._thread is None:
            self._thread = threading.Thread(target=_run, args=(self._queue,), name="vramplan-copies", daemon=True)
            self._thread.start()
        self._last = Issued()
        self._queue.put((issue, self._last))
        return self._last

    def settle(self) -> None:
        """Until nothing is left to be issued."""
        if self._last is not None:
            self._last.settled()

    def close(self) -> None:
        """Ends the thread, when all is issued."""
        self.settle()
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
        self._thread = self._last = None


def _run(jobs: queue.SimpleQueue[tuple[Callable[[], Any], Issued] | None]) -> None:
    while (job := jobs.get()) is not None:
        issue, issued = job
        event, error = None, None
        try:
            event = issue()
        except Exception as caught:  # noqa: BLE001 - whatever it is, who waits raises it
            error = caught.with_traceback(None)  # whose frames hold the memory
        del job, issue  # and with it the memory, before anybody learns of the end
        issued.finish(event, error)
