"""Files that hold weights: byte ranges of them as sources of copies, and the safetensors layout of those that a store writes.

A store's file can be read by anybody (`safetensors.safe_open`). The format forbids gaps, so that what aligns the weights is
written down too: spaces behind the header, and entries of bytes between the weights.
"""

from __future__ import annotations

import contextlib
import json
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from runtime.errors import StoreError
from runtime.executable import WeightView

PAGE_BYTES = 4096

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class OpenFile:
    """A file descriptor that closes with its last user: a number that was reused would give another file's bytes."""

    def __init__(self, path: Path, flags: int) -> None:
        self.path = path
        try:
            self.fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreError(f"cannot open {path}: {error.strerror}") from error
        weakref.finalize(self, os.close, self.fd)
        if hasattr(os, "posix_fadvise"):  # more is read ahead
            with contextlib.suppress(OSError):
                os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fills `target` from byte `offset` on.

        Raises:
            StoreError: the file ends before, or cannot be read; names it.
        """
        done = 0
        while done < len(target):
            try:
                got = os.preadv(self.fd, [target[done:]], offset + done)
            except OSError as error:
                raise StoreError(f"cannot read {self.path} at byte {offset + done}: {error.strerror}") from error
            if got == 0:
                raise StoreError(
                    f"{self.path} ends at byte {offset + done}, {len(target) - done} bytes too early: it was cut while in use. "
                    "Plan and build the model again"
                )
            done += got

    def write(self, source: memoryview, offset: int) -> None:
        """Writes all of `source` from byte `offset` on.

        Raises:
            StoreError: the disk is full or the file cannot be written; names it.
        """
        done = 0
        while done < len(source):
            try:
                done += os.pwrite(self.fd, source[done:], offset + done)
            except OSError as error:
                raise StoreError(f"cannot write {self.path}: {error.strerror}") from error


@dataclass(frozen=True)
class FileRange:
    """Bytes [offset, offset + nbytes) of a file: what a copy reads where weights live on disk."""

    file: OpenFile
    offset: int
    nbytes: int

    def numel(self) -> int:
        """As of a byte tensor."""
        return self.nbytes


@dataclass(frozen=True)
class FileTensor:
    """A contiguous tensor in a safetensors file."""

    where: FileRange
    dtype: torch.dtype
    shape: tuple[int, ...]

    def is_laid_out_as(self, view: WeightView) -> bool:
        """Whether its bytes are those of the weight, where the weight's dtype can be read."""
        same = (self.dtype, self.shape, self.where.nbytes) == (view.dtype, view.shape, view.nbytes)
        return same and _is_contiguous(view) and self.where.offset % self.dtype.itemsize == 0


# What a copy reads: bytes in host memory (uint8, 1-d), or bytes of a file.
Source = torch.Tensor | FileRange


def safetensors_header(views: Mapping[str, WeightView], places: Mapping[str, int], nbytes: int) -> bytes:
    """The first bytes of a file with the weights at the given offsets of `nbytes` bytes of data; a multiple of a page.

    A weight that is not contiguous, or whose dtype the format lacks, is written as its bytes, with what it is in the metadata.
    """
    entries: dict[str, object] = {}
    metadata = {"format": "pt"}
    cursor = 0
    for name, start in sorted(places.items(), key=lambda item: item[1]):
        view = views[name]
        if start > cursor:
            entries[f"__pad_{cursor}__"] = {"dtype": "U8", "shape": [start - cursor], "data_offsets": [cursor, start]}
        cursor = start + view.nbytes
        dtype, shape = _NAMES.get(view.dtype), list(view.shape)
        if dtype is None or view.nbytes != view.dtype.itemsize * torch.Size(view.shape).numel() or not _is_contiguous(view):
            metadata[name] = json.dumps({"dtype": str(view.dtype), "shape": view.shape, "stride": view.stride})
            dtype, shape = "U8", [view.nbytes]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, cursor]}
    if nbytes > cursor:
        entries[f"__pad_{cursor}__"] = {"dtype": "U8", "shape": [nbytes - cursor], "data_offsets": [cursor, nbytes]}
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % PAGE_BYTES)
    return len(text).to_bytes(8, "little") + text


def _is_contiguous(view: WeightView) -> bool:
    return torch.empty_strided(view.shape, view.stride, dtype=view.dtype, device="meta").is_contiguous()


def read_places(file: OpenFile) -> dict[str, FileTensor]:
    """The tensors of a safetensors file, by name.

    Raises:
        StoreError: the file is too short, or its header is none.
    """
    length = bytearray(8)
    file.read_into(memoryview(length), 0)
    start = 8 + int.from_bytes(length, "little")
    dtypes = {name: dtype for dtype, name in _NAMES.items()}
    try:
        text = bytearray(min(start - 8, os.fstat(file.fd).st_size))
        file.read_into(memoryview(text), 8)
        return {
            name: FileTensor(
                FileRange(file, start + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0]),
                dtypes[entry["dtype"]],
                tuple(entry["shape"]),
            )
            for name, entry in json.loads(text).items()
            if name != "__metadata__" and entry["dtype"] in dtypes
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{file.path} is no safetensors file ({error!r}); download or copy it again") from error
