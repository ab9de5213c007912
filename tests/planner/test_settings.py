"""Plain attributes that are set around calls: found, given again for a capture, and told apart when a program is chosen."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from planner.settings import Settings, as_set
from runtime.leftovers import ABSENT, KnownSettings, attribute

PLAIN = st.recursive(
    st.integers() | st.floats(allow_nan=False) | st.booleans() | st.text(max_size=3) | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def made(value: Any = 1.0) -> nn.Module:
    module = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU())).eval()
    module[1].scale = copy.deepcopy(value)
    return module


@given(PLAIN, PLAIN)
def test_what_differs_is_found_and_can_be_had_again(before: Any, after: Any) -> None:
    module = made(before)
    settings = Settings(module)
    assert settings.differing() == {}
    module[1].scale = copy.deepcopy(after)
    found = settings.differing()
    same = repr(before) == repr(after)
    assert found == ({} if same else {("1", "scale"): after})
    assert settings.usual(("1", "scale")) == before
    module[1].scale = copy.deepcopy(before)
    with as_set(module, found):
        assert repr(module[1].scale) == repr(after)
    assert repr(module[1].scale) == repr(before)


def test_containers_that_are_filled_anew() -> None:
    module = made({"one": [1.0]})
    settings, held = Settings(module), module[1].scale
    held["one"][0] = 0.5
    found = settings.differing()
    assert found == {("1", "scale"): {"one": [0.5]}}
    held["one"][0] = 1.0
    assert settings.differing() == {}
    with as_set(module, found):
        module[1].scale["one"].append(2.0)
    assert module[1].scale is held
    assert held == {"one": [1.0]}
    assert found == {("1", "scale"): {"one": [0.5]}}


def test_attributes_that_come_and_go() -> None:
    module = made()
    settings = Settings(module)
    module.new = 1
    del module[1].scale
    found = settings.differing()
    assert found == {("", "new"): 1, ("1", "scale"): ABSENT}
    module[1].scale = 1.0
    del module.new
    with as_set(module, found):
        assert not hasattr(module[1], "scale")
        assert module.new == 1
    assert not hasattr(module, "new")
    assert module[1].scale == 1.0


def test_objects_are_exchanged() -> None:
    module = made()
    module.processor = object()
    settings = Settings(module)
    module.processor, module[1].scale = object(), 2.0
    assert settings.differing() == {("1", "scale"): 2.0}
    assert settings.exchanged() == [("", "processor")]


@pytest.mark.parametrize("now", [1.0, 0.5, 0.25])
def test_programs_know_how_they_were_set(now: float) -> None:
    """One for the usual value, and one for another; of other modules' attributes a program knows nothing."""
    module = made()
    known = KnownSettings(module)
    known.add("1", {})
    known.add("1", {("1", "scale"): (1.0, 0.5)})
    known.add("0", {})
    assert known.keys() == {("1", "scale")}
    module[1].scale = now
    assert [known.fits(index) for index in range(3)] == [now == 1.0, now == 0.5, True]
    assert attribute(module, ("1", "scale")) == now
