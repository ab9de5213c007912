"""A model of 2.5 GB within 0.8 GB of RAM, against accelerate's disk offload: seconds a call, resident memory, equal outputs.

    python -m tests.benchmarks.disk [folder] [--calls 4] [--json results/disk-cpu.json]

The checkpoint (a T5 v1.1 XL encoder in bfloat16, random weights) is written shard by shard. Each contender runs in a process
of its own, with the threads and the malloc that users have. Memory is the process's peak of resident memory since loading
(`VmHWM`, reset through `/proc/self/clear_refs`); that includes Python, PyTorch and transformers. "cold" is a call after the
kernel was asked to forget the files (`POSIX_FADV_DONTNEED`), "warm" the median of those that follow; CPU time is what all
threads of the process worked in a warm call, which others on the machine do not change.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import T5Config, T5EncoderModel
from transformers.utils import logging

logging.disable_progress_bar()

BUDGET = "0.8GB"
BUDGET_BYTES = 800_000_000
SLACK_BYTES = 500_000_000
TOKENS = 128
CONTENDERS = ("whole", "ours", "accelerate")


def empty_model() -> T5EncoderModel:
    """The T5 v1.1 XL encoder on the meta device, in bfloat16."""
    config = T5Config(
        vocab_size=32128, d_model=2048, d_kv=64, d_ff=5120, num_layers=24, num_heads=32, feed_forward_proj="gated-gelu"
    )
    with torch.device("meta"):
        return T5EncoderModel(config).to(torch.bfloat16).eval()


def write_checkpoint(folder: Path) -> None:
    """One shard a block, and an index, as transformers writes them; never more than a shard in memory."""
    if (folder / "model.safetensors.index.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    shards: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in empty_model().named_parameters():
        shards.setdefault(".".join(name.split(".")[:3]) if ".block." in name else "rest", []).append((name, parameter))
    generator, files = torch.Generator().manual_seed(0), {}
    for number, members in enumerate(shards.values()):
        file = f"model-{number:05}.safetensors"
        save_file({name: _random(name, p, generator) for name, p in members}, folder / file, {"format": "pt"})
        files.update({name: file for name, _ in members})
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _random(name: str, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(like.shape, generator=generator)
    if like.ndim == 1:
        return (1 + 0.1 * noise).to(like.dtype)
    scale = 1.0 if "shared" in name or "bias" in name else like.shape[-1] ** -0.5
    return noise.mul_(scale).to(like.dtype)


def tokens() -> torch.Tensor:
    return torch.randint(32128, (1, TOKENS), generator=torch.Generator().manual_seed(1))


def whole(folder: Path) -> tuple[nn.Module, list[Path], dict[str, Any]]:
    """Everything in RAM, as `from_pretrained` leaves it."""
    model = empty_model()
    state: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= load_file(path)
    model.load_state_dict(state, assign=True, strict=False)
    model.tie_weights()
    return model, [], {}


def ours(folder: Path) -> tuple[nn.Module, list[Path], dict[str, Any]]:
    """A plan within the budget; planning is part of it."""
    from planner import plan

    started = time.perf_counter()
    p = plan(empty_model(), BUDGET, kwargs={"input_ids": tokens()}, device="cpu")
    planned = time.perf_counter()
    m = p.build(weights=folder)
    built = time.perf_counter()
    assert m._runner.store is not None
    said = {
        "plan_seconds": planned - started, "build_seconds": built - planned, "predicted_peak_bytes": p.peak_bytes,
        "predicted_step_seconds": p.step_seconds, "streamed_bytes": p.layout.streamed_bytes, "plan": str(p),
    }  # fmt: skip
    scratch = Path(os.environ.get("VRAMPLAN_SCRATCH", tempfile.gettempdir()))
    return m, [*scratch.glob(f"vramplan-weights-*-{os.getpid()}-*/*.safetensors"), *folder.glob("*.safetensors")], said


def accelerate(folder: Path) -> tuple[nn.Module, list[Path], dict[str, Any]]:
    """`disk_offload` with the index that `load_checkpoint_and_dispatch` writes for safetensors: read from the shards."""
    from accelerate import disk_offload

    model = empty_model()
    files: dict[str, str] = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    index = {
        name: {"safetensors_file": str(folder / file), "weight_name": name, "dtype": "bfloat16"} for name, file in files.items()
    }
    index["encoder.embed_tokens.weight"] = index["shared.weight"]
    with tempfile.TemporaryDirectory() as offload:
        Path(offload, "index.json").write_text(json.dumps(index))
        model = disk_offload(model, offload, execution_device=torch.device("cpu"))
    return model, list(folder.glob("*.safetensors")), {}


def contend(name: str, folder: Path, calls: int) -> dict[str, Any]:
    """What one process measures."""
    load: Callable[[Path], tuple[nn.Module, list[Path], dict[str, Any]]] = globals()[name]
    imported = _status("VmRSS")
    started = time.perf_counter()
    model, files, result = load(folder)
    result |= {"load_seconds": time.perf_counter() - started, "load_peak_bytes": _status("VmHWM")}
    gc.collect()
    _forget(files)
    Path("/proc/self/clear_refs").write_text("5")
    loaded = _status("VmRSS")
    seconds, worked = [], []
    with torch.no_grad():
        for _ in range(calls + 1):
            started, busy = time.perf_counter(), time.process_time()
            output = model(input_ids=tokens()).last_hidden_state
            seconds.append(time.perf_counter() - started)
            worked.append(time.process_time() - busy)
    result |= {
        "imported_rss_bytes": imported, "loaded_rss_bytes": loaded, "peak_rss_bytes": _status("VmHWM"),
        "anonymous_rss_bytes": _status("RssAnon"), "cold_seconds": seconds[0], "warm_seconds": statistics.median(seconds[1:]),
        "warm_cpu_seconds": statistics.median(worked[1:]),
    }  # fmt: skip
    if name == "ours":
        report: Any = model.report()  # type: ignore[operator]
        result |= {"measured_peak_bytes": report.peak_bytes, "link_fraction": report.link_fraction}
    torch.save(output, folder / f"output-{name}.pt")
    return result


def _status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field + ":")).split()[1])


def _forget(files: list[Path]) -> None:
    """Asks the kernel to drop its cache of these files."""
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(tempfile.gettempdir(), "vramplan-benchmark-t5-xl"))
    parser.add_argument("--calls", type=int, default=4)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--contender", choices=CONTENDERS)
    options = parser.parse_args()
    if options.contender:
        print(json.dumps(contend(options.contender, options.folder, options.calls)))
        return
    write_checkpoint(options.folder)
    size = sum(path.stat().st_size for path in options.folder.glob("*.safetensors"))
    results: dict[str, Any] = {}
    for name in CONTENDERS:
        command = [sys.executable, "-m", "tests.benchmarks.disk", str(options.folder), "--contender", name]
        done = subprocess.run([*command, "--calls", str(options.calls)], stdout=subprocess.PIPE, text=True, check=True)
        results[name] = json.loads(done.stdout.splitlines()[-1])
    expected = torch.load(options.folder / "output-whole.pt")
    for name in CONTENDERS:
        results[name]["equal"] = torch.equal(torch.load(options.folder / f"output-{name}.pt"), expected)
    _print(results, size)
    ours_ = results["ours"]
    assert ours_["equal"]
    assert ours_["measured_peak_bytes"] <= ours_["predicted_peak_bytes"] <= BUDGET_BYTES
    assert ours_["peak_rss_bytes"] <= BUDGET_BYTES + SLACK_BYTES, "resident memory passes the budget and what Python takes"
    if options.json:
        machine = {
            "cpu": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(), "torch": torch.__version__,
            "system": platform.platform(), "load": os.getloadavg(),
        }  # fmt: skip
        document = {"checkpoint_bytes": size, "budget_bytes": BUDGET_BYTES, "machine": machine, "results": results}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=2) + "\n")


def _print(results: dict[str, Any], size: int) -> None:
    print(f"T5 v1.1 XL encoder, {size / 1e9:.2f} GB in bfloat16, {TOKENS} tokens, budget {BUDGET}")
    print(f"{'':12}{'cold call':>12}{'warm call':>12}{'CPU time':>12}{'peak RSS':>12}{'over import':>14}{'equal':>8}")
    for name, r in results.items():
        times = "".join(f"{r[key]:10.2f} s" for key in ("cold_seconds", "warm_seconds", "warm_cpu_seconds"))
        extra = r["peak_rss_bytes"] - r["imported_rss_bytes"]
        print(f"{name:12}{times}{r['peak_rss_bytes'] / 1e9:9.2f} GB{extra / 1e9:11.2f} GB{r['equal']!s:>8}")
    print(results["ours"]["plan"])


if __name__ == "__main__":
    main()
