"""Calls of components that cannot be captured whole: their own Python runs, with their parts as programs of the pipeline.

A part is a member of the pipeline's budget as a captured call is; what the component's Python holds around it counts as what
the pipeline's own Python holds. The weights that this Python reads itself are on the device while it runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from passes.calibrate import calibrating
from passes.probe import Prober
from planner.explore import Exploration, explore
from planner.memory import MemoryModel
from planner.names import Names
from planner.options import Options
from planner.pipeline_captured import ProgramOfCall, argument_bytes, with_own_constants
from planner.progress import working
from planner.refuse import refuse_shared_state
from planner.solve.share import most_bytes
from runtime.errors import CaptureError, UnknownSize
from runtime.layout import align
from runtime.loose_signature import LooseSignature


@dataclass(frozen=True, eq=False)
class PartsOfCall:
    """A call of a component whose Python runs. `path`: of the component, from the root.

    Attributes:
        parts: by the keys of the exploration; `opaque`: paths of the modules whose Python runs, with the names of the weights
            that it reads, both from the root. `opaque_bytes`: of those weights, by the paths of the exploration.
    """

    path: str
    method: str
    signature: LooseSignature
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    exploration: Exploration
    parts: Mapping[str, ProgramOfCall]
    opaque: Mapping[str, tuple[str, ...]]
    opaque_bytes: Mapping[str, int]

    @property
    def key(self) -> str:
        return f"{self.path}.{self.method}"

    @property
    def reason(self) -> str:
        """Why it cannot be captured whole."""
        return self.exploration.reasons[""]

    @property
    def argument_bytes(self) -> int:
        """What the exploration counts of its arguments, in Python's bytes."""
        return argument_bytes(self.args, self.kwargs)

    @property
    def python_bytes(self) -> int:
        """The most that its Python holds at any time between its parts, arguments and weights that it reads included."""
        return most_bytes(self.exploration.python, self.opaque_bytes)

    def around_bytes(self, key: str) -> int:
        """What it holds besides the inputs of a part at the part's call."""
        return most_bytes(self.exploration.outside[key], self.opaque_bytes)

    def calls(self, key: str) -> int:
        """How often a part is called at most in one call."""
        return self.exploration.calls[key]


def parts_of_call(
    root: nn.Module,
    path: str,
    method: str,
    call: tuple[tuple[Any, ...], dict[str, Any]],
    options: Options,
    error: CaptureError,
    number: int,
) -> PartsOfCall:
    """Explores a call that cannot be captured, as `error` says; it has the `number` for itself.

    Raises:
        CaptureError: that error, where the Python fails on fakes or nothing in it can be captured.
        UnknownSize: bytes of its Python depend on values, and nobody says how many; names the module.
    """
    module, kind = root.get_submodule(path), options.device.partition(":")[0]
    memory = MemoryModel.of(kind, options.machine.capability)
    with working(f"exploring {path}.{method}, which cannot be captured whole"), calibrating(kind) as calibrator:
        # On `accounting` what is dispatched is all there is, and exploring sees that itself.
        prober = Prober(kind, options.machine.capability, calibrator) if kind != "accounting" else None
        try:
            found = explore(
                module, call, method, reason=str(error), opaque_bytes=_stated(options.opaque_bytes, path), prober=prober
            )
        except CaptureError as other:
            raise error from other
        except UnknownSize as unknown:
            raise UnknownSize(
                f"{unknown}. Or leave {path} out of the pipeline, or pass what it gives to the call (such as prompt_embeds=...)"
            ) from unknown
    if not found.parts:
        raise error
    names, own = Names(root), Names(module)
    parts = {}
    for key, part in found.parts.items():
        refuse_shared_state(module, part.program)
        where = f"{path}.{part.path}"
        renamed = with_own_constants(root, names.rename(part.program, path), f"part {number}")
        program = dataclasses.replace(renamed, name=f"{where}.forward")
        signature = LooseSignature.of(*part.call)
        parts[key] = ProgramOfCall(where, "forward", signature, program, *part.call, part=True)
    opaque = {f"{path}.{p}".rstrip("."): tuple(names.canonical[f"{path}.{n}"] for n in w) for p, w in found.weights.items()}
    sizes = {p: sum(align(own.nbytes(n), memory.weight_alignment) for n in w) for p, w in found.weights.items()}
    return PartsOfCall(path, method, LooseSignature.of(*call), *call, found, parts, opaque, sizes)


def _stated(opaque_bytes: Mapping[str, int], path: str) -> dict[str, int]:
    """What was said of the component's modules, by patterns of their paths in it."""
    return {pattern.removeprefix(f"{path}."): nbytes for pattern, nbytes in opaque_bytes.items()}
