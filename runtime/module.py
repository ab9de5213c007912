"""`PlannedModule`: the user's module with one method replaced by its emitted program.

It is an instance of the original class and shares the original's attributes, so `state_dict()`, `.config`, submodules and hooks
are the original's own; only where the weights live and what the planned method runs have changed.
"""

from __future__ import annotations

import functools
import inspect
import os
from typing import Any, Self

from torch import nn

from runtime.errors import ModuleUnusable
from runtime.report import Report
from runtime.runner import Runner


class PlannedModule(nn.Module):
    """Base of every planned module; `build()` makes a subclass of this and of the original's class."""

    _runner: Runner

    def report(self) -> Report:
        """What the last call measured."""
        return self._runner.report()

    def save_sharded(self, folder: str | os.PathLike[str], max_shard_size: int | str = "5GB", *, stored: bool = False) -> None:
        """Writes the weights, as they are now, into a new folder: a checkpoint in shards that the model's library loads.

        `max_shard_size` is bytes, or a size such as "5GB". With `stored`, cast weights are written as they are stored.

        Raises:
            PlannerError: the folder has a checkpoint already, or a weight has no values.
            StoreError: the disk is full or refuses; nothing is left then.
        """
        assert self._runner.save is not None
        self._runner.save(folder, max_shard_size, stored=stored)

    def close(self) -> None:
        """Frees arenas and page locks; the original module keeps its weights. Closing twice is nothing."""
        self._runner.close()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ModuleUnusable(
            "a planned module cannot be copied or pickled: it holds a device's arenas. Save its weights with "
            "torch.save(m.state_dict(), ...) and the plan with p.save(...), or close() it and copy the original"
        )

    def train(self, mode: bool = True) -> Self:
        if mode:
            raise ModuleUnusable(
                "a planned module cannot be trained: its weights are streamed. Train the original, then plan it"
            )
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        raise ModuleUnusable(
            "a planned module stays on its device and in its dtypes (.to, .cuda, .half ...); close() it, move or cast the "
            "original, and plan again"
        )


def planned(module: nn.Module, runner: Runner) -> PlannedModule:
    """An object that shares the module's attributes, is an instance of its class, and runs the planned method."""
    original = type(module)

    def run(self: PlannedModule, *args: Any, **kwargs: Any) -> Any:
        return self._runner.call(args, kwargs)

    functools.update_wrapper(run, getattr(original, runner.method))
    run.__signature__ = inspect.signature(getattr(original, runner.method))  # type: ignore[attr-defined]
    body = {"__slots__": ("_runner",), runner.method: run, "__module__": original.__module__, "__doc__": original.__doc__}
    kind: Any = type(f"Planned{original.__name__}", (PlannedModule, original), body)
    result: PlannedModule = kind.__new__(kind)
    object.__setattr__(result, "__dict__", module.__dict__)
    kind._runner.__set__(result, runner)
    return result
