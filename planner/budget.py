"""The budget a user declares: how many bytes a plan may take of each memory, and on which device."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from planner.sizes import format_bytes, parse_size
from runtime.errors import BudgetError

_CUDA = re.compile(r"cuda(?::(?P<index>\d+))?", re.ASCII)
_CUDA_SHAPED = '"cuda", "cuda:1", 1'
_HOST_KEYS = ("cpu", "disk")


@dataclass(frozen=True)
class Budget:
    """Bytes a plan may use, per memory.

    Attributes:
        device_bytes: on the execution device: what PyTorch's allocator reserves plus library workspaces.
        host_bytes: host memory for weights and staging, or None for no limit. None when the device is the CPU itself.
        disk_bytes: disk space for spilled weights, or None for no limit.
        device: the device the budget is for (`"cuda"`, `"cuda:1"`, `"cpu"`, `"accounting"`), or None for the default.
        include_context: whether the driver context and loaded kernels count against `device_bytes` too.
    """

    device_bytes: int
    host_bytes: int | None = None
    disk_bytes: int | None = None
    device: str | None = None
    include_context: bool = False

    def __post_init__(self) -> None:
        _check_bytes("device_bytes", self.device_bytes)
        for name, size in (("host_bytes", self.host_bytes), ("disk_bytes", self.disk_bytes)):
            if size is not None:
                _check_bytes(name, size)
        if self.device is not None:
            _check_device(self.device)
        if self.device == "cpu" and self.host_bytes is not None:
            raise BudgetError(
                "on the device 'cpu' the device memory is the host memory, so it has one budget. "
                f"Write Budget(device_bytes={self.device_bytes}, device='cpu') without host_bytes."
            )

    def __str__(self) -> str:
        parts = [f"{format_bytes(self.device_bytes)} on {self.device or 'the default device'}"]
        if self.host_bytes is not None:
            parts.append(f"{format_bytes(self.host_bytes)} of host memory")
        if self.disk_bytes is not None:
            parts.append(f"{format_bytes(self.disk_bytes)} of disk")
        if self.include_context:
            parts.append("driver context included")
        return ", ".join(parts)

    @classmethod
    def parse(cls, value: int | str | Mapping[str | int, int | str] | Budget, device: str | None = None) -> Budget:
        """Read a budget as users write it.

        Args:
            value: one size for the device (`"6GB"`, an integer of bytes); or a mapping in the manner of accelerate's
                `max_memory` (`{"cuda:0": "8GB", "cpu": "16GB", "disk": "100GB"}`, integer keys are CUDA indices);
                or a `Budget`.
            device: the device of the plan, or None to take the one that the mapping names.

        Raises:
            BudgetError: if a size or device cannot be read, the plan's device has no size, or several devices have one.
        """
        if device is not None:
            _check_device(device)
        if isinstance(value, Budget):
            return _on_device(value, device)
        if isinstance(value, Mapping):
            return _parse_mapping(value, device)
        return cls(device_bytes=parse_size(value), device=device)


def _parse_mapping(mapping: Mapping[str | int, int | str], device: str | None) -> Budget:
    if not mapping:
        raise BudgetError('the budget names no device. Write budget="6GB" or budget={"cuda": "6GB", "cpu": "16GB"}.')
    sizes: dict[str, int] = {}
    for key, size in mapping.items():
        name = _device_name(key)
        if name in sizes:
            raise BudgetError(f'the budget names {name!r} twice. Give it one size: budget={{"{name}": {size!r}}}.')
        sizes[name] = parse_size(size, what=f"budget[{key!r}]")
    accelerators = [name for name in sizes if name not in _HOST_KEYS]
    if len(accelerators) > 1:
        raise BudgetError(
            f"the budget names {len(accelerators)} devices ({', '.join(accelerators)}); planning over several devices "
            f'is not supported yet. Give one of them: budget={{"{accelerators[0]}": {sizes[accelerators[0]]}}}.'
        )
    named = accelerators[0] if accelerators else "cpu" if "cpu" in sizes else None
    chosen = _agreed_device(named, device)
    host_bytes = None if chosen == "cpu" else sizes.get("cpu")
    return Budget(sizes[named or ""], host_bytes=host_bytes, disk_bytes=sizes.get("disk"), device=chosen)


def _agreed_device(named: str | None, device: str | None) -> str:
    """The device that the mapping's key `named` and the plan's `device` agree on; the more specific name wins."""
    if named is None:
        wanted = device or "cuda"
        raise BudgetError(f'the budget has only a size for disk. Add the device: budget={{"{wanted}": "6GB", ...}}.')
    if device is None or device == named:
        return named
    if named == "cuda" and device.startswith("cuda:"):
        return device
    if device == "cuda" and named.startswith("cuda:"):
        return named
    raise BudgetError(
        f"the plan is for {device!r}, but the budget gives a size for {named!r} and none for {device!r}. "
        f'Write budget={{"{device}": "6GB"}}, or pass device={named!r}.'
    )


def _on_device(budget: Budget, device: str | None) -> Budget:
    if device is None:
        return budget
    if budget.device is None:
        return replace(budget, device=device)
    return replace(budget, device=_agreed_device(budget.device, device))


def _device_name(key: object) -> str:
    """The name of a budget's key: an integer is a CUDA index, as in accelerate's `max_memory`."""
    if isinstance(key, int) and not isinstance(key, bool) and key >= 0:
        return f"cuda:{key}"
    if isinstance(key, str) and (key in (*_HOST_KEYS, "accounting") or _CUDA.fullmatch(key)):
        return key
    raise BudgetError(
        f'the budget names an unknown device {key!r}; known are {_CUDA_SHAPED}, "cpu", "disk" and "accounting". '
        'Write for example budget={"cuda:0": "8GB", "cpu": "16GB"}.'
    )


def _check_device(device: object) -> None:
    if isinstance(device, str) and (device in ("cpu", "accounting") or _CUDA.fullmatch(device)):
        return
    raise BudgetError(
        f'unknown device {device!r}; known are "cuda", "cuda:1", "cpu" and "accounting". Write for example device="cuda".'
    )


def _check_bytes(name: str, size: object) -> None:
    if isinstance(size, int) and not isinstance(size, bool):
        parse_size(size, what=name)
        return
    raise BudgetError(
        f"Budget({name}={size!r}) needs an integer of bytes. Sizes with a unit are read by Budget.parse: "
        'Budget.parse("6GB", device="cuda").'
    )
