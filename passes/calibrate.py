"""Calibration: what operators take besides their outputs on this CPU, where fakes cannot tell, measured by running them.

Kernels make scratch that no dispatcher sees: `im2col` of a 3-d convolution, reorders of oneDNN, buffers of RNNs (up to 45 times
the visible bytes). So each distinct call is run on zeros, and PyTorch's own allocator says what it gave; planning needs that
memory too, but for weights, whose zeros nobody writes. The results are kept in a file: planning the model again runs nothing.
They hold for the number of threads that planning had.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from passes.cache import cache_folder, read_json, write_json
from passes.spec import TensorSpec
from runtime.allocations import AllocationTrace
from runtime.errors import UnknownSize

VERSION = 1
# The first run of a kernel may take more than later ones, and a trace may lack an event (memory that another thread frees).
_MOST_RUNS = 5
# What takes longer is not run a second time.
_SLOW_SECONDS = 0.1
# What PyTorch's allocator gives begins at multiples of so many bytes.
_ALIGNED = 64
# Share of the free memory that a run may take.
_SHARE = 0.8


class Calibrator:
    """Workspace of calls on this machine, in bytes, by operator and geometry; known ones come from memory or `file`."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._fresh: dict[str, int] = {}
        self.runs = 0

    def workspace_bytes(
        self, target: Any, args: Any, kwargs: Any, sizes: list[int], output_bytes: int, visible_bytes: int, key: Any
    ) -> int:
        """The most that the call allocates beyond its outputs.

        Args:
            target: an operator overload; args, kwargs: with a `TensorSpec` for each tensor.
            sizes: bytes of the storages that the specs refer to.
            output_bytes: of the storages that it makes. visible_bytes: workspace that a dispatcher sees, which is the least.
            key: equal for calls that behave alike.

        Raises:
            UnknownSize: the call cannot be run here.
        """
        name = f"{target}|{hashlib.sha256(repr((environment(), key)).encode()).hexdigest()[:24]}"
        if name not in _known(self._file):
            measured = _known(self._file)[name] = self._measure(target, args, kwargs, sizes, output_bytes, visible_bytes)
            if str(target).startswith("aten."):  # the code behind another operator may change without notice
                self._fresh[name] = measured
        return _known(self._file)[name]

    def save(self) -> None:
        """Adds what was measured to the file. One that cannot be written is no reason to fail: it only saves time."""
        if self._file is None or not self._fresh:
            return
        with contextlib.suppress(OSError):
            write_json(self._file, {"version": VERSION, "workspace_bytes": {**_read(self._file), **self._fresh}})
            self._fresh.clear()

    def _measure(self, target: Any, args: Any, kwargs: Any, sizes: list[int], output_bytes: int, visible_bytes: int) -> int:
        needed = sum(sizes) + output_bytes + visible_bytes
        free = free_ram_bytes()
        if needed > _SHARE * free:
            raise UnknownSize(
                f"{target} takes at least {needed} bytes and this machine has {free} free, so that what the kernel needs "
                "besides cannot be measured: plan where there is more memory, or with smaller inputs"
            )
        self.runs += 1
        reason = ""
        for fill in _FILLS:
            try:
                return _run(target, args, kwargs, sizes, output_bytes, visible_bytes, fill)
            except (RuntimeError, ValueError, IndexError, ArithmeticError, NotImplementedError) as error:
                reason = reason or str(error).splitlines()[0]
        raise UnknownSize(f"{target} cannot be run without its data ({reason}), so that its workspace is not known")


def _run(
    target: Any,
    args: Any,
    kwargs: Any,
    sizes: list[int],
    output_bytes: int,
    visible_bytes: int,
    fill: Callable[[torch.Tensor], Any],
) -> int:
    """Runs a call until two traces agree; the most that it took beyond its outputs.

    A trace counts if it ends with the outputs, and with nothing else: then no event is missing. Where no two agree, the largest
    stands, and what a dispatcher sees if that is more.
    """
    traces: list[AllocationTrace] = []
    # In this order: leaving inference mode turns gradients on, and RNNs then take memory to remember.
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=[]):
        for _ in range(_MOST_RUNS):
            bases = [_untouched(size) for size in sizes]
            own_args, own_kwargs = tree_map_only(TensorSpec, lambda spec: tensor_over(spec, bases, fill), (args, kwargs))  # noqa: B023
            started = time.perf_counter()
            with AllocationTrace() as trace:
                result = target(*own_args, **own_kwargs)
            seconds = time.perf_counter() - started
            del result, own_args, own_kwargs
            traces.append(trace)
            peaks = [t.peak_bytes - output_bytes for t in traces if t.end_bytes == output_bytes]
            if len(peaks) > 1 and peaks[-1] == peaks[-2]:
                return max(peaks)
            if peaks and peaks[-1] >= visible_bytes and seconds > _SLOW_SECONDS:
                return max(peaks)
    return max(visible_bytes, *(t.peak_bytes - min(output_bytes, t.end_bytes) for t in traces))


def _untouched(nbytes: int) -> torch.Tensor:
    """Zeros that the system makes page by page, where they are touched; `torch.zeros` writes them all."""
    room = np.zeros(nbytes + _ALIGNED, dtype=np.uint8)
    start = -room.ctypes.data % _ALIGNED
    return torch.from_numpy(room[start : start + nbytes])


def base_sizes(args: Any, kwargs: Any) -> list[int]:
    """Bytes of the storages that the `TensorSpec`s of a call refer to, by their ids."""
    specs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, TensorSpec)]
    sizes = [0] * (1 + max((s.storage for s in specs), default=-1))
    for spec in specs:
        sizes[spec.storage] = max(sizes[spec.storage], spec.offset * spec.dtype.itemsize + spec.span_bytes)
    return sizes


def tensor_over(spec: TensorSpec, bases: list[torch.Tensor], fill: Callable[[torch.Tensor], Any]) -> torch.Tensor:
    """The tensor that a spec describes, over the bytes of its storage, which `fill` fills as elements of its dtype."""
    base = bases[spec.storage]
    whole = base[: base.numel() // spec.dtype.itemsize * spec.dtype.itemsize].view(spec.dtype)
    tensor = whole.as_strided(spec.shape, spec.stride, spec.offset)
    fill(whole)
    return tensor.detach().requires_grad_(spec.grad)  # by which `matmul` chooses its kernel, as it will


def _zeros(flat: torch.Tensor) -> None:
    """Valid as indices; zero already, and memory that is not touched costs nothing."""


def _ones(flat: torch.Tensor) -> None:
    """Valid as divisors."""
    flat.fill_(1)


def _noise(flat: torch.Tensor) -> None:
    """Valid for decompositions of matrices."""
    if flat.dtype.is_floating_point:
        flat.normal_()


_FILLS = (_zeros, _ones, _noise)


@functools.cache
def _known(file: Path | None) -> dict[str, int]:
    """What this process knows, by the file that it came from."""
    return {} if file is None else _read(file)


def _read(file: Path) -> dict[str, int]:
    data = read_json(file)
    known = data.get("workspace_bytes") if isinstance(data, dict) and data.get("version") == VERSION else None
    return {str(k): int(v) for k, v in known.items()} if isinstance(known, dict) else {}


def cache_file() -> Path | None:
    """Where results are kept, in `cache_folder()`; None without a home."""
    folder = cache_folder()
    return None if folder is None else folder / f"workspace-v{VERSION}.json"


def environment() -> tuple[object, ...]:
    """What decides, besides the call itself, which kernel runs and what it allocates."""
    return (
        torch.__version__,
        torch.backends.cpu.get_cpu_capability(),
        torch.get_num_threads(),
        torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled,
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        os.environ.get("ONEDNN_MAX_CPU_ISA"),
    )


def free_ram_bytes() -> int:
    """Memory that can be had without swapping."""
    with contextlib.suppress(OSError, StopIteration, ValueError), open("/proc/meminfo") as lines:
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def calibrating(device: str) -> Iterator[Calibrator | None]:
    """The calibrator of a device that has one; what it found is kept, also where planning fails later."""
    if device != "cpu":
        yield None
        return
    calibrator = Calibrator(cache_file())
    try:
        yield calibrator
    finally:
        calibrator.save()
