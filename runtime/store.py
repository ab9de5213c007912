"""The host's copy of the weights: each tensor a storage of its own, over bytes in memory or in a file (`runtime.homes`).

`torch.save` of one view saves all that it is a view of, which is why tensors are laid over the bytes one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch.utils._python_dispatch import _disable_current_modes

from runtime.checkpoint_file import CheckpointFile
from runtime.executable import WeightView
from runtime.homes import CheckpointSegment, Home, MemoryHome, Segment
from runtime.layout import align
from runtime.weight_file import FileRange, FileTensor, OpenFile, Source, Value, is_contiguous


class HostStore:
    """Weights by any of their names, in the order given, at multiples of `alignment` bytes, in memory unless `home` is another.

    Weights in `given` stay in the files where they are; of those `fill` only gives the tensor.

    The store is filled one weight at a time, and its caller may free each original before the next is copied, so that the host
    never holds the model twice.
    """

    def __init__(
        self,
        views: Mapping[str, WeightView],
        alignment: int,
        home: Home | None = None,
        given: Mapping[str, FileRange] | None = None,
    ) -> None:
        self.views: dict[str, WeightView] = {}
        self.nbytes, self._alignment = 0, alignment
        self._home: Home = home if home is not None else MemoryHome()
        self._places: dict[str, tuple[int, int]] = {}  # segment and offset
        self._names: dict[str, str] = {}  # of tied weights: another name of one to its own
        self._segments: list[Segment] = []
        self._given = dict(given or {})
        self._checkpoints = list(dict.fromkeys(w.file for w in self._given.values() if isinstance(w.file, CheckpointFile)))
        self._written: set[str] = set()  # of those: what the process changed in its own memory
        self.extend({name: view for name, view in views.items() if name not in self._given})
        self._take(views)

    @property
    def buffers(self) -> list[torch.Tensor]:
        """The bytes of every segment in memory."""
        return [segment.buffer for segment in self._segments if segment.in_memory]

    @property
    def held(self) -> dict[str, int]:
        """The weights in memory, with the bytes that they take there."""
        return {name: self._aligned(self.views[name]) for name, (at, _) in self._places.items() if self._segments[at].in_memory}

    def extend(self, views: Mapping[str, WeightView]) -> list[torch.Tensor]:
        """Adds weights (the constants that a later program brings) and gives the memory that they take.

        Raises:
            StoreError, BudgetError: their home has no room.
        """
        before = len(self._segments)
        for home, part in self._home.split(views):
            self._add(home, part)
        return [segment.buffer for segment in self._segments[before:] if segment.in_memory]

    def _add(self, home: Home, views: Mapping[str, WeightView]) -> None:
        places, cursor = {}, 0
        for name, view in views.items():
            places[name] = cursor
            cursor += self._aligned(view)
        self._segments.append(home.segment(views, places, cursor))
        self._places |= {name: (len(self._segments) - 1, offset) for name, offset in places.items()}
        self._register(views)
        self.nbytes += cursor

    def _aligned(self, view: WeightView) -> int:
        return align(view.nbytes, self._alignment)

    def _take(self, views: Mapping[str, WeightView]) -> None:
        segments: dict[OpenFile, int] = {}
        for name, where in self._given.items():
            if where.file not in segments:
                segments[where.file] = len(self._segments)
                self._segments.append(CheckpointSegment(where.file))
            self._places[name] = segments[where.file], where.offset
            self._register({name: views[name]})
            self.nbytes += where.nbytes

    def _register(self, views: Mapping[str, WeightView]) -> None:
        self.views.update(views)
        self._names |= {alias: name for name, view in views.items() for alias in view.aliases}

    def has(self, name: str) -> bool:
        """Whether it holds a weight of that name."""
        return name in self.views or name in self._names

    def _own(self, name: str) -> str:
        return name if name in self.views else self._names[name]

    def written(self, names: Iterable[str]) -> bool:
        """Says that tensors of the store were written in place; gives whether `runs` changed by that.

        A file that is not ours is not written: the new value is in this process's memory only.
        """
        fresh = (self._given.keys() & set(names)) - self._written
        self._written |= fresh
        return bool(fresh)

    def fill(self, name: str, value: Value) -> torch.Tensor:
        """Copies one weight in, or reads it in from a file; gives the tensor that now holds it."""
        if name in self._given:
            return self.tensor(name)
        segment, offset = self._places[name]
        if self.views[name].nbytes:
            self._segments[segment].write(self.views[name], offset, value)
        return self.tensor(name)

    def tensor(self, name: str) -> torch.Tensor:
        """The weight as a tensor with a storage of its own over the store's bytes."""
        name = self._own(name)
        view = self.views[name]
        if view.nbytes == 0:
            return torch.empty_strided(view.shape, view.stride, dtype=view.dtype)
        segment, offset = self._places[name]
        with _disable_current_modes():  # bytes of the host are none of the device's, whoever counts those
            return self._segments[segment].tensor(view, offset)

    def value(self, name: str) -> Value:
        """The weight as it is now, in a file where it lies there as the format has tensors: reading it touches no mapping."""
        name = self._own(name)
        view = self.views[name]
        if view.nbytes and is_contiguous(view):
            ((_, source),) = self.runs([(name, 0)])
            if isinstance(source, FileRange):
                return FileTensor(source, view.dtype, view.shape)
        return self.tensor(name)

    def check(self) -> None:
        """Raises CheckpointError where a checkpoint's file that weights are read from has changed."""
        for file in self._checkpoints:
            file.check()

    def leave(self, tensor: torch.Tensor) -> torch.Tensor:
        """One of the store's tensors as it can outlive the store: in memory."""
        where = tensor.data_ptr()
        if any(b.data_ptr() <= where < b.data_ptr() + b.numel() for b in self.buffers):
            return tensor
        return self._home.leave(tensor)

    def runs(self, places: Sequence[tuple[str | WeightView, int]]) -> list[tuple[int, Source]]:
        """(offset, source bytes) that put weights at the given offsets; neighbours on both sides are one copy.

        A weight is named, or is a view: of rows, which are found inside of the whole.
        """
        joined: list[list[int]] = []  # segment, start, offset, bytes
        private: list[tuple[int, Source]] = []
        for weight, offset in places:
            view = self.views[self._own(weight)] if isinstance(weight, str) else weight
            name, nbytes = self._own(view.name), view.nbytes
            segment, start = self._places[name]
            start += view.first_byte
            if nbytes == 0:
                continue
            own = self._segments[segment]
            if name in self._written and isinstance(own, CheckpointSegment):
                private.append((offset, own.private(start, nbytes)))
                continue
            last = joined[-1] if joined and joined[-1][0] == segment else None
            if last is not None and start - last[1] == offset - last[2] and last[1] < start:
                last[3] = start - last[1] + nbytes
            else:
                joined.append([segment, start, offset, nbytes])
        with _disable_current_modes():
            files = [(offset, self._segments[segment].source(start, nbytes)) for segment, start, offset, nbytes in joined]
        return files + private

    def close(self) -> None:
        """Gives up what is on disk; tensors that are still held stay readable."""
        self._home.close()
