"""The checkpoint of the T5 encoder that is read from disk: written shard by shard, loaded, and forgotten by the kernel."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import T5Config, T5EncoderModel

XL: dict[str, Any] = {"vocab_size": 32128, "d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_heads": 32}
SMALL: dict[str, Any] = {"vocab_size": 512, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 4, "num_heads": 4}
INDEX = "model.safetensors.index.json"


def write(folder: Path, sizes: dict[str, Any]) -> None:
    """One shard a block, and an index, as transformers writes them; never more than a shard in memory. Kept if it is there."""
    if (folder / INDEX).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = T5Config(feed_forward_proj="gated-gelu", **sizes)
    config.architectures, config.dtype = ["T5EncoderModel"], torch.bfloat16
    config.save_pretrained(folder)
    shards: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in empty_model(folder).named_parameters():
        shards.setdefault(".".join(name.split(".")[:3]) if ".block." in name else "rest", []).append((name, parameter))
    generator, files = torch.Generator().manual_seed(0), dict[str, str]()
    for number, members in enumerate(shards.values()):
        file = f"model-{number:05}.safetensors"
        save_file({name: _random(name, p, generator) for name, p in members}, folder / file, {"format": "pt"})
        files.update({name: file for name, _ in members})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))


def empty_model(folder: Path) -> T5EncoderModel:
    """The folder's model on the meta device, in bfloat16."""
    with torch.device("meta"):
        return T5EncoderModel(T5Config.from_pretrained(folder)).to(torch.bfloat16).eval()


def load(model: nn.Module, folder: Path) -> None:
    """Everything into RAM of the process's own, not mapped from the files."""
    state: dict[str, torch.Tensor] = {}
    for path in shards(folder):
        state |= {name: tensor.clone() for name, tensor in load_file(path).items()}
    model.load_state_dict(state, assign=True, strict=False)
    model.tie_weights()  # type: ignore[operator]


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def offload_index(folder: Path) -> dict[str, dict[str, str]]:
    """The index that accelerate's `load_checkpoint_and_dispatch` makes for safetensors: weights are read from the shards."""
    files: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    index = {
        name: {"safetensors_file": str(folder / file), "weight_name": name, "dtype": "bfloat16"} for name, file in files.items()
    }
    index["encoder.embed_tokens.weight"] = index["shared.weight"]
    return index


def forget(paths: Iterable[Path]) -> None:
    """Asks the kernel to drop its cache of these files."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def _random(name: str, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(like.shape, generator=generator)
    if like.ndim == 1:
        return (1 + 0.1 * noise).to(like.dtype)
    scale = 1.0 if "shared" in name or "bias" in name else like.shape[-1] ** -0.5
    return noise.mul_(scale).to(like.dtype)
