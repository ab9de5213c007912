"""What `plan` declines before it captures anything, each with the call that puts it right."""

from __future__ import annotations

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd

from passes.program import Program
from passes.spec import TensorSpec
from runtime.errors import PlannerError


def refuse_unplannable(module: nn.Module, method: str) -> None:
    """Raises PlannerError for modules whose plan would be wrong: training, compiled, hooked or quantised ones.

    Adapters that were loaded into a module in eval mode are in training mode themselves: below the root only what computes
    something else then is refused.
    """
    kind = type(module).__name__
    if not isinstance(module, nn.Module):
        raise PlannerError(f"plan() takes an nn.Module here, got {kind}; call plan(module, budget=..., inputs=(...,))")
    if not callable(getattr(module, method, None)):
        raise PlannerError(f"{kind} has no method {method!r}; pass method= one of its own, such as method='forward'")
    if _is_compiled(module):
        raise PlannerError(
            f"{kind} is compiled; plan the module underneath: plan(module._orig_mod, ...) "
            "or the module before torch.compile / .compile()"
        )
    for name, child in module.named_modules():
        label = f"{name or 'the module'} ({type(child).__name__})"
        if child.training and (child is module or _trains(child)):
            raise PlannerError(f"{label} is in training mode; plans are for inference: call plan(module.eval(), ...)")
        if hasattr(child, "_hf_hook"):
            raise PlannerError(
                f"{label} carries an accelerate hook (device_map or cpu_offload); remove it first: "
                "accelerate.hooks.remove_hook_from_module(module, recurse=True)"
            )
        if getattr(getattr(child, "_diffusers_hook", None), "hooks", None):
            raise PlannerError(
                f"{label} carries diffusers hooks: of a cache, whose Python keeps tensors from call to call (disable_cache() "
                "takes it off), or of group offload or layerwise casting; load the model again without those, the plan takes "
                "their place"
            )
        for key, tensor in (*child._parameters.items(), *child._buffers.items()):
            if tensor is not None:
                _refuse_subclass(f"{name}.{key}".lstrip("."), tensor)
    if method in vars(module):
        raise PlannerError(
            f"{method} of this {kind} was replaced on the object, where it would run past the plan; "
            f"restore it (del module.{method}), or put the change into a subclass or a forward hook"
        )


def _trains(child: nn.Module) -> bool:
    """Whether one of torch's own modules computes something else in training mode; Python of others is captured as it runs."""
    if isinstance(child, (_DropoutNd, nn.RNNBase, nn.MultiheadAttention)):
        return bool(child.p if isinstance(child, _DropoutNd) else child.dropout)
    if isinstance(child, _NormBase):
        return isinstance(child, _BatchNorm) or child.track_running_stats
    return isinstance(child, nn.RReLU)


def refuse_shared_state(module: nn.Module, program: Program) -> None:
    """Raises PlannerError where the program writes a tensor that another one of the module shares memory with."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for weight in program.weights.values():
        own = tensors.get(weight.name)
        if not weight.state or own is None or _has_no_bytes(own):
            continue
        for name, other in tensors.items():
            if other is not own and not _has_no_bytes(other) and _overlap(own, other):
                raise PlannerError(
                    f"{weight.name}, which {program.name} writes, shares memory with {name}; a plan gives each its own memory. "
                    f"Give {name} a copy (.clone()), or register the same tensor under both names"
                )


def _has_no_bytes(tensor: torch.Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    (start, stop), (other, end) = _extent(a), _extent(b)
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() and start < end and other < stop


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First and last byte that the strides reach."""
    span = TensorSpec.of(tensor).span_bytes
    return tensor.data_ptr(), tensor.data_ptr() + span


def _is_compiled(module: nn.Module) -> bool:
    return isinstance(module, torch._dynamo.eval_frame.OptimizedModule) or any(
        child._compiled_call_impl is not None for child in module.modules()
    )


def _refuse_subclass(name: str, tensor: torch.Tensor) -> None:
    if isinstance(tensor, FakeTensor):
        return  # plans like one on the meta device
    plain = (torch.Tensor, nn.Parameter, nn.Buffer)
    if type(tensor) not in plain or type(tensor.data) is not torch.Tensor or tensor.is_quantized:
        raise PlannerError(
            f"{name} is a {type(tensor).__name__} (quantised or another tensor subclass), which has storage we cannot plan; "
            "load the model unquantised, in its own dtype"
        )
    if tensor.layout is not torch.strided:
        raise PlannerError(f"{name} has layout {tensor.layout}; only strided tensors can be planned: call .to_dense()")
