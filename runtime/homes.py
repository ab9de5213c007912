"""Homes: where the host keeps weights. Memory (an anonymous map), or disk (a file, mapped for those who look at the module).

A home makes segments; a segment is a run of bytes in which a store places weights, and gives them as tensors and as sources of
copies.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch

from runtime.errors import StoreError
from runtime.executable import WeightView
from runtime.scratch import VARIABLE, ScratchFolder
from runtime.weight_file import FileRange, FileTensor, OpenFile, Source, Value, is_contiguous, safetensors_header

# A private map of a file that is larger than RAM is refused unless it says that it wants no swap kept for it. Python names the
# flag from 3.13 on.
_NO_RESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class Segment(Protocol):
    """Bytes that hold weights. `buffer` is all of them (uint8, 1-d); `in_memory`: there are some, and they are no file's."""

    buffer: torch.Tensor
    in_memory: bool

    def tensor(self, view: WeightView, offset: int) -> torch.Tensor:
        """The weight at that offset, in a storage of its own, and the very bytes: what is written there stays."""
        ...

    def write(self, view: WeightView, offset: int, value: Value) -> None:
        """Puts the value there; one that is in a file is read straight to it.

        Raises:
            StoreError: the disk refuses.
        """
        ...

    def source(self, offset: int, nbytes: int) -> Source:
        """Those bytes, for copies."""
        ...


class Home(Protocol):
    def split(self, views: Mapping[str, WeightView]) -> list[tuple[Home, Mapping[str, WeightView]]]:
        """Which home has which of the weights."""
        ...

    def segment(self, views: Mapping[str, WeightView], places: Mapping[str, int], nbytes: int) -> Segment:
        """Makes `nbytes` bytes for weights at the given offsets.

        Raises:
            StoreError, BudgetError: there is no room.
        """
        ...

    def leave(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor as it can outlive the home, strides kept."""
        ...

    def close(self) -> None:
        """Gives up what is not memory. Tensors that are still held stay readable."""
        ...


class MemoryHome:
    """Exactly sized anonymous maps, which page-locking needs (`pin_memory()` rounds up to powers of two)."""

    def split(self, views: Mapping[str, WeightView]) -> list[tuple[Home, Mapping[str, WeightView]]]:
        return [(self, views)]

    def segment(self, views: Mapping[str, WeightView], places: Mapping[str, int], nbytes: int) -> Segment:
        return _MemorySegment(nbytes)

    def leave(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def close(self) -> None:
        return None


class _MemorySegment:
    def __init__(self, nbytes: int) -> None:
        self.in_memory = nbytes > 0
        self._map = mmap.mmap(-1, max(nbytes, 1))
        self.buffer = torch.frombuffer(self._map, dtype=torch.uint8, count=max(nbytes, 1))

    def tensor(self, view: WeightView, offset: int) -> torch.Tensor:
        return view.on(torch.frombuffer(self._map, dtype=torch.uint8, count=view.nbytes, offset=offset), 0)

    def write(self, view: WeightView, offset: int, value: Value) -> None:
        _put(self.tensor(view, offset), value)

    def source(self, offset: int, nbytes: int) -> Source:
        return self.buffer[offset : offset + nbytes]


class CheckpointSegment:
    """A checkpoint's own file, which is never written: what is written in place is private to this process, in memory."""

    in_memory = False

    def __init__(self, file: OpenFile) -> None:
        self._file = file
        self._map = mmap.mmap(file.fd, 0, flags=mmap.MAP_PRIVATE | _NO_RESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        self.buffer = torch.empty(0, dtype=torch.uint8)

    def tensor(self, view: WeightView, offset: int) -> torch.Tensor:
        return view.on(torch.frombuffer(self._map, dtype=torch.uint8, count=view.nbytes, offset=offset), 0)

    def write(self, view: WeightView, offset: int, value: Value) -> None:
        _put(self.tensor(view, offset), value)

    def source(self, offset: int, nbytes: int) -> Source:
        return FileRange(self._file, offset, nbytes)

    def private(self, offset: int, nbytes: int) -> Source:
        """The bytes as this process sees them."""
        return torch.frombuffer(self._map, dtype=torch.uint8, count=nbytes, offset=offset)


class DiskHome:
    """Safetensors files in a scratch folder of its own, made when the first weight comes.

    The module's tensors lie over a shared mapping: a page that nobody touches takes no RAM, and what is written in place is in
    the file at once, so that the next copy reads it.
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        self._limit_bytes = limit_bytes
        self._folder: ScratchFolder | None = None
        self._files = 0

    def segment(self, views: Mapping[str, WeightView], places: Mapping[str, int], nbytes: int) -> Segment:
        if nbytes == 0:
            return _MemorySegment(0)
        if self._folder is None:
            self._folder = ScratchFolder(self._limit_bytes)
        header = safetensors_header(views, places, nbytes)
        weights = sum(view.nbytes > 0 for view in views.values())
        first = self._files == 0
        try:
            self._folder.reserve(nbytes, len(header))
            segment = _FileSegment(self._folder, f"weights-{self._files + 1}.safetensors", header, nbytes, weights, first)
        except BaseException:
            if first:
                self.close()
            raise
        self._files += 1
        return segment

    def split(self, views: Mapping[str, WeightView]) -> list[tuple[Home, Mapping[str, WeightView]]]:
        return [(self, views)]

    def leave(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone() if tensor.device.type == "cpu" else tensor

    def close(self) -> None:
        if self._folder is not None:
            self._folder.close()


class _FileSegment:
    """One safetensors file, written weight by weight under a temporary name."""

    in_memory = False

    def __init__(self, folder: ScratchFolder, name: str, header: bytes, nbytes: int, weights: int, first: bool) -> None:
        # The folder is named by what the first file holds; constants of later programs follow.
        self._folder, self._name, self._first = folder, name, first
        self._start, self._waiting = len(header), weights
        self._digest = hashlib.sha256(header)
        self._file = OpenFile(folder.path / f"{name}.part", os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            # All blocks now: a full disk is an error here, and would be a bus error in a write through the mapping.
            os.posix_fallocate(self._file.fd, 0, self._start + nbytes)
            self._file.write(memoryview(header), 0)
        except OSError as error:
            self._remove()
            raise StoreError(
                f"no room for {nbytes} bytes of weights in {folder.parent} ({error.strerror}); set {VARIABLE} to another folder"
            ) from error
        except StoreError:
            self._remove()
            raise
        self._map = mmap.mmap(self._file.fd, self._start + nbytes)
        self.buffer = torch.frombuffer(self._map, dtype=torch.uint8, count=nbytes, offset=self._start)

    def tensor(self, view: WeightView, offset: int) -> torch.Tensor:
        own = torch.frombuffer(self._map, dtype=torch.uint8, count=view.nbytes, offset=self._start + offset)
        return view.on(own, 0)

    def write(self, view: WeightView, offset: int, value: Value) -> None:
        """Past the mapping, of which no page becomes resident."""
        for first, content in _contents(view, value):
            self._file.write(content, self._start + offset + first)
            if self._waiting:
                self._digest.update(content)
        if self._waiting == 0:
            return  # written again
        self._waiting -= 1
        if self._waiting == 0:
            self._finish()

    def _remove(self) -> None:
        with contextlib.suppress(OSError):
            self._file.path.unlink()

    def _finish(self) -> None:
        os.rename(self._folder.path / f"{self._name}.part", self._folder.path / self._name)
        if self._first:
            self._folder.finish(self._digest.hexdigest())
        self._file.path = self._folder.path / self._name

    def source(self, offset: int, nbytes: int) -> Source:
        return FileRange(self._file, self._start + offset, nbytes)


def _put(target: torch.Tensor, value: Value) -> None:
    if isinstance(value, FileTensor):
        value.copy_into(target)
    else:
        target.copy_(value)


def _contents(view: WeightView, value: Value) -> Iterator[tuple[int, memoryview]]:
    """The value's bytes as the view lays them, one part after the other, each with the place of its first byte."""
    if not isinstance(value, FileTensor):
        yield 0, memoryview(bytes_of(view, value).numpy())  # type: ignore[arg-type]
    elif not is_contiguous(view):
        yield 0, memoryview(bytes_of(view, value.read()).numpy())  # type: ignore[arg-type]
    else:
        for first, piece in value.pieces(view.dtype):
            yield first * view.dtype.itemsize, memoryview(piece.view(torch.uint8).numpy())  # type: ignore[arg-type]


def bytes_of(view: WeightView, value: torch.Tensor) -> torch.Tensor:
    """The value's bytes as the view lays them (uint8, 1-d); the value's own memory where that is laid out so already."""
    value = value.detach()
    dense = value.numel() * value.dtype.itemsize == view.nbytes
    if dense and value.device.type == "cpu" and value.dtype == view.dtype and value.stride() == view.stride:
        return value.as_strided((value.numel(),), (1,)).view(torch.uint8)
    own = torch.zeros(view.nbytes, dtype=torch.uint8)
    view.on(own, 0).copy_(value)
    return own
