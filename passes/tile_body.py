"""Bodies of loops: the operators of one tile, noted first, so that tiles with the same ones share a body.

A tile is noted as steps on numbered values. Where it begins is a column of the loop's table; everything else is part of the
steps. Tiles with equal steps differ in their columns only.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map_only

from passes.known_calls import run_on_fakes
from passes.loop import Run
from passes.program import tensors_of
from passes.regions import Region, TileNeeds
from passes.tile_rules import Part, Reduced, Tiled, Untileable
from passes.write_over import Window
from runtime import ops

aten = torch.ops.aten


@dataclass(frozen=True)
class _Ref:
    """The value of an earlier step, an operand (negative), or a column of the table."""

    index: int
    column: bool = False


@dataclass(frozen=True)
class _Step:
    name: str
    target: Any
    args: Any
    kwargs: Any


@dataclass(frozen=True)
class _Token:
    """Stands for a value while a tile is noted."""

    sheet: _Sheet
    ref: _Ref

    def __getitem__(self, index: int) -> _Token:
        return self.sheet.note("member", operator.getitem, (self.ref, index), {})


@dataclass
class _Sheet:
    """The steps of one tile and its row of the table, with names for its columns. `sizes` of intervals have to be equal too."""

    steps: list[_Step] = field(default_factory=list)
    row: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    _cuts: dict[tuple[_Ref, Part], _Token] = field(default_factory=dict)
    _columns: dict[tuple[tuple[str, ...], tuple[int, ...]], tuple[_Ref, ...]] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return repr((self.steps, self.sizes))

    def note(self, name: str, target: Any, args: Any, kwargs: Any) -> _Token:
        args, kwargs = tree_map_only(_Token, lambda token: token.ref, (args, kwargs))
        self.steps.append(_Step(name, target, tuple(args), dict(kwargs)))
        return _Token(self, _Ref(len(self.steps) - 1))

    def interval(self, part: Part) -> tuple[_Ref, ...]:
        """The columns with the bounds of a part, whose size decides the body."""
        return self._column(("lo", "hi"), part.start, part.stop)

    def following(self, part: Part) -> tuple[_Ref, ...]:
        """The columns with the bounds of a part of a later tile, of whatever size."""
        return self._column(("next_lo", "next_hi"), part.start, part.stop)

    def place(self, index: int) -> _Ref:
        """The column that counts tiles."""
        return self._column(("tile",), index)[0]

    def _column(self, names: tuple[str, ...], *numbers: int) -> tuple[_Ref, ...]:
        if (names, numbers) not in self._columns:
            first = len(self.row)
            self.row += numbers
            self.names += names
            self.sizes += [numbers[1] - numbers[0]] if names == ("lo", "hi") else []
            self._columns[names, numbers] = tuple(_Ref(first + i, column=True) for i in range(len(numbers)))
        return self._columns[names, numbers]

    def play(self, operands: Callable[[int], Any], run: Callable[[str, Any, Any, Any], Any]) -> None:
        """Calls `run(name, target, args, kwargs)` for every step in order, with the tile's own numbers and what came before.

        `operands` gives that of a number, when it is first read.
        """
        made: list[Any] = []

        def value(ref: _Ref) -> Any:
            if ref.column:
                return self.row[ref.index]
            return made[ref.index] if ref.index >= 0 else operands(-1 - ref.index)

        for step in self.steps:
            args, kwargs = tree_map_only(_Ref, value, (step.args, step.kwargs))
            made.append(run(step.name, step.target, args, kwargs))

    def part(self, name: str, value: _Token, part: Part | None, size: int, *, fixed: bool) -> _Token:
        """A part of a value; `fixed`: at the same place in every tile."""
        if part is None or part.size == size:
            return value
        if (value.ref, part) not in self._cuts:
            bounds = (part.start, part.stop) if fixed else self.interval(part)
            self._cuts[value.ref, part] = self.note(name, aten.slice.Tensor, (value, part.dim, *bounds), {})
        return self._cuts[value.ref, part]


@dataclass(frozen=True)
class Buffers:
    """Operands of a loop besides what it reads: whole results by node, stacks of partial results by merged node.

    `slots`: for each operand that lives on the host the device memory for one band of it. `windows`: the operands that the
    loop writes over, of which every tile copies what it reads; `kept`: for the rows that a tile keeps of them for the next one.
    """

    results: Mapping[fx.Node, fx.Node]
    stacks: Mapping[fx.Node, fx.Node]
    slots: Mapping[fx.Node, fx.Node]
    kept: Mapping[fx.Node, fx.Node] = field(default_factory=dict)
    windows: Mapping[fx.Node, Window] = field(default_factory=dict)


def bands_of(region: Region, tile: TileNeeds) -> dict[fx.Node, Part]:
    """Of every value that lives on the host the band that a tile reads.

    Raises:
        Untileable: something reads it whole, or along another dimension than that of its bands.
    """
    bands: dict[fx.Node, Part] = {}
    for node in region.ordered:
        step = tile.steps[node]
        for argument, need in () if step is None else _needs(region, node, step):
            if argument.target is not ops.host or (need is not None and need.size == 0):
                continue
            if need is None or need.dim != argument.args[2]:
                raise Untileable(f"{node.name} reads {argument.name}, which lives on the host, along another dimension")
            bands[argument] = bands[argument].hull(need) if argument in bands else need
    return bands


def note_tile(
    region: Region,
    tile: TileNeeds,
    index: int,
    operands: Mapping[fx.Node, int],
    buffers: Buffers,
    bands: Mapping[fx.Node, Part],
    coming: Mapping[fx.Node, Part],
) -> _Sheet:
    """The steps of one tile. `operands`: positions in the loop's list of them. `bands`, `coming`: of this tile and the next."""
    sheet = _Sheet()
    here: dict[fx.Node, _Token] = {}
    known: dict[fx.Node, list[_Token | None]] = {}
    held = {**bands, **{node: window.parts[index] for node, window in buffers.windows.items()}}

    def operand(node: fx.Node) -> _Token:
        return _Token(sheet, _Ref(-1 - operands[node]))

    def value(node: fx.Node, need: Part | None, member: int = 0) -> _Token:
        if need is not None and need.size == 0 and node.target is ops.host:
            return empty(node, need)
        if need is not None and need.size == 0:
            whole = known[node][member] if node in known else operand(node)
            assert whole is not None
            return sheet.note(f"{node.name}_none", aten.slice.Tensor, (whole, need.dim, 0, 0), {})
        if node in held:
            if node not in here:
                here[node] = fetch(node, bands[node])
            assert need is not None
            return sheet.part(f"{node.name}_part", here[node], need.within(held[node]), held[node].size, fixed=True)
        if node not in known:
            size = int(node.meta["val"].shape[need.dim]) if need is not None else 0
            return sheet.part(f"{node.name}_part", operand(node), need, size, fixed=False)
        token, part = known[node][member], tile.parts[node][member]
        assert token is not None
        if need is None or part is None:
            return token
        return sheet.part(f"{node.name}_part", token, need.within(part), part.size, fixed=True)

    def fetch(node: fx.Node, band: Part) -> _Token:
        """A band from the host, laid out as the value would be; the slot is free for the next one then."""
        place = operand(node), operand(buffers.slots[node]), band.dim
        arrived = sheet.note(f"{node.name}_band", ops.fetch, (*place, *sheet.interval(band)), {})
        part = sheet.note(f"{node.name}_part", aten.clone.default, (arrived,), {"memory_format": torch.contiguous_format})
        following = coming.get(node, Part(band.dim, 0, 0))
        sheet.note(f"{node.name}_ahead", ops.ahead, (*place, *sheet.following(following)), {})
        return part

    def copy(node: fx.Node, window: Window) -> _Token:
        """What the tile reads of a value that it writes over; its last rows are kept for the next tile."""
        part, size = window.parts[index], int(node.meta["val"].shape[window.dim])
        rest = Part(part.dim, part.start + (window.kept if index else 0), part.stop)
        there = sheet.part(f"{node.name}_rest", operand(node), rest, size, fixed=False)
        if index and window.kept:
            made = sheet.note(f"{node.name}_part", aten.cat.default, ([operand(buffers.kept[node]), there], part.dim), {})
        else:
            made = sheet.note(f"{node.name}_part", aten.clone.default, (there,), {"memory_format": torch.contiguous_format})
        if window.kept and index + 1 < len(window.parts):
            after = window.parts[index + 1].start
            last = sheet.part(f"{node.name}_last", operand(node), Part(part.dim, after, after + window.kept), size, fixed=False)
            sheet.note(f"{node.name}_keep", aten.copy_.default, (operand(buffers.kept[node]), last), {})
        return made

    def empty(node: fx.Node, need: Part) -> _Token:
        """Nothing of a value that is not on the device."""
        like = node.meta["val"]
        shape = [0 if d == need.dim else int(n) for d, n in enumerate(like.shape)]
        options = {"dtype": like.dtype, "device": torch.device("cpu")}
        return sheet.note(f"{node.name}_none", aten.empty.memory_format, (shape,), options)

    def write(node: fx.Node) -> None:
        """Its own part of a result, as soon as that is there."""
        buffer, part = buffers.results[node], tile.written[node]
        if buffer.target is ops.host:
            place = operand(buffer), operand(buffers.slots[buffer]), part.dim, *sheet.interval(part)
            room = sheet.note(f"{node.name}_room", ops.room, place, {})
            sheet.note(f"{node.name}_write", aten.copy_.default, (room, value(node, part)), {})
            sheet.note(f"{node.name}_save", ops.save, place, {})
            return
        target = sheet.part(f"{node.name}_place", operand(buffer), part, int(buffer.meta["val"].shape[part.dim]), fixed=False)
        sheet.note(f"{node.name}_write", aten.copy_.default, (target, value(node, part)), {})

    for node, window in buffers.windows.items():
        here[node] = copy(node, window)  # before anything is written over it
    for node in region.ordered:
        step = tile.steps[node]
        if node.target is operator.getitem and node in tile.parts:
            source, member = node.args
            known[node] = [value(source, tile.parts[node][0], member)]  # type: ignore[arg-type]
        elif step is None:
            continue
        elif isinstance(step, Reduced):
            inputs = [value(a, need) for a, need in _needs(region, node, step)]
            _note_partial(sheet, node, step, inputs, operand(buffers.stacks[node]), index)
        else:
            result = step.compute(_Namer(sheet, node.name), [value(a, need) for a, need in _needs(region, node, step)])
            known[node] = list(result) if isinstance(result, (list, tuple)) else [result]
        if node in tile.written:
            write(node)
    return sheet


def _needs(region: Region, node: fx.Node, step: Tiled | Reduced) -> Iterator[tuple[fx.Node, Part | None]]:
    return zip(region.calls.arguments(node), step.needs, strict=True)


def _note_partial(sheet: _Sheet, node: fx.Node, step: Reduced, inputs: Sequence[_Token], stack: _Token, index: int) -> None:
    """The partial result of a tile, at its place in the stack."""
    partial = step.partial(_Namer(sheet, node.name), inputs)
    target = sheet.note(f"{node.name}_place", aten.select.int, (stack, 0, sheet.place(index)), {})
    sheet.note(f"{node.name}_write", aten.copy_.default, (target, partial), {})


@dataclass(frozen=True)
class _Namer:
    """`run` for a rule: notes every call under the name of the node that it is for."""

    sheet: _Sheet
    name: str

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> _Token:
        return self.sheet.note(f"{self.name}_part", target, args, kwargs)


def make_runs(sheets: Sequence[_Sheet], operands: Sequence[fx.Node], taken: set[str]) -> tuple[Run, ...]:
    """Neighbouring tiles with the same steps as one run; runs with the same steps share their body. Names avoid `taken`."""
    bodies: dict[str, fx.Graph] = {}
    runs = []
    for key, group in groupby(sheets, key=lambda sheet: sheet.key):
        tiles = list(group)
        if key not in bodies:
            bodies[key] = _body(tiles[0], operands, taken)
        runs.append(Run(bodies[key], tuple(tuple(sheet.row) for sheet in tiles)))
    return tuple(runs)


def _body(sheet: _Sheet, operands: Sequence[fx.Node], taken: set[str]) -> fx.Graph:
    """The steps as a graph, with the value of every step on fakes."""
    graph = fx.Graph()
    used = taken | {node.name for node in operands}
    values: dict[_Ref, fx.Node] = {}

    def unique(name: str) -> str:
        found, number = name, 1
        while found in used:
            found, number = f"{name}_{number}", number + 1
        used.add(found)
        return found

    for position, node in enumerate(operands):
        values[_Ref(-1 - position)] = placeholder = graph.placeholder(node.name)
        placeholder.name = node.name
        placeholder.meta["val"] = node.meta["val"]
    for column, number in enumerate(sheet.row):
        name = unique(sheet.names[column])
        values[_Ref(column, column=True)] = placeholder = graph.placeholder(name)
        placeholder.name = name
        placeholder.meta["val"] = number
    mode = next(t.fake_mode for node in operands for t in tensors_of(node) if hasattr(t, "fake_mode"))
    for index, step in enumerate(sheet.steps):
        args, kwargs = tree_map_only(_Ref, values.__getitem__, (step.args, step.kwargs))
        name = unique(step.name)
        node = graph.create_node("call_function", step.target, args, kwargs, name=name)
        node.name = name
        fakes, named = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        node.meta["val"] = run_on_fakes(step.target, fakes, named, mode)
        values[_Ref(index)] = node
    graph.output(())
    return graph
