"""`Executable`: an emitted program as the runtime takes it: source text, memory layout, weight geometry. Plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch.utils._pytree import TreeSpec

from runtime.layout import Layout
from runtime.leftovers import Leftovers
from runtime.stored import Stored


@dataclass(frozen=True)
class Rows:
    """Rows [start, stop) of a weight that has `of` rows (its dimension 0), each a run of bytes right behind the one before."""

    start: int
    stop: int
    of: int

    def __str__(self) -> str:
        return f"[{self.start}:{self.stop}]"


@dataclass(frozen=True)
class WeightView:
    """Geometry of one weight in an arena; `nbytes` is the span that its strides reach, `grad` whether it requires gradients.

    With `rows` it is that part of the weight called `name`: shape and bytes are the part's, on the host it lies in the whole.
    What is `stored` of a weight has a name of its own.
    """

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    state: bool
    grad: bool = False
    rows: Rows | None = None
    stored: Stored | None = None

    @property
    def label(self) -> str:
        """The name, with the rows where it is a part."""
        return self.name if self.rows is None else f"{self.name}{self.rows}"

    @property
    def row_bytes(self) -> int:
        """From one row to the next."""
        return self.stride[0] * self.dtype.itemsize

    @property
    def first_byte(self) -> int:
        """Where in the whole weight it begins."""
        return 0 if self.rows is None else self.rows.start * self.row_bytes

    @property
    def whole(self) -> WeightView:
        """The weight that it is a part of; itself where it is none."""
        if self.rows is None:
            return self
        shape = (self.rows.of, *self.shape[1:])
        return replace(self, shape=shape, nbytes=self.rows.of * self.row_bytes, rows=None)

    def on(self, buffer: torch.Tensor, offset: int) -> torch.Tensor:
        """The weight as a view of a byte buffer (uint8, 1-d) from byte `offset` on."""
        if self.nbytes == 0:
            return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=buffer.device)
        flat = buffer[offset : offset + self.nbytes].view(self.dtype)
        return flat.as_strided(self.shape, self.stride, flat.storage_offset())

    def argument(self, buffer: torch.Tensor, offset: int) -> torch.Tensor:
        """As `on`, for operators: `matmul` takes another kernel, with other bits, for a weight that requires gradients.

        Detached, since what counts is whether the base of a view does.
        """
        return self.on(buffer, offset).detach().requires_grad_(self.grad)


class ReadPace(NamedTuple):
    """A read of a bundle: its bytes, and the read whose copy has to be over before, as in `runtime.layout.Read`."""

    bundle: int
    nbytes: int
    after: int
    disk_seconds: float
    copy_seconds: float


@dataclass(frozen=True)
class Pace:
    """How long things take on the machine that was planned for: what a device without engines of its own goes by.

    `compute`: seconds of operators before each prefetch, onload and evict, in program order, and after the last of them.
    `copies`: seconds of each bundle's copy, with its bytes; where it is read from disk in part, the seconds are of the rest.
    `reads` are in the layout's order; `ahead` is the layout's.
    """

    compute: tuple[float, ...]
    copies: tuple[tuple[float, int], ...]
    reads: tuple[ReadPace, ...] = ()
    ahead: bool = False


@dataclass(frozen=True)
class RunPace:
    """As `Pace`, of a call that several programs serve: how long a copy takes besides those of bundles.

    `load_seconds`: of so many bytes, of which so many come from disk.
    """

    load_seconds: Callable[[int, int], float]


@dataclass(frozen=True)
class Executable:
    """Runs as `program(rt, w, device, *inputs) -> list of leaves`; weights and constants are keyed by placeholder name.

    `tables` are the weights whose rows it looks up on the host, by the module's names. `written`: the inputs that it writes.
    """

    name: str
    source: str
    layout: Layout
    weights: Mapping[str, WeightView]
    constants: Mapping[str, torch.Tensor]
    inputs: tuple[str, ...]
    out_spec: TreeSpec
    predicted: Mapping[str, float] = field(default_factory=dict)
    pace: Pace | None = None
    leftovers: Leftovers | None = None
    tables: Mapping[str, WeightView] = field(default_factory=dict)
    written: tuple[str, ...] = ()
