"""`p.emit`: what is refused, and that nothing half-written is left."""

from __future__ import annotations

import enum
import errno
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import runtime
from planner import PackageError, PlannerError, plan
from tests.planner.routed import WIDTH, Branch
from tests.planner.toys import Box, Mlp, Unboxes, planned, x


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "package"


def test_a_plan_in_parts(folder: Path) -> None:
    p = plan(Branch().eval(), "1MB", inputs=(torch.randn(2, WIDTH),), device="accounting")
    with pytest.raises(PlannerError, match=r"Branch.* is planned in parts, .*emit its parts.*get_submodule\('before'\)"):
        p.emit(folder)
    assert not folder.exists()


def test_hooks(folder: Path) -> None:
    module = Mlp().eval()
    p = planned(module, x())
    handle = module.register_forward_hook(lambda *_: None)
    with pytest.raises(PlannerError, match=r"the Mlp has forward hooks.*handle.remove\(\)"):
        p.emit(folder)
    handle.remove()
    p.emit(folder)


def test_other_things_in_the_folder(folder: Path, tmp_path: Path) -> None:
    p = planned(Mlp(), x())
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(PackageError, match=r"that folder is not empty, .* would be lost \(thesis.tex\); name a new folder"):
        p.emit(folder)
    (folder / "thesis.tex").rename(folder / "plan.json")
    with pytest.raises(PackageError, match=r"would be lost \(no package\)"):
        p.emit(folder)
    (folder / "plan.json").unlink()
    p.emit(folder)  # an empty one
    (folder / "notes.txt").write_text("of mine")
    with pytest.raises(PackageError, match=r"notes.txt"):
        p.emit(folder)
    with pytest.raises(PackageError, match=r"that is a file; name a folder"):
        p.emit(folder / "notes.txt")
    with pytest.raises(PackageError, match=r"there is no folder .*; make it first"):
        p.emit(tmp_path / "no" / "such")


def test_a_package_takes_the_place_of_another(folder: Path) -> None:
    first, second = Mlp(), Mlp()
    planned(first, x()).emit(folder, max_shard_size=1)
    held = runtime.load(folder)
    (folder / "plan.json").write_text((folder / "plan.json").read_text()[:300])  # a damaged one too
    planned(second, x()).emit(folder)
    assert torch.equal(runtime.load(folder)(x()), second(x()))
    assert torch.equal(held(x()), first(x()))
    assert len(list(folder.glob("*.safetensors"))) == 1
    assert [path.name for path in folder.parent.iterdir()] == ["package"]


class Fails:
    """Fails at the call of that number."""

    def __init__(self, real: Callable[..., Any], at: int, error: BaseException) -> None:
        self.real, self.left, self.error = real, at, error

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise self.error
        return self.real(*args, **kwargs)


NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


FAILURES = [
    ("planner.package_weights.os.posix_fallocate", 1),
    ("planner.package_weights.os.posix_fallocate", 2),
    ("planner.package_weights.zlib.crc32", 3),  # where a weight was just written
    ("planner.emit_package.Path.write_text", 1),  # the index, then the program, then the plan
    ("planner.emit_package.Path.write_text", 2),
    ("planner.emit_package.Path.write_text", 3),
    ("planner.emit_package.os.rename", 1),
]
# Where a package is there, it is moved first.
CASES = [*((*case, there) for case in FAILURES for there in (False, True)), ("planner.emit_package.os.rename", 2, True)]


@pytest.mark.parametrize(("where", "at", "there"), CASES)
@pytest.mark.parametrize("error", [NO_SPACE, KeyboardInterrupt()])
def test_nothing_is_left_of_a_failure(
    folder: Path, monkeypatch: pytest.MonkeyPatch, where: str, at: int, there: bool, error: BaseException
) -> None:
    module = Mlp().eval()
    if there:
        planned(module, x()).emit(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()} if there else {}
    p = planned(Mlp(), x())
    real = {"posix_fallocate": os.posix_fallocate, "rename": os.rename, "write_text": Path.write_text, "crc32": zlib.crc32}
    fails = Fails(real[where.rpartition(".")[2]], at, error)
    monkeypatch.setattr(where, lambda *args, **named: fails(*args, **named))
    wanted = PackageError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(wanted, match="No space left on device; nothing is left of it" if wanted is PackageError else None):
        p.emit(folder, max_shard_size="1KB")
    monkeypatch.undo()
    assert [path.name for path in folder.parent.iterdir()] == (["package"] if there else [])
    assert before == ({path.name: path.read_bytes() for path in folder.iterdir()} if there else {})
    p.emit(folder)
    assert torch.equal(runtime.load(folder)(x()), p.target(x()))


def test_a_disk_that_is_too_small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planner.emit_package.shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(PackageError, match=r"takes .* on disk, and .* has 10 B free; emit to another disk"):
        planned(Mlp(), x()).emit(folder)
    assert list(folder.parent.iterdir()) == []


def test_an_input_that_json_cannot_say(folder: Path) -> None:
    class Scales(nn.Module):
        def forward(self, v: Tensor, by: Any) -> Tensor:
            return v * by

    class Twice(int, enum.Enum):
        TWO = 2

    p = planned(Scales(), x(), Twice.TWO)
    with pytest.raises(PlannerError, match=r"JSON cannot say what it takes or gives: an? .*Plan a method whose inputs"):
        p.emit(folder)


def test_inputs_of_a_class(folder: Path) -> None:
    p = planned(Unboxes(), Box(x()))
    p.emit(folder)
    assert torch.equal(runtime.load(folder)(Box(x())), p.target(Box(x())))
