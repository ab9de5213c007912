"""Files are written beside their place and moved there: a crash leaves the old file or none."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from runtime.errors import PlannerError


def check_folder(path: str | Path, what: str) -> None:
    """Refuses what cannot be a file, before anything is computed for it.

    Raises:
        PlannerError: there is no such folder, or the path is a folder itself; says `what` was to be written.
    """
    if not Path(path).absolute().parent.is_dir():
        raise PlannerError(f"cannot write {what} {str(path)!r}: there is no such folder; make it first")
    if Path(path).is_dir():
        raise PlannerError(f"cannot write {what} {str(path)!r}: that is a folder; name a file in it")


@contextlib.contextmanager
def replacing(path: str | Path, what: str) -> Iterator[Path]:
    """Gives a path to write to; when the block ends without an error, that file takes the place of `path`.

    Raises:
        PlannerError: the system refuses (no such folder, no room, no permission); says `what` was to be written.
    """
    check_folder(path, what)
    target = Path(path)
    scratch = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield scratch
        os.replace(scratch, target)
    except OSError as error:
        raise PlannerError(f"cannot write {what} {str(path)!r}: {error.strerror or error}; give another path") from error
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
