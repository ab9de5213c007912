"""Running an emitted package: a module that stands in for the original, and a runner that cannot plan.

Neither the planner nor the library that the model came from is imported: the module has the original's weights by their names,
the planned method's signature, and no Python of its own.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from runtime.call_text import describe_call, describe_signature
from runtime.devices import Device, open_device
from runtime.errors import InputError, ModuleUnusable, PackageError, PlannerError
from runtime.executable import Executable, WeightView
from runtime.leftovers import ABSENT
from runtime.module import PlannedModule, planned
from runtime.origins import Lookup
from runtime.package_files import PackageFiles
from runtime.package_format import PLAN_FILE, PRELUDE, decode_program, decode_signature, decode_tensor, load_document
from runtime.runner import Runner
from runtime.signature import Signature


class Part(nn.Module):
    """Holds weights under the names that the original's submodules gave them."""


class Packaged(Part):
    """Base of the module that a package gives; `forward`, or the method that was planned, is added to it."""


class PackageRunner(Runner):
    """A runner of programs that are all known when it begins."""

    def __init__(
        self,
        module: nn.Module,
        data: Mapping[str, Any],
        device: Device,
        programs: list[tuple[Signature, Executable]],
        concurrent: Literal["wait", "raise"],
    ) -> None:
        budget, link = data["budget_bytes"], data["link_bandwidth"]
        super().__init__(module, data["method"], device, budget, link, self._refuse_new, concurrent)
        self._given, self._title = programs, data["programs"][0]["name"]

    def _attach(self, signature: Signature, program: Executable, lookup: Lookup | None) -> None:
        self._move_weights([program for _, program in self._given], lookup)
        self.executor = self._new_executor()
        for served, program in self._given:
            self.add(served, program)
        self.executor.load(self.programs[0][1])
        self.versions = self._versions()

    def _refuse_new(self, args: tuple[Any, ...], kwargs: dict[str, Any], budget_bytes: int) -> Executable:
        known = "; or ".join(describe_signature(signature, self.function) for signature, _ in self.programs)
        raise InputError(
            f"this package runs {self._title} for {known}, and was called with {describe_call(args, kwargs, self.function)}. A "
            "package cannot plan: where the model is, plan(model, budget, inputs=...) for such a call, with dynamic=... for a "
            "range of sizes, and p.emit(folder)"
        )

    def _refuse_closed(self) -> None:
        if self.closed:
            raise ModuleUnusable("this package is closed: its arenas are gone. Load it again: runtime.load(folder)")


def load_package(
    folder: str | Path, device: str | None, verify: bool, checkpoint: str | Path | None, concurrent: Literal["wait", "raise"]
) -> PlannedModule:
    """See `runtime.load`."""
    root = Path(folder).absolute()
    data = load_document(_read(root, PLAN_FILE, folder), str(root / PLAN_FILE))
    sources = [_source(root, program, folder) for program in data["programs"]]
    try:
        tensors = {name: decode_tensor(name, entry) for name, entry in data["tensors"].items()}
        programs = [
            (decode_signature(program["signature"]), decode_program(program, source, tensors))
            for program, source in zip(data["programs"], sources, strict=True)
        ]
        module = _stand_in(data, tensors, programs)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise PackageError(f"{root / PLAN_FILE} is damaged ({error!r}); emit the package again: p.emit(folder)") from error
    for source in sources:
        _check_operators(source, data["torch"])
    files = PackageFiles(root, tensors, data["tensors"], data["files"], None if checkpoint is None else Path(checkpoint))
    if verify:
        files.verify()
    chosen = open_device(_device(data["device"], device), data["disk_bytes"])
    runner = PackageRunner(module, data, chosen, programs, concurrent)
    with torch.inference_mode(False):
        runner.attach(*programs[0], files)
    return planned(module, runner)


def _read(root: Path, name: str, folder: str | Path) -> str:
    try:
        return (root / name).read_text(encoding="utf-8")
    except OSError as error:
        raise PackageError(
            f"cannot read {root / name}: {error.strerror}; runtime.load({str(folder)!r}) takes what p.emit(folder) wrote"
        ) from error
    except UnicodeDecodeError as error:
        raise PackageError(f"{root / name} is damaged ({error}); emit the package again: p.emit(folder)") from error


def _source(root: Path, program: Mapping[str, Any], folder: str | Path) -> str:
    """A program's source, which has to be the one that was emitted: what is proved of it holds for that."""
    text = _read(root, program["source"], folder)
    if hashlib.sha256(text.encode()).hexdigest() != program["sha256"]:
        raise PackageError(
            f"{root / program['source']} is not what was emitted, and only of that it was proved that it fits the budget; emit "
            "the package again: p.emit(folder)"
        )
    return text.removeprefix(PRELUDE)


def _check_operators(source: str, written_by: str) -> None:
    """Raises PackageError for an operator that this process does not have."""
    calls = (node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    for name in sorted({ast.unparse(call) for call in calls if isinstance(call, ast.Attribute)}):
        parts = name.removeprefix("torch.ops.").split(".")
        if not name.startswith(("torch.ops.", "aten.")):
            continue
        found: Any = torch.ops
        try:
            for part in parts:
                found = getattr(found, part)
        except AttributeError as error:
            raise PackageError(
                f"the program calls the operator {name}, which is not here: import the package that registers it before "
                f"runtime.load, or use the PyTorch that it was emitted with ({written_by}; this is {torch.__version__})"
            ) from error


def _device(own: str, asked: str | None) -> str:
    """Where to run: the device that was planned for, or another one of its kind."""
    if asked is not None and asked.partition(":")[0] != own.partition(":")[0]:
        raise PackageError(
            f"this package was planned for {own!r}, and what it takes on {asked!r} is not known; "
            f"plan with device={asked!r} and emit that"
        )
    chosen = asked or own
    kind, _, index = chosen.partition(":")
    if kind == "cuda" and not (torch.cuda.is_available() and (not index or int(index) < torch.cuda.device_count())):
        raise PlannerError(f"this package is for {chosen}, and there is no such device here; load it where there is one")
    return chosen


# The module.


def _stand_in(
    data: Mapping[str, Any], tensors: Mapping[str, WeightView], programs: list[tuple[Signature, Executable]]
) -> nn.Module:
    """A module with all tensors on the meta device, under all their names, and with the attributes that programs leave."""
    kind: Any = type(data["class"], (Packaged,), {data["method"]: _method(data)})
    module: nn.Module = kind()
    for name, view in tensors.items():
        tensor: torch.Tensor = torch.empty_strided(view.shape, view.stride, dtype=view.dtype, device="meta")
        role = data["tensors"][name]["kind"]
        if role == "parameter":
            tensor = nn.Parameter(tensor, requires_grad=False)
        for path in (name, *view.aliases):
            owner, _, key = path.rpartition(".")
            part = _part(module, owner)
            table: dict[str, Any] = part._parameters if role == "parameter" else part._buffers
            table[key] = tensor
            if role == "other":
                part._non_persistent_buffers_set.add(key)
    for _, program in programs:
        before = {} if program.leftovers is None else copy.deepcopy(dict(program.leftovers.before))
        for (path, key), value in before.items():
            table = _part(module, path).__dict__
            if value is not ABSENT:
                table[key] = value
    return module.eval()


def _part(module: nn.Module, path: str) -> nn.Module:
    """The submodule of that path, made where there is none."""
    for name in path.split(".") if path else ():
        known = module._modules.get(name)
        if known is None:
            known = module._modules[name] = Part()
        module = known
    return module


def _method(data: Mapping[str, Any]) -> Any:
    """What the planned method is called like; the planned module runs the program in its place."""
    name = data["method"]

    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        raise ModuleUnusable("a package's module runs as what runtime.load gave, and not by itself")

    kinds = {str(kind.name): kind for kind in inspect._ParameterKind}
    own = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)]
    for given in data["parameters"]:
        default = _Default(given["default"]) if "default" in given else inspect.Parameter.empty
        own.append(inspect.Parameter(given["name"], kinds[given["kind"]], default=default))
    method.__name__ = method.__qualname__ = name
    method.__doc__ = "Runs the emitted program."
    method.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
    method.sees_spelling = data["sees_spelling"]  # type: ignore[attr-defined]
    return method


class _Default:
    """A default of the original method, which is in the program already: only its text is known."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text
