"""A pretended execution device: Python runs on the CPU and believes that it runs on a device, whose bytes are counted.

The device is called `cpu:0`. PyTorch takes that name wherever it takes a device, and gives CPU tensors for it; tensors say
`cpu` of themselves. So what is made on `cpu:0`, or moved there, is on the pretended device, what is made on `cpu` is on the
host, and a result is where the arguments are. What a tensor answers to `.device` follows that, and a move between the two
makes a copy, as it would for real.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from passes.live_storages import LiveStorages
from passes.program import storage_id
from planner.watch import asking_site

aten = torch.ops.aten
EXECUTION = torch.device("cpu", 0)
_HOST = torch.device("cpu")
# A new object each time it is looked up, but equal ones.
_DEVICE_OF = torch.Tensor.device.__get__
_MOVES = {torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda}
_ASKS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


@dataclass(frozen=True)
class Held:
    """Bytes that are alive on the execution device and on the host."""

    device_bytes: int = 0
    host_bytes: int = 0

    def __sub__(self, other: Held) -> Held:
        return Held(self.device_bytes - other.device_bytes, self.host_bytes - other.host_bytes)

    def most(self, other: Held) -> Held:
        """The larger number of each."""
        return Held(max(self.device_bytes, other.device_bytes), max(self.host_bytes, other.host_bytes))


class PretendDevice:
    """Within it, storages that are made are counted by where they are, and `asked` collects lines that ask for answers.

    Answers are tensors whose values are made up (`answer`), and what is computed from them. A line of Python that asks for the
    value of one (`.item()`, `if x > 0`, `mask.nonzero()`) may go another way with the real values. What NumPy makes of it is
    not followed: there, pictures are made.
    """

    def __init__(self) -> None:
        self._live = {True: LiveStorages(self._gone), False: LiveStorages(self._gone)}  # by whether it is on the device
        self._weights: dict[int, torch.Tensor] = {}
        self._answers: set[int] = set()
        self._read: dict[int, int] = {}  # bytes of weights that Python itself computes with
        self._peak = Held()
        self.asked: dict[str, None] = {}
        self.paused = False
        self.making_on_device = False

    def __enter__(self) -> Self:
        self._modes = contextlib.ExitStack()
        self._modes.enter_context(_Storages(self))
        self._modes.enter_context(_Places(self))
        return self

    def __exit__(self, *_: object) -> None:
        self._modes.close()
        for live in self._live.values():
            live.detach()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Within it nothing is counted, and PyTorch is as always."""
        before, self.paused = self.paused, True
        try:
            with _disable_current_modes():
                yield
        finally:
            self.paused = before

    @property
    def held(self) -> Held:
        return Held(self._live[True].live_bytes, self._live[False].live_bytes)

    def take_peak(self) -> Held:
        """The most that was held at once since it was last asked; counting starts anew from what is held now."""
        peak, self._peak = self._peak.most(self.held), self.held
        return peak

    def own(self, weights: Iterable[torch.Tensor]) -> None:
        """These are on the device, and are never counted."""
        for tensor in weights:
            if not tensor.is_meta:
                self._weights[storage_id(tensor)] = tensor

    @property
    def read_bytes(self) -> int:
        """Of the weights that Python itself has computed with: a real device needs copies of those."""
        return sum(self._read.values())

    def reads(self, tensors: Iterable[torch.Tensor]) -> None:
        """Takes note of the weights among these."""
        for tensor in tensors:
            if not tensor.is_meta and storage_id(tensor) in self._weights:
                self._read[storage_id(tensor)] = tensor.untyped_storage().nbytes()

    def is_on_device(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is on the device; weights that have no bytes here (on meta) are."""
        if tensor.is_meta or tensor.layout is not torch.strided:
            return tensor.is_meta
        return storage_id(tensor) in self._weights or storage_id(tensor) in self._live[True]

    def count(self, tensor: torch.Tensor, on_device: bool) -> None:
        """Counts a tensor's storage, unless it is known already."""
        if tensor.is_meta or tensor.layout is not torch.strided:
            return
        key = storage_id(tensor)
        if key in self._weights or key in self._live[not on_device]:
            return
        self._live[on_device].count(tensor)
        self._peak = self._peak.most(self.held)

    def answer(self, tree: Any) -> None:
        """Counts tensors whose values are made up; they are on the device."""
        for leaf in tree_leaves(tree):
            if isinstance(leaf, torch.Tensor):
                self.count(leaf, on_device=True)
                self._answers.add(storage_id(leaf))

    def bytes_of(self, tree: Any) -> Held:
        """Bytes of the storages behind the tensors in a tree, as far as they are counted."""
        keys = {storage_id(t) for t in tree_leaves(tree) if isinstance(t, torch.Tensor) and not t.is_meta}
        device, host = (sum(self._live[side].bytes_of(key) for key in keys) for side in (True, False))
        return Held(device, host)

    def is_answer(self, tensor: Any) -> bool:
        known = isinstance(tensor, torch.Tensor) and not tensor.is_meta and tensor.layout is torch.strided
        return known and storage_id(tensor) in self._answers

    def ask(self) -> None:
        self.asked[asking_site()] = None

    def _gone(self, key: int) -> None:
        self._answers.discard(key)


class _Storages(TorchDispatchMode):
    """Counts what operators make, where the function that runs them makes it."""

    def __init__(self, device: PretendDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device = self._device
        tensors = _tensors((args, kwargs))
        device.reads(tensors)
        metas = [tensor.is_meta for tensor in tensors]
        asks = not _ASKS.isdisjoint(func.tags)
        if any(metas) and (asks or not all(metas)):
            args, kwargs = tree_map_only(torch.Tensor, _with_values, (args, kwargs))
        if asks and any(device.is_answer(decider) for decider in _deciders(func, args)):
            device.ask()
        result = func(*args, **(kwargs or {}))
        made_up = any(device.is_answer(tensor) for tensor in tensors)
        for tensor in _tensors(result):
            device.count(tensor, device.making_on_device)
            if made_up and not tensor.is_meta and tensor.layout is torch.strided:
                device._answers.add(storage_id(tensor))
        return result


class _Places(TorchFunctionMode):
    """Knows where each call of PyTorch makes its results: what the caller says, else where the arguments are."""

    def __init__(self, device: PretendDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = self._device
        if device.paused:
            return func(*args, **kwargs)
        if func == _DEVICE_OF:
            return EXECUTION if device.is_on_device(args[0]) else func(*args)
        if func in _MOVES:
            return self._move(func, args, kwargs)
        if func is torch.Tensor.tolist and device.is_answer(args[0]):
            device.ask()
        named = _device_of(kwargs.get("device"))
        if named is not None:
            kwargs = {**kwargs, "device": named}
            on_device = named == EXECUTION
        else:
            on_device = any(device.is_on_device(tensor) for tensor in _tensors((args, kwargs)))
        return self._run(on_device, lambda: func(*args, **kwargs))

    def _run(self, on_device: bool, call: Callable[[], Any]) -> Any:
        device = self._device
        before, device.making_on_device = device.making_on_device, on_device
        try:
            result = call()
        finally:
            device.making_on_device = before
        for tensor in _tensors(result) if not isinstance(result, (int, float, str)) else ():
            device.count(tensor, on_device)  # such as those of `torch.tensor`, which no operator makes
        return result

    def _move(self, func: Any, args: Any, kwargs: Any) -> Any:
        """`.to`, `.cpu` and `.cuda`: a copy if the place changes, for the CPU alone would see none."""
        tensor, *rest = args
        is_here = self._device.is_on_device(tensor)
        target = self._target(func, rest, kwargs)
        if target is None:
            return self._run(is_here, lambda: func(*args, **kwargs))
        if func is not torch.Tensor.to:
            func, rest, kwargs = torch.Tensor.to, [target], {k: v for k, v in kwargs.items() if k != "device"}
        to_device = target == EXECUTION
        plain = torch.device("meta") if tensor.is_meta else _HOST

        def placed(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value.dtype if tensor.is_meta else value
            return plain if _device_of(value) is not None else value

        rest, kwargs = [placed(v) for v in rest], {k: placed(v) for k, v in kwargs.items()}
        if "other" in kwargs and tensor.is_meta:
            kwargs["dtype"] = kwargs.pop("other")

        def moved() -> Any:
            result = func(tensor, *rest, **kwargs)
            if is_here != to_device and not tensor.is_meta and storage_id(result) == storage_id(tensor):
                return result.clone()
            return result

        return self._run(to_device or tensor.is_meta, moved)

    def _target(self, func: Any, rest: list[Any], kwargs: Any) -> torch.device | None:
        if func is not torch.Tensor.to:
            return _HOST if func is torch.Tensor.cpu else EXECUTION
        other = rest[0] if rest and isinstance(rest[0], torch.Tensor) else kwargs.get("other")
        if other is not None:
            return EXECUTION if self._device.is_on_device(other) else _HOST
        return _device_of(rest[0] if rest else None) or _device_of(kwargs.get("device"))


def _device_of(value: Any) -> torch.device | None:
    """The device that an argument names: the pretended one, the host, or meta; None for other arguments.

    A device of another kind, such as a CUDA device that Python names outright, is meant to be the pretended one.
    """
    if isinstance(value, str):
        value = torch.device(value)
    elif isinstance(value, int) and not isinstance(value, bool):
        return EXECUTION  # the number of an accelerator
    if not isinstance(value, torch.device):
        return None
    return value if value.type in ("cpu", "meta") else EXECUTION


def _with_values(tensor: torch.Tensor) -> torch.Tensor:
    """A weight without bytes as one that Python can compute with: zeros, one number for all of them."""
    if not tensor.is_meta:
        return tensor
    with _disable_current_modes():
        return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)


def _deciders(func: Any, args: Any) -> list[Any]:
    """The arguments whose values decide how an operator goes on."""
    if func is aten.index.Tensor:
        return [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
    return list(args[1:2]) if func is aten.masked_select.default else _tensors(args)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def plain_devices(tree: Any) -> Any:
    """The tree with the CPU in place of the pretended device, for what does not run under it."""
    return tree_map(lambda leaf: _HOST if isinstance(leaf, torch.device) and leaf == EXECUTION else leaf, tree)
