"""Capture: a module and example inputs become a `Program`, without touching weights or the user's module.

The call is exported by `torch.export.export(strict=False)` without decompositions, on fake CPU tensors that stand in for
parameters, buffers and inputs wherever those really are (CPU, CUDA or meta), so that device constants in the graph are
uniformly the CPU and the executing device is put in at emission.
"""

from __future__ import annotations

import contextlib
import io
import logging
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from operator import is_
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export.graph_signature import InputKind
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_flatten, tree_flatten_with_path, tree_map

from passes.data_sizes import settle_data_sizes
from passes.inline_regions import InlineRegions
from passes.inline_vmap import InlineVmap
from passes.program import NOT_THEIRS, Program, Weight, WeightKind, place_of, storage_id
from passes.spec import TensorSpec
from planner.frontends.recorders import recording_hooks
from planner.isolate import fake_weights, random_draws, refuse_hooks
from planner.plain_state import PlainState, Unrepeatable, as_left
from planner.plan_file import fingerprint
from planner.refuse import refuse_unplannable
from runtime.errors import CaptureError, InvalidCall
from runtime.leftovers import Leftovers
from runtime.origins import equal_values
from runtime.signature import bind_call

_KINDS: dict[InputKind, WeightKind] = {
    InputKind.PARAMETER: "parameter",
    InputKind.BUFFER: "buffer",
    InputKind.CONSTANT_TENSOR: "constant",
}
_NOISY = ("torch.export", "torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor")
_PRODUCTS = {f"aten.{name}.default" for name in ("linear", "mm", "bmm", "addmm", "baddbmm", "matmul")} | {
    f"aten.{name}.default" for name in ("conv1d", "conv2d", "conv3d", "convolution")
}


@dataclass(eq=False)
class _Found:
    """What a call did besides computing."""

    leftovers: Leftovers | None = None


class _Call(nn.Module):
    """Gives `torch.export` any method of a module as a `forward`, past the root's own hooks (they stay Python).

    `torch.export` sees a buffer that is written, but loses one that a submodule assigns (`self.count = self.count + 1`); so
    what was assigned is written into the original buffer at the end.
    """

    def __init__(self, module: nn.Module, method: str, found: _Found) -> None:
        super().__init__()
        self.target = module
        self._method, self._found = method, found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        before = [(owner, name, buffer) for owner in self.target.modules() for name, buffer in owner._buffers.items()]
        held = PlainState(self.target)
        given, given_spec = tree_flatten((args, kwargs))
        result = getattr(self.target, self._method)(*args, **kwargs)
        try:
            self._found.leftovers = held.undo()  # so that another run of it begins as this one
        except Unrepeatable as effect:
            raise _effect_error(self.target, self._method, effect) from None
        left, left_spec = tree_flatten((args, kwargs))
        if left_spec != given_spec or not all(map(is_, left, given)):
            raise CaptureError(
                f"{type(self.target).__name__}.{self._method} changes a list or dict that it is given, which its program would "
                "not repeat; return the value instead"
            )
        for owner, name, buffer in before:
            now = owner._buffers.get(name)
            if now is buffer:
                continue
            if buffer is None or now is None or (now.shape, now.dtype) != (buffer.shape, buffer.dtype):
                raise CaptureError(
                    f"{type(owner).__name__} assigns its buffer {name!r} a value of another shape or dtype; a plan has one "
                    "memory layout: keep the buffer's shape, or return the value instead"
                )
            owner._buffers[name] = buffer.copy_(now)
        return result


class _PackedCall(_Call):
    """The same with the arguments as one tuple and one dict: `torch.export` loses dynamic shapes beside `**kwargs`."""

    def forward(self, args: Any, kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def capture(
    module: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    method: str = "forward",
    *,
    dynamic_shapes: Any = None,
) -> Program:
    """The program of `module.method(*args, **kwargs)` in inference.

    Inputs may be real, fake or meta: only shapes, strides, dtypes and Python values are read. `dynamic_shapes` is as in
    `torch.export.export`, for the tuple of positional arguments and the dict of others; sizes are then sympy expressions.

    A call that changes plain attributes is captured again from what it leaves: if that is the same program, which leaves the
    same, they are its leftovers, and nothing that it depends on.

    Raises:
        PlannerError: the module is in training mode, compiled, hooked by accelerate or quantised.
        CaptureError: `torch.export` cannot follow it; names the operator and the line.
    """
    refuse_unplannable(module, method)
    args, kwargs = bind_call(getattr(module, method), args, dict(kwargs or {}))
    program = _capture(module, args, kwargs, method, dynamic_shapes)
    leftovers = program.leftovers
    if leftovers is None:
        return program
    with as_left(module, leftovers):
        again = _capture(module, args, kwargs, method, dynamic_shapes)
    if again.leftovers is not None:
        key = next(iter(again.leftovers.before))
        raise _effect_error(module, method, Unrepeatable(*key), ", for every call leaves it otherwise")
    if not is_same(program, again):
        key = next(iter(leftovers.before))
        raise _effect_error(module, method, Unrepeatable(*key), ", for what it computes depends on what the last call left")
    return program


def _capture(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], method: str, dynamic_shapes: Any) -> Program:
    """The program from the attributes as they are; its leftovers are what has changed, whatever depends on it."""
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    fake_args, fake_kwargs = fake_inputs((args, kwargs), mode)
    refuse_hooks(module, method)
    found = _Found()
    with contextlib.ExitStack() as stack:
        for context in (recording_hooks(module), fake_weights(module, mode), torch.no_grad(), warnings.catch_warnings()):
            stack.enter_context(context)
        drawn = stack.enter_context(random_draws())
        warnings.simplefilter("ignore")
        try:
            with _quiet():
                if dynamic_shapes is None:
                    exported = torch.export.export(_Call(module, method, found), fake_args, fake_kwargs, strict=False)
                else:
                    exported = _export_symbolic(_PackedCall(module, method, found), (args, kwargs), dynamic_shapes)
        except CaptureError:
            raise
        except Exception as error:
            raise _explain(module, method, error) from error
    if drawn:
        raise CaptureError(
            f"{type(module).__name__}.{method} draws random numbers with {drawn[0]} while it is captured, and its program "
            "would always use those; draw them with torch, on the device of an input, or pass them as an input"
        )
    program = replace(_program(module, method, exported, (fake_args, fake_kwargs)), leftovers=found.leftovers)
    return program if dynamic_shapes is not None else settle_data_sizes(program)


def refuse_leftovers(program: Program) -> None:
    """Raises CaptureError for a program with leftovers: a part's would have to be there for the Python around it too."""
    if program.leftovers is not None:
        path, name = next(iter(program.leftovers.before))
        raise CaptureError(f"{program.name} changes the attribute {f'{path}.{name}'.lstrip('.')!r} while it runs")


def _effect_error(module: nn.Module, method: str, effect: Unrepeatable, why: str = "") -> CaptureError:
    return CaptureError(
        f"{type(module).__name__}.{method} changes the attribute {str(effect)!r} while it runs, which its program would "
        f"not repeat{why}; keep state in a buffer (self.register_buffer({effect.name!r}, ...)), or plan a submodule: "
        "plan(module.child, ...)"
    )


def is_same(one: Program, other: Program) -> bool:
    """Whether two programs of one module compute the same, operator by operator."""
    if fingerprint(one) != fingerprint(other) or one.weights != other.weights or one.inputs != other.inputs:
        return False
    if one.in_spec != other.in_spec or one.out_spec != other.out_spec:
        return False
    pairs = [(value, other.constants[name]) for name, value in one.constants.items()]
    return all(a is b or (not a.is_meta and not b.is_meta and equal_values(a, b)) for a, b in pairs)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the graphs and warnings that `torch.export` prints when it fails: the error says what matters."""
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _export_symbolic(call: _Call, inputs: tuple[Any, Any], dynamic_shapes: Any) -> Any:
    """Symbols are made by `torch.export` itself, from real inputs: their memory is never touched."""

    def empty(leaf: Any) -> Any:
        return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf

    return torch.export.export(call, tree_map(empty, inputs), dynamic_shapes=tuple(dynamic_shapes), strict=False)


def fake_inputs(tree: Any, mode: FakeTensorMode) -> Any:
    """The same pytree with fake CPU tensors; inputs that share memory share it in the fakes too."""
    bases: dict[int, torch.Tensor] = {}
    memo: dict[TensorSpec, torch.Tensor] = {}  # equal views of one storage are one input, as for the call signature

    def fake(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        key, nbytes = storage_id(leaf), int(leaf.untyped_storage().nbytes())
        spec = TensorSpec.of(leaf, key)
        if spec in memo:
            return memo[spec]
        with mode:
            if key not in bases:
                bases[key] = torch.empty(nbytes, dtype=torch.uint8)
            whole = bases[key][: nbytes - nbytes % leaf.dtype.itemsize].view(leaf.dtype)
            memo[spec] = whole.as_strided(leaf.shape, leaf.stride(), leaf.storage_offset())
        return memo[spec]

    return tree_map(fake, tree)


def _refuse_mixed_dtypes(program: Program) -> None:
    """Raises CaptureError where a product of matrices mixes dtypes: fakes take what kernels refuse."""
    for node in program.ops():
        if str(node.target) not in _PRODUCTS:
            continue
        operands = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
        dtypes = {n.name: n.meta["val"].dtype for n in operands}
        if len(set(dtypes.values())) > 1:
            found = ", ".join(f"{name} is {str(dtype).removeprefix('torch.')}" for name, dtype in dtypes.items())
            raise InvalidCall(
                f"{program.name} multiplies different dtypes in {node.name}{place_of(node)}: {found}. "
                "Give inputs in the model's dtype: inputs=(x.to(model.dtype),), or cast the model"
            )


def _explain(module: nn.Module, method: str, error: Exception) -> CaptureError:
    """Names the innermost line outside torch, which is where a person can do something."""
    trace = traceback.extract_tb(error.__traceback__)
    frames = [f for f in trace if not any(part in f.filename for part in NOT_THEIRS)]
    where = f" at {frames[-1].filename}:{frames[-1].lineno} (`{frames[-1].line}`)" if frames else ""
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return CaptureError(
        f"{type(module).__name__}.{method} cannot be captured{where}: {reason}. "
        "Plan a submodule or another method of it (method=...), or pass inputs for which that line does not depend on data."
    )


def _program(module: nn.Module, method: str, exported: Any, call: tuple[Any, Any]) -> Program:
    graph: fx.Graph = exported.graph
    leaves, in_spec = tree_flatten_with_path(call)
    paths = [_leaf_name(path) for path, _ in leaves]
    weights: dict[str, Weight] = {}
    constants: dict[str, torch.Tensor] = {}
    inputs: list[str] = []
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    ties = _ties(module)
    for node, spec in zip(placeholders, exported.graph_signature.input_specs, strict=True):
        if spec.kind == InputKind.USER_INPUT:
            _rename(graph, node, paths[len(inputs)])
            inputs.append(node.name)
            continue
        if spec.kind not in _KINDS:
            raise CaptureError(f"{type(module).__name__}.{method} takes a {spec.kind.name} input ({spec.target}), unsupported")
        if not node.users:
            graph.erase_node(node)
            continue
        name = spec.target.removeprefix("target.")
        _rename(graph, node, "w_" + _identifier(name))
        weight = Weight(
            name=name,
            node=node.name,
            kind=_KINDS[spec.kind],
            spec=TensorSpec.of(node.meta["val"]),
            aliases=tuple(n for n in ties.get(name, ()) if n != name),
            persistent=spec.persistent is not False,
        )
        weights[node.name] = weight
        if weight.kind == "constant":
            value = exported.constants[spec.target]
            constants[node.name] = _attribute(module, name) if isinstance(value, FakeTensor) else value.detach()
    program = Program(
        name=f"{type(module).__name__}.{method}",
        graph=graph,
        weights=weights,
        constants=constants,
        inputs=tuple(inputs),
        in_spec=in_spec,
        out_spec=exported.call_spec.out_spec,
    )
    program = InlineRegions().apply(program)  # while the graph module that holds the regions is at hand
    program = InlineVmap().apply(program)
    _refuse_mixed_dtypes(program)
    return program


def _ties(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """For every weight name, all names of the same tensor object."""
    groups: dict[int, list[str]] = {}
    for name, tensor in (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ):
        groups.setdefault(id(tensor), []).append(name)
    return {name: tuple(names) for names in groups.values() for name in names}


def _attribute(module: nn.Module, path: str) -> torch.Tensor:
    owner: Any = module
    for part in path.split("."):
        owner = owner[int(part)] if part.isdigit() and isinstance(owner, (list, tuple)) else getattr(owner, part)
    if not isinstance(owner, torch.Tensor):
        raise CaptureError(f"the constant {path!r} is a {type(owner).__name__}, not a tensor")
    return owner.detach()


def _leaf_name(path: tuple[Any, ...]) -> str:
    """`args[0]` -> `arg_0`; `kwargs["mask"]["a"]` -> `mask_a`."""
    keys = [str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", "")))) for k in path]
    return _identifier("_".join(["arg", *keys[1:]] if keys[0] == "0" else keys[1:]))


def _identifier(text: str) -> str:
    name = "".join(c if c.isalnum() and c.isascii() else "_" for c in text)
    return name if not name[:1].isdigit() else "_" + name


def _rename(graph: fx.Graph, node: fx.Node, name: str) -> None:
    node._rename(name)
    node.target = node.name
