"""What `plan.json` of an emitted package says: programs, their calls and the tensors that they read, as JSON and back.

    program     where its source is, its layout, which tensor each of its weights is, structure of its outputs
    signature   the call that it serves: structure and leaves, or formulas in the dims of a dynamic program
    tensors     geometry of each, its names in the module, where its bytes are

Programs come back as they were but for two things: constants are tensors like all others, and what was stored of a weight in
another type or layout is a tensor of its own, for the package holds it and not what it was made from.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from runtime.dynamic_signature import DimSource, DynamicSignature, Formula
from runtime.errors import PackageError
from runtime.executable import Executable, Pace, ReadPace, Rows, WeightView
from runtime.layout import Bundle, HostLayout, HostPlace, Layout, Read, Slot
from runtime.leftovers import Leftovers
from runtime.plain_json import decode, dtype_name, dtype_of, encode
from runtime.signature import CallSignature, Signature, TensorKey
from runtime.structures import decode_structure, encode_structure

FORMAT, VERSION = "vramplan package", 1
PLAN_FILE = "plan.json"
# In front of a program's source, so that its file can be imported.
PRELUDE = """\
import math
from math import inf, nan

import torch

import runtime.ops  # makes torch.ops.vramplan

aten = torch.ops.aten


"""
_INLINE = 110  # characters of JSON on one line


def dump_document(data: Mapping[str, Any]) -> str:
    """The text of `plan.json`, with a digest of the rest."""
    return _pretty({"format": FORMAT, "version": VERSION, "digest": _digest(data), **data}) + "\n"


def load_document(text: str, path: str) -> dict[str, Any]:
    """What `dump_document` wrote.

    Raises:
        PackageError: damaged, changed, no package, or of another version.
    """
    try:
        data = json.loads(text)
    except ValueError as error:
        raise PackageError(f"{path} is damaged ({error}); emit the package again: p.emit(folder)") from error
    if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
        raise PackageError(f"{path} is not of an emitted package; runtime.load takes a folder that p.emit(folder) wrote")
    version = data.pop("version", None)
    if version != VERSION:
        raise PackageError(f"{path} has version {version}, this library reads version {VERSION}; emit the package again")
    if data.pop("digest", None) != _digest(data):
        raise PackageError(
            f"{path} is not what was emitted: its digest differs, so it is damaged or was edited. A package cannot be edited, "
            "for its program was proved as it is; plan and emit again"
        )
    return data


def _digest(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _pretty(value: Any, indent: str = "", key: str = "") -> str:
    """JSON for people: what is short stays on one line, behind its key."""
    flat = key + json.dumps(value, allow_nan=False)
    if not isinstance(value, (dict, list, tuple)) or not value or len(flat) + len(indent) <= _INLINE:
        return flat
    inner = indent + " "
    if not isinstance(value, dict):
        lines = [inner + _pretty(item, inner) for item in value]
        return f"{key}[\n" + ",\n".join(lines) + f"\n{indent}]"
    lines = [inner + _pretty(item, inner, f"{json.dumps(name)}: ") for name, item in value.items()]
    return f"{key}{{\n" + ",\n".join(lines) + f"\n{indent}}}"


# Tensors.


def encode_tensor(view: WeightView) -> dict[str, Any]:
    """The geometry of a whole weight; who writes it adds where its bytes are."""
    data: dict[str, Any] = {
        "dtype": dtype_name(view.dtype),
        "shape": list(view.shape),
        "stride": list(view.stride),
        "nbytes": view.nbytes,
    }
    if view.aliases:
        data["aliases"] = list(view.aliases)
    if view.stored is not None:
        stored = view.stored
        data["stored"] = {"weight": stored.weight, "part": stored.part, "dtype": dtype_name(stored.dtype), "dim": stored.dim}
    return data


def decode_tensor(name: str, data: Mapping[str, Any]) -> WeightView:
    """The whole weight, under the package's name for it."""
    aliases, shape, stride = tuple(data.get("aliases", ())), tuple(data["shape"]), tuple(data["stride"])
    return WeightView(name, aliases, shape, stride, dtype_of(data["dtype"]), data["nbytes"], False)


# Programs.


def encode_program(program: Executable, names: Callable[[WeightView], str]) -> dict[str, Any]:
    """All but the source; `names` gives the package's name of a weight.

    Raises:
        TypeError: attributes or outputs that JSON cannot hold.
    """

    def weight(view: WeightView) -> Any:
        data: dict[str, Any] = {"tensor": names(view)}
        if view.rows is not None:
            data["rows"] = [view.rows.start, view.rows.stop, view.rows.of]
            data |= {"shape": list(view.shape), "stride": list(view.stride), "nbytes": view.nbytes}
        return data | {key: True for key in ("state", "grad") if getattr(view, key)}

    return {
        "name": program.name,
        "inputs": list(program.inputs),
        "outputs": encode_structure(program.out_spec),
        "predicted": dict(program.predicted),
        "layout": _encode_layout(program.layout),
        "weights": {node: weight(view) for node, view in program.weights.items()},
        "tables": {name: weight(view) for name, view in program.tables.items()},
        "leftovers": None if program.leftovers is None else _encode_leftovers(program.leftovers),
        "pace": None if program.pace is None else dataclasses.asdict(program.pace),
    }


def decode_program(data: Mapping[str, Any], source: str, tensors: Mapping[str, WeightView]) -> Executable:
    """The executable; its views have the package's names.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: that is no program.
    """

    def weight(saved: Mapping[str, Any]) -> WeightView:
        view = dataclasses.replace(
            tensors[saved["tensor"]], state=bool(saved.get("state", False)), grad=bool(saved.get("grad", False))
        )
        if "rows" not in saved:
            return view
        part = {"shape": tuple(saved["shape"]), "stride": tuple(saved["stride"]), "nbytes": saved["nbytes"]}
        return dataclasses.replace(view, rows=Rows(*saved["rows"]), **part)

    pace = data["pace"]
    return Executable(
        name=data["name"],
        source=source,
        layout=_decode_layout(data["layout"]),
        weights={node: weight(saved) for node, saved in data["weights"].items()},
        constants={},
        inputs=tuple(data["inputs"]),
        out_spec=decode_structure(data["outputs"]),
        predicted=dict(data["predicted"]),
        pace=None if pace is None else _decode_pace(pace),
        leftovers=None if data["leftovers"] is None else _decode_leftovers(data["leftovers"]),
        tables={name: weight(saved) for name, saved in data["tables"].items()},
    )


def _decode_pace(data: Mapping[str, Any]) -> Pace:
    copies = tuple((seconds, nbytes) for seconds, nbytes in data["copies"])
    return Pace(
        tuple(data["compute"]), copies, tuple(ReadPace(*read) for read in data.get("reads", ())), bool(data.get("ahead"))
    )


def _encode_layout(layout: Layout) -> dict[str, Any]:
    """Slots as `[weight, offset, nbytes]`."""

    def slots(given: tuple[Slot, ...]) -> list[Any]:
        return [[slot.weight, slot.offset, slot.nbytes] for slot in given]

    data = {f.name: getattr(layout, f.name) for f in dataclasses.fields(layout)}
    bundles = [{**dataclasses.asdict(bundle), "slots": slots(bundle.slots)} for bundle in layout.bundles]
    data |= {"resident": slots(layout.resident), "state": slots(layout.state), "bundles": bundles}
    if layout.host is not None:
        data["host"] = {**dataclasses.asdict(layout.host), "reads": [list(dataclasses.astuple(r)) for r in layout.host.reads]}
    return data | {"pools": list(layout.pools), "hosted": [[place.offset, place.nbytes] for place in layout.hosted]}


def _decode_layout(data: Mapping[str, Any]) -> Layout:
    def slots(saved: Any) -> tuple[Slot, ...]:
        return tuple(Slot(*slot) for slot in saved)

    parts = {"resident": slots(data["resident"]), "state": slots(data["state"]), "pools": tuple(data["pools"])}
    bundles = tuple(Bundle(**{**bundle, "slots": slots(bundle["slots"])}) for bundle in data["bundles"])
    hosted = tuple(HostPlace(*place) for place in data["hosted"])
    return Layout(**{**data, **parts, "bundles": bundles, "hosted": hosted, "host": _decode_host(data.get("host"))})


def _decode_host(data: Mapping[str, Any] | None) -> HostLayout | None:
    if data is None:
        return None
    names = {"held": tuple(data["held"]), "tables": tuple(data["tables"])}
    return HostLayout(**{**data, **names, "reads": tuple(Read(*read) for read in data["reads"])})


def _encode_leftovers(leftovers: Leftovers) -> dict[str, Any]:
    return {
        "before": encode(dict(leftovers.before)),
        "after": encode(dict(leftovers.after)),
        "in_place": encode(leftovers.in_place),
    }


def _decode_leftovers(data: Mapping[str, Any]) -> Leftovers:
    return Leftovers(decode(data["before"]), decode(data["after"]), decode(data["in_place"]))


# Signatures.


def encode_signature(signature: Signature) -> dict[str, Any]:
    """Which calls a program serves.

    Raises:
        TypeError: a container among the inputs that JSON cannot hold.
    """
    assert isinstance(signature, (CallSignature, DynamicSignature))
    data = {"inputs": encode_structure(signature.in_spec), "leaves": [_encode_leaf(leaf) for leaf in signature.leaves]}
    if isinstance(signature, DynamicSignature):
        data["dims"] = {name: dataclasses.asdict(source) for name, source in signature.dims.items()}
        data["ranges"] = {name: list(ends) for name, ends in signature.ranges.items()}
        data["guard"] = signature.guard
    return data


def decode_signature(data: Mapping[str, Any]) -> Signature:
    """What was encoded.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: that is no signature.
    """
    leaves, structure = tuple(_decode_leaf(leaf) for leaf in data["leaves"]), decode_structure(data["inputs"])
    if "dims" not in data:
        return CallSignature(leaves, structure)
    dims = {name: DimSource(**source) for name, source in data["dims"].items()}
    ranges = {name: (low, high) for name, (low, high) in data["ranges"].items()}
    return DynamicSignature(leaves, structure, dims, ranges, data["guard"])


def _encode_leaf(leaf: Any) -> dict[str, Any]:
    if isinstance(leaf, Formula):
        return {"formula": leaf.text}
    if isinstance(leaf, TensorKey):
        return {**dataclasses.asdict(leaf), "dtype": dtype_name(leaf.dtype)}
    kind, value = leaf
    value = float.fromhex(value) if kind is float else value
    if type(value) is not kind:
        raise TypeError(f"an input is a {kind.__name__}")
    return {"value": encode(value)}


def _decode_leaf(data: Mapping[str, Any]) -> Any:
    if "formula" in data:
        return Formula(data["formula"])
    if "value" in data:
        value = decode(data["value"])
        return type(value), value.hex() if isinstance(value, float) else value
    key = {**data, "shape": tuple(data["shape"]), "stride": tuple(data["stride"]), "dtype": dtype_of(data["dtype"])}
    return TensorKey(**key)
