"""What exists at one point of the checker's replay: values by name, the storages behind them, and who refers to those."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

from passes.check_cuts import Cut, span
from passes.check_kernels import Value
from passes.spec import TensorSpec
from runtime.layout import HostPlace


@dataclass
class Place:
    """A result that is to be written over what some memory holds.

    Attributes:
        name: that of the result. spec: where it is. before: the names of what is there, which only those still read that write
            it. full: whether there is anything. cuts: what is written of it outside of loops.
    """

    name: str
    spec: TensorSpec
    before: frozenset[str]
    full: bool
    cuts: list[Cut] = field(default_factory=list)


@dataclass
class Storage:
    """Bytes that values refer to.

    Attributes:
        nbytes: what it takes of the device's activations; 0 for weights and for what lives on the host.
        weight, bundle: for weights, resident and staged.
        host, bands: its place, for what lives on the host, and the dimension of its bands.
        frame: the value that it was made for.
        complete: of what lives on the host all has been written.
        blank: it was made uninitialised, and nothing has written it so far.
        places: the results that are to be written over what it holds.
        gone: names of what has been written over.
        values: the names that refer to it.
    """

    nbytes: int
    weight: str | None = None
    bundle: int | None = None
    host: HostPlace | None = None
    bands: int = 0
    frame: TensorSpec | None = None
    complete: bool = False
    blank: bool = False
    places: list[Place] = field(default_factory=list)
    gone: set[str] = field(default_factory=set)
    values: set[str] = field(default_factory=set)


class Memory:
    """Values are lists of their members (None for what is no tensor), storages have keys that are never used again."""

    def __init__(self) -> None:
        self.values: dict[str, list[Value | None]] = {}
        self.freed: set[str] = set()
        self.storages: dict[int, Storage] = {}

    def add(self, storage: Storage) -> int:
        """The key of a new storage."""
        self.storages[len(self.storages)] = storage
        return len(self.storages) - 1

    def name(self, node: fx.Node, outputs: list[Value | None]) -> None:
        """From now on the node's name is that of a value."""
        self.values[node.name] = outputs
        for key in self.keys(node.name):
            self.storages[key].values.add(node.name)

    def keys(self, name: str) -> set[int]:
        """The storages that a value refers to."""
        return {value[1] for value in self.values[name] if value is not None}

    def only(self, node: fx.Node) -> Value:
        """A value that is one tensor."""
        value = self.values[node.name][0]
        assert value is not None
        return value

    def names_in(self, key: int, spec: TensorSpec) -> set[str]:
        """The names that refer to some of the memory of a tensor in a storage."""
        first, end = span(spec)

        def shares(name: str) -> bool:
            spans = [span(value[0]) for value in self.values.get(name, ()) if value is not None and value[1] == key]
            return not spans or any(start < end and first < stop for start, stop in spans)

        return {name for name in self.storages[key].values if shares(name)}

    def storages_of(self, node: fx.Node) -> Mapping[int, Storage]:
        """By key."""
        return {key: self.storages[key] for key in self.keys(node.name)}
