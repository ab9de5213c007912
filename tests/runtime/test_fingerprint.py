"""What a program took for granted and notices when it changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from runtime.fingerprint import Fingerprint
from tests.planner.toys import Counter, Mlp


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.counter, self.act = Mlp(), Counter(), torch.relu
        self.lstm = nn.LSTM(8, 8)
        self.table, self.names = {"a": [1]}, {1}


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "scalar": (lambda m: setattr(m.counter, "scale", 3.0), "an attribute of counter"),
    "new scalar": (lambda m: setattr(m.counter, "other", 3.0), "an attribute of counter"),
    "scalar type": (lambda m: setattr(m.counter, "scale", True), "an attribute of counter"),
    "tuple": (lambda m: setattr(m.counter, "sizes", (3, 4)), "an attribute of counter"),
    "list in place": (lambda m: m.counter.shifts.append(3.0), "an attribute of counter"),
    "list item": (lambda m: m.counter.shifts.__setitem__(0, 5.0), "an attribute of counter"),
    "dict in place": (lambda m: m.table.update(b=2), "an attribute of the module"),
    "in a dict": (lambda m: m.table["a"].append(2), "an attribute of the module"),
    "set in place": (lambda m: m.names.add(2), "an attribute of the module"),
    "tensor attribute": (lambda m: setattr(m.counter, "constant", torch.zeros(8)), "an attribute of counter"),
    "function": (lambda m: setattr(m, "act", torch.tanh), "an attribute of the module"),
    "method": (lambda m: setattr(m.mlp, "forward", lambda x: x), "an attribute of mlp"),
    "training": (lambda m: m.mlp.up.train(), "an attribute of mlp.up"),
    "parameter": (lambda m: setattr(m.mlp.up, "weight", nn.Parameter(torch.zeros(16, 8))), "buffer of mlp.up"),
    "parameter gone": (lambda m: setattr(m.mlp.up, "bias", None), "buffer of mlp.up"),
    "buffer": (lambda m: setattr(m.counter, "count", torch.zeros(())), "buffer of counter"),
    "child": (lambda m: setattr(m.mlp, "up", nn.Linear(8, 16)), "children of mlp"),
    "new child": (lambda m: m.mlp.add_module("new", nn.ReLU()), "children of mlp"),
    "hook": (lambda m: m.mlp.up.register_forward_hook(lambda *a: None), "hooks of mlp.up"),
    "pre-hook": (lambda m: m.mlp.up.register_forward_pre_hook(lambda *a: None), "hooks of mlp.up"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_named(name: str) -> None:
    module = _Model().eval()
    fingerprint = Fingerprint(module)
    assert fingerprint.changed() is None
    change, text = CHANGES[name]
    change(module)
    assert text in str(fingerprint.changed())


ALLOWED: dict[str, Callable[[Any], Any]] = {
    "root hook": lambda m: m.register_forward_hook(lambda *a: None),
    "root pre-hook": lambda m: m.register_forward_pre_hook(lambda *a: None),
    "equal scalar": lambda m: setattr(m.counter, "scale", float("2")),
    "equal dict": lambda m: setattr(m, "table", {"a": [1]}),
    "equal tuple": lambda m: setattr(m.counter, "sizes", (1, 1 + 1)),
    "weights in place": lambda m: m.mlp.up.weight.data.mul_(2),
    "state dict": lambda m: m.load_state_dict(_Model().state_dict()),
    "eval": lambda m: m.eval(),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_what_may_change(name: str) -> None:
    module = _Model().eval()
    fingerprint = Fingerprint(module)
    ALLOWED[name](module)
    assert fingerprint.changed() is None


def test_containers_that_hold_themselves() -> None:
    module = _Model().eval()
    module.table["self"] = module.table  # type: ignore[assignment]
    fingerprint = Fingerprint(module)
    assert fingerprint.changed() is None
    module.table["a"].append(2)
    assert "an attribute of the module" in str(fingerprint.changed())


def test_changes_of_a_part_are_told_from_others() -> None:
    module = _Model().eval()
    fingerprint = Fingerprint(module)
    module.counter.scale = 5.0
    assert fingerprint.changed() == fingerprint.changed("counter") == "an attribute of counter changed"
    assert fingerprint.changed("mlp") is None
    assert fingerprint.only_settings()
    module.mlp.up.weight = nn.Parameter(torch.zeros(16, 8))
    assert not fingerprint.only_settings()
    assert fingerprint.only_settings("counter")


def test_objects_are_no_settings() -> None:
    module = _Model().eval()
    fingerprint = Fingerprint(module)
    module.act = torch.tanh
    assert not fingerprint.only_settings()


def test_what_is_ignored_may_change() -> None:
    module = _Model().eval()
    fingerprint = Fingerprint(module)
    module.table["b"] = [2]
    fingerprint.ignore([("", "table")])
    assert fingerprint.changed() is None
    module.counter.scale = 5.0
    assert fingerprint.changed() == "an attribute of counter changed"


def test_a_shared_part_counts_where_it_is_called() -> None:
    module = nn.ModuleDict({"one": nn.Linear(2, 2), "two": nn.Sequential()})
    module["two"].append(module["one"])
    fingerprint = Fingerprint(module.eval())
    module["one"].in_features = 3
    assert fingerprint.changed("two") == "an attribute of one changed"
