"""What an emitted package holds of a module's tensors: those that its programs read, each once, in the order of their use."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from runtime.errors import PlannerError
from runtime.executable import Executable, WeightView
from runtime.homes import bytes_of
from runtime.layout import align
from runtime.origins import Lookup, has_no_bytes, in_files, in_memory, named_tensors, source_of, stored_sources
from runtime.package_files import header_hash
from runtime.package_format import encode_tensor
from runtime.weight_file import FileRange, OpenFile, safetensors_header
from runtime.weight_keeper import first_use

INDEX_FILE = "weights.safetensors.index.json"


class PackageWeights:
    """The tensors of some programs, by the names that a package has for them.

    Args:
        module: whose weights they are. lookup: where weights are instead, as in `build(weights=...)`.
        states: what programs write, as it is now, where the module has not got it.
        refer: whether tensors that lie in files of `lookup` as programs read them stay there.

    Attributes:
        views: geometry by the package's name, in the order of use. references: paths of the files that hold some of them.
        nbytes: of those that are to be written.

    Raises:
        PlannerError: there is no value for a tensor.
    """

    def __init__(
        self,
        module: nn.Module,
        programs: Sequence[Executable],
        lookup: Lookup | None,
        states: Mapping[str, torch.Tensor],
        *,
        refer: bool,
    ) -> None:
        self._module = module
        self.alignment = programs[0].layout.alignment
        read = [view for program in programs for view in (*program.weights.values(), *program.tables.values())]
        known = {view.name: view.whole for view in read}
        order = list(dict.fromkeys(name for program in programs for name in first_use(program)))
        short = Counter(_short_name(view) for view in known.values())
        self._names = {name: _short_name(v) if short[_short_name(v)] == 1 else name for name, v in known.items()}
        self.views = {self._names[name]: known[name] for name in order}
        written = {view.name for view in read if view.state}
        tensors = named_tensors(module)
        constants = {v.name: p.constants[node] for p in programs for node, v in p.weights.items() if node in p.constants}
        own = {**constants, **tensors, **({} if lookup is not None else states)}
        _refuse_missing(known, own, lookup)
        sources = stored_sources(list(known.values()), tensors, lookup)
        sources |= {name: source_of(name, view, own, lookup) for name, view in known.items() if name not in sources}
        self._sources = {self._names[name]: source for name, source in sources.items()}
        places = in_files([name for name in order if name not in written], known, tensors, lookup) if refer else {}
        self._places = {self._names[name]: where for name, where in places.items()}
        self._names_there = _names_there(places, known, lookup)

    @property
    def references(self) -> dict[str, OpenFile]:
        return {str(where.file.path.absolute()): where.file for where in self._places.values()}

    @property
    def nbytes(self) -> int:
        return sum(align(view.nbytes, self.alignment) for name, view in self.views.items() if name not in self._places)

    def name_of(self, view: WeightView) -> str:
        """The package's name of a weight, or of what is stored of it."""
        return self._names[view.name]

    def value(self, name: str) -> torch.Tensor:
        """Read, or made, now; to be asked for once."""
        return in_memory(self._sources.pop(name)())

    def place(self, name: str) -> FileRange | None:
        """Where it is in a checkpoint's file, if it stays there."""
        return self._places.get(name)

    def entry(self, name: str) -> dict[str, Any]:
        """What a package says of the tensor, but for where its bytes are."""
        view = self.views[name]
        data = {"kind": _kind(self._module, view.name), **encode_tensor(view)}
        there = self._names_there.get(view.name, name)
        return data if there == name else {**data, "name": there}


def write_shards(folder: Path, tensors: PackageWeights, most: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Writes tensors into files of at most `most` bytes, larger ones alone; gives what a package says of files and tensors.

    Raises:
        OSError: the disk refuses.
    """
    files: dict[str, Any] = {}
    for path, file in tensors.references.items():
        status = os.fstat(file.fd)
        files[path] = {
            "path": path,
            "nbytes": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "header_sha256": header_hash(file),
        }
    entries = {name: tensors.entry(name) for name in tensors.views}
    for name in tensors.views:
        where = tensors.place(name)
        if where is not None:
            entries[name] |= {"file": str(where.file.path.absolute()), "offset": where.offset}
    shards = list(_shards(tensors, most))
    for number, names in enumerate(shards, 1):
        file_name = f"weights-{number:05}-of-{len(shards):05}.safetensors"
        for name, offset, checksum in _write_shard(folder / file_name, names, tensors):
            entries[name] |= {"file": file_name, "offset": offset, "crc32": checksum}
        written = OpenFile(folder / file_name, os.O_RDONLY)
        files[file_name] = {"nbytes": os.fstat(written.fd).st_size, "header_sha256": header_hash(written)}
    index = {name: entry["file"] for name, entry in entries.items() if "crc32" in entry}
    if index:
        total = sum(tensors.views[name].nbytes for name in index)
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
        (folder / INDEX_FILE).write_text(text, encoding="utf-8")
    return files, entries


def _shards(tensors: PackageWeights, most: int) -> Iterator[list[str]]:
    """Names of the tensors to write, file by file."""
    names: list[str] = []
    used = 0
    for name, view in tensors.views.items():
        if tensors.place(name) is not None:
            continue
        nbytes = align(view.nbytes, tensors.alignment)
        if names and used + nbytes > most:
            yield names
            names, used = [], 0
        names.append(name)
        used += nbytes
    if names:
        yield names


def _write_shard(path: Path, names: list[str], tensors: PackageWeights) -> Iterator[tuple[str, int, int]]:
    """Writes one file; gives of each tensor where it begins, and the checksum of its bytes."""
    places, cursor = {}, 0
    for name in names:
        places[name] = cursor
        cursor += align(tensors.views[name].nbytes, tensors.alignment)
    header = safetensors_header(tensors.views, places, cursor)
    with open(path, "xb") as file:
        _reserve(file.fileno(), len(header) + cursor)
        file.write(header)
        for name, start in places.items():
            view = tensors.views[name]
            content = memoryview(bytes_of(view, tensors.value(name)).numpy())  # type: ignore[arg-type]
            file.seek(len(header) + start)
            file.write(content)
            yield name, len(header) + start, zlib.crc32(content)
        file.truncate(len(header) + cursor)  # what aligns the last one, where no blocks were taken


def _reserve(fd: int, nbytes: int) -> None:
    """Takes all blocks now, where the file system can: a full disk is an error before anything is computed."""
    with contextlib.suppress(AttributeError):  # not on every system
        try:
            os.posix_fallocate(fd, 0, nbytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise


def _refuse_missing(views: Mapping[str, WeightView], own: Mapping[str, torch.Tensor], lookup: Lookup | None) -> None:
    """Raises PlannerError where a tensor has no value here."""
    if lookup is not None:
        return
    for view in views.values():
        name = view.name if view.stored is None else view.stored.weight
        if name not in own or has_no_bytes(own[name]):
            raise PlannerError(
                f"the weight {name!r} is on the meta device (or fake), and a package holds weights: "
                "p.emit(folder, weights=<module, state dict or checkpoint folder>)"
            )


def _short_name(view: WeightView) -> str:
    return view.name if view.stored is None else view.stored.name


def _names_there(places: Mapping[str, FileRange], views: Mapping[str, WeightView], lookup: Lookup | None) -> dict[str, str]:
    """What a checkpoint's files call the tensors that stay in them: of a tied one perhaps another of its names."""
    place: Callable[[str], Any] | None = getattr(lookup, "place", None)
    if place is None:
        return {}
    return {name: next(n for n in (name, *views[name].aliases) if place(n) is not None) for name in places}


def _kind(module: nn.Module, name: str) -> str:
    """What the module has it as: "parameter", "buffer" (of its state dict), or "other"."""
    path, _, key = name.rpartition(".")
    try:
        owner = module.get_submodule(path)
    except AttributeError:
        return "other"
    if key in owner._parameters:
        return "parameter"
    return "buffer" if key in owner._buffers and key not in owner._non_persistent_buffers_set else "other"
