"""Which files of a folder hold a checkpoint's weights: index files, shards, single files and their variants."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

from runtime.checkpoint_file import CheckpointFile
from runtime.errors import CheckpointError, PlannerError
from runtime.weight_file import FileTensor

# model.safetensors, model-00001-of-00002.safetensors; with a variant model.fp16.safetensors and
# model.fp16-00001-of-00002.safetensors, or, as older versions wrote it, model-00001-of-00002.fp16.safetensors.
_FILE = re.compile(
    r"(?P<stem>[^.]+?)(?:\.(?P<variant>[^.]+?))?(?:-(?P<number>\d+)-of-(?P<count>\d+))?(?:\.(?P<old>[^.]+))?\.safetensors"
)
_INDEX = re.compile(r"(?P<stem>.+?)\.safetensors\.index(?:\.(?P<variant>[^.]+))?\.json")
# What the libraries call their files: diffusers looks for an index first, transformers for the single file.
DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"


class CheckpointFiles:
    """The tensors of a folder's files, by the names that they have there. Headers are read; no weight is.

    Attributes:
        where: the folder, or the file. tensors: of the dtypes that PyTorch has.
    """

    def __init__(self, where: Path, variant: str | None = None) -> None:
        """Raises PlannerError where there is no such folder, variant or weight; CheckpointError for damaged files."""
        self.where = where
        paths, expected = ([where], None) if where.is_file() else _chosen(where, variant)
        self._files = {path: CheckpointFile(path) for path in paths}
        self.tensors: dict[str, FileTensor] = {}
        self._strange: dict[str, tuple[Path, str]] = {}
        for path, file in self._files.items():
            self.tensors |= {name: at for name, at in file.tensors.items() if expected is None or expected.get(name) == path}
            self._strange |= {name: (path, dtype) for name, dtype in file.strange.items()}
        for name, path in (expected or {}).items():
            if name not in self.tensors and name not in self._strange:
                raise CheckpointError(
                    f"{path} has no tensor {name!r}, which the index of {where} says is there; download or copy it again",
                    path=str(path),
                    tensor=name,
                )

    @property
    def label(self) -> str:
        """The file, or the folder where there are several, for messages."""
        return str(next(iter(self._files))) if len(self._files) == 1 else str(self.where)

    @property
    def paths(self) -> list[Path]:
        return list(self._files)

    def file_of(self, name: str) -> Path | None:
        """The file that holds a tensor."""
        at = self.tensors.get(name)
        return at.where.file.path if at is not None else self._strange.get(name, (None, ""))[0]

    def strange(self, name: str) -> str | None:
        """The dtype of a tensor that PyTorch has no dtype for."""
        return self._strange[name][1] if name in self._strange else None

    def check(self) -> None:
        """Raises CheckpointError where a file is not as it was when it was opened: size, time of change, identity, header."""
        for file in self._files.values():
            file.check(thoroughly=True)


def _chosen(folder: Path, variant: str | None) -> tuple[list[Path], dict[str, Path] | None]:
    """The files of a folder's checkpoint; with an index, which of them each tensor is in."""
    if not folder.is_dir():
        raise PlannerError(f"weights={str(folder)!r} is no folder; pass a module, a state dict or a checkpoint folder")
    files: dict[tuple[str, str], list[Path]] = defaultdict(list)
    indexes: dict[tuple[str, str], Path] = {}
    for path in sorted(folder.iterdir()):
        if match := _FILE.fullmatch(path.name):
            files[match["stem"], match["variant"] or match["old"] or ""].append(path)
        elif match := _INDEX.fullmatch(path.name):
            indexes[match["stem"], match["variant"] or ""] = path
        elif path.suffix == ".safetensors":
            files[path.stem, ""].append(path)
    if not files and not indexes:
        raise _no_weights(folder)
    stem = next((s for s in (DIFFUSERS, TRANSFORMERS) if any(s == key[0] for key in (*files, *indexes))), None)
    stem = stem or next((key[0] for key in indexes), None)
    if stem is None:  # whatever there is
        if variant is not None:
            raise PlannerError(f"{folder} has no files of a variant; leave variant={variant!r} out")
        return [path for paths in files.values() for path in paths], None
    key = stem, _variant(folder, variant, {v for s, v in (*files, *indexes) if s == stem})
    single = next((path for path in files[key] if "-of-" not in path.name), None)
    if key in indexes and (stem != TRANSFORMERS or single is None):
        return _by_index(indexes[key])
    return ([single] if single is not None else _complete(files[key])), None


def _variant(folder: Path, asked: str | None, there: set[str]) -> str:
    """The variant that was asked for, else the plain files, else the only one."""
    if asked is not None and asked in there:
        return asked
    known = ", ".join(f"variant={name!r}" for name in sorted(there - {""})) or "none"
    if asked is not None:
        raise PlannerError(
            f"{folder} has no weights of the variant {asked!r}; it has {known}; leave variant out for the plain ones"
        )
    if "" in there or len(there) == 1:
        return "" if "" in there else next(iter(there))
    raise PlannerError(f"{folder} has its weights in several variants; name one: {known}")


def _by_index(index: Path) -> tuple[list[Path], dict[str, Path]]:
    try:
        table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        places = {str(name): index.parent / str(file) for name, file in table.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is no index of shards ({error!r}); download or copy it again", path=str(index)
        ) from error
    for name, path in places.items():
        if not path.is_file():
            others = sum(other == path for other in places.values()) - 1
            raise CheckpointError(
                f"{path} is missing, which by {index.name} holds {name!r} and {others} more; download or copy it again",
                path=str(path),
                tensor=name,
            )
    return list(dict.fromkeys(places.values())), places


def _complete(shards: list[Path]) -> list[Path]:
    """Raises CheckpointError where one of a numbered series is missing."""
    for path in shards:
        match = _FILE.fullmatch(path.name)
        assert match is not None
        if match["count"] and int(match["count"]) != len(shards):
            have = ", ".join(shard.name for shard in shards)
            raise CheckpointError(
                f"{path.parent} has {len(shards)} of {int(match['count'])} shards ({have}); download or copy the others",
                path=str(path.parent),
            )
    return shards


def _no_weights(folder: Path) -> PlannerError:
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    if pickled:
        return PlannerError(
            f"no safetensors file in {folder}, and {pickled[0]} is pickled, which is not read lazily; load the model once and "
            "save it again: model.save_pretrained(folder, safe_serialization=True) writes model.safetensors"
        )
    return PlannerError(f"no safetensors file in {folder}; pass the folder that holds model.safetensors")
