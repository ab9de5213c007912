"""A checkpoint's safetensors file: its header read and checked once, its tensors by name, and how it was when it was opened.

What is read later is read by byte offsets that the header gave, so that a file which has changed since would give other bytes
without any error. `check` finds that out: cheaply before every call, with the header read again when a plan is built.
"""

from __future__ import annotations

import os
from pathlib import Path

from runtime.errors import CheckpointError, StoreError
from runtime.weight_file import DTYPES, Header, OpenFile, read_header, tensors_of


class CheckpointFile(OpenFile):
    """An open file of a checkpoint, which is only read.

    Attributes:
        tensors: by name, those of dtypes that PyTorch has. strange: the dtypes of the others.
    """

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError where it cannot be opened, is cut, or has no good header."""
        try:
            super().__init__(path, os.O_RDONLY)
        except StoreError as error:
            raise CheckpointError(f"{error}; download or copy it again", path=str(path)) from error
        self.header = Header({}, "")
        self.header = read_header(self)
        self.tensors = tensors_of(self, self.header)
        self.strange = {name: entry.dtype for name, entry in self.header.entries.items() if entry.dtype not in DTYPES}
        self._state = _state(os.fstat(self.fd))

    def check(self, *, thoroughly: bool = False) -> None:
        """Raises CheckpointError where the file is not what it was when it was opened; names a tensor in it.

        Size, time of change and identity, of what is open and of what the path leads to now. A file that was only removed is
        still there for whoever has it open; `thoroughly` it has to be there, and to have the same header.
        """
        now = os.fstat(self.fd)
        if _state(now) != self._state:
            raise self._changed(self._difference(now))
        try:
            there = os.stat(self.path)
        except OSError as error:
            if thoroughly:
                raise self._changed(f"cannot be found any more ({error.strerror})") from error
            return
        if _state(there) != self._state:
            raise self._changed("was replaced by another file")
        if thoroughly and read_header(self).digest != self.header.digest:
            raise self._changed("has another header")

    def read_into(self, target: memoryview, offset: int) -> None:
        """As for any file; an error names the tensor that is there."""
        try:
            super().read_into(target, offset)
        except StoreError as error:
            name = next((n for n, e in self.header.entries.items() if e.start <= offset < e.stop), "")
            raise CheckpointError(f"{error} (in the tensor {name!r})", path=str(self.path), tensor=name) from error

    def _difference(self, now: os.stat_result) -> str:
        size = self._state[0]
        if now.st_size != size:
            return f"had {size} bytes and has {now.st_size} now"
        return "was written"

    def _changed(self, what: str) -> CheckpointError:
        size = os.fstat(self.fd).st_size
        names = list(self.header.entries)
        name = next((n for n, entry in self.header.entries.items() if entry.stop > size), names[0] if names else "")
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return CheckpointError(
            f"{self.path} {what} since the plan was made; it holds {name!r}{others}, which may be other weights now. "
            "Put the file back, or plan and build again",
            path=str(self.path),
            tensor=name,
        )


def _state(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_dev
