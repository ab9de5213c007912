"""The user's cache folder: what was measured on this machine, as JSON files that are replaced whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any

VARIABLE = "VRAMPLAN_CACHE"


def cache_folder() -> Path | None:
    """`$VRAMPLAN_CACHE`, else `vramplan` in the user's cache folder; None without a home."""
    folder = os.environ.get(VARIABLE)
    if folder is not None:
        return Path(folder)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "vramplan")
    except RuntimeError:
        return None


def write_json(path: Path, data: Any, *, indent: int | None = None) -> None:
    """Writes atomically, and makes the folder: a crash leaves the old file or none.

    Raises:
        OSError: the folder cannot be made, or the disk is full.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        scratch.write_text(json.dumps(data, indent=indent) + "\n", encoding="utf-8")
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """What a file holds; None if there is none, or it is damaged: it is measured anew."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
