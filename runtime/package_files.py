"""The files that hold an emitted package's tensors: its own shards, or a checkpoint's where it refers to those.

Everything is checked before anything is read: that a file is there, as long as it was, with the header that it had, and, of a
checkpoint's file, last written when it was; `verify` reads the package's own tensors through and compares checksums.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from runtime.errors import PackageError, StoreError
from runtime.executable import WeightView
from runtime.weight_file import FileRange, FileTensor, OpenFile, read_places

_CHUNK = 1 << 24  # bytes that are read at once to be checked
_LONGEST_HEADER = 100_000_000  # of the format; a longer one is damage


@dataclass(frozen=True)
class PackedTensor(FileTensor):
    """A tensor of a package, and how it is laid out there: strides, too, which safetensors does not know."""

    stride: tuple[int, ...] = ()

    def is_laid_out_as(self, view: WeightView) -> bool:
        """Whether its bytes are those of the weight."""
        mine = (self.dtype, self.shape, self.stride, self.where.nbytes)
        same = mine == (view.dtype, view.shape, view.stride, view.nbytes)
        return same and self.where.offset % self.dtype.itemsize == 0


class PackageFiles:
    """A look-up of tensors by name, read when they are asked for; `place` says where bytes are, as a checkpoint does.

    Args:
        folder: the package. views: all tensors, by name; entries: what `plan.json` says of where they are.
        files: what it says of files. checkpoint: a folder in which files of another are looked for instead.

    Raises:
        PackageError: a file is missing, cut or another one; names it, and a tensor in it.
    """

    def __init__(
        self,
        folder: Path,
        views: Mapping[str, WeightView],
        entries: Mapping[str, Any],
        files: Mapping[str, Any],
        checkpoint: Path | None = None,
    ) -> None:
        self._views, self._entries = views, entries
        self._files: dict[str, OpenFile] = {}
        for name, known in files.items():
            inside = [tensor for tensor, entry in entries.items() if entry["file"] == name]
            path = folder / name
            if "path" in known:
                path = Path(known["path"]) if checkpoint is None else checkpoint / Path(known["path"]).name
            self._files[name] = self._open(path, known, inside, moved=checkpoint is not None)
        self._owned = {name for name, known in files.items() if "path" not in known}

    def __call__(self, name: str) -> torch.Tensor | None:
        """The tensor over a mapping of its own, which goes with it."""
        if name not in self._entries:
            return None
        view, where = self._views[name], self._where(name)
        if view.nbytes == 0:
            return view.on(torch.empty(0, dtype=torch.uint8), 0)
        start = where.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        skip, protection = where.offset - start, mmap.PROT_READ | mmap.PROT_WRITE  # private to us; PyTorch warns of less
        mapped = mmap.mmap(where.file.fd, skip + view.nbytes, flags=mmap.MAP_PRIVATE, prot=protection, offset=start)
        return view.on(torch.frombuffer(mapped, dtype=torch.uint8, count=view.nbytes, offset=skip), 0)

    def place(self, name: str) -> PackedTensor | None:
        """Where the tensor is."""
        if name not in self._entries:
            return None
        view = self._views[name]
        return PackedTensor(self._where(name), view.dtype, view.shape, view.stride)

    def verify(self) -> None:
        """Reads the package's own tensors and compares their checksums.

        Raises:
            PackageError: one differs; names file and tensor. StoreError: a file cannot be read.
        """
        buffer = bytearray(min(_CHUNK, max((view.nbytes for view in self._views.values()), default=0)))
        for name, entry in self._entries.items():
            if entry["file"] not in self._owned:
                continue
            where, checksum, done = self._where(name), 0, 0
            while done < where.nbytes:
                piece = memoryview(buffer)[: min(len(buffer), where.nbytes - done)]
                where.file.read_into(piece, where.offset + done)
                checksum, done = zlib.crc32(piece, checksum), done + len(piece)
            if checksum != entry["crc32"]:
                raise PackageError(
                    f"{where.file.path}: the bytes of the tensor {name!r} are not those that were emitted, so the file is "
                    "damaged or was changed; emit the package again, or copy it again"
                )

    def _where(self, name: str) -> FileRange:
        entry = self._entries[name]
        return FileRange(self._files[entry["file"]], entry["offset"], self._views[name].nbytes)

    def _open(self, path: Path, known: Mapping[str, Any], inside: list[str], *, moved: bool) -> OpenFile:
        example = f"the tensor {inside[0]!r}" if inside else "no tensor"
        again = "plan and emit again" if "path" in known else "copy the package again, or emit it again"
        try:
            file = OpenFile(path, os.O_RDONLY)
        except StoreError as error:
            hint = (
                "; runtime.load(folder, checkpoint=<folder>) names the folder where the checkpoint is now"
                if "path" in known
                else ""
            )
            raise PackageError(f"{error}: the package has {example} in it{hint}") from error
        found = os.fstat(file.fd)
        if found.st_size != known["nbytes"]:
            ends = {name: self._entries[name]["offset"] + self._views[name].nbytes for name in inside}
            cut = next((name for name, end in ends.items() if end > found.st_size), None)
            what = (
                f"was cut: the tensor {cut!r} ends behind its end" if cut is not None else f"is another file (it has {example})"
            )
            raise PackageError(f"{path} has {found.st_size} bytes instead of {known['nbytes']} and {what}; {again}")
        if header_hash(file) != known["header_sha256"]:
            raise PackageError(f"{path} {self._difference(file, inside)}; {again}")
        if "mtime_ns" in known and not moved and found.st_mtime_ns != known["mtime_ns"]:
            raise PackageError(f"{path} was written since the package was emitted, which reads {example} from it; {again}")
        return file

    def _difference(self, file: OpenFile, inside: list[str]) -> str:
        """How a header is not the one that was there."""
        try:
            places = read_places(file)
        except StoreError:
            return (
                f"has no safetensors header, and the package reads the tensor {inside[0]!r} from it"
                if inside
                else "has another header"
            )
        for name in inside:
            place = places.get(self._entries[name].get("name", name))
            if place is None:
                return f"has another header: the tensor {name!r} is missing"
            if (place.where.offset, place.where.nbytes) != (self._entries[name]["offset"], self._views[name].nbytes):
                return f"has another header: the tensor {name!r} is at another place, or of another size"
        return "has another header, so what its tensors are is not known" + (f" ({inside[0]!r} is one)" if inside else "")


def header_hash(file: OpenFile) -> str:
    """SHA-256 of a safetensors file's header, its length included; of what there is where that is less.

    Raises:
        StoreError: the file cannot be read.
    """
    size = os.fstat(file.fd).st_size
    length = bytearray(min(8, size))
    file.read_into(memoryview(length), 0)
    header = bytearray(min(8 + int.from_bytes(length, "little"), size, _LONGEST_HEADER))
    file.read_into(memoryview(header), 0)
    return hashlib.sha256(header).hexdigest()
