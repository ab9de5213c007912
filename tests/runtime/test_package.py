"""`runtime.load`: what a package gives back, what stands in for classes that are not here, and what it refuses to run."""

from __future__ import annotations

import collections
import copy
import dataclasses
import hashlib
import inspect
import json
import math
import os
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import register_dataclass, tree_flatten, tree_map, tree_structure, tree_unflatten

import runtime
from planner import plan
from runtime.errors import InputError, ModuleUnusable, PackageError, PlannerError
from runtime.leftovers import ABSENT
from runtime.module import PlannedModule
from runtime.package_format import decode_program, decode_signature, decode_tensor, dump_document, load_document
from runtime.plain_json import decode, encode
from runtime.structures import Output, decode_structure, encode_structure
from tests.planner.toys import Counter, Lookup, Mlp, planned, x

SHARD = "weights-00001-of-00001.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "package"


def emitted(folder: Path, module: nn.Module | None = None, *inputs: Any, **options: Any) -> nn.Module:
    """A package of a module, for its least budget; gives the module."""
    module = (module or Mlp()).eval()
    planned(module, *(inputs or (x(),)), least=True, **options).emit(folder)
    return module


# The module that it gives.


def test_it_is_called_as_the_original(folder: Path) -> None:
    class Named(Mlp):
        def forward(self, v: Tensor, *, scale: float = 2.0, mask: Tensor | None = None) -> Tensor:
            return super().forward(v) * scale

    module = emitted(folder, Named())
    loaded = runtime.load(folder)
    assert isinstance(loaded, PlannedModule)
    assert type(loaded).__name__ == "PlannedNamed"
    assert str(inspect.signature(loaded.forward)) == "(v, *, scale=2.0, mask=None)"
    assert torch.equal(loaded(x()), module(x()))
    assert torch.equal(loaded(v=x()), module(x()))
    with pytest.raises(InputError, match=r"the inputs do not fit forward\(v, \*, scale=2.0, mask=None\)"):
        loaded(x(), x())
    assert not loaded.training
    assert dict(loaded.named_parameters()).keys() == dict(module.named_parameters()).keys()
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in loaded.state_dict().items())
    loaded.close()


def test_it_cannot_do_what_a_planned_module_cannot(folder: Path) -> None:
    emitted(folder)
    loaded = runtime.load(folder)
    for refused in (loaded.train, loaded.half, lambda: copy.deepcopy(loaded), lambda: pickle.dumps(loaded)):
        with pytest.raises(ModuleUnusable):
            refused()


def test_report_and_close(folder: Path) -> None:
    emitted(folder)
    loaded = runtime.load(folder)
    with pytest.raises(ModuleUnusable, match="nothing was measured yet"):
        loaded.report()
    loaded(x())
    assert loaded.report().calls == 1
    loaded.close()
    loaded.close()
    with pytest.raises(ModuleUnusable, match=r"this package is closed.* runtime.load\(folder\)"):
        loaded(x())
    assert all(value.is_meta for value in loaded.state_dict().values())


def test_weights_written_in_place_are_seen(folder: Path) -> None:
    module = emitted(folder)
    loaded = runtime.load(folder)
    loaded(x())
    with torch.no_grad():
        loaded.up.weight.mul_(2)
        module.up.weight.mul_(2)  # type: ignore[union-attr]
    assert torch.equal(loaded(x()), module(x()))
    loaded.close()
    again = runtime.load(folder)
    assert not torch.equal(again(x()), module(x()))
    again.close()


def test_on_the_cpu_weights_are_read_from_the_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Lookup().eval()
    ids = torch.arange(4)
    p = plan(module, "1MB", inputs=(ids,), device="cpu")
    p.replan(p.minimum_bytes).emit(folder)

    def fails(*_: Any) -> None:
        raise AssertionError("a scratch folder")

    monkeypatch.setattr("runtime.homes.ScratchFolder", fails)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    loaded = runtime.load(folder)
    wanted = module(ids)
    for _ in range(2):
        assert torch.equal(loaded(ids), wanted)
    with torch.no_grad():
        loaded.mlp.up.weight.zero_()
        loaded(ids)
    loaded.close()
    assert before == {path: path.read_bytes() for path in folder.iterdir()}


def test_state_on_the_cpu_is_not_written_to_the_package(folder: Path) -> None:
    p = plan(Counter().eval(), "1MB", inputs=(x(),), device="cpu")
    p.emit(folder)
    for _ in range(2):
        loaded = runtime.load(folder)
        loaded(x())
        assert loaded.count.item() == 1
        loaded.close()


def test_two_at_once(folder: Path) -> None:
    module = emitted(folder, Counter())
    wanted = [module(x()) for _ in range(2)]
    one, two = runtime.load(folder), runtime.load(folder)
    assert torch.equal(one(x()), wanted[0])
    assert torch.equal(two(x()), wanted[0])
    assert torch.equal(one(x()), wanted[1])


# What it refuses.


def test_another_call(folder: Path) -> None:
    emitted(folder)
    loaded = runtime.load(folder)
    for given_, said in {
        x(5): r"float32\[5, 8\]",
        x().double(): r"float64\[3, 8\]",
        torch.randn(8, 3).t(): r"float32\[3, 8\] with strides \(1, 3\)",
        torch.randn(4, 8)[1:]: r"float32\[3, 8\] at element 8 of a storage of 128 B",
    }.items():
        with pytest.raises(
            InputError, match=rf"runs Mlp.forward for x float32\[3, 8\], and was called with x {said}\. A package"
        ):
            loaded(given_)
    loaded(x())


def test_another_device(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emitted(folder)
    with pytest.raises(
        PackageError, match="planned for 'accounting', and what it takes on 'cpu' is not known; plan with device='cpu'"
    ):
        runtime.load(folder, "cpu")
    runtime.load(folder, "accounting").close()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    p = plan(Mlp().eval(), "1GB", inputs=(x(),), machine="rtx-4090")
    p.emit(folder)
    for device in (None, "cuda:1"):
        with pytest.raises(PlannerError, match=r"this package is for cuda(:1)?, and there is no such device here"):
            runtime.load(folder, device)


def test_no_package(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=r"cannot read .*plan.json: No such file.*takes what p.emit\(folder\) wrote"):
        runtime.load(tmp_path)
    with pytest.raises(PackageError, match=r"No such file"):
        runtime.load(tmp_path / "nowhere")
    (tmp_path / "plan.json").write_text('{"format": "vramplan plan"}')
    with pytest.raises(PackageError, match=r"plan.json is not of an emitted package"):
        runtime.load(tmp_path)


def test_an_operator_that_is_not_here(folder: Path) -> None:
    library = torch.library.Library("vramplan_test_gone", "DEF")
    library.define("twice(Tensor v) -> Tensor")
    library.impl("twice", lambda v: v * 2, "CompositeExplicitAutograd")
    library.impl("twice", lambda v: torch.empty_like(v), "Meta")

    class Foreign(Mlp):
        def forward(self, v: Tensor) -> Tensor:
            return torch.ops.vramplan_test_gone.twice(super().forward(v))  # type: ignore[no-any-return]

    module = emitted(folder, Foreign())
    loaded = runtime.load(folder)
    assert torch.equal(loaded(x()), module(x()))
    loaded.close()
    text = (folder / "program.py").read_text().replace("vramplan_test_gone.twice", "vramplan_test_gone.thrice")
    _rewrite(folder, lambda data: data["programs"][0].update(sha256=_sha256(text)))
    (folder / "program.py").write_text(text)
    with pytest.raises(
        PackageError, match=r"operator torch.ops.vramplan_test_gone.thrice.*, which is not here: import the package"
    ):
        runtime.load(folder)
    library._destroy()


# Integrity.


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes `plan.json` as somebody would who knows about its digest."""
    path = folder / "plan.json"
    data = load_document(path.read_text(), str(path))
    change(data)
    path.write_text(dump_document(data))


def _edit(path: Path, change: Callable[[bytearray], Any]) -> None:
    content = bytearray(path.read_bytes())
    changed = change(content)
    path.write_bytes(content if changed is None else changed)


def _flip(position: int) -> Callable[[bytearray], None]:
    def change(content: bytearray) -> None:
        content[position] ^= 0x10

    return change


def _without(name: str) -> Callable[[bytearray], bytes]:
    """A shard whose header calls that tensor otherwise, with the length that it had."""
    return lambda content: bytes(content).replace(f'"{name}"'.encode(), f'"{name[::-1]}"'.encode())


DAMAGES: dict[str, tuple[str, Callable[[bytearray], Any], str]] = {
    "cut in its data": (
        SHARD,
        lambda content: content[:-300],
        rf"{SHARD} has \d+ bytes instead of \d+ and was cut: the tensor '",
    ),
    "cut in its header": (SHARD, lambda content: content[:40], rf"{SHARD} has 40 bytes .* was cut: the tensor '"),
    "empty": (SHARD, lambda content: b"", rf"{SHARD} has 0 bytes .* was cut: the tensor '"),
    "too long": (SHARD, lambda content: content + b"x", rf"{SHARD} has .* is another file \(it has the tensor '"),
    "no header": (SHARD, _flip(20), rf"{SHARD} has .*the tensor '"),
    "a header of an impossible length": (SHARD, _flip(7), rf"{SHARD} has no safetensors header, .*the tensor '"),
    "a missing tensor": (SHARD, _without("up.weight"), rf"{SHARD} has another header: the tensor 'up.weight' is missing"),
    "a changed weight": (SHARD, _flip(-10), rf"{SHARD}: the bytes of the tensor '.*' are not those that were emitted"),
    "a changed program": ("program.py", lambda c: c + b"\n", r"program.py is not what was emitted.*proved"),
    "a program that is no text": ("program.py", lambda c: b"\xff\xfe", r"program.py is damaged"),
    "a cut plan": ("plan.json", lambda content: content[:500], r"plan.json is damaged \("),
    "an empty plan": ("plan.json", lambda content: b"", r"plan.json is damaged \("),
    "a plan that is no text": ("plan.json", lambda content: b"\xff\xfe", r"plan.json is damaged \("),
    "an edited plan": (
        "plan.json",
        lambda c: bytes(c).replace(b'"budget_bytes": ', b'"budget_bytes": 1'),
        r"its digest differs",
    ),
    "another version": (
        "plan.json",
        lambda c: bytes(c).replace(b'"version": 1', b'"version": 99'),
        r"version 99, .* reads version 1",
    ),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_damage_is_named(folder: Path, what: str) -> None:
    emitted(folder)
    name, change, said = DAMAGES[what]
    _edit(folder / name, change)
    with pytest.raises(PackageError, match=said):
        runtime.load(folder)


def test_a_missing_file_is_named(folder: Path) -> None:
    emitted(folder)
    (folder / SHARD).unlink()
    with pytest.raises(PackageError, match=rf"cannot open .*{SHARD}: No such file.*: the package has the tensor '.*' in it"):
        runtime.load(folder)


def test_without_verifying_headers_alone_are_read(folder: Path) -> None:
    module = emitted(folder)
    _edit(folder / SHARD, _flip(-10))
    loaded = runtime.load(folder, verify=False)
    assert loaded(x()).shape == module(x()).shape
    _edit(folder / SHARD, lambda content: content[:-1])
    with pytest.raises(PackageError, match="was cut"):
        runtime.load(folder, verify=False)


@given(st.integers(0, 1 << 30), st.sampled_from(["plan.json", "program.py", SHARD]), st.booleans())
def test_no_damaged_byte_goes_unnoticed(tmp_path_factory: pytest.TempPathFactory, where: int, name: str, cut: bool) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    if not folder.exists():
        emitted(folder)
    whole = (folder / name).read_bytes()
    if cut:
        (folder / name).write_bytes(whole[: where % len(whole)])
    else:
        _edit(folder / name, _flip(where % len(whole)))
    padding = name == SHARD and not cut and not _is_read(folder, where % len(whole))
    try:
        if padding:
            runtime.load(folder).close()
        else:
            with pytest.raises(PackageError, match=name):
                runtime.load(folder)
    finally:
        (folder / name).write_bytes(whole)


def _is_read(folder: Path, position: int) -> bool:
    """Whether a byte of the shard is in its header or a weight, and not between two weights."""
    entries = json.loads((folder / "plan.json").read_text())["tensors"].values()
    starts = [(entry["offset"], entry["nbytes"]) for entry in entries]
    return position < min(starts)[0] or any(start <= position < start + nbytes for start, nbytes in starts)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data["programs"][0].pop("layout"), "KeyError"),
        (lambda data: data["programs"][0].update(outputs=3), "TypeError"),
        (lambda data: data["tensors"]["up.weight"].update(dtype="float17"), "has no dtype 'float17'"),
        (lambda data: data["programs"][0]["layout"].update(surprise=1), "TypeError"),
    ],
)
def test_a_plan_that_makes_no_sense(folder: Path, change: Callable[[Any], Any], said: str) -> None:
    emitted(folder)
    _rewrite(folder, change)
    with pytest.raises(PackageError, match=rf"plan.json is damaged \(.*{said}"):
        runtime.load(folder)


class TestReferences:
    """Of weights that stayed in a checkpoint."""

    @pytest.fixture
    def shard(self, tmp_path: Path, folder: Path) -> Path:
        (tmp_path / "checkpoint").mkdir()
        path = tmp_path / "checkpoint" / "model.safetensors"
        module = Mlp().eval()
        save_file(module.state_dict(), path)
        planned(module, x()).emit(folder, path.parent, copy=False)
        runtime.load(folder).close()
        return path

    def test_another_time(self, shard: Path, folder: Path) -> None:
        os.utime(shard, ns=(1, 1))
        with pytest.raises(
            PackageError, match=r"model.safetensors was written since the package was emitted, which reads the tensor"
        ):
            runtime.load(folder)
        runtime.load(folder, checkpoint=shard.parent).close()

    def test_another_size(self, shard: Path, folder: Path) -> None:
        _edit(shard, lambda content: content[:-4])
        for checkpoint in (None, shard.parent):
            with pytest.raises(PackageError, match=r"model.safetensors has .* was cut: the tensor '.*'.*plan and emit again"):
                runtime.load(folder, checkpoint=checkpoint)

    def test_another_header(self, shard: Path, folder: Path) -> None:
        state = {("up.weighs" if name == "up.weight" else name): value for name, value in Mlp().state_dict().items()}
        nbytes = shard.stat().st_size
        save_file(state, shard)
        assert shard.stat().st_size == nbytes
        with pytest.raises(PackageError, match=r"model.safetensors has another header: the tensor '.*' is "):
            runtime.load(folder, checkpoint=shard.parent)


# Structures.


class Point(NamedTuple):
    first: Any
    second: Any


@dataclasses.dataclass
class Both:
    hidden: Any
    pooled: Any = None
    states: Any = None


register_dataclass(Both)


class Structured(Mlp):
    def forward(self, v: Tensor) -> Any:
        y = super().forward(v)
        return {
            "point": Point(y, (y + 1, [y])),
            "both": Both(hidden=y, states=(y, y)),
            "ordered": collections.OrderedDict(b=y, a=None),
            "largest": y.max(dim=0),
            "numbers": (3, 2.5, "text", True),
        }


def test_structures_whose_classes_are_here_come_as_they_are(folder: Path) -> None:
    module = emitted(folder, Structured())
    found, wanted = runtime.load(folder)(x()), module(x())
    assert tree_structure(found) == tree_structure(wanted)
    assert type(found["both"]) is Both
    assert type(found["point"]) is Point
    assert type(found["largest"]) is torch.return_types.max


def test_others_have_stand_ins(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = emitted(folder, Structured())
    wanted = module(x())
    monkeypatch.delitem(sys.modules, __name__)
    loaded = runtime.load(folder)
    found = loaded(x())
    assert __name__ not in sys.modules  # nothing is imported for it
    point, both = found["point"], found["both"]
    assert (type(point).__name__, point._fields) == ("Point", ("first", "second"))
    one, (two, _) = point
    assert torch.equal(one, wanted["point"].first)
    assert torch.equal(two, point.second[0])
    assert isinstance(both, Output)
    assert list(both) == ["hidden", "states"]
    assert torch.equal(both.hidden, both["hidden"])
    assert both[0] is both.hidden
    assert both.pooled is None
    assert both.to_tuple()[1] is both.states
    with pytest.raises(AttributeError, match="other"):
        both.other
    with pytest.raises(KeyError):
        both["pooled"]
    assert repr(both).startswith("Both(hidden=tensor(")
    assert found["numbers"] == (3, 2.5, "text", True)
    assert type(found["ordered"]) is collections.OrderedDict
    loaded.close()


def test_a_stand_in_is_a_dict_and_a_tree() -> None:
    output = Output("Thing", {"values": 1, "b": (2, 3)}, ("values", "b", "none"))
    assert isinstance(output, dict)
    assert output.values == 1  # a field, as in the libraries
    assert tree_map(lambda n: n + 1, output) == Output("Thing", {"values": 2, "b": (3, 4)})
    assert tree_map(lambda n: n, output).none is None
    output.b = 5
    assert output["b"] == 5
    output["values"] = 6
    assert output.values == 6
    for copied in (copy.deepcopy(output), pickle.loads(pickle.dumps(output))):
        assert (copied, copied.none, copied.values, repr(copied)) == (output, None, 6, "Thing(values=6, b=5)")


def test_inputs_of_a_class_that_is_not_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unboxes(Mlp):
        def forward(self, box: Any) -> Tensor:
            return super().forward(box.hidden)

    module = emitted(folder, Unboxes(), Both(x()))
    wanted = module(Both(x()))
    monkeypatch.delitem(sys.modules, __name__)
    loaded = runtime.load(folder)
    assert torch.equal(loaded(Output("Both", {"hidden": x()}, ("hidden", "pooled", "states"))), wanted)
    with pytest.raises(InputError, match=r"for box Both\(hidden=float32\[3, 8\]\), and was called with box float32\[3, 8\]"):
        loaded(x())


STRUCTURES: list[Any] = [
    0,
    (),
    (0, [0, (0,)], {}),
    {"b": 0, "a": {"c": [0]}},
    {1: 0, (2, "x"): 0},
    collections.OrderedDict(z=0, a=(0,)),
    collections.deque([0, 0], maxlen=5),
    collections.defaultdict(list, {"k": 0}),
    Point(0, (0, 0)),
    Both(0, states=[0]),
    torch.return_types.topk((0, 0)),
]


@pytest.mark.parametrize("tree", STRUCTURES, ids=lambda tree: type(tree).__name__)
def test_structures_through_json(tree: Any) -> None:
    leaves, spec = tree_flatten(tree)
    read = decode_structure(json.loads(json.dumps(encode_structure(spec))))
    assert read == spec
    assert type(tree_unflatten(leaves, read)) is type(tree)


def test_a_class_that_says_nothing_of_its_parts() -> None:
    class Bag:
        def __init__(self, *items: Any) -> None:
            self.items = items

    torch.utils._pytree.register_pytree_node(Bag, lambda bag: (list(bag.items), None), lambda items, _: Bag(*items))
    with pytest.raises(TypeError, match="Bag does not say what its parts are called"):
        encode_structure(tree_structure(Bag(1, 2)))


# Plain data.

_SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.complex_numbers()
    | st.sampled_from([torch.float8_e4m3fn, torch.device("cuda:1"), torch.strided, torch.channels_last, ABSENT, list, int])
)  # fmt: skip
_KEYS = st.text() | st.integers() | st.tuples(st.integers(), st.text())
_PLAIN = st.recursive(
    _SCALARS,
    lambda inner: (
        st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(_KEYS, inner)
        | st.sets(st.integers()) | st.frozensets(st.text()) | st.lists(st.integers(0, 9)).map(torch.Size)
    ),
)  # fmt: skip


def _alike(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return a.hex() == b.hex()
    if isinstance(a, complex):
        return _alike(a.real, b.real) and _alike(a.imag, b.imag)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_alike, a, b))
    if isinstance(a, dict):
        return _alike(list(a), list(b)) and _alike(list(a.values()), list(b.values()))
    return a == b  # type: ignore[no-any-return]


@given(_PLAIN)
def test_plain_data_through_json(value: Any) -> None:
    assert _alike(decode(json.loads(json.dumps(encode(value), allow_nan=False))), value)


@pytest.mark.parametrize("value", [object(), Point(1, 2), torch.zeros(1), math, types.SimpleNamespace()])
def test_what_is_no_plain_data(value: Any) -> None:
    with pytest.raises(TypeError, match="is no plain data"):
        encode([value])


@pytest.mark.parametrize("saved", [{"$eval": "1"}, {"$torch": "load"}, {"$type": "print"}, {"a": 1, "b": 2}, {}])
def test_what_is_none_of_its_json(saved: Any) -> None:
    with pytest.raises((ValueError, TypeError, AttributeError)):
        decode(saved)


# The document.


def test_a_program_through_json(folder: Path) -> None:
    p = planned(Lookup(), torch.arange(4), least=True)
    p.emit(folder)
    data = load_document((folder / "plan.json").read_text(), "plan.json")
    views = {name: decode_tensor(name, entry) for name, entry in data["tensors"].items()}
    (saved,) = data["programs"]
    read = decode_program(saved, p.code, views)
    assert read == dataclasses.replace(p.executable, constants={})
    assert decode_signature(saved["signature"]).leaves == p.build()._runner.programs[0][0].leaves  # type: ignore[attr-defined]
    p.restore()


def test_the_document_is_for_people(folder: Path) -> None:
    emitted(folder)
    lines = (folder / "plan.json").read_text().splitlines()
    assert max(map(len, lines)) <= 115
    assert lines[1] == ' "format": "vramplan package",'
    assert '   "outputs": "leaf",' in lines
