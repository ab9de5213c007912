"""Scratch folders on disk: one per built plan, never shared, gone with the plan or the process.

A folder is locked (`flock`) by its process for as long as that lives: what is not locked was left by a
process that was killed, and is removed when the next one makes a folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
import time
import warnings
import weakref
from pathlib import Path

from runtime.errors import BudgetError, StoreError

VARIABLE = "VRAMPLAN_SCRATCH"
_PREFIX, _UNFINISHED = "vramplan-weights-", ".vramplan-weights-"
_LOCK = "lock"
# An empty folder this old, without a lock file, was left by a process that died between two system calls.
_UNLOCKED_SECONDS = 60.0


class ScratchFolder:
    """A private folder under `$VRAMPLAN_SCRATCH`, or the system's folder for temporary files."""

    def __init__(self, limit_bytes: int | None = None) -> None:
        self.parent = Path(os.environ.get(VARIABLE) or tempfile.gettempdir())
        self._limit_bytes = limit_bytes
        self._taken_bytes = 0
        if not self.parent.is_dir():
            raise StoreError(f"the scratch folder {self.parent} does not exist; make it, or set {VARIABLE} to another")
        remove_stale(self.parent)
        if filesystem_of(self.parent) in ("tmpfs", "ramfs"):
            warnings.warn(
                f"the weights go to {self.parent}, which is {filesystem_of(self.parent)}: RAM, which is what the budget is to "
                f"save. Set {VARIABLE} to a folder on a disk, such as /var/tmp",
                stacklevel=2,
            )
        try:
            self.path = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=self.parent))
        except OSError as error:
            raise StoreError(f"cannot make a folder in {self.parent} ({error.strerror}); set {VARIABLE} to another") from error
        self._lock = _locked(self.path / _LOCK)
        # The path may change and the finalizer may not know this object: it holds a list.
        self._where = [self.path]
        self._remove = weakref.finalize(self, _remove, self._where, self._lock, os.getpid())

    def reserve(self, nbytes: int, beside: int = 0) -> None:
        """Checks that `nbytes` more fit the disk and the budget; `beside` them are what only the disk counts (headers).

        Raises:
            BudgetError: the budget's `disk` is smaller.
            StoreError: the disk has less free.
        """
        total = self._taken_bytes + nbytes
        if self._limit_bytes is not None and total > self._limit_bytes:
            raise BudgetError(
                f"the weights take {total} bytes on disk and the budget allows {self._limit_bytes}; "
                f'write budget={{"cpu": ..., "disk": {total}}} or more'
            )
        free = shutil.disk_usage(self.parent).free
        if nbytes + beside > free:
            raise StoreError(
                f"the weights take {nbytes + beside} bytes on disk, and {self.parent} has {free} free; "
                f"set {VARIABLE} to a folder on a larger disk"
            )
        self._taken_bytes = total

    def finish(self, digest: str) -> None:
        """Gives the folder its final name: from its contents, and unique."""
        final = self.parent / f"{_PREFIX}{digest[:16]}-{os.getpid()}-{secrets.token_hex(4)}"
        os.rename(self.path, final)
        self.path = self._where[0] = final

    def close(self) -> None:
        """Removes the folder. Closing twice is nothing."""
        self._remove()


def remove_stale(parent: Path) -> None:
    """Removes folders that processes left which were killed."""
    for folder in (*parent.glob(f"{_PREFIX}*"), *parent.glob(f"{_UNFINISHED}*")):
        with contextlib.suppress(OSError):  # gone already, or another user's
            if folder.is_symlink() or not folder.is_dir() or folder.stat().st_uid != os.getuid():
                continue
            if not (folder / _LOCK).exists():
                if folder.name.startswith(_UNFINISHED) and time.time() - folder.stat().st_mtime > _UNLOCKED_SECONDS:
                    folder.rmdir()  # only if it is empty
                continue
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            except BlockingIOError:
                pass  # its owner lives
            finally:
                os.close(lock)


def filesystem_of(path: Path) -> str:
    """The type of the file system that holds a path, such as "ext4" or "tmpfs"; empty where the system does not say."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    resolved, best, kind = path.resolve(), -1, ""
    for line in lines:
        fields = line.split(" ")
        mount = Path(fields[4].replace("\\040", " "))
        if resolved.is_relative_to(mount) and len(mount.parts) >= best:
            best, kind = len(mount.parts), fields[fields.index("-") + 1]
    return kind


def _locked(path: Path) -> int:
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def _remove(where: list[Path], lock: int, owner: int) -> None:
    if os.getpid() != owner:
        return  # a forked child does not own it
    shutil.rmtree(where[0], ignore_errors=True)
    os.close(lock)
