"""Reader threads: copies from files (or host memory) into arenas, in the background, first in first out."""

from __future__ import annotations

import os
import queue
import threading
import time
import weakref
from dataclasses import dataclass
from typing import Any

import torch

from runtime.errors import PlannerError
from runtime.weight_file import FileRange, Source

THREADS = 2  # a guess for two cores, to be measured where it is quiet: one alone cannot copy as fast as a good drive reads
# Large enough that a call costs nothing beside its bytes, small enough that one weight keeps all threads busy.
PIECE_BYTES = 8 * 1024 * 1024


class Arrival:
    """The end of one copy: an event that compute waits for."""

    def __init__(self, pieces: int) -> None:
        self._waiting = pieces
        self._done = threading.Condition()
        self._owner = os.getpid()
        self._error: Exception | None = None
        # By `time.perf_counter()`: when it was asked for, when a thread took the first piece, when the last one was through.
        self.issued = time.perf_counter()
        self.began: float | None = None
        self.ended: float | None = self.issued if pieces == 0 else None

    def begin(self) -> None:
        """A thread has taken a piece."""
        with self._done:
            if self.began is None:
                self.began = time.perf_counter()

    def finished(self, error: Exception | None) -> None:
        """One piece is through, or failed."""
        with self._done:
            self._error = self._error or error
            self._waiting -= 1
            if self._waiting == 0:
                self.ended = time.perf_counter()
                self._done.notify_all()

    def wait(self) -> None:
        """Until all pieces are through.

        Raises:
            PlannerError: a piece could not be read; names the file.
        """
        self.settle()
        if self._error is not None:
            raise self._error

    def settle(self) -> None:
        """Until no piece of it is under way, however it went; in a forked child none is, for the threads are its parent's."""
        if self._owner != os.getpid():
            return
        with self._done:
            while self._waiting:
                self._done.wait()


@dataclass(frozen=True)
class _Piece:
    """It holds the memory that it fills: what is being read into cannot be given back. It waits for `after`, if given."""

    target: torch.Tensor
    source: Source
    arrival: Arrival
    after: Any = None


class Readers:
    """A pool of daemon threads over one queue; started when the first copy comes, and anew in a forked child."""

    def __init__(self, threads: int = THREADS) -> None:
        self._count = threads
        self._queue: queue.SimpleQueue[_Piece | None] = queue.SimpleQueue()
        self._arrivals: list[Arrival] = []
        self._clock = _BusyClock()
        self._owner = 0
        self._stop: weakref.finalize[..., Readers] | None = None

    def copy(self, pairs: list[tuple[torch.Tensor, Source]], after: Any = None) -> Arrival:
        """Queues the copies of all pairs, which begin when `after` (an event of the device) is over; returns at once."""
        self._start()
        pieces = [piece for target, source in pairs for piece in _cut(target, source)]
        arrival = Arrival(len(pieces))
        self._arrivals = [a for a in self._arrivals if a._waiting] + [arrival]
        for target, source in pieces:
            self._queue.put(_Piece(target, source, arrival, after))
        return arrival

    def drain(self) -> None:
        """Forgets what has not begun and waits for what has: afterwards no thread writes anywhere."""
        if self._owner != os.getpid():
            self._arrivals.clear()  # a forked child: the threads, and what they did, are its parent's
            return
        while True:
            try:
                piece = self._queue.get_nowait()
            except queue.Empty:
                break
            if piece is not None:
                piece.arrival.finished(PlannerError("the copy was called off"))
        for arrival in self._arrivals:
            arrival.settle()
        self._arrivals.clear()

    def busy_seconds(self) -> float:
        """Time so far in which at least one thread was reading."""
        return self._clock.seconds()

    def close(self) -> None:
        """Drains and ends the threads."""
        self.drain()
        if self._stop is not None:
            self._stop()
        self._owner, self._stop = 0, None

    def _start(self) -> None:
        if self._owner == os.getpid():
            return
        self._owner, self._queue, self._clock = os.getpid(), queue.SimpleQueue(), _BusyClock()
        arguments = self._queue, self._clock, threading.Lock()
        for i in range(self._count):
            threading.Thread(target=_read, args=arguments, name=f"vramplan-reader-{i}", daemon=True).start()
        self._stop = weakref.finalize(self, _end, self._queue, self._count)


class _BusyClock:
    """The length of the union of spans that threads report."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._active, self._since, self._total = 0, 0.0, 0.0

    def __enter__(self) -> None:
        with self._lock:
            if self._active == 0:
                self._since = time.perf_counter()
            self._active += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._active -= 1
            if self._active == 0:
                self._total += time.perf_counter() - self._since

    def seconds(self) -> float:
        with self._lock:
            return self._total + (time.perf_counter() - self._since if self._active else 0.0)


def _read(pieces: queue.SimpleQueue[_Piece | None], clock: _BusyClock, taking: threading.Lock) -> None:
    """What a thread does. It knows the queue and not the pool, which can thus be collected."""
    while (piece := _take(pieces, taking)) is not None:
        arrival, error = piece.arrival, None
        try:
            if piece.after is not None:
                piece.after.synchronize()
            with clock:
                _transfer(piece.target, piece.source)
        except Exception as caught:  # noqa: BLE001 - whatever it is, the thread that waits raises it
            error = caught.with_traceback(None)  # whose frames hold the memory
        del piece  # before anybody learns of the end: memory that is evicted then is given back there, not here and later
        arrival.finished(error)


def _take(pieces: queue.SimpleQueue[_Piece | None], taking: threading.Lock) -> _Piece | None:
    """The next piece. One thread at a time, so that copies begin in the order in which they were asked for."""
    with taking:
        piece = pieces.get()
        if piece is not None:
            piece.arrival.begin()
        return piece


def _end(pieces: queue.SimpleQueue[_Piece | None], count: int) -> None:
    for _ in range(count):
        pieces.put(None)


def _transfer(target: torch.Tensor, source: Source) -> None:
    if isinstance(source, FileRange):
        source.file.read_into(memoryview(target.numpy()), source.offset)  # type: ignore[arg-type]
    else:
        target.copy_(source)


def _cut(target: torch.Tensor, source: Source) -> list[tuple[torch.Tensor, Source]]:
    pieces: list[tuple[torch.Tensor, Source]] = []
    for start in range(0, source.numel(), PIECE_BYTES):
        stop = min(start + PIECE_BYTES, source.numel())
        part = (
            FileRange(source.file, source.offset + start, stop - start) if isinstance(source, FileRange) else source[start:stop]
        )
        pieces.append((target[start:stop], part))
    return pieces
