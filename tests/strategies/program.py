"""A generated program as a module whose forward is text, and a case: such a module with the arguments of a call."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIGNATURE = "self, x, ids=None, *, y=None, scale=1.0, flip=False"
SHORT = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.int64: "i64", torch.bool: "b8"}
GLOBALS: dict[str, Any] = {"torch": torch, "F": F}  # what every line sees


class GeneratedModule(nn.Module):
    """A module whose forward is the text in `lines`; `repr` prints its layers, its own tensors and that text."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        self.lines: list[str] = []

    @property
    def source(self) -> str:
        """The program as a Python function."""
        return "\n    ".join([f"def forward({SIGNATURE}):", *self.lines])

    def forward(
        self, x: Tensor, ids: Tensor | None = None, *, y: Tensor | None = None, scale: float = 1.0, flip: bool = False
    ) -> Any:
        """Run the lines."""
        return _function(self.source)(self, x, ids, y=y, scale=scale, flip=flip)

    def __repr__(self) -> str:
        heads = [f"# self.layers.{name} = {layer!r}" for name, layer in self.layers.items()]
        heads += [f"# self.{name} = parameter {type_text(p)}" for name, p in self._parameters.items() if p is not None]
        for name, b in self._buffers.items():
            kind = "non-persistent buffer" if name in self._non_persistent_buffers_set else "buffer"
            heads.append(f"# self.{name} = {kind} {type_text(b)}")
        heads += [f"# self.{name} = constant {type_text(t)}" for name, t in vars(self).items() if isinstance(t, Tensor)]
        return "\n".join([*heads, self.source])


@dataclass(frozen=True, repr=False)
class Case:
    """A module in eval mode with one call's arguments. `description` is the program and the types of its inputs."""

    module: GeneratedModule
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    description: str

    def fresh(self) -> GeneratedModule:
        """A deep copy of the module: calls may write its buffers."""
        return copy.deepcopy(self.module)

    def __repr__(self) -> str:
        return f"Case of\n{self.description}\n"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """How Hypothesis prints a failing example."""
        printer.text(repr(self))


@functools.lru_cache(maxsize=1024)
def _function(source: str) -> Callable[..., Any]:
    scope: dict[str, Any] = {}
    exec(compile(source, "<generated>", "exec"), GLOBALS, scope)
    return scope["forward"]


def type_text(t: Tensor | None) -> str:
    """`f32[2, 3]`."""
    return "None" if t is None else f"{SHORT.get(t.dtype, str(t.dtype))}{list(t.shape)}"
