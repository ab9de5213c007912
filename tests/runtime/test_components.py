"""Objects whose methods are met by somebody else, and who stay what they are."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from runtime.components import Taken, methods_of
from runtime.errors import ModuleUnusable


class _Coder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    @property
    def device(self) -> torch.device:
        return self.inner.weight.device

    @property
    def width(self) -> int:
        return 2

    def encode(self, x: torch.Tensor, *, twice: bool = False) -> torch.Tensor:
        """Docs."""
        return self.forward(x) * (2 if twice else 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(x)
        return result


class _Handler:
    torch_device = torch.device("cpu")

    def __init__(self) -> None:
        self.met: list[tuple[str, str]] = []

    def meet(self, path: str, method: str, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.met.append((path, method))
        return own(*args, **kwargs)


def test_methods_go_to_the_handler_and_come_back() -> None:
    coder, handler, taken = _Coder(), _Handler(), Taken()
    x, attributes = torch.ones(2), set(vars(coder))
    want = coder(x)
    taken.take_module(coder, "vae", handler, whole=True)
    assert isinstance(coder, _Coder)
    assert (type(coder).__name__, type(coder).__qualname__) == (_Coder.__name__, _Coder.__qualname__)
    assert type(coder).__module__ == _Coder.__module__
    assert set(vars(coder)) == attributes
    assert torch.equal(coder(x), want)
    assert torch.equal(coder.encode(x, twice=True), 2 * want)
    assert handler.met == [("vae", "forward"), ("vae", "encode"), ("vae", "forward")]
    assert inspect.signature(coder.encode) == inspect.signature(_Coder().encode)
    assert (coder.encode.__doc__, coder.device, coder.width) == ("Docs.", torch.device("cpu"), 2)
    with taken.as_before():
        assert type(coder) is _Coder
    assert type(coder) is not _Coder
    taken.give_back()
    assert type(coder) is _Coder
    assert torch.equal(coder(x), want)
    assert len(handler.met) == 3


def test_hooks_run_around_the_handler() -> None:
    coder, handler, taken = _Coder(), _Handler(), Taken()
    taken.take_module(coder, "vae", handler, whole=True)
    seen: list[int] = []
    coder.register_forward_hook(lambda *_: seen.append(len(handler.met)))
    coder(torch.ones(2))
    assert seen == [1]


def test_of_a_submodule_forward_alone() -> None:
    coder, handler, taken = _Coder(), _Handler(), Taken()
    taken.take_module(coder.inner, "vae.inner", handler, whole=False)
    coder.inner.to(torch.float64)
    coder.encode(torch.ones(2, dtype=torch.float64))
    assert handler.met == [("vae.inner", "forward")]


def test_what_would_go_wrong_says_so() -> None:
    coder, handler, taken = _Coder(), _Handler(), Taken()
    taken.take_module(coder, "vae", handler, whole=True)
    assert coder.to("cpu").float() is coder
    for wrong in (coder.half, lambda: coder.to("meta"), coder.train, lambda: copy.deepcopy(coder)):
        with pytest.raises(ModuleUnusable, match="restore"):
            wrong()
    assert coder.eval() is coder


def test_a_call_of_a_pipeline() -> None:
    class Pipe:
        def __call__(self, x: int) -> int:
            return x + 1

    pipe, taken = Pipe(), Taken()
    taken.take_call(pipe, lambda own, args, kwargs: (own(*args, **kwargs), "met"))
    assert pipe(1) == (2, "met")  # type: ignore[comparison-overlap]
    assert isinstance(pipe, Pipe)
    taken.give_back()
    assert pipe(1) == 2


def test_which_methods() -> None:
    assert methods_of(_Coder) == ["forward", "encode"]
