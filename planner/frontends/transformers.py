"""Modules of transformers: from a config without weights, and from a checkpoint folder with them."""

from __future__ import annotations

import copy
import difflib
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn

from planner.checkpoint_names import Naming
from planner.frontends.empty import keep_in_float32, without_weights
from planner.recipes import Recipe, Size, meta_tensor
from runtime.errors import PlannerError

_SIDE = 224  # of images, where a config has no size


def build(class_name: str, config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """The module that the config describes: parameters on the meta device, in eval mode, its float32 parts in float32.

    Raises:
        PlannerError: no such model class, or a config that it does not take.
    """
    kind = _model_class(class_name)
    try:
        described = kind.config_class.from_dict(dict(config))
        described.dtype = dtype
        with without_weights(dtype):
            module = kind(described)
    except (TypeError, ValueError) as error:
        raise PlannerError(f"transformers.{class_name} does not take this config: {error}") from error
    module.tie_weights()
    kept = set(module._keep_in_fp32_modules_strict or ()) if dtype.itemsize < 4 else set()
    if dtype == torch.float16:  # the others have the range that these parts need
        kept |= set(module._keep_in_fp32_modules or ())
    if kept:
        pattern = re.compile("|".join(name.replace("*", ".*") for name in sorted(kept)))
        keep_in_float32(module, lambda name: pattern.search(name) is not None)
    return module.eval()


def load(folder: Path, class_name: str, dtype: torch.dtype) -> nn.Module:
    """The module of a checkpoint folder with its weights, on the CPU in eval mode. Nothing is downloaded."""
    try:
        return _model_class(class_name).from_pretrained(str(folder), dtype=dtype, local_files_only=True).eval()
    except (OSError, ValueError) as error:
        raise PlannerError(f"transformers cannot load {str(folder)!r}: {error}") from error


def config_of(module: nn.Module) -> dict[str, Any]:
    """The config with all defaults put in."""
    config: Any = module.config
    return config.to_dict()


def rebuild(module: nn.Module) -> nn.Module:
    """Another instance of the module's class with its config, as `build` makes it."""
    return build(type(module).__name__, config_of(module), next(p.dtype for p in module.parameters()))


def naming(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Naming:
    """What the tensors of a checkpoint are to the model."""
    from planner.frontends.transformers_names import naming as find  # needs version 5

    return find(module, tensors)


def untied(module: nn.Module, name: str) -> None:
    """Tells the model that one of its weights is tied no more: a checkpoint has other values under each of the names."""
    model: Any = module
    model.all_tied_weights_keys.pop(name, None)


def read_extras(module: nn.Module, folder: Path) -> None:
    """What beside config and weights `from_pretrained` gives a model: its name, and how it generates."""
    model: Any = module
    model.config._name_or_path = model.name_or_path = str(folder)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(str(folder), local_files_only=True)


def save_config(module: nn.Module, folder: Path) -> None:
    """Writes config.json with the names of class and dtype, and how the model generates where it does."""
    model: Any = module
    config = copy.deepcopy(model.config)
    config.architectures = [type(module).__name__]
    config.dtype = model.dtype
    config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def recipe(module: nn.Module) -> Recipe | None:
    """Inputs for a model of one modality, from its config and `main_input_name`; None where they cannot be known.

    Text: `input_ids` [batch, tokens]; images: `pixel_values` [batch, channels, height, width], 224 x 224 where the config
    says nothing; audio: `input_features` [batch, mel bins, frames] (or the other way round), `input_values` [batch, samples by
    tokens], [batch, channels, samples] or spectrograms.
    """
    names = config_of(module)
    if "text_config" in names and "vision_config" in names:
        return None  # several modalities: what a call has is the caller's choice
    found = _main(module, names)
    return None if found is None else _with_decoder(module, names, *found)


def _with_decoder(module: nn.Module, names: Mapping[str, Any], sizes: dict[str, Size], inputs: dict[str, Any]) -> Recipe:
    takes = inspect.signature(module.forward).parameters
    if "decoder_input_ids" in takes and names.get("is_encoder_decoder"):
        inputs["decoder_input_ids"] = _tokens()
        sizes.setdefault("tokens", Size("tokens", 64, most=names.get("max_target_positions")))
    if "use_cache" in takes:
        inputs["use_cache"] = {"value": False}
    return Recipe({"batch": Size("batch", 1), **sizes}, inputs)


_Found = tuple[dict[str, Size], dict[str, Any]]


def _main(module: nn.Module, names: Mapping[str, Any]) -> _Found | None:
    """Sizes and inputs for the main input."""
    main = str(getattr(module, "main_input_name", ""))
    if main == "input_ids" and "vocab_size" in names:
        most = names.get("max_position_embeddings") or names.get("n_positions")
        return {"tokens": Size("tokens", min(512, most or 512), most=most)}, {"input_ids": _tokens()}
    if main == "pixel_values" and "num_channels" in names:
        side = names.get("image_size") or _SIDE
        height, width = side if isinstance(side, (list, tuple)) else (side, side)
        step = names.get("patch_size") if isinstance(names.get("patch_size"), int) else 1
        sizes = {"height": Size("height", height, step=step or 1), "width": Size("width", width, step=step or 1)}
        return sizes, {"pixel_values": {"shape": ["batch", "num_channels", "height", "width"]}}
    if main == "input_features" and {"num_mel_bins", "max_source_positions"} <= names.keys():
        frames = 2 * names["max_source_positions"]  # the stem halves them
        return {}, {"input_features": {"shape": ["batch", "num_mel_bins", frames]}}
    if main == "input_features" and {"input_feat_per_channel", "max_source_positions"} <= names.keys():
        frames = min(1000, names["max_source_positions"])
        return {}, {"input_features": {"shape": ["batch", frames, "input_feat_per_channel"]}}
    return _waves(names) if main == "input_values" else None


def _waves(names: Mapping[str, Any]) -> _Found | None:
    if "num_mel_bins" in names and "max_length" in names:  # a spectrogram
        return {}, {"input_values": {"shape": ["batch", "max_length", "num_mel_bins"]}}
    if "audio_channels" in names and "sampling_rate" in names:  # one second
        return {}, {"input_values": {"shape": ["batch", "audio_channels", "sampling_rate"]}}
    if "conv_stride" in names and "num_mel_bins" not in names:
        return {"tokens": Size("tokens", 16_000)}, {"input_values": {"shape": ["batch", "tokens"]}}
    return None


def _pair(module: nn.Module) -> Recipe | None:
    """Of two encoders whose results are compared: text and an image. Where text has places for images, nothing is known."""
    names, model = config_of(module), cast(Any, module)
    text, vision = names.get("text_config"), names.get("vision_config")
    if not text or not vision or model.can_generate():
        return None
    most, side = text.get("max_position_embeddings"), vision.get("image_size")
    if not {"input_ids", "pixel_values"} <= set(inspect.signature(module.forward).parameters) or not most or not side:
        return None
    pixels = {"shape": ["batch", vision.get("num_channels", 3), side, side]}
    words = {"shape": ["batch", "tokens"], "dtype": "int64", "below": text["vocab_size"]}
    sizes = {"tokens": Size("tokens", min(512, most), most=most)}
    return _with_decoder(module, names, sizes, {"input_ids": words, "pixel_values": pixels})


def example(module: nn.Module, method: str) -> dict[str, Any]:
    """Keyword arguments for a call of a model without inputs: from its config, else its `dummy_inputs`.

    Raises:
        PlannerError: they are not known for the model or the method.
    """
    model: Any = module
    kind = type(module).__name__
    if method != "forward":
        raise PlannerError(
            f"the inputs of {kind}.forward are known, not those of {method}; give them: "
            f"plan(model, budget='6GB', method={method!r}, kwargs={{...}})"
        )
    found = recipe(module) or _pair(module)
    if found is not None:
        config = config_of(module)
        return found.make(found.resolve({}, config, kind), config, model.dtype, meta_tensor)
    dummy = {} if "vision_config" in config_of(module) else dict(model.dummy_inputs)
    if model.main_input_name in dummy and model.main_input_name in inspect.signature(module.forward).parameters:
        return dummy
    raise PlannerError(
        f"what a call of {kind} has is not known from its config; give it: "
        f"plan(model, budget='6GB', kwargs={{{model.main_input_name!r}: ...}})"
    )


def _tokens() -> dict[str, Any]:
    return {"shape": ["batch", "tokens"], "dtype": "int64", "below": "vocab_size"}


def _model_class(name: str) -> Any:
    kind = getattr(transformers, name, None)
    if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
        return kind
    known = [n for n in dir(transformers) if n.endswith("Model") or "For" in n]
    close = difflib.get_close_matches(name, known, n=2)
    hint = (
        f"did you mean {' or '.join(close)}?" if close else f"it may need a newer transformers than {transformers.__version__}"
    )
    raise PlannerError(f"transformers has no model class {name!r}; {hint}")
