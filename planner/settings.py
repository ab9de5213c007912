"""Settings: plain attributes of components that a pipeline's own Python changes around their calls, such as adapters' scales.

self.text_encoder ... scaling = {"style": 0.5}   # cross_attention_kwargs={"scale": 0.5}
self.text_encoder(ids)                           # a call with settings: another program than without
self.text_encoder ... scaling = {"style": 1.0}
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from planner.plain_state import as_left
from runtime.fingerprint import TABLES, Fingerprint
from runtime.leftovers import ABSENT, SCALARS, Key, Leftovers, attribute, containers_of, outline


class Settings:
    """The plain attributes of a module and its submodules, as they are when this is made."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._fingerprint = module, Fingerprint(module)
        held = self._held()
        plain = {key: value for key, value in held.items() if containers_of(value) is not None}
        self._usual = {key: value if type(value) in SCALARS else copy.deepcopy(value) for key, value in plain.items()}
        self._others = {key: value for key, value in held.items() if key not in plain}

    def differing(self) -> dict[Key, Any]:
        """Those that differ now, with their values; what is not plain, now or before, is not among them."""
        if self._fingerprint.changed() is None:
            return {}
        held = self._held()
        now = {key: held.get(key, ABSENT) for key in held.keys() | self._usual.keys() if key not in self._others}
        new = {key: value for key, value in now.items() if outline([value]) != outline([self.usual(key)])}
        return {key: copy.deepcopy(new[key]) for key in sorted(new) if containers_of(new[key]) is not None}

    def exchanged(self) -> list[Key]:
        """Those that are other objects now, where they were no plain data."""
        if self._fingerprint.changed() is None:
            return []
        held = self._held()
        return [key for key, value in self._others.items() if held.get(key, ABSENT) is not value]

    def usual(self, key: Key) -> Any:
        """The value when this was made."""
        return self._usual.get(key, ABSENT)

    def _held(self) -> dict[Key, Any]:
        owners = self._module.named_modules()
        return {(path, k): v for path, owner in owners for k, v in owner.__dict__.items() if k not in TABLES}


@contextlib.contextmanager
def as_set(module: nn.Module, settings: Mapping[Key, Any]) -> Iterator[None]:
    """Within it the attributes have these values."""
    if not settings:
        yield
        return
    before = {key: attribute(module, key) for key in settings}
    with as_left(module, Leftovers(before, settings, frozenset())):
        yield
