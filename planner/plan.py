"""`Plan`: what was decided for one target and budget, proved, printable, and buildable."""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import sympy
import torch
from torch import nn

from planner.budget import Budget
from planner.cast_fit import fitted
from planner.checkpoint import open_saved
from planner.checkpoint_weights import Checkpoint
from planner.compare import Comparison, compare_policies
from planner.dynamic import DynamicShapes
from planner.dynamic_plan import describe_sizes, dynamic_signature, largest, peak_bytes_at, peak_bytes_expr
from planner.emit_package import emit_package
from planner.frontier import POINTS, Frontier, frontier_of
from planner.machine import Machine, machine_from_mapping
from planner.memory_use import MemoryUse, memory_use
from planner.options import Options, check_keep, check_repeats
from planner.pipeline import make_executable
from planner.plan_facts import PlanFacts
from planner.plan_file import check_fingerprint, fingerprint, load_call, read_plan, write_plan
from planner.plot import plot
from planner.prepare import prepare, tilings_of
from planner.progress import transferring
from planner.save_shards import save_sharded
from planner.show import describe, where
from planner.sizes import format_bytes
from planner.solve.decisions import Decisions
from planner.solve.reuse import reuses_of
from planner.solve.tilings import Tilings
from planner.timeline_files import save_memory_history, save_trace
from planner.validate import Validation, compare, refuse_without_weights, run_alike
from planner.weights import Lookup, open_weights
from runtime.devices import open_device
from runtime.errors import PlanFileError, PlannerError
from runtime.executable import Executable
from runtime.module import PlannedModule, planned
from runtime.recovery import OnOom
from runtime.report import Report
from runtime.runner import Runner
from runtime.signature import CallSignature, Signature, bind_call

# Of programs that were let go: from so many on it is worth a collection, since graphs are cycles.
_MANY_OPERATORS = 5_000


class Plan(PlanFacts):
    """The plan of one module's method for one budget. Made by `plan()`, `Plan.load` or `replan`; immutable but for `build`.

    Attributes:
        budget: what was declared; machine: what it was planned for; device: where `build` runs it.
        program: the canonical program; emitted: the one with streaming operators and layout that the checker proved.
        decisions: what was decided, as data. layout: where every byte lives.
    """

    def __init__(self, target: nn.Module, options: Options, tilings: Tilings, decisions: Decisions | None = None) -> None:
        super().__init__(target, options, tilings, decisions)
        self.validation: Validation | None = None
        self._runner: Runner | None = None
        self._lookup: Lookup | None = None  # into files; what is in memory is not kept alive here

    @cached_property
    def peak_bytes_expr(self) -> sympy.Expr | int:
        """`peak_bytes` of this plan's decisions as a sympy expression in the dims of `dynamic=`; the integer without any.

        Exact at every size of the range that the program serves, and beyond it as long as kernels choose as they do there. Its
        symbols are `p.symbols`, positive integers: `p.peak_bytes_expr.subs(p.symbols["batch"], 2)`. Where operators cannot be
        counted in symbols (all of `cuda`, some recurrent layers, kernels that choose otherwise for part of the range) it is, or
        contains, a function that replays the program once all dims are numbers.
        """
        return self.peak_bytes if self.problem.in_symbols is None else peak_bytes_expr(self)

    def peak_bytes_at(self, **sizes: int) -> int:
        """`peak_bytes` at given sizes of the dims, the largest where none is given, by replaying the program.

        Raises:
            PlannerError: the plan has fixed sizes, there is no such dim, or the program does not serve the sizes.
        """
        return peak_bytes_at(self, sizes)

    def largest(self, dim: str, /, **sizes: int) -> int:
        """The largest size of a dim for which a plan within the budget exists, others at `sizes` or their largest.

        The range given to `dynamic=` does not bound it; what the model takes for granted does (a table of positions, say). To
        have the plan, plan again with inputs of that size, without `dynamic=` where it has to be tiled: programs for many sizes
        are not.

        Raises:
            PlannerError: the plan has fixed sizes, there is no such dim, or not even the least size fits.
        """
        return largest(self, self._target, self._options, dim, sizes)

    @property
    def peak_at(self) -> str:
        """Where the peak is: operator and module."""
        return where(self)

    @cached_property
    def memory_use(self) -> MemoryUse:
        """Bytes on the device by kind, at every operator and stall of the timeline."""
        return memory_use(self.problem, self.emitted, self.timeline)

    @cached_property
    def executable(self) -> Executable:
        header: tuple[str, ...] = (
            f"{self.program.name}: budget {format_bytes(self.budget_bytes)}, predicted peak {format_bytes(self.peak_bytes)}"
            f" at {where(self)}",
            f"on {self.device}, planned for {self.machine.name}; passes: canonicalise, {self._passes}",
        )
        if self.symbols:
            header += (f"{describe_sizes(self)}; bytes are those of the largest sizes",)
        predicted = {
            "peak_bytes": float(self.peak_bytes),
            "reserved_bytes": float(self.reserved_bytes),
            "step_seconds": self.step_seconds,
        }
        pace = self.engines.pace(self.machine)
        return make_executable(self.emitted, self.proof, header, self.device, predicted, pace)

    @property
    def _passes(self) -> str:
        """Those that changed something, in their order."""
        tiling = self.decisions.tiling
        named: list[tuple[str, object]] = [("fuse_attention", tiling.attention), ("channels_last", tiling.channels_last)]
        if tiling.unrolled:
            named += [("functionalise", True), ("unroll_slices", True)]
        named.append(("cast_weights", tiling.casts))
        named += [("functionalise", not tiling.unrolled and (tiling.tiles or tiling.norms)), ("split_norms", tiling.norms)]
        named.append(("tile_regions", tiling.tiles))
        used = [name for name, used in named if used]
        return ", ".join([*used, *reuses_of(self.problem.program), "stream_weights", "insert_frees"])

    @property
    def code(self) -> str:
        """The emitted program as Python: what is printed is what runs."""
        return self.executable.source

    def __str__(self) -> str:
        return describe(self)

    def __repr__(self) -> str:
        return f"<Plan of {self.program.name}: {format_bytes(self.peak_bytes)} of {format_bytes(self.budget_bytes)}>"

    def __eq__(self, other: object) -> bool:
        """Equal plans decide the same for the same program, budget, machine and device."""
        if not isinstance(other, Plan):
            return NotImplemented
        mine = (self.decisions, self.budget, self.machine, self.device, self.code)
        return mine == (other.decisions, other.budget, other.machine, other.device, other.code)

    __hash__ = None  # type: ignore[assignment]

    # What can be done with it.

    def replan(
        self, budget: int | str | Mapping[str | int, int | str] | Budget, *, machine: str | Machine | None = None
    ) -> Plan:
        """The same captured call under another budget, and for another machine where one is named; the capture is reused.

        Raises:
            BudgetError, InfeasibleBudget, MachineError: as `plan()`.
        """
        options = dataclasses.replace(self._options, budget=Budget.parse(budget, self.device))
        if machine is None:
            return fitted(Plan(self._target, options, self._tilings))
        options = dataclasses.replace(options, machine=Machine.of(machine).on(self.device))
        return fitted(Plan(self._target, options, tilings_of(self.program, options, self._tilings.casting)))

    def compare(self) -> Comparison:
        """What the switches of today would do with this program on this machine model: simulated, not measured.

        Raises:
            PlannerError: the plan is one in parts; each of them can be compared.
        """
        return compare_policies(self)

    def frontier(self, budgets: Iterable[int | str] | None = None, points: int = POINTS, *, compare: bool = False) -> Frontier:
        """The step against the budget. Budgets are solved for, which is all that this takes; no other plan is emitted.

        Args:
            budgets: bytes or sizes such as "6GB"; by default `points`, from the least possible to everything resident, and
                the plan's own. Infeasible ones become rows that say so.
            compare: whether to simulate the policies of `compare()` too.

        Raises:
            PlannerError: fewer than two points, or a budget that is no size.
        """
        return frontier_of(self, budgets, points, compare=compare)

    def save(self, path: str | Path) -> None:
        """Writes decisions and fingerprint as JSON, atomically. No weights."""
        write_plan(
            path,
            name=self.program.name,
            fingerprint=fingerprint(self.program),
            decisions=self.decisions.to_json(),
            budget=self.budget,
            machine=self.machine,
            device=self.device,
            method=self._options.method,
            call=(self._options.args, self._options.kwargs),
            keep=self._options.keep,
            offload=self._options.offload,
            dynamic=None if self._options.dynamic is None else self._options.dynamic.to_json(),
            repeats=self._options.repeats,
            profile=self._options.profile,
            tile=self._options.tile,
            casts=self._options.casts,
            max_error=self._options.max_error,
            layout=self._options.layout,
            attention=self._options.attention,
            folder=self._options.folder,
        )

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: nn.Module | str | os.PathLike[str],
        *,
        inputs: tuple[Any, ...] | None = None,
        kwargs: dict[str, Any] | None = None,
    ) -> Plan:
        """A saved plan for this model, or for the model in a folder: captured again, decisions applied again, checked again.

        Raises:
            PlanFileError: truncated, of another version, or made for another model (names the differing node).
            CheckpointError: the folder's files are damaged, or are not the model's.
        """
        data = read_plan(path)
        model, folder = open_saved(model, data)
        try:
            args, named = (inputs or (), kwargs or {}) if inputs is not None or kwargs else load_call(data["call"])
            machine = machine_from_mapping(data["machine"], origin=str(path))
            budget, given = Budget(**data["budget"]), data["decisions"]
            decisions = None if given.keys() & {"parts", "phases"} else Decisions.from_json(given)
            saved = [str(entry) for entry in data["fingerprint"]]
            options = Options(
                budget, machine, data["device"], data["method"], args, named, check_keep(data["keep"]), bool(data["offload"]),
                {str(path): int(nbytes) for path, nbytes in data["opaque_bytes"].items()},
                DynamicShapes.from_json(data["dynamic"]) if "dynamic" in data else None,
                check_repeats(data["repeats"]),
                bool(data.get("profile", False)),
                bool(data["tile"]),
                tuple(data.get("casts", ())),
                data.get("max_error"),
                bool(data.get("layout", True)),
                bool(data.get("attention", True)),
                folder,
            )  # fmt: skip
            Budget.parse(options.budget, options.device)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise PlanFileError(f"{str(path)!r} is damaged ({error!r}); save it again with p.save(...)") from error
        try:
            if "phases" in given:
                from planner.generation import GenerationPlan

                return GenerationPlan.of_saved(model, options, saved, given)
            if decisions is None:
                from planner.parted import PartedPlan
                from planner.parted_problem import prepare_parts

                problem = prepare_parts(model, options, "the plan was made so")
                return PartedPlan.of_saved(model, options, problem, saved, given)
            tilings = prepare(model, options)
            check_fingerprint(saved, fingerprint(tilings.base.problem.program))
            return cls(model, options, tilings, decisions)
        except (ValueError, KeyError) as error:
            raise PlanFileError(f"the decisions in {str(path)!r} do not fit the program ({error}); plan it again") from error

    def save_trace(self, path: str | Path, *, measured: bool = False) -> None:
        """Writes the predicted timeline as a trace (JSON) for ui.perfetto.dev or chrome://tracing.

        Lanes: operators, the copy engine's bundles, waits with their cause; counters: live bytes by kind. With `measured` the
        last call of the built module is in the file too, as a process of its own (alone: `p.report().save_trace(path)`).

        Raises:
            PlannerError: nothing was measured, or the file cannot be written.
        """
        save_trace(self, path, measured)

    def save_memory_history(self, path: str | Path) -> None:
        """Writes the predicted allocations of one call as a pickle for pytorch.org/memory_viz (`torch.cuda._memory_viz`).

        Bundles, activations and workspaces come and go, each with operator and modules for a stack. On CUDA the measured one
        has this form too, and the visualiser shows both: call `torch.cuda.memory._record_memory_history()` before the module
        and `torch.cuda.memory._dump_snapshot(path)` after it.

        Raises:
            PlannerError: the file cannot be written.
        """
        save_memory_history(self, path)

    def plot(self, path: str | Path) -> None:
        """Draws memory over predicted time, the budget, and copies and waits beneath: a .png, .svg or .pdf file.

        Raises:
            PlannerError: another suffix, or the file cannot be written.
        """
        plot(self, path)

    def emit(self, folder: str | Path, weights: Any = None, *, max_shard_size: int | str = "5GB", copy: bool = True) -> None:
        """Writes a package that `runtime.load(folder)` runs, without the planner and without the model's library.

        In it are the program as Python, `plan.json` and, as safetensors, the weights that the program reads as it stores them.
        Nothing is pickled. State, which programs write, begins as it is now; of a built plan all known calls are served.

        Args:
            folder: a new one, an empty one, or a package, which is replaced when the new one is whole.
            weights: for a model on the meta device, as for `build`.
            max_shard_size: of a file with weights, which a larger weight has for itself.
            copy: False leaves weights in the checkpoint folder, given as `weights` or planned, where they lie there as
                the program reads them.

        Raises:
            PlannerError: the plan is one in parts, the module has hooks, or weights are missing.
            PackageError: there is something else in the folder, or it cannot be written; nothing half-written is left.
        """
        emit_package(self, folder, weights, max_shard_size, copy=copy)

    def build(
        self, weights: Any = None, *, concurrent: Literal["wait", "raise"] = "wait", on_oom: OnOom = "replan"
    ) -> PlannedModule:
        """The module that runs the plan. Its weights move, one at a time, into one host arena that the original then shares.

        Args:
            weights: for a model on the meta device: a module, a state dict or a folder of safetensors files; by default the
                folder that was planned, if it was one.
            concurrent: what a call does while another thread is inside: wait or raise.
            on_oom: what happens where the device refuses memory in a call because something else took it. "replan": the call
                runs once more, with a warning, by a plan for what is free then, if it has not written an input or a buffer yet;
                that budget stays in force. "raise": torch.OutOfMemoryError. Models in parts and generations always raise.

        Raises:
            PlannerError: no such device here, on_oom is neither, or weights are missing.
            CheckpointError: a file of the folder is damaged, or changed since it was planned; names file and tensor.
        """
        if self._runner is not None and not self._runner.closed:
            raise PlannerError("this plan is built already; close() the planned module, or p.restore(), before building again")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise PlannerError(
                f"this plan is for {self.device}, and there is no CUDA device here; build it where there is one, "
                "or plan with device='accounting'"
            )
        if on_oom not in ("replan", "raise"):
            raise PlannerError(f"on_oom={on_oom!r} is neither 'replan' nor 'raise'")
        if weights is None and self._options.folder is not None:
            weights = self._options.folder.require_weights()
        lookup = open_weights(weights, self._target) if weights is not None else None
        with torch.inference_mode(False):
            module = self._build(lookup, concurrent)
        self._lookup = lookup if isinstance(lookup, Checkpoint) else None
        module._runner.save = self.save_sharded
        module._runner.on_oom = on_oom
        return module

    def _build(self, lookup: Lookup | None, concurrent: Literal["wait", "raise"]) -> PlannedModule:
        in_ram = self.device == "cpu" or self.budget.host_bytes is not None  # where what is kept counts
        if in_ram and self._tilings.forget() > _MANY_OPERATORS:
            gc.collect()
        call = bind_call(getattr(self._target, self._options.method), self._options.args, self._options.kwargs)
        signature: Signature = CallSignature.of(*call)[0]
        if self.program.origin is not None:
            signature = dynamic_signature(self.program.origin, call)
        runner = Runner(
            self._target,
            self._options.method,
            open_device(self.device, self.budget.disk_bytes),
            self.budget_bytes,
            self.machine.link_peak_bandwidth,
            self._replan_call,
            concurrent,
        )
        with transferring(f"moving the weights of {type(self._target).__name__} into the host arena") as runner.moved:
            runner.attach(signature, self.executable, lookup)
        self._runner = runner
        return planned(self._target, runner)

    def _replan_call(self, args: tuple[Any, ...], kwargs: dict[str, Any], budget_bytes: int) -> Executable:
        store = None if self._runner is None else self._runner.store
        held = None if store is None or self._host is None else store.held
        budget = dataclasses.replace(self.budget, device_bytes=budget_bytes)
        options = dataclasses.replace(self._options, args=args, kwargs=kwargs, dynamic=None, budget=budget, held=held)
        return Plan(self._target, options, prepare(self._target, options)).executable

    @property
    def runner(self) -> Runner | None:
        """What runs the built module; None before `build()` and after `restore()`."""
        return None if self._runner is None or self._runner.closed else self._runner

    @property
    def lookup(self) -> Lookup | None:
        """The checkpoint that weights come from, if they do."""
        return self._lookup if self._lookup is not None or self._options.folder is None else self._options.folder.weights

    def save_sharded(self, folder: str | os.PathLike[str], max_shard_size: int | str = "5GB", *, stored: bool = False) -> None:
        """Writes the module's weights, as they are now, into a new folder, as a checkpoint that its library loads.

        Shard by shard: no more than one weight is in memory besides. config.json and an index are written too; where anything
        goes wrong, nothing is left.

        Args:
            max_shard_size: bytes, or a size such as "5GB"; a larger weight gets a file of its own.
            stored: write cast weights as they are stored, values and scales (`planner.save_shards` says how), which takes less
                room, and which `plan(folder, allow_cast=...)` reads as they are. Other libraries cannot.

        Raises:
            PlannerError: the folder has a checkpoint already, or a weight has no values.
            StoreError: the disk is full or refuses.
        """
        save_sharded(self, folder, max_shard_size, stored)

    def report(self) -> Report:
        """What the last call of the built module measured."""
        if self._runner is None:
            raise PlannerError("nothing was measured yet: m = p.build(), call m, then p.report()")
        return self._runner.report()

    def validate(self, inputs: tuple[Any, ...] | None = None, kwargs: dict[str, Any] | None = None) -> Validation:
        """Runs the module and the plan on the same inputs and compares; what comes out is printed with the plan from then on.

        The module runs whole, where its weights are. A plan that is not built is built for this and restored; the module's
        attributes, buffers and all random state are as before afterwards.

        Args:
            inputs, kwargs: real tensors of the planned shapes; by default the example inputs.

        Raises:
            PlannerError: the module has no weights (meta device), or the plan is built on another device than the module's.
        """
        call = (self._options.args, self._options.kwargs) if inputs is None and kwargs is None else (inputs or (), kwargs or {})
        built = self._runner is not None and not self._runner.closed
        if built and self.device.startswith("cuda"):
            raise PlannerError("this plan is built, and the module's weights are in its arenas: validate() before build()")
        refuse_without_weights(self._target)
        function = getattr(self._target, self._options.method)
        own, other = (run_alike(self._target, function, *call, seed=seed) for seed in (0, 1))
        module = None if built else self.build()
        runner = self._runner
        assert runner is not None
        try:
            mine = run_alike(self._target, lambda *args, **named: runner.call(args, named), *call)
        finally:
            if module is not None:
                module.close()
        draws = not compare(other, own, draws=False).equal
        self.validation = compare(mine, own, draws, self.cast_count)
        return self.validation

    def restore(self) -> nn.Module:
        """Closes the built module and gives the original back, its weights where they were."""
        if self._runner is not None:
            self._runner.close()
        return self._target
