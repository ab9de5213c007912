"""Recovery: where the device refuses memory in a call, that call runs once more, by a plan for what is free then.

A budget says what a program may take. Whoever else uses the device may take of that meanwhile, and then an allocation fails in
the middle of a call. Everything on the device is given up, the call is planned for what is left, and begins anew. That is only
right where nothing of it can be seen yet: no input and no buffer was written, and random numbers are drawn again as they were.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from runtime.devices.base import Device
from runtime.errors import InfeasibleBudget
from runtime.executable import Executable

OnOom = Literal["replan", "raise"]
# Plans the call for so many bytes of the device and loads that program.
Shrink = Callable[[int], Executable]
Run = Callable[[Executable], Any]


@dataclass(frozen=True)
class Beginning:
    """What a call began with, as far as it may change that. Versions are None where PyTorch does not count writes."""

    written: tuple[tuple[str, torch.Tensor, int | None], ...]
    random: tuple[torch.Tensor, ...]
    device: torch.device

    @classmethod
    def of(
        cls, program: Executable, leaves: Sequence[Any], state: Mapping[str, torch.Tensor], device: torch.device
    ) -> Beginning:
        """Of a call on flat inputs; only what the program writes is looked at."""
        tensors = {f"input {i}": leaves[i] for i, name in enumerate(program.inputs) if name in program.written}
        names = [program.weights[slot.weight].name for slot in program.layout.state]
        tensors |= {f"buffer {name!r}": state[name] for name in names}
        versions = tuple((name, t, None if t.is_inference() else t._version) for name, t in tensors.items())
        random = [torch.get_rng_state()]
        if device.type == "cuda":
            random.append(torch.cuda.get_rng_state(device))
        return cls(versions, tuple(random), device)

    def changed(self) -> str | None:
        """What the call has written, or may have: it cannot be repeated."""
        for name, tensor, version in self.written:
            if version is None:
                return f"{name} may be written already (in inference mode writes are not counted)"
            if tensor._version != version:
                return f"{name} is written already"
        return None

    def rewind(self) -> None:
        """Sets the random state back."""
        torch.set_rng_state(self.random[0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(self.random[1], self.device)


@dataclass(frozen=True)
class Recovery:
    """Of one call: `name` of what is called, the budget in force, and the bytes of the inputs, which it covers."""

    name: str
    device: Device
    budget_bytes: int
    input_bytes: int

    def run(self, program: Executable, beginning: Beginning, run: Run, unload: Callable[[], None], shrink: Shrink) -> Any:
        """Runs a program, and where memory is refused once more what `shrink` gives.

        Raises:
            torch.OutOfMemoryError: memory is refused and the call cannot be repeated, or is refused again.
            InfeasibleBudget: no plan fits what is free.
        """
        try:
            return run(program)
        except torch.OutOfMemoryError as error:
            changed = beginning.changed()
            if changed is not None:
                error.add_note(f"vramplan: {self.name} is not run again, for {changed}; plan it with a smaller budget")
                raise
            refused = error.with_traceback(None)  # its frames hold what the call has made
        unload()
        free = self.device.free_bytes(self.input_bytes)
        budget = self.budget_bytes if free is None else min(self.budget_bytes, free)
        warnings.warn(
            f"the device refused memory in {self.name} ({str(refused).splitlines()[0]}); it runs once more, planned for the "
            f"{budget:,} B that are free now (its budget was {self.budget_bytes:,} B). Something else uses the device: plan "
            "with a smaller budget, or build(on_oom='raise') to have the error",
            RuntimeWarning,
            stacklevel=5,
        )
        beginning.rewind()
        try:
            smaller = shrink(budget)
        except InfeasibleBudget as error:
            error.add_note("vramplan: the device refused memory, and what is free now is not enough for any plan of this call")
            raise error from refused
        return run(smaller)
