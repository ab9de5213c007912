"""Damaged, incomplete and changed checkpoints are refused with the names of file and tensor; so is a full disk."""

from __future__ import annotations

import errno
import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from planner import CheckpointError, Plan, PlannerError, plan
from planner.checkpoint import open_folder
from runtime.checkpoint_file import CheckpointFile
from runtime.errors import StoreError
from tests.planner.checkpoints import bert, call_of, configure, equal, outputs, rewrite, saved

SHARD = "model-00002-of-"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    saved(bert, tmp_path / "bert")
    return tmp_path / "bert"


def shard(folder: Path) -> Path:
    (path,) = folder.glob(f"{SHARD}*")
    return path


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_header(path: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def last_of(path: Path) -> str:
    entries = {name: entry["data_offsets"] for name, entry in header_of(path)[0].items() if name != "__metadata__"}
    return max(entries, key=lambda name: entries[name])


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 5)


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"12345")


def misplace(path: Path) -> None:
    header, data = header_of(path)
    header[last_of(path)]["data_offsets"][0] += 4
    write_header(path, header, data)


def reshape(path: Path) -> None:
    header, data = header_of(path)
    header[last_of(path)]["shape"].append(2)
    write_header(path, header, data)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (
        truncate,
        r"is truncated: it ends at byte \d+, within '{tensor}', which ends at \d+; download or copy it again",
    ),
    "goes on": (lengthen, "goes on for 5 bytes behind its last tensor '{tensor}'"),
    "a gap": (misplace, r"has '{tensor}' at byte \d+, where \d+ is next"),
    "another size": (reshape, r"has \d+ bytes for '{tensor}'"),
    "empty": (lambda path: path.write_bytes(b""), "has 0 bytes"),
    "no header": (lambda path: path.write_bytes(b"\xff" * 64), "says that its header has"),
    "no json": (lambda path: path.write_bytes((8).to_bytes(8, "little") + b"no json!"), "has a bad header"),
    "no entries": (lambda path: path.write_bytes((7).to_bytes(8, "little") + b'{"a":1}'), "has a bad header"),
    "a list": (lambda path: path.write_bytes((2).to_bytes(8, "little") + b"[]"), "has a bad header"),
    "gone": (lambda path: path.unlink(), r"is missing, which by model\.safetensors\.index\.json holds '\S+' and \d+ more"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files(folder: Path, damage: str) -> None:
    path = shard(folder)
    tensor = last_of(path)
    change, message = DAMAGES[damage]
    change(path)
    with pytest.raises(CheckpointError, match=message.replace("{tensor}", tensor)) as caught:
        plan(folder, "1GB")
    assert caught.value.path == str(path)
    assert str(path) in str(caught.value)
    if "{tensor}" in message:
        assert caught.value.tensor == tensor


def test_a_tensor_that_the_index_names_and_the_shard_lacks(folder: Path) -> None:
    path = shard(folder)
    state = load_file(path)
    name = last_of(path)
    del state[name]
    save_file(state, path)
    with pytest.raises(CheckpointError, match=rf"{path.name} has no tensor '{name}', which the index"):
        open_folder(folder)


def test_a_shard_of_a_series_without_an_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    shard(folder).unlink()
    with pytest.raises(CheckpointError, match=r"has \d of \d+ shards \(model-00001"):
        open_folder(folder)


def test_an_index_that_is_none(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"index\.json is no index of shards"):
        open_folder(folder)


class TestOfAnotherModel:
    NAME = "encoder.layer.1.output.dense.weight"

    def test_a_missing_tensor_is_named_with_close_ones(self, folder: Path) -> None:
        rewrite(
            folder, lambda state: {n.replace("layer.1.output.dense.w", "layer.1.output.dens.w"): t for n, t in state.items()}
        )
        with pytest.raises(CheckpointError, match=rf"lacks '{self.NAME}'; close to it: \S*dens\.weight") as caught:
            open_folder(folder)
        assert caught.value.tensor == self.NAME
        assert caught.value.path == str(folder / "model.safetensors")

    def test_another_shape(self, folder: Path) -> None:
        rewrite(folder, lambda state: {**state, self.NAME: torch.ones(3, 4)})
        with pytest.raises(CheckpointError, match=rf"has '{self.NAME}' as \(3, 4\), the model as \(32, 64\)"):
            open_folder(folder)

    def test_a_config_with_fewer_layers(self, folder: Path) -> None:
        """The library would leave the others out, and say so in a log."""
        configure(folder, num_hidden_layers=1)
        with pytest.raises(
            CheckpointError, match=r"has 'encoder\.layer\.1\.\S+', for which 'encoder\.layer' of BertModel has no"
        ):
            open_folder(folder)

    def test_a_tensor_beside_a_weight(self, folder: Path) -> None:
        scale = self.NAME + "_scale"
        rewrite(folder, lambda state: {**state, scale: torch.ones(1)})
        with pytest.raises(
            CheckpointError, match=rf"'{scale}', for which .* the checkpoint is quantised; close to it: {self.NAME}"
        ):
            open_folder(folder)

    def test_a_branch_that_the_class_lacks_is_left_alone(self, folder: Path) -> None:
        rewrite(folder, lambda state: {**state, "classifier.weight": torch.ones(2, 2), "head.0.bias": torch.ones(1)})
        assert open_folder(folder).weights is not None

    def test_a_type_that_pytorch_lacks(self, folder: Path) -> None:
        rewrite(folder, lambda state: state)
        path = folder / "model.safetensors"
        header, data = header_of(path)
        header[self.NAME] |= {"dtype": "F4", "shape": [32, 2 * 4 * 64]}
        write_header(path, header, data)
        with pytest.raises(CheckpointError, match=f"has '{self.NAME}' as F4, a type that PyTorch lacks"):
            open_folder(folder)


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("checkpoint") / "bert"
    kwargs = call_of(saved(bert, folder))[1]
    return folder, plan(folder, "1GB", kwargs=kwargs, device="cpu"), kwargs


@pytest.fixture
def intact(planned: tuple[Path, Plan, dict[str, Any]]) -> Iterator[tuple[Path, Plan, dict[str, Any]]]:
    """The folder is as before afterwards: the same files, with the same times."""
    folder, p, kwargs = planned
    before = {path: (path.read_bytes(), path.stat()) for path in folder.glob("*.safetensors")}
    yield planned
    for path, (content, stat) in before.items():
        if path.with_suffix(".old").exists():
            os.replace(path.with_suffix(".old"), path)
        path.write_bytes(content)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    p.restore()
    assert outputs(p.build(), "forward", kwargs)
    p.restore()


def write_in_place(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"\x01")  # of the same size


def replace(path: Path) -> None:
    os.rename(path, path.with_suffix(".old"))
    path.write_bytes(path.with_suffix(".old").read_bytes())


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (truncate, r"had \d+ bytes and has \d+ now since the plan was made; it holds '{tensor}' and \d+ more"),
    "written": (write_in_place, "was written since the plan was made; it holds"),
    "replaced": (replace, "was replaced by another file since the plan was made"),
    "touched": (lambda path: os.utime(path, ns=(1, 1)), "was written since the plan was made"),
}


@pytest.mark.parametrize("when", ["before the build", "between calls"])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_files(intact: tuple[Path, Plan, dict[str, Any]], when: str, change: str) -> None:
    folder, p, kwargs = intact
    path = shard(folder)
    tensor = last_of(path)
    again: Callable[[], Any] = p.build
    if when == "between calls":
        again = functools.partial(outputs, p.build(), "forward", kwargs)
        again()
    CHANGES[change][0](path)
    with pytest.raises(CheckpointError, match=CHANGES[change][1].replace("{tensor}", tensor)) as caught:
        again()
    assert caught.value.path == str(path)
    assert caught.value.tensor
    assert all(parameter.is_meta for parameter in p.restore().parameters())


def test_the_header_is_compared_too(intact: tuple[Path, Plan, dict[str, Any]]) -> None:
    """Where size and times say nothing: a copy in place that keeps them."""
    folder, p, _ = intact
    path = shard(folder)
    stat, content = path.stat(), path.read_bytes()
    path.write_bytes(content.replace(b'"format":"pt"', b'"format":"tf"', 1))
    assert path.read_bytes() != content
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(CheckpointError, match="has another header since the plan was made"):
        p.build()


def test_a_file_that_was_removed_is_still_read(folder: Path) -> None:
    """Whoever has it open has it; it cannot be opened anew."""
    file = CheckpointFile(shard(folder))
    content = {name: at.read() for name, at in file.tensors.items()}
    shard(folder).unlink()
    file.check()
    assert all(torch.equal(at.read(), content[name]) for name, at in file.tensors.items())
    with pytest.raises(CheckpointError, match="cannot be found any more"):
        file.check(thoroughly=True)


def test_a_file_cut_while_it_is_read_names_the_tensor(folder: Path) -> None:
    file = CheckpointFile(shard(folder))
    name = last_of(shard(folder))
    truncate(shard(folder))
    with pytest.raises(CheckpointError, match=rf"bytes too early.*\(in the tensor '{name}'\)"):
        file.tensors[name].read()


class TestFullDisk:
    """Scratch files for what is converted, with a disk that fills while they are written."""

    @pytest.fixture
    def scratch(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        (tmp_path / "scratch").mkdir()
        monkeypatch.setenv("VRAMPLAN_SCRATCH", str(tmp_path / "scratch"))
        return tmp_path / "scratch"

    @pytest.mark.parametrize("call", ["posix_fallocate", "pwrite"])
    def test_nothing_is_left_and_the_plan_can_be_built_later(
        self, folder: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch, call: str
    ) -> None:
        kwargs = {"input_ids": torch.ones(1, 4, dtype=torch.int64)}
        p = plan(folder, "1GB", kwargs=kwargs, device="cpu", dtype="bfloat16")
        own, calls = getattr(os, call), []

        def full(*arguments: Any) -> Any:
            calls.append(arguments)
            if call == "posix_fallocate" or len(calls) > 5:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return own(*arguments)

        with monkeypatch.context() as patched:
            patched.setattr(os, call, full)
            with pytest.raises(StoreError, match="No space left on device"):
                p.build()
        assert not list(scratch.iterdir())
        assert all(parameter.is_meta for parameter in p.restore().parameters())
        assert outputs(p.build(), "forward", kwargs)

    def test_a_later_segment_leaves_the_first_ones_alone(self, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from runtime.homes import DiskHome
        from runtime.origins import view_of
        from runtime.store import HostStore

        views = {name: view_of(name, torch.empty(64)) for name in "ab"}
        store = HostStore({"a": views["a"]}, 64, DiskHome())
        store.fill("a", torch.ones(64))
        with monkeypatch.context() as patched:
            patched.setattr(os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
            with pytest.raises(StoreError, match="full"):
                store.extend({"b": views["b"]})
        assert [path.name for path in scratch.glob("*/weights-*")] == ["weights-1.safetensors"]
        store.extend({"b": views["b"]})
        store.fill("b", torch.zeros(64))
        assert equal([store.tensor("a"), store.tensor("b")], [torch.ones(64), torch.zeros(64)])
        store.close()


def test_weights_of_a_folder_that_lack_one(folder: Path) -> None:
    """Given to `build`, too."""
    p = plan(folder, "1GB", device="accounting")
    rewrite(folder, lambda state: {n: t for n, t in state.items() if n != TestOfAnotherModel.NAME})
    with pytest.raises(PlannerError, match=rf"model\.safetensors lacks '{TestOfAnotherModel.NAME}'"):
        p.build(weights=folder)
