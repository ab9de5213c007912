"""Running Python on fakes: counts the bytes that it holds, and answers what fakes cannot, within known limits."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from passes.fakes import FaithfulFakes
from passes.live_storages import LiveStorages
from passes.probe import Prober
from passes.program import storage_id
from runtime.errors import CaptureError, UnknownSize

aten = torch.ops.aten
_TRUTHS = {aten.equal.default, aten.is_nonzero.default, aten.allclose.default}
_MAX_QUESTIONS = 10_000
_OURS = tuple(f"planner/{name}.py" for name in ("watch", "pretend_device", "outermost", "dry_run", "component_results"))
_OURS += ("passes/fakes.py",)
# Values of tensors up to this many elements are known where they do not depend on unknown ones: paddings, sizes, masks.
KNOWN_ELEMENTS = 4096


class Answers:
    """What Python is told when it asks for a value that a fake does not have: a path through the module.

    `prefix` answers the first questions, `default` the others; at one line of code answers alternate, so that loops end.
    `share` is the part of all rows that a mask is said to choose.
    """

    def __init__(self, prefix: tuple[bool, ...] = (), default: bool = False, share: float = 1.0) -> None:
        self.prefix, self.default, self.share = prefix, default, share
        self.taken: list[tuple[str, bool]] = []
        self._asked: dict[str, int] = {}
        self.sizes = 0  # how often a size depended on values
        self.failed: CaptureError | None = None  # this path ends in an error of the module's own
        self.guessed = False  # whether a number was asked for, of which more is not explored than 0 and 1

    def decide(self, site: str) -> bool:
        if len(self.taken) >= _MAX_QUESTIONS:
            raise UnknownSize(f"{site} asks for values without end")
        before = self._asked.get(site, 0)
        self._asked[site] = before + 1
        given = len(self.taken)
        answer = self.prefix[given] if given < len(self.prefix) else self.default ^ (before % 2 == 1)
        self.taken.append((site, answer))
        return answer

    def following(self) -> Answers | None:
        """The next path, depth first: the last answer that can be turned is; None when all were walked.

        At one line of code only the first two answers are turned: a loop is walked not at all, once and twice.
        """
        for i in range(len(self.taken) - 1, -1, -1):
            site, answer = self.taken[i]
            before = [a for place, a in self.taken[:i] if place == site]
            first = self.default ^ (len(before) % 2 == 1)
            if len(before) < 2 and answer == first and not self.default:
                return Answers((*(a for _, a in self.taken[:i]), not answer))
        return None

    @property
    def looped(self) -> bool:
        """Whether a line of code asked more often than its answers are turned: there are more paths than are walked."""
        return max(self._asked.values(), default=0) > 2

    def rows(self, most: int) -> int:
        self.sizes += 1
        return int(most * self.share)


class Watch(FaithfulFakes):
    """Within it (over a FakeTensorMode), `live_bytes` are those of all storages that are alive.

    Args:
        weights: storages that are never counted; `read` is called with one when an operator takes it.
        note: called with the live bytes whenever they grow.
        prober: says what kernels take besides their results; it is asked where it can know more than these fakes show.
    """

    def __init__(
        self,
        answers: Answers,
        weights: set[int],
        read: Callable[[int], None],
        note: Callable[[int], None],
        prober: Prober | None = None,
    ) -> None:
        super().__init__()
        self._prober = prober
        self.answers, self._weights, self._read, self._note = answers, weights, read, note
        self.paused = False
        self._storages = LiveStorages()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        self.paused = True
        try:
            yield
        finally:
            self.paused = False

    @property
    def live_bytes(self) -> int:
        return self._storages.live_bytes

    def detach(self) -> None:
        self._storages.detach()

    def bytes_of(self, storage: int) -> int:
        return self._storages.bytes_of(storage)

    def count(self, tensor: torch.Tensor) -> None:
        if storage_id(tensor) not in self._weights and self._storages.count(tensor):
            self._note(self.live_bytes)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        for tensor in tensors:
            if storage_id(tensor) in self._weights:
                self._read(storage_id(tensor))
        result = self._execute(func, args, kwargs, tensors)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.count(leaf)
        if self._prober is not None and tensors:
            self._note_workspace(func, args, kwargs, result)
        return result

    def _note_workspace(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        assert self._prober is not None
        with _disable_current_modes(), contextlib.suppress(UnknownSize):  # then what dispatching showed is all that is known
            workspace = self._prober.cost_of(func, args, kwargs, result).workspace_bytes
            if workspace:
                self._note(self.live_bytes + workspace)

    def _execute(self, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> Any:
        known = not any(isinstance(t, FakeTensor) for t in tensors) if tensors else _is_small(func, args)
        if known:
            with _disable_current_modes():  # values that are known stay known
                return func(*args, **kwargs)
        if func in _TRUTHS:
            return self.answers.decide(asking_site())
        if func is aten._local_scalar_dense.default:
            return self._scalar(args[0])
        if func is aten.nonzero.default:
            return self._nonzero(args[0])
        if func is aten.masked_select.default:
            rows = self.answers.rows(torch.broadcast_shapes(args[0].shape, args[1].shape).numel())
            return torch.empty(rows, dtype=args[0].dtype)
        if func is aten._unique2.default:
            rows = self.answers.rows(args[0].numel())
            inverse, counts = (args[2] if len(args) > 2 else False), (args[3] if len(args) > 3 else False)
            index = torch.empty(args[0].shape if inverse or counts else 0, dtype=torch.int64)
            return torch.empty(rows, dtype=args[0].dtype), index, torch.empty(rows if counts else 0, dtype=torch.int64)
        if func is aten.index.Tensor and any(_is_mask(i) for i in args[1]):
            args = (args[0], self._rows_of(args[1]))
        return super().run(func, args, kwargs)

    def _scalar(self, tensor: torch.Tensor) -> Any:
        if tensor.dtype is torch.bool:
            return self.answers.decide(asking_site())
        if tensor.is_floating_point():
            self.answers.guessed = True
            return float(self.answers.decide(asking_site()))  # a factor, or what `if` asks of a number
        raise UnknownSize(f"{asking_site()} takes an integer out of a tensor")

    def _nonzero(self, mask: torch.Tensor) -> torch.Tensor:
        rows = self.answers.rows(mask.numel())
        # ATen/native/TensorAdvancedIndexing.cpp: the result is laid out column by column
        return torch.empty((mask.dim(), rows), dtype=torch.int64).t()

    def _rows_of(self, indices: Any) -> list[Any]:
        expanded: list[Any] = []
        for index in indices:
            if _is_mask(index):
                expanded.extend(self._nonzero(index).unbind(1))
            else:
                expanded.append(index)
        return expanded


class UnknownFloat(float):
    """A number out of a tensor without values. It scales and compares like the answer that was given; it is no size."""

    def __trunc__(self) -> int:
        raise UnknownSize(f"{asking_site()} makes an integer of a number in a tensor")

    __int__ = __index__ = __floor__ = __ceil__ = __round__ = __trunc__  # type: ignore[assignment]

    def _unknown(self, other: Any, result: Any) -> Any:
        return result if result is NotImplemented else UnknownFloat(result)

    def __add__(self, other: Any) -> Any:
        return self._unknown(other, float.__add__(self, other))

    def __mul__(self, other: Any) -> Any:
        return self._unknown(other, float.__mul__(self, other))

    def __sub__(self, other: Any) -> Any:
        return self._unknown(other, float.__sub__(self, other))

    def __truediv__(self, other: Any) -> Any:
        return self._unknown(other, float.__truediv__(self, other) if other else 0.0)

    __radd__, __rmul__ = __add__, __mul__


class Numbers(TorchFunctionMode):
    """Within it, a number that leaves a floating-point fake is unknown, and no size can be made of it."""

    def __init__(self) -> None:
        super().__init__()
        self.paused = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        unknown = not self.paused and args and isinstance(args[0], FakeTensor) and args[0].is_floating_point()
        if unknown and func in (torch.Tensor.__int__, torch.Tensor.__index__):
            raise UnknownSize(f"{asking_site()} makes an integer of a number in a tensor")
        result = func(*args, **(kwargs or {}))
        return UnknownFloat(result) if unknown and func is torch.Tensor.item and type(result) is float else result


def _is_small(func: Any, args: Any) -> bool:
    """Whether an operator without tensors among its arguments makes values worth keeping: masks, ranges, constants."""
    if torch.Tag.nondeterministic_seeded in func.tags or "empty" in func._schema.name:
        return False
    sizes = [prod(size) if isinstance(size, (list, tuple)) else size for size in args]
    return all(size <= KNOWN_ELEMENTS for size in sizes if isinstance(size, (int, float)))


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


def asking_site() -> str:
    """File and line of the Python that asks: the innermost frame outside of torch and of what runs it here."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        name = frame.f_code.co_filename
        if "/torch/" not in name and not name.endswith(_OURS):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"
