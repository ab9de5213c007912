"""What a pipeline runs, as the planner gives it: programs of calls, calls in parts, and whom to ask for more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from runtime.early import Pieces
from runtime.executable import Executable, RunPace
from runtime.leftovers import Key
from runtime.loose_signature import LooseSignature
from runtime.own_python import parents_of

Stay = Literal["always", "phase", "call"]


@dataclass(frozen=True)
class PipelineProgram:
    """The program of one call of a component, which is the module at `path`; `phases` are those in which it is called.

    `settings`: plain attributes that are set for this call from outside: what they are as usual, and here.
    """

    key: str
    path: str
    method: str
    signature: LooseSignature
    program: Executable
    stay: Stay
    phases: tuple[int, ...] = ()
    settings: Mapping[Key, tuple[Any, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class PartedCall:
    """A call of a component whose own Python runs; `parts` are indices of the programs that run in it.

    `opaque`: paths of the modules whose Python runs, with the names of the weights that it reads, which start at multiples of
    `alignment` bytes.
    """

    key: str
    path: str
    method: str
    signature: LooseSignature
    parts: tuple[int, ...]
    opaque: Mapping[str, tuple[str, ...]]
    alignment: int


@dataclass(frozen=True)
class PipelinePrograms:
    """All that a pipeline runs. `steps`: for every component call of a run its program, by index, and its phase.

    A step of a call in parts has the index of that call in `parted`, inverted (`~index`).

    `early`: during the call of one program, followed by one of another whose weights are not there, which of them come already.
    """

    programs: tuple[PipelineProgram, ...]
    steps: tuple[tuple[int, int], ...]
    predicted: Mapping[str, float]
    pace: RunPace
    early: Mapping[tuple[int, int], Pieces] = field(default_factory=dict)
    parted: tuple[PartedCall, ...] = ()

    @property
    def opaque(self) -> set[str]:
        """The names of the weights that components' own Python reads."""
        return {name for call in self.parted for names in call.opaque.values() for name in names}


@dataclass(frozen=True)
class Planners:
    """How a runner asks for what was not planned.

    `again`: the programs of another call of the pipeline, by its keyword arguments. `one`: of a single call of a component,
    (path, method, args, kwargs). `part`: of a call that the Python of a component makes and no explored path has made, by the
    key of the call in parts: (key, path, args, kwargs). `anew`: what the pipeline gives for a call after it has been planned
    and built again, because something about its components is different: (what, args, kwargs).
    """

    again: Callable[[dict[str, Any]], PipelinePrograms]
    one: Callable[[str, str, tuple[Any, ...], dict[str, Any]], PipelineProgram]
    part: Callable[[str, str, tuple[Any, ...], dict[str, Any]], PipelineProgram]
    anew: Callable[[str, tuple[Any, ...], dict[str, Any]], Any]


def captured_paths(root: nn.Module, programs: PipelinePrograms) -> set[str]:
    """Paths of the modules whose Python does not run: outside of components in parts all, and in those what is in a part."""
    parts = {index for call in programs.parted for index in call.parts}
    whole = {each.path.partition(".")[0] for index, each in enumerate(programs.programs) if index not in parts}
    running = {call.path for call in programs.parted if call.path.partition(".")[0] not in whole}
    captured = {programs.programs[index].path for index in parts} - {p for call in programs.parted for p in call.opaque}
    paths = [path for path, _ in root.named_modules()]
    around = {path: {path, *parents_of(f"{path}.")} for path in paths}
    return {path for path in paths if not around[path] & running or around[path] & captured}
