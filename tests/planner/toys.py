"""Modules of a few lines that the planner's and the runtime's tests share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from planner import Plan, plan

BUDGET = "1MB"


class Mlp(nn.Module):
    """Two linear layers and a norm, 8 features."""

    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, hidden)
        self.down = nn.Linear(hidden, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Counter(nn.Module):
    """Counts its calls in a buffer; has an attribute, a tensor attribute and a list that the forward reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.scale = 2.0
        self.shifts = [1.0, 2.0]
        self.sizes = (1, 2)
        self.constant = torch.full((8,), 3.0)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return self.layer(x) * self.scale + self.constant + self.shifts[0] + self.count


class Lookup(nn.Module):
    """Ids to logits over the same table, so the table has two visits."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.mlp = Mlp()
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mlp(self.table(ids)))


def x(rows: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))


def planned(module: nn.Module, *inputs: Any, budget: int | str = BUDGET, least: bool = False, **options: Any) -> Plan:
    """A plan on the accounting device; with `least`, for the least budget."""
    made = plan(module.eval(), budget, inputs=inputs, device="accounting", **options)
    return made.replan(made.minimum_bytes) if least else made


def snapshot(module: nn.Module) -> dict[str, Any]:
    """All that a failed plan must leave alone: identities and values."""
    state: dict[str, Any] = {"mode": [m.training for m in module.modules()]}
    for name, child in module.named_modules():
        for key, value in child.__dict__.items():
            if key not in ("_parameters", "_buffers", "_modules"):
                state[f"{name}:{key}"] = list(map(id, value)) if isinstance(value, list) else id(value)
        for key, tensor in (*child._parameters.items(), *child._buffers.items()):
            state[f"{name}.{key}"] = id(tensor)
    for key, value in module.state_dict().items():
        plain = value.is_meta or value.is_quantized or value.layout != torch.strided
        state[f"value {key}"] = None if plain else value.clone().numpy().tobytes()
    return state


@dataclass
class Box:
    """An input type that a plan file cannot write."""

    value: Tensor


torch.utils._pytree.register_dataclass(Box)


class Unboxes(nn.Module):
    """Takes a `Box`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, box: Box) -> Tensor:
        return self.layer(box.value)
