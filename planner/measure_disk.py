"""How fast the disk is read, as the `cpu` device reads it: by its threads, from a scratch file that is in no cache."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from planner.stopwatch import Stopwatch
from runtime.devices.cpu import CpuDevice
from runtime.errors import StoreError
from runtime.scratch import VARIABLE, ScratchFolder, filesystem_of
from runtime.weight_file import FileRange, OpenFile

_BLOCK_BYTES = 8 * 1024 * 1024


class DiskMeter:
    """A scratch file of `nbytes` random bytes, gone with `close()`.

    Raises:
        StoreError: the disk is full, or there is no scratch folder; says how to name another. Nothing is left behind.
    """

    def __init__(self, nbytes: int, watch: Stopwatch) -> None:
        self._watch, self._device = watch, CpuDevice()
        self._folder = ScratchFolder()
        self._nbytes, self._next = nbytes, 0
        try:
            free = shutil.disk_usage(self._folder.parent).free
            if nbytes > free:
                raise StoreError(
                    f"measuring the disk takes a file of {nbytes} bytes, and {self._folder.parent} has {free} free; "
                    f"set {VARIABLE} to a folder on a larger disk"
                )
            path = self._folder.path / "calibration.bin"
            _fill(path, nbytes)
            self._file = OpenFile(path, os.O_RDONLY)
            self.cached = not self._drop_cache()
        except BaseException:
            self.close()
            raise

    @property
    def where(self) -> str:
        """The folder and its file system, for people."""
        kind = filesystem_of(self._folder.parent)
        return f"{self._folder.parent} ({kind})" if kind else str(self._folder.parent)

    def seconds(self, nbytes: int, *, repeats: int, seconds: float) -> float:
        """Of reading `nbytes` from the disk into memory; the median."""
        target = self._device.allocate(nbytes)
        target.fill_(1)  # its pages exist, as an arena's do

        def read() -> None:
            self._device.wait(self._device.copy([(target, FileRange(self._file, self._next, nbytes))], []))

        return self._watch.median(read, repeats=repeats, seconds=seconds, before=lambda: self._aside(nbytes))

    def memory_seconds(self, nbytes: int, *, repeats: int, seconds: float) -> float:
        """Of copying `nbytes` from memory by the same threads."""
        source, target = torch.ones(nbytes, dtype=torch.uint8), self._device.allocate(nbytes)
        target.fill_(0)
        return self._watch.median(
            lambda: self._device.wait(self._device.copy([(target, source)], [])), repeats=repeats, seconds=seconds
        )

    def close(self) -> None:
        """Ends the threads and removes the file."""
        self._device.close()
        self._folder.close()

    def _aside(self, nbytes: int) -> None:
        """The next read is elsewhere in the file, and nothing of it in the cache."""
        self._next = self._next + nbytes if self._next + 2 * nbytes <= self._nbytes else 0
        self._drop_cache()

    def _drop_cache(self) -> bool:
        """Whether the file's pages left the page cache."""
        if not hasattr(os, "posix_fadvise"):
            return False
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._file.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        try:  # a read that may not wait for the disk succeeds only from the cache
            os.preadv(self._file.fd, [bytearray(1)], self._nbytes // 2, os.RWF_NOWAIT)
        except BlockingIOError:
            return True
        except (OSError, AttributeError):  # the system cannot tell
            return True
        return False


def _fill(path: Path, nbytes: int) -> None:
    """Random bytes, which no file system compresses, written through to the disk: only then can they leave the cache."""
    block = memoryview(os.urandom(min(_BLOCK_BYTES, nbytes)))
    file = OpenFile(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    for start in range(0, nbytes, len(block)):
        file.write(block[: nbytes - start], start)
    try:
        os.fsync(file.fd)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}") from error


def measure_disk(
    sizes: Sequence[int], file_bytes: int, watch: Stopwatch, *, repeats: int, seconds: float
) -> tuple[tuple[tuple[int, float], ...], float, str]:
    """Pairs of bytes and seconds of reads, bytes per second of copies from memory by the same threads, and what was read where.

    Raises:
        StoreError: as `DiskMeter`.
    """
    meter = DiskMeter(max(file_bytes, *sizes), watch)
    try:
        points = tuple((n, meter.seconds(n, repeats=repeats, seconds=seconds / len(sizes))) for n in sorted(sizes))
        memory = max(sizes) / meter.memory_seconds(max(sizes), repeats=repeats, seconds=seconds / len(sizes))
    finally:
        meter.close()
    note = f"disk {meter.where}" + (", through a page cache that could not be dropped" if meter.cached else "")
    return points, memory, note
