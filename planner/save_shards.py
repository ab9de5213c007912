"""`save_sharded`: a plan's weights as a checkpoint again, shard by shard; memory never holds more than one weight besides.

The files are what the library itself would write: config.json, `model-00001-of-00003.safetensors` (diffusers:
`diffusion_pytorch_model-...`) and an index where there are several; a module of neither library gets `model.safetensors`.

By default every weight is written as the model has it, so that anybody can load the folder. With `stored=True` a cast weight
`w` is written as the program stores it, as two tensors `w:values:<dtype>:<dim>` (in the storage type) and
`w:scales:<dtype>:<dim>` (float32): `w = values * scales`, with a scale for each index of `dim`, or one for all where it is
None. Other loaders will miss `w`, rather than take the values for it; `plan(folder)` and `build(weights=folder)` take them
as they are where the plan casts just so, and cast them back elsewhere.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from planner.checkpoint_files import DIFFUSERS, TRANSFORMERS
from planner.libraries import library_of
from planner.presets import frontend
from planner.progress import stepping
from planner.sizes import format_bytes, parse_size
from runtime.errors import PlannerError, StoreError
from runtime.origins import Lookup, has_no_bytes, named_tensors, source_of, view_of
from runtime.runner import Runner
from runtime.weight_file import DTYPE_NAMES, FileTensor, Value

if TYPE_CHECKING:
    from planner.plan import Plan


@dataclass(frozen=True)
class Item:
    """A tensor to be written. `value` gives it when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    value: Callable[[], Value]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def save_sharded(plan: Plan, folder: str | os.PathLike[str], max_shard_size: int | str = "5GB", stored: bool = False) -> None:
    """Writes the weights of a plan's module, as they are now, into a new folder; see the module for the form.

    Everything is written beside its place and moved there in the end: where anything goes wrong, nothing is left.

    Raises:
        PlannerError: the folder has weights already; a weight has no values, or a dtype that safetensors lacks.
        StoreError: the disk is full or refuses.
    """
    limit, target = parse_size(max_shard_size, "max_shard_size"), Path(folder)
    _refuse_place(target)
    runner = plan.runner
    items, aliases = _items(plan.target, runner, plan.lookup, stored)
    if stored:
        items += _stored_items(runner)
    total = sum(item.nbytes for item in items)
    free = shutil.disk_usage(target.absolute().parent).free
    if total > free:
        raise StoreError(f"the weights take {format_bytes(total)}, and {target} has {format_bytes(free)} free; save elsewhere")
    library = library_of(plan.target)
    with _replacing_folder(target) as scratch:
        if library is not None:
            frontend(library).save_config(plan.target, scratch)
        _write(scratch, DIFFUSERS if library == "diffusers" else TRANSFORMERS, items, limit, {} if library else aliases)


def _refuse_place(folder: Path) -> None:
    if not folder.absolute().parent.is_dir():
        raise PlannerError(f"cannot save to {str(folder)!r}: there is no such folder above it; make it first")
    if folder.exists() and not folder.is_dir():
        raise PlannerError(f"cannot save to {str(folder)!r}: that is a file; name a folder")
    there = next(
        (path.name for pattern in ("*.safetensors", "*.index.json", "config.json") for path in folder.glob(pattern)), ""
    )
    if there:
        raise PlannerError(f"{str(folder)!r} has a checkpoint already ({there}), which may be read from; save to a new folder")


def _items(module: nn.Module, runner: Runner | None, lookup: Lookup | None, stored: bool) -> tuple[list[Item], dict[str, str]]:
    """What a checkpoint of the module has, tied weights once; with the other names of these."""
    ignored = [re.compile(pattern) for pattern in getattr(module, "_keys_to_ignore_on_save", None) or ()]
    everything = named_tensors(module)
    first: dict[int, str] = {}
    items, aliases = [], {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if any(pattern.search(name) for pattern in ignored):
            continue
        if not isinstance(tensor, torch.Tensor):
            raise PlannerError(f"{name!r} in the state of {type(module).__name__} is no tensor, which safetensors cannot hold")
        own = first.setdefault(id(tensor), name)
        if own != name:
            aliases[name] = own
        elif not (stored and _is_stored_otherwise(runner, name)):
            items.append(Item(name, tensor.dtype, tuple(tensor.shape), _value_of(name, tensor, everything, runner, lookup)))
    return items, aliases


def _is_stored_otherwise(runner: Runner | None, name: str) -> bool:
    """Whether a cast form of a weight is in the store, and the weight itself is not."""
    if runner is None or runner.store is None or runner.store.has(name):
        return False
    return any(
        v.stored is not None and v.stored.weight == name and v.stored.part == "values" for v in runner.store.views.values()
    )


def _value_of(
    name: str, tensor: torch.Tensor, everything: Mapping[str, torch.Tensor], runner: Runner | None, lookup: Lookup | None
) -> Callable[[], Value]:
    """Where a weight is now: on the device if the program writes it, in the store, in the module, or in the checkpoint."""
    names = tuple(other for other, t in everything.items() if t is tensor and other != name)
    if runner is not None and runner.store is not None:
        state, store = runner.state, runner.store
        held = next((n for n in (name, *names) if n in state), None)
        if held is not None:
            return lambda: state[held].detach()
        if store.has(name):
            return lambda: store.value(name)
    if not has_no_bytes(tensor):
        return lambda: tensor.detach()
    if lookup is None:
        raise PlannerError(
            f"the weight {name!r} has no values here: build the plan first, or, where it is cast and was given as weights=, "
            "write what is stored: save_sharded(folder, stored=True)"
        )
    return source_of(name, view_of(name, tensor, names), everything, lookup)


def _stored_items(runner: Runner | None) -> list[Item]:
    """The values and scales of cast weights."""
    if runner is None or runner.store is None:
        raise PlannerError(
            "stored=True writes what a built plan stores: m = p.build(), then m.save_sharded(folder, stored=True)"
        )
    store, items = runner.store, []
    for name, view in store.views.items():
        if view.stored is not None and view.stored.part != "layout":
            items.append(Item(view.stored.key, view.dtype, view.shape, functools.partial(store.value, name)))
    return items


def _write(folder: Path, stem: str, items: Sequence[Item], limit: int, aliases: Mapping[str, str]) -> None:
    shards = _split(items, limit)
    names = [f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    names = names if len(shards) > 1 else [f"{stem}.safetensors"]
    with stepping("writing shards", len(shards)) as step:
        for name, shard in zip(names, shards, strict=True):
            step(name)
            here = {item.name for item in shard}
            _write_shard(folder / name, shard, {alias: own for alias, own in aliases.items() if own in here})
    if len(shards) > 1:
        places = {item.name: name for name, shard in zip(names, shards, strict=True) for item in shard}
        index = {"metadata": {"total_size": sum(item.nbytes for item in items)}, "weight_map": dict(sorted(places.items()))}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _split(items: Sequence[Item], limit: int) -> list[list[Item]]:
    """In order, as many in a shard as fit; a larger one has its own."""
    shards: list[list[Item]] = [[]]
    taken = 0
    for item in items:
        if shards[-1] and taken + item.nbytes > limit:
            shards.append([])
            taken = 0
        shards[-1].append(item)
        taken += item.nbytes
    return shards


def _write_shard(path: Path, items: Sequence[Item], aliases: Mapping[str, str]) -> None:
    """Larger elements come first, so that every tensor starts at a multiple of its own; `aliases` as safetensors notes them."""
    items = sorted(items, key=lambda item: -item.dtype.itemsize)
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **aliases}}
    cursor = 0
    for item in items:
        if item.dtype not in DTYPE_NAMES:
            raise PlannerError(f"{item.name!r} is {item.dtype}, which safetensors files do not hold; save the module otherwise")
        shape, stop = list(item.shape), cursor + item.nbytes
        entries[item.name] = {"dtype": DTYPE_NAMES[item.dtype], "shape": shape, "data_offsets": [cursor, stop]}
        cursor = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    try:
        with path.open("xb", buffering=0) as file:
            _put(file, memoryview(len(text).to_bytes(8, "little") + text))
            for item in items:
                for content in _contents(item):
                    _put(file, content)
            os.fsync(file.fileno())
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror or error}") from error


def _contents(item: Item) -> Iterator[memoryview]:
    for piece in _pieces(item.value(), item.dtype):
        yield memoryview(piece.view(torch.uint8).numpy())  # type: ignore[arg-type]


def _pieces(value: Value, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The values, as 1-d tensors with elements."""
    if isinstance(value, FileTensor):
        yield from (piece for _, piece in value.pieces(dtype))
    elif value.numel():
        yield value.to("cpu", dtype).contiguous().view(-1)


def _put(file: Any, content: memoryview) -> None:
    """All of it: the system writes no more than 2 GiB at a time."""
    done = 0
    while done < len(content):
        done += file.write(content[done:])


@contextlib.contextmanager
def _replacing_folder(target: Path) -> Iterator[Path]:
    """Gives a folder to write to; when the block ends without an error, what is in it takes its place in `target`."""
    scratch = target.absolute().with_name(f".{target.absolute().name}.{os.getpid()}.part")
    try:
        try:
            scratch.mkdir()
            yield scratch
            if not target.is_dir() or not any(target.iterdir()):
                os.rename(scratch, target)
                return
            # What says that there is a checkpoint comes last: config and index.
            for path in sorted(scratch.iterdir(), key=lambda path: path.suffix != ".safetensors"):
                os.replace(path, target / path.name)
        except OSError as error:
            raise StoreError(f"cannot write the checkpoint {str(target)!r}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
