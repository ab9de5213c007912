"""Files that hold weights: byte ranges of them as sources of copies, and the safetensors layout of those that a store writes.

A store's file can be read by anybody (`safetensors.safe_open`). The format forbids gaps, so that what aligns the weights is
written down too: spaces behind the header, and entries of bytes between the weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from runtime.errors import CheckpointError, StoreError
from runtime.executable import WeightView

PAGE_BYTES = 4096
# What a conversion holds at a time: a weight in another dtype than the program's is read and converted in such pieces.
PIECE_BYTES = 8 * 1024 * 1024

# What the format calls the dtypes.
DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_MOST_HEADER_BYTES = 100_000_000  # the format's own limit


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
        return same and is_contiguous(view) and self.where.offset % self.dtype.itemsize == 0

    def read(self) -> torch.Tensor:
        """The tensor in memory.

        Raises:
            StoreError: the file ends before, or cannot be read; names it. As all that reads.
        """
        result = torch.empty(self.shape, dtype=self.dtype)
        self.copy_into(result)
        return result

    def copy_into(self, target: torch.Tensor) -> None:
        """Fills a host tensor of the same shape: read straight into it, in pieces where its dtype is another."""
        if not target.is_contiguous():
            target.copy_(self.read())
        elif target.dtype == self.dtype and self.where.nbytes:
            self.where.file.read_into(_bytes_of(target), self.where.offset)
        else:
            flat = target.view(-1)
            for first, piece in self.pieces():
                flat[first : first + piece.numel()] = piece

    def pieces(self, dtype: torch.dtype | None = None) -> Iterator[tuple[int, torch.Tensor]]:
        """The values, in that dtype or their own, in order: (number of the first, values as a 1-d tensor).

        A piece is overwritten by the next one.
        """
        step = PIECE_BYTES // self.dtype.itemsize
        count = self.where.nbytes // self.dtype.itemsize
        buffer = _buffer(min(step, count), self.dtype)
        converted = buffer if dtype is None or dtype == self.dtype else _buffer(min(step, count), dtype)
        for first in range(0, count, step):
            piece, result = (b[: min(step, count - first)] for b in (buffer, converted))
            self.where.file.read_into(_bytes_of(piece), self.where.offset + first * self.dtype.itemsize)
            yield first, piece if converted is buffer else result.copy_(piece)


# What a copy reads: bytes in host memory (uint8, 1-d), or bytes of a file.
Source = torch.Tensor | FileRange
# A weight's value: in memory, or in a file from which it is read when it is needed.
Value = torch.Tensor | FileTensor


def _buffer(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory that goes back to the system at once: pieces from the heap, freed between small values, leave holes there."""
    if count == 0:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize), dtype=dtype)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous host tensor with elements."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


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
        dtype, shape = DTYPE_NAMES.get(view.dtype), list(view.shape)
        if dtype is None or view.nbytes != view.dtype.itemsize * torch.Size(view.shape).numel() or not is_contiguous(view):
            metadata[name] = json.dumps({"dtype": str(view.dtype), "shape": view.shape, "stride": view.stride})
            dtype, shape = "U8", [view.nbytes]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, cursor]}
    if nbytes > cursor:
        entries[f"__pad_{cursor}__"] = {"dtype": "U8", "shape": [nbytes - cursor], "data_offsets": [cursor, nbytes]}
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % PAGE_BYTES)
    return len(text).to_bytes(8, "little") + text


def is_contiguous(view: WeightView) -> bool:
    """Whether the weight lies as the format has tensors."""
    return torch.empty_strided(view.shape, view.stride, dtype=view.dtype, device="meta").is_contiguous()


@dataclass(frozen=True)
class Entry:
    """A tensor of the header: the format's name of its dtype, its shape, and its bytes [start, stop) of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """What the first bytes of a file say. `entries` are in the order of their bytes; `digest` is over the header itself."""

    entries: dict[str, Entry]
    digest: str


def read_header(file: OpenFile) -> Header:
    """The header of a safetensors file, checked: every tensor is in the file, and its bytes are those of its shape.

    Raises:
        CheckpointError: it is not; names the file, and the first tensor that is concerned.
    """
    size = os.fstat(file.fd).st_size
    if size < 8:
        raise _damaged(file, f"has {size} bytes")
    length = bytearray(8)
    file.read_into(memoryview(length), 0)
    nbytes = int.from_bytes(length, "little")
    if nbytes > min(size - 8, _MOST_HEADER_BYTES):
        raise _damaged(file, f"says that its header has {nbytes} bytes, and the file has {size}")
    text = bytearray(nbytes)
    file.read_into(memoryview(text), 8)
    try:
        table = json.loads(text)
        entries = {name: _entry(entry, 8 + nbytes) for name, entry in table.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(file, f"has a bad header: {error!r}") from error
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
    _check_places(file, entries, 8 + nbytes, size)
    return Header(entries, hashlib.sha256(text).hexdigest())


def read_places(file: OpenFile) -> dict[str, FileTensor]:
    """The tensors of a safetensors file, by name, of those dtypes that PyTorch has.

    Raises:
        CheckpointError: as `read_header`.
    """
    return tensors_of(file, read_header(file))


def tensors_of(file: OpenFile, header: Header) -> dict[str, FileTensor]:
    """The tensors that a file's header lists, by name, of those dtypes that PyTorch has."""
    return {
        name: FileTensor(FileRange(file, entry.start, entry.stop - entry.start), DTYPES[entry.dtype], entry.shape)
        for name, entry in header.entries.items()
        if entry.dtype in DTYPES
    }


def _entry(entry: dict[str, object], data: int) -> Entry:
    """Raises TypeError, KeyError or ValueError where it is none."""
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise TypeError(f"{entry}")
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, *offsets)):
        raise ValueError(f"{entry}")
    return Entry(dtype, tuple(shape), data + offsets[0], data + offsets[1])


def _check_places(file: OpenFile, entries: dict[str, Entry], data: int, size: int) -> None:
    """Tensors follow each other without gaps up to the end of the file."""
    cursor = data
    for name, entry in entries.items():
        known = DTYPES.get(entry.dtype)
        if entry.start != cursor or entry.stop < entry.start:
            raise _damaged(file, f"has {name!r} at byte {entry.start}, where {cursor} is next", name)
        if known is not None and entry.stop - entry.start != prod(entry.shape) * known.itemsize:
            raise _damaged(file, f"has {entry.stop - entry.start} bytes for {name!r}, {entry.dtype} {list(entry.shape)}", name)
        cursor = entry.stop
        if cursor > size:
            raise CheckpointError(
                f"{file.path} is truncated: it ends at byte {size}, within {name!r}, which ends at {cursor}; "
                "download or copy it again",
                path=str(file.path),
                tensor=name,
            )
    if cursor < size:
        last = next(reversed(entries), "")
        raise _damaged(file, f"goes on for {size - cursor} bytes behind its last tensor {last!r}", last)


def _damaged(file: OpenFile, what: str, tensor: str = "") -> CheckpointError:
    return CheckpointError(
        f"{file.path} is no safetensors file ({what}); download or copy it again", path=str(file.path), tensor=tensor
    )
