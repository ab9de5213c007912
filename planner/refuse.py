"""What `plan` declines before it captures anything, each with the call that puts it right."""

from __future__ import annotations

import torch
from torch import nn

from runtime.errors import PlannerError


def refuse_unplannable(module: nn.Module, method: str) -> None:
    """Raises PlannerError for modules whose plan would be wrong: training, compiled, hooked or quantised ones."""
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
        if child.training:
            raise PlannerError(f"{label} is in training mode; plans are for inference: call plan(module.eval(), ...)")
        if hasattr(child, "_hf_hook"):
            raise PlannerError(
                f"{label} carries an accelerate hook (device_map or cpu_offload); remove it first: "
                "accelerate.hooks.remove_hook_from_module(module, recurse=True)"
            )
        if getattr(getattr(child, "_diffusers_hook", None), "hooks", None):
            raise PlannerError(
                f"{label} carries diffusers hooks (group offload or layerwise casting); load the model again without them, "
                "the plan takes their place"
            )
        for key, tensor in (*child._parameters.items(), *child._buffers.items()):
            if tensor is not None:
                _refuse_subclass(f"{name}.{key}".lstrip("."), tensor)


def _is_compiled(module: nn.Module) -> bool:
    return isinstance(module, torch._dynamo.eval_frame.OptimizedModule) or any(
        child._compiled_call_impl is not None for child in module.modules()
    )


def _refuse_subclass(name: str, tensor: torch.Tensor) -> None:
    plain = (torch.Tensor, nn.Parameter, nn.Buffer)
    if type(tensor) not in plain or type(tensor.data) is not torch.Tensor or tensor.is_quantized:
        raise PlannerError(
            f"{name} is a {type(tensor).__name__} (quantised or another tensor subclass), which has storage we cannot plan; "
            "load the model unquantised, in its own dtype"
        )
    if tensor.layout is not torch.strided:
        raise PlannerError(f"{name} has layout {tensor.layout}; only strided tensors can be planned: call .to_dense()")
