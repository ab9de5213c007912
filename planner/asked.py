"""`Asked`: what a plan was asked for, whatever it is a plan of."""

from __future__ import annotations

from planner.budget import Budget
from planner.machine import Machine
from planner.options import Options


class Asked:
    """The options of a plan, and those of them that are read most."""

    _options: Options

    @property
    def options(self) -> Options:
        """All that was declared."""
        return self._options

    @property
    def budget(self) -> Budget:
        return self._options.budget

    @property
    def budget_bytes(self) -> int:
        """Of the device."""
        return self._options.budget.device_bytes

    @property
    def machine(self) -> Machine:
        return self._options.machine

    @property
    def device(self) -> str:
        return self._options.device
