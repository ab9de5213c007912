"""Checkpoint folders as targets: the module from config.json, the call's inputs from the class's preset or its config."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from planner.cli.targets import Call, Target, check_method
from planner.presets import Preset, frontend, model_dtype
from planner.recipes import Recipe, meta_tensor, random_tensor
from runtime.errors import PlannerError

_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


def from_folder(folder: Path, sizes: Mapping[str, int | None], dtype: str | None, method: str | None) -> Target:
    """The model in a folder of transformers or diffusers.

    Raises:
        PlannerError: a whole pipeline (lists its components), no config, or a model whose inputs cannot be known.
    """
    config = _config(folder)
    library = "diffusers" if "_class_name" in config else "transformers"
    class_name = config["_class_name"] if library == "diffusers" else config["architectures"][0]
    chosen = model_dtype(dtype or _dtype(folder, config))
    frontend_ = frontend(library)
    module: nn.Module = frontend_.build(class_name, config, chosen)
    described = frontend_.config_of(module)
    recipe, known = _recipe(folder, library, class_name, module, described)
    check_method(str(folder), known, method)
    resolved = recipe.resolve(sizes, described, str(folder))

    def concrete() -> Call:
        return (), recipe.make(resolved, described, chosen, random_tensor)

    def load() -> nn.Module:
        loaded: nn.Module = frontend_.load(folder, class_name, chosen)
        return loaded

    return Target(
        str(folder), module, known, (), recipe.make(resolved, described, chosen, meta_tensor), concrete,
        load if any(folder.glob("*.safetensors")) else None,
    )  # fmt: skip


def _config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise PlannerError(f"{str(folder)!r} is a file; give the folder that holds config.json, or `vramplan show` a plan file")
    if (folder / "model_index.json").is_file():
        raise PlannerError(
            f"{str(folder)!r} is a whole pipeline, and a plan is for one model; plan its components:{_components(folder)}"
        )
    path = folder / "config.json"
    if not path.is_file():
        raise PlannerError(f"there is no config.json in {str(folder)!r}; give the folder of one model:{_components(folder)}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlannerError(f"{str(path)!r} cannot be read ({error}); download or copy it again") from error
    if isinstance(config, dict) and (config.get("_class_name") or config.get("architectures")):
        return config
    raise PlannerError(
        f"{str(path)!r} names no class: neither _class_name (diffusers) nor architectures (transformers) is in it; "
        "write a factory: vramplan plan module:factory"
    )


def _components(folder: Path) -> str:
    """One line per subfolder that is a model, each the call that plans it."""
    models = sorted(path.parent for path in folder.glob("*/config.json"))
    lines = "".join(f"\n  vramplan plan {path} --budget 6GB" for path in models)
    return lines or " (none of its subfolders has a config.json)"


def _recipe(folder: Path, library: str, class_name: str, module: nn.Module, config: Mapping[str, Any]) -> tuple[Recipe, str]:
    """The inputs and the method: those of a preset of the same class that fits, else what the config says."""
    for name in Preset.names():
        preset = Preset.load(name)
        if (preset.library, preset.class_name) == (library, class_name) and preset.recipe.fits(config):
            return preset.recipe, preset.method
    recipe: Recipe | None = frontend(library).recipe(module) if library == "transformers" else None
    if recipe is None:
        raise PlannerError(
            f"the inputs of {class_name} in {str(folder)!r} are not known here; write a function that returns "
            "(module, args, kwargs) and give it as module:factory: vramplan plan my_models:make --budget 6GB"
        )
    return recipe, "forward"


def _dtype(folder: Path, config: Mapping[str, Any]) -> str:
    """As the config says, else what most of the weights in the folder are (some models keep a few in float32)."""
    said = config.get("dtype") or config.get("torch_dtype")
    if isinstance(said, str) and said.removeprefix("torch.") in _DTYPES.values():
        return said.removeprefix("torch.")
    elements: Counter[str] = Counter()
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as shard:
                for key in shard.keys():  # noqa: SIM118  no mapping: it cannot be iterated
                    view = shard.get_slice(key)  # of the header alone
                    elements[_DTYPES.get(view.get_dtype(), "")] += math.prod(view.get_shape())
        except (SafetensorError, OSError) as error:
            raise PlannerError(f"{path} is no readable safetensors file ({error}); download or copy it again") from error
    del elements[""]
    if elements:
        return elements.most_common(1)[0][0]
    raise PlannerError(f"{str(folder)!r} does not say its dtype, and holds no weights that would; add --dtype bfloat16")
