"""Every error that vramplan raises on purpose; all of them derive from :class:`PlannerError`.

They live in the lowest layer so that `passes` and `runtime` can raise them; users import them from `planner`.
A message says what was asked, what is possible, where, and the corrected call.
"""

from __future__ import annotations


class PlannerError(Exception):
    """Base of every error this library raises on purpose."""


class BudgetError(PlannerError, ValueError):
    """A budget that cannot be read: unknown unit, not positive, no such device, several devices."""


class CaptureError(PlannerError):
    """The module cannot be captured as it is; names the operator or the module that stands in the way."""


class InvalidCall(CaptureError):
    """The call itself is wrong and would fail without a plan too, such as inputs in another dtype than the model's."""


class InputError(PlannerError, ValueError):
    """A planned module was called with inputs that its device cannot take."""


class RowError(PlannerError, IndexError):
    """An index is outside of a table that is looked up on the host; names the table, the index and how many rows there are."""


class InfeasibleBudget(PlannerError):
    """No plan fits the budget.

    Attributes:
        budget_bytes: what was asked.
        minimum_bytes: the least budget that is feasible.
        node: name of the operator that sets the minimum.
        memory: whose budget: "device", "cpu" for the host's memory beside a device, or "disk".
    """

    def __init__(self, message: str, *, budget_bytes: int, minimum_bytes: int, node: str, memory: str = "device") -> None:
        super().__init__(message)
        self.budget_bytes = budget_bytes
        self.minimum_bytes = minimum_bytes
        self.node = node
        self.memory = memory


class UnknownSize(PlannerError):
    """A size or operator that the analyses cannot know; never guessed."""


class CheckError(PlannerError):
    """The checker refuses an emitted program; the message cites the violated invariant (I1 to I7) and the node."""


class PlanFileError(PlannerError):
    """A saved plan that is damaged, of another version, or made for another model."""


class StoreError(PlannerError):
    """The files that hold the weights cannot be made, written or read; names the file or folder."""


class CheckpointError(StoreError):
    """A checkpoint is damaged, lacks a tensor, or changed on disk since the plan was made; names file and tensor.

    Attributes:
        path: the file, or the folder where no file can be named.
        tensor: a tensor that is concerned; empty where none can be named.
    """

    def __init__(self, message: str, *, path: str = "", tensor: str = "") -> None:
        super().__init__(message)
        self.path = path
        self.tensor = tensor


class ModuleUnusable(PlannerError):
    """A planned module was used after `close()`, trained, moved, or entered twice at once."""


class PackageError(PlannerError):
    """An emitted package that cannot be written, read or run as asked; names the file, and the tensor where it is about one."""
