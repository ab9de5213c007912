"""Where a build finds weights: in the module's own tables, in what a user gives, in a checkpoint's files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from runtime.errors import PlannerError
from runtime.executable import WeightView
from runtime.stored import Stored, scales_of
from runtime.weight_file import FileRange, FileTensor, Value

# Weights by name, None where there is none.
Lookup = Callable[[str], torch.Tensor | None]


@runtime_checkable
class Places(Protocol):
    """A look-up whose weights are in files, which says where."""

    def __call__(self, name: str) -> torch.Tensor | None: ...

    def place(self, name: str) -> FileTensor | None:
        """Where the tensor is, just as the module has it; None where it has to be made, or where there is none."""
        ...


@runtime_checkable
class Files(Places, Protocol):
    """A look-up in a checkpoint: it says what it has without reading it, and what is wrong with it."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape, whether it is there or has to be made; None where there is none of that name."""
        ...

    def part(self, stored: Stored) -> FileTensor | None:
        """Where values or scales of a cast weight are that was saved so; None where it was not."""
        ...

    def refusal(self, name: str, wanted: tuple[int, ...]) -> PlannerError:
        """What to raise where there is no such tensor, or one of another shape than `wanted`."""
        ...


# For each tensor (by identity) the tables of the module that hold it, with the key.
Owners = dict[int, list[tuple[dict[str, Any], str]]]


def named_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """All names, tied ones included; of tensors that are parameters and buffers."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(module.named_buffers(remove_duplicate=False))}


def view_of(name: str, tensor: torch.Tensor, aliases: tuple[str, ...] = ()) -> WeightView:
    """The geometry of a tensor that no program reads; `aliases` are its other names."""
    span = 0 if tensor.numel() == 0 else 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    nbytes = span * tensor.dtype.itemsize
    return WeightView(name, aliases, tuple(tensor.shape), tensor.stride(), tensor.dtype, nbytes, False)


def owners_of(module: nn.Module) -> Owners:
    """The tables that hold each tensor of the module."""
    owners: Owners = {}
    for child in module.modules():
        for slots in (child._parameters, child._buffers):
            for key, tensor in slots.items():
                if tensor is not None:
                    owners.setdefault(id(tensor), []).append((slots, key))
    return owners


def source_of(name: str, view: WeightView, tensors: Mapping[str, torch.Tensor], lookup: Lookup | None) -> Callable[[], Value]:
    """How to get a weight's value: checked now, read when it is called and not held, so that a model is never there twice.

    Raises:
        PlannerError: there is none, or one of another shape.
    """
    if lookup is not None:
        for known in (name, *view.aliases):
            shape = _shape_of(known, lookup)
            if shape is None:
                continue
            if shape != view.shape and isinstance(lookup, Files):
                raise lookup.refusal(known, view.shape)
            if shape != view.shape:
                raise PlannerError(f"the weights given have {known!r} as {shape}, the model as {view.shape}")
            return lambda: _read(known, view, lookup)
    if name not in tensors or has_no_bytes(tensors[name]):
        if isinstance(lookup, Files):
            raise lookup.refusal(name, view.shape)
        where = "the weights given lack it" if lookup is not None else "pass build(weights=<module, state dict or folder>)"
        raise PlannerError(f"the weight {name!r} is on the meta device (or fake): {where}")
    return lambda: tensors[name].data


def in_memory(value: Value) -> torch.Tensor:
    """The value itself, or read from its file."""
    return value.read() if isinstance(value, FileTensor) else value


def stored_sources(
    views: Sequence[WeightView], tensors: Mapping[str, torch.Tensor], lookup: Lookup | None
) -> dict[str, Callable[[], Value]]:
    """How to get what is stored of the module's weights, of those `views` that are that; each is read twice at most.

    What a checkpoint has in that very form is taken from there.

    Raises:
        PlannerError: as `source_of`; when called: a weight has values that are not finite.
    """
    scales: dict[str, torch.Tensor] = {}  # computed with the values, for the next who asks

    def source(stored: Stored) -> Callable[[], Value]:
        part = lookup.part(stored) if isinstance(lookup, Files) else None
        if part is not None:
            return lambda: part
        names = tuple(n for n, t in tensors.items() if t is tensors[stored.weight] and n != stored.weight)
        read = source_of(stored.weight, view_of(stored.weight, tensors[stored.weight], names), tensors, lookup)

        def make() -> torch.Tensor:
            if stored.part == "scales" and stored.weight in scales:
                return scales.pop(stored.weight)
            weight = in_memory(read()).to(tensors[stored.weight].dtype)
            if stored.part == "layout":
                return stored.make(weight)
            weight = weight.cpu()
            if stored.part == "values":
                scales[stored.weight] = scales_of(weight, stored.dtype, stored.dim)
            return stored.make(weight, scales.get(stored.weight))

        return make

    return {view.name: source(view.stored) for view in views if view.stored is not None}


def _shape_of(name: str, lookup: Lookup) -> tuple[int, ...] | None:
    """From the header, where the weights are in a file."""
    if isinstance(lookup, Files):
        return lookup.shape(name)
    value = lookup(name)
    if value is None:
        return None
    if has_no_bytes(value):
        raise PlannerError(f"the weights given have {name!r} on the meta device too; pass real ones")
    return tuple(value.shape)


def _read(name: str, view: WeightView, lookup: Lookup) -> Value:
    place = lookup.place(name) if isinstance(lookup, Files) else None
    if place is not None:
        return place
    value = lookup(name)
    assert value is not None
    return value if value.dtype == view.dtype else value.to(view.dtype)


def in_files(
    order: list[str], views: Mapping[str, WeightView], tensors: Mapping[str, torch.Tensor], lookup: Lookup | None
) -> dict[str, FileRange]:
    """Weights that a checkpoint's files hold just as the program reads them, with their places there."""
    found: dict[str, FileRange] = {}
    if not isinstance(lookup, Places):
        return found
    for name in order:
        known = next((at for n in (name, *views[name].aliases) if (at := lookup.place(n)) is not None), None)
        if name in tensors and known is not None and views[name].nbytes and known.is_laid_out_as(views[name]):
            found[name] = known.where
    return found


def has_no_bytes(tensor: torch.Tensor) -> bool:
    """Whether a tensor is on the meta device, or fake."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def version_of(tensor: torch.Tensor) -> int:
    """How often it was written; 0 where that is not counted (made in inference mode)."""
    try:
        return tensor._version
    except RuntimeError:
        return 0


def original_of(module: nn.Module, path: str, value: torch.Tensor) -> torch.Tensor:
    """The module's own attribute behind a captured constant, which knows when it is written; else the constant."""
    owner: Any = module
    for part in path.split("."):
        owner = getattr(owner, part, None)
    return owner if isinstance(owner, torch.Tensor) and owner.data_ptr() == value.data_ptr() else value


def equal_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Same geometry and values, NaN being equal to NaN."""
    if a.is_meta or b.is_meta or a.dtype != b.dtype or a.shape != b.shape or a.stride() != b.stride():
        return False
    if torch.equal(a, b):
        return True
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
