"""The contenders: ours, and each switch of diffusers and accelerate, applied to the same work as their documentation says."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tests.benchmarks.bench import checkpoint
from tests.benchmarks.bench.cases import Case
from tests.benchmarks.bench.ours import ours
from tests.benchmarks.bench.setting import Ready, Setting
from tests.benchmarks.bench.work import Work

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Method:
    """One contender. `needs`: why it cannot run somewhere, asked with case and kind of device; "" where it can.

    `host_factor`: about how many times the weights it holds of the host's memory, page-locked copies included.
    """

    name: str
    label: str
    prepare: Callable[[Work, Setting], Ready]
    needs: Callable[[Case, str], str] = lambda case, kind: ""
    budgeted: bool = False
    host_factor: float = 1.1

    def label_at(self, budget: str | None) -> str:
        return self.label.format(budget=budget)

    def refusal(self, case: Case, kind: str) -> str:
        """Why it does not run here; "" where it does."""
        skipped = next((why for beginning, why in case.skips.items() if self.name.startswith(beginning)), "")
        return skipped or self.needs(case, kind)


def load(work: Work) -> None:
    """Weights into RAM, where they are still in files."""
    if work.folder is not None:
        checkpoint.load(work.target, work.folder)


def unplanned(work: Work, setting: Setting) -> Ready:
    load(work)
    work.target.to(setting.device)
    return Ready()


def sequential(work: Work, setting: Setting) -> Ready:
    """Of a pipeline."""
    work.target.enable_sequential_cpu_offload(device=setting.device)
    return Ready()


def model_offload(work: Work, setting: Setting) -> Ready:
    """Of a pipeline: components come when they are called, and the last one leaves at the end of the pipeline's call."""
    work.target.enable_model_cpu_offload(device=setting.device)
    return Ready()


def group(work: Work, setting: Setting, *, kind: str, disk: bool = False, **options: bool) -> Ready:
    """diffusers' group offload of every component; those on disk have folders of their own, since files are named by group."""
    from diffusers.hooks import apply_group_offloading

    load(work)
    files = []
    for name, module in work.modules().items():
        folder = setting.scratch / name
        if disk:
            folder.mkdir()
        apply_group_offloading(
            module,
            onload_device=setting.device,
            offload_device=torch.device("cpu"),
            offload_type=kind,
            num_blocks_per_group=1 if kind == "block_level" else None,
            offload_to_disk_path=str(folder) if disk else None,
            **options,
        )
        files += sorted(folder.glob("*.safetensors")) if disk else []
    return Ready(files=files)


def casting(work: Work, setting: Setting) -> Ready:
    """Layerwise casting of the model, of a pipeline's denoiser, to e4m3; everything on the device."""
    from diffusers.hooks import apply_layerwise_casting
    from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN

    load(work)
    parts = work.modules()
    model: Any = parts.get("unet") or parts.get("transformer") or next(iter(parts.values()))
    compute = next(p.dtype for p in model.parameters() if p.is_floating_point())
    if hasattr(model, "enable_layerwise_casting"):
        model.enable_layerwise_casting(storage_dtype=FP8, compute_dtype=compute)
    else:  # what that method does for a model of another library
        kept = tuple(re.escape(name) for name in getattr(model, "_keep_in_fp32_modules", None) or ())
        apply_layerwise_casting(
            model, storage_dtype=FP8, compute_dtype=compute, skip_modules_pattern=(*DEFAULT_SKIP_MODULES_PATTERN, *kept)
        )
    work.target.to(setting.device)
    return Ready()


def slicing(work: Work, setting: Setting) -> Ready:
    ready = unplanned(work, setting)
    _decoder(work).enable_slicing()
    return ready


def tiling(work: Work, setting: Setting) -> Ready:
    """With tiles of half the picture's side: the default, the size it was trained at, would leave these pictures whole."""
    ready, vae = unplanned(work, setting), _decoder(work)
    latents = work.kwargs["latents" if work.whole else "z"]
    side = latents.shape[-1] // 2
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    vae.enable_tiling()
    vae.tile_latent_min_size, vae.tile_sample_min_size = side, side * scale
    return ready


def _decoder(work: Work) -> Any:
    return work.target.vae if work.whole else work.target


def cpu_offload(work: Work, setting: Setting) -> Ready:
    """accelerate's, with the arguments with which diffusers' sequential offload calls it."""
    from accelerate import cpu_offload as offload

    load(work)
    offload(work.target, setting.device, offload_buffers=len(work.target._parameters) > 0)
    return Ready()


def disk_offload(work: Work, setting: Setting) -> Ready:
    """accelerate's; from a checkpoint's own files where there is one."""
    from accelerate import disk_offload as offload
    from accelerate.utils import save_offload_index

    if work.folder is not None:
        save_offload_index(checkpoint.offload_index(work.folder), str(setting.scratch))
    offload(work.target, str(setting.scratch), execution_device=setting.device)
    files = [*setting.scratch.rglob("*.dat"), *([] if work.folder is None else checkpoint.shards(work.folder))]
    return Ready(files=files)


def device_map(work: Work, setting: Setting) -> Ready:
    """`max_memory` of the budget less what unplanned took besides its weights; the rest on the host, on `cpu` on disk."""
    from accelerate import dispatch_model, infer_auto_device_map, load_checkpoint_and_dispatch

    own = setting.budget_bytes - setting.room_bytes
    if own <= 0:
        raise MemoryError(
            f"unplanned takes {setting.room_bytes} B besides its weights: nothing of {setting.budget} is left for them"
        )
    on_cuda = setting.kind == "cuda"
    rest: dict[Any, Any] = {0: own, "cpu": "1TB"} if on_cuda else {"cpu": own}
    whole = list(getattr(work.target, "_no_split_modules", None) or ())
    placed = infer_auto_device_map(work.target, max_memory=rest, no_split_module_classes=whole)
    if work.folder is not None:
        load_checkpoint_and_dispatch(
            work.target, str(work.folder), device_map=placed, offload_folder=str(setting.scratch), dtype=torch.bfloat16
        )
    else:
        dispatch_model(work.target, placed, offload_dir=str(setting.scratch))
    files = [*setting.scratch.rglob("*.dat"), *([] if work.folder is None else checkpoint.shards(work.folder))]
    return Ready(files=files, said={"budget_bytes": setting.budget_bytes})


def _accelerated(case: Case, kind: str) -> str:
    return "needs an accelerator" if kind != "cuda" else ""


def _pipelines(case: Case, kind: str) -> str:
    return _accelerated(case, kind) if case.pipeline else "of pipelines"


def _models(case: Case, kind: str) -> str:
    return "of one model" if case.pipeline else ""


def _moving(case: Case, kind: str) -> str:
    """Moving weights between RAM and RAM."""
    return "its weights stay in RAM, which is what is to be saved here" if kind == "cpu" else ""


def _models_moving(case: Case, kind: str) -> str:
    return _models(case, kind) or _moving(case, kind)


def _decoders(case: Case, kind: str) -> str:
    return "" if case.decoder else "of autoencoders"


def _batches(case: Case, kind: str) -> str:
    return _decoders(case, kind) or ("" if case.batch > 1 else "there is one picture, and nothing to slice")


def _groups() -> list[Method]:
    """Levels by streams, and what goes with them."""
    made = []
    for level, word in (("block", "blocks"), ("leaf", "leaves")):
        variants: Sequence[tuple[str, str, dict[str, Any], Callable[[Case, str], str]]] = (
            ("", "", {}, _moving),
            ("-stream", ", stream", {"use_stream": True}, _accelerated),
            ("-stream-record", ", stream, record_stream", {"use_stream": True, "record_stream": True}, _accelerated),
            ("-stream-lowmem", ", stream, low_cpu_mem_usage", {"use_stream": True, "low_cpu_mem_usage": True}, _accelerated),
            ("-disk", ", on disk", {"disk": True}, lambda case, kind: ""),
        )
        for suffix, words, options, needs in variants:
            prepare = functools.partial(group, kind=f"{level}_level", **options)
            pinned = "stream" in suffix and "lowmem" not in suffix  # and rounded up to powers of two
            label = f"diffusers group offload, {word}{words}"
            factor = 2.8 if pinned else 0.4 if suffix == "-disk" and level == "leaf" else 1.1
            made.append(Method(f"group-{level}{suffix}", label, prepare, needs, host_factor=factor))
    return made


METHODS = (
    Method("unplanned", "unplanned, everything resident", unplanned),
    Method("ours", "`plan(..., {budget!r})`", ours, budgeted=True, host_factor=1.2),
    Method(
        "casts", "`plan(..., {budget!r}, allow_cast='float8_e4m3fn')`", functools.partial(ours, casts="float8_e4m3fn"),
        budgeted=True, host_factor=1.2,
    ),
    Method("sequential", "diffusers sequential offload", sequential, _pipelines),
    Method("model-offload", "diffusers model offload", model_offload, _pipelines),
    *_groups(),
    Method("layerwise-casting", "diffusers layerwise casting, e4m3", casting),
    Method("vae-slicing", "diffusers VAE slicing", slicing, _batches),
    Method("vae-tiling", "diffusers VAE tiling, tiles of half the side", tiling, _decoders),
    Method("cpu-offload", "accelerate `cpu_offload` (sequential offload)", cpu_offload, _models_moving),
    Method("disk-offload", "accelerate `disk_offload`", disk_offload, _models, host_factor=0.3),
    Method("device-map", "accelerate `device_map`, `max_memory` for {budget}", device_map, _models, budgeted=True),
)  # fmt: skip


def methods(names: Sequence[str] | None = None) -> list[Method]:
    """The contenders of these names, or whose names begin so; all without any. Unplanned always is among them.

    Raises:
        SystemExit: no name begins so.
    """
    for name in names or ():
        if not any(method.name.startswith(name) for method in METHODS):
            raise SystemExit(f"no contender {name!r}; known are {', '.join(method.name for method in METHODS)}")
    return [m for m in METHODS if not names or m.name == "unplanned" or any(m.name.startswith(name) for name in names)]
