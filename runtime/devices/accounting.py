"""The `accounting` device: CPU kernels, every storage counted by a dispatch mode, and a virtual clock of the planned machine.

Budgets, peaks and overlap without a GPU.

It is the unfriendly kind of device: evicted bytes are overwritten with ones, so a program that reads what it has given back
gives NaN instead of being right by luck.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

from runtime.devices.base import Copied, Measurement
from runtime.devices.feeder import Fed
from runtime.devices.run_clock import RunClock
from runtime.devices.virtual_clock import VirtualClock
from runtime.executable import Executable, Pace, RunPace
from runtime.homes import Home, MemoryHome
from runtime.host_memory import LockedBytes
from runtime.tables import Table
from runtime.weight_file import FileRange

_POISON = 0xFF


class AccountingDevice:
    """See the module. `peak_bytes` counts arenas, inputs, staged bundles and every storage the dispatcher makes.

    `limit_bytes`: memory that there is, for calls and their inputs; what passes it is refused as on a real device.
    """

    kind = "accounting"

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")
        self._counter: StorageCounter | None = None
        self._last: Measurement | None = None
        self._copied_bytes = self._read_bytes = 0
        self._clock: VirtualClock | None = None
        self._run: RunClock | None = None
        self.limit_bytes: int | None = None
        self._locked = LockedBytes()

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.full((nbytes,), _POISON, dtype=torch.uint8)

    def pin(self, buffer: torch.Tensor) -> bool:
        self._locked.lock(buffer)
        return True

    def unpin(self, buffer: torch.Tensor) -> None:
        self._locked.unlock(buffer)

    def home(self) -> Home:
        return MemoryHome()

    def copy(self, pairs: Sequence[tuple[torch.Tensor, Copied]], after: list[Any], bundle: int | None = None) -> Any:
        for target, source in pairs:
            if isinstance(source, Fed):
                target.copy_(source.take())
                source.give_back(None)
                self._read_bytes += source.numel()
            elif isinstance(source, FileRange):
                source.file.read_into(memoryview(target.numpy()), source.offset)  # type: ignore[arg-type]
                self._read_bytes += source.numel()
            else:
                target.copy_(source)
            self._copied_bytes += source.numel()
        if bundle is None and self._run is not None:
            read = sum(source.numel() for _, source in pairs if isinstance(source, FileRange))
            return self._run.copy(sum(source.numel() for _, source in pairs), read)
        if self._clock is not None and bundle is not None:
            self._clock.copy(bundle)
        return None

    def bounce(self, slots: list[torch.Tensor]) -> None:
        return None  # files are read straight to their places

    def save(self, target: torch.Tensor, source: torch.Tensor, after: Any) -> None:
        with _disable_current_modes():  # its result is in host memory, which is not counted
            target.copy_(source)

    def bands(self, *, begin: bool) -> None:
        if self._clock is not None:
            self._clock.begin_bands() if begin else self._clock.end_bands()

    def look_up(self, table: Table, indices: torch.Tensor, result: torch.Tensor) -> None:
        with _disable_current_modes():  # what the host does is none of the device's
            table.read(table.positions(indices), result)

    def mark(self) -> None:
        return None

    def evict(self, buffer: torch.Tensor, bundle: int | None = None) -> None:
        buffer.fill_(_POISON)
        if self._clock is not None and bundle is not None:
            self._clock.evict(bundle)

    def wait(self, event: Any, bundle: int | None = None) -> None:
        if event is not None and self._run is not None:
            self._run.wait(event, bundle)
        elif self._clock is not None and bundle is not None:
            self._clock.wait(bundle)

    def settle(self, event: Any, bundle: int | None = None) -> None:
        self.wait(event)
        if self._clock is not None and bundle is not None:
            self._clock.forget(bundle)

    def loaded(self, program: object) -> None:
        pace = getattr(program, "pace", None)
        self._clock = VirtualClock(pace) if isinstance(pace, Pace) else None
        self._run = RunClock(pace) if isinstance(pace, RunPace) else None

    def turn(self, program: Executable | None) -> None:
        if self._run is not None:
            self._clock = self._run.turn(program)

    def skip(self, bundle: int) -> None:
        if self._clock is not None:
            self._clock.skip()

    def reserve(self, *sizes: int) -> None:
        return None

    @contextlib.contextmanager
    def call(self, inputs: list[torch.Tensor], arenas: list[torch.Tensor]) -> Iterator[None]:
        counter = StorageCounter(self.limit_bytes)
        self._copied_bytes = self._read_bytes = 0
        started = time.perf_counter()
        if self._clock is not None:
            self._clock.begin()
        if self._run is not None:
            self._run.begin()
        try:
            counter.count_all([*inputs, *arenas])
            del arenas  # bundles that came over the seam go with their eviction
            with counter, _LinearIsOneKernel(counter):
                yield
        except BaseException:
            if self._clock is not None:
                self._clock.reset()
            raise
        finally:
            counter.detach()
        timeline = self._clock.end() if self._clock is not None else None
        ticked = timeline or self._run
        seconds = ticked.step_seconds if ticked is not None else time.perf_counter() - started
        copying = ticked.copy_seconds if ticked is not None else None
        self._last = Measurement(
            counter.peak_bytes, None, seconds, self._copied_bytes, copying, timeline, self._locked.peak_bytes, self._read_bytes
        )

    def measurement(self) -> Measurement | None:
        return self._last

    def enforce(self, budget_bytes: int) -> None:
        return None

    def free_bytes(self, input_bytes: int) -> int | None:
        return self.limit_bytes

    def lower(self, budget_bytes: int) -> None:
        return None

    def close(self) -> None:
        return None


class StorageCounter(TorchDispatchMode):
    """Bytes of all untyped storages that are alive: counted when first seen, until their true death.

    Raises:
        torch.OutOfMemoryError: in whatever makes a storage with which they pass `limit_bytes`.
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        super().__init__()
        self.limit_bytes = limit_bytes
        self.live_bytes = self.peak_bytes = 0
        self._sizes: dict[int, int] = {}
        self._deaths: dict[int, weakref.finalize[Any, Any]] = {}

    def detach(self) -> None:
        """Stops watching what is still alive: arenas, inputs, outputs."""
        for death in self._deaths.values():
            death.detach()

    def count_all(self, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            self.count(tensor)

    def count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._sizes:
            return
        self._sizes[storage._cdata] = storage.nbytes()
        self.live_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        self._deaths[storage._cdata] = weakref.finalize(storage, self._forget, storage._cdata)
        if self.limit_bytes is not None and self.live_bytes > self.limit_bytes:
            raise torch.OutOfMemoryError(
                f"accounting: {storage.nbytes():,} B more are {self.live_bytes:,} B, and there are {self.limit_bytes:,} B"
            )

    def _forget(self, key: int) -> None:
        del self._deaths[key]
        self.live_bytes -= self._sizes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.count(leaf)
        return result


class _LinearIsOneKernel(TorchFunctionMode):
    """Keeps `linear` whole: under a dispatch mode it would decompose otherwise than it runs, and round otherwise."""

    def __init__(self, counter: StorageCounter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        counting = _get_current_dispatch_mode() is self._counter  # not so while something is planned within a call
        if not counting or (func is not torch.ops.aten.linear.default and func is not torch.nn.functional.linear):
            return func(*args, **(kwargs or {}))
        with _disable_current_modes():
            result = func(*args, **(kwargs or {}))
        self._counter.count(result)
        return result
