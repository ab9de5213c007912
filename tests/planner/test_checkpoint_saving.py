"""`save_sharded`: what a plan holds becomes a checkpoint that its library loads, and that can be planned again."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import nn
from transformers import T5Config, T5EncoderModel

from planner import BudgetError, Machine, PlannerError, plan
from runtime.errors import StoreError
from tests.planner.checkpoints import MODELS, T5, bert, call_of, equal, loaded, outputs, saved, state_of
from tests.planner.toys import Counter, Mlp, x

EXACT: dict[str, Any] = {"allow": ("offload",)}


@pytest.mark.parametrize(("name", "device"), [("llama", "cpu"), ("t5", "accounting"), ("vae", "cpu")])
def test_the_library_loads_it(name: str, device: str, tmp_path: Path) -> None:
    model = saved(MODELS[name], tmp_path / "own", shard="1GB")
    method, kwargs = call_of(model)
    p = plan(tmp_path / "own", "1GB", kwargs=kwargs, method=method, device=device, **EXACT)
    m: Any = p.build()
    m.save_sharded(tmp_path / "new", max_shard_size="30KB")
    stem = "diffusion_pytorch_model" if name == "vae" else "model"
    shards = sorted((tmp_path / "new").glob(f"{stem}-0*-of-*.safetensors"))
    assert len(shards) > 2
    assert all(path.stat().st_size < 30_000 + 8_000 for path in shards)
    index = json.loads((tmp_path / "new" / f"{stem}.safetensors.index.json").read_text())
    own, new = state_of(tmp_path / "own"), state_of(tmp_path / "new")
    assert index["weight_map"].keys() == new.keys() == own.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in own.values())
    assert all(torch.equal(own[n], new[n]) and own[n].dtype == new[n].dtype for n in own)
    ignored = {"_name_or_path", "architectures", "dtype", "transformers_version"}
    before, after = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("own", "new"))
    assert {k: v for k, v in before.items() if k not in ignored} == {k: v for k, v in after.items() if k not in ignored}
    assert before.get("architectures") == after.get("architectures")
    wanted = outputs(model, method, kwargs)
    assert equal(outputs(loaded(model, tmp_path / "new"), method, kwargs), wanted)
    assert equal(outputs(m, method, kwargs), wanted)
    with pytest.raises(PlannerError, match=r"has a checkpoint already \(\S+\), which may be read from; save to a new folder"):
        p.save_sharded(tmp_path / "own")


def test_planned_again(tmp_path: Path) -> None:
    model = saved(bert, tmp_path / "own")
    method, kwargs = call_of(model)
    p = plan(tmp_path / "own", "1GB", kwargs=kwargs, device="accounting", **EXACT)
    p.save_sharded(tmp_path / "new")  # before it is built: from the checkpoint
    assert [path.name for path in (tmp_path / "new").glob("*.safetensors*")] == ["model.safetensors"]
    q = plan(tmp_path / "new", "1GB", kwargs=kwargs, device="cpu", **EXACT)
    assert equal(outputs(q.build(), method, kwargs), outputs(model, method, kwargs))


@pytest.mark.parametrize("device", ["cpu", "accounting"])
def test_what_was_written_since_is_saved(tmp_path: Path, device: str) -> None:
    """Weights changed in place, and state that the program writes."""
    module = Counter().eval()
    m: Any = plan(module, "1GB", inputs=(x(),), device=device).build()
    m(x())
    with torch.no_grad():
        next(module.parameters()).add_(1)
    m(x())
    m.save_sharded(tmp_path / "new")
    state = load_file(tmp_path / "new" / "model.safetensors")
    assert state["count"].item() == 2
    assert state.keys() == module.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in m.state_dict().items())
    m.close()
    other = Counter()
    load_model(other, tmp_path / "new" / "model.safetensors")
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())


def test_weights_of_a_file_that_were_written_in_place(tmp_path: Path) -> None:
    saved(bert, tmp_path / "own", shard="1GB")
    content = (tmp_path / "own" / "model.safetensors").read_bytes()
    m: Any = plan(tmp_path / "own", "1GB", device="cpu", **EXACT).build()
    kwargs = {"input_ids": torch.ones(1, 16, dtype=torch.int64)}
    with torch.no_grad():
        m.pooler.dense.bias.fill_(0.5)
    outputs(m, "forward", kwargs)
    m.save_sharded(tmp_path / "new")
    assert (load_file(tmp_path / "new" / "model.safetensors")["pooler.dense.bias"] == 0.5).all()
    assert (tmp_path / "own" / "model.safetensors").read_bytes() == content


def test_tied_weights_of_a_module_of_no_library(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(x))

    module = Tied().eval()
    p = plan(module, "1GB", inputs=(torch.arange(3),), device="accounting")
    p.save_sharded(tmp_path / "new")
    with safe_open(tmp_path / "new" / "model.safetensors", "pt") as file:
        assert list(file.keys()) == ["table.weight"]
        assert file.metadata() == {"format": "pt", "head.weight": "table.weight"}
    other = Tied()
    load_model(other, tmp_path / "new" / "model.safetensors")
    assert torch.equal(other.head.weight, module.table.weight)


class TestCasts:
    """What is stored in a smaller type is written as it was, or as it is stored."""

    @staticmethod
    def wide() -> nn.Module:
        sizes = {**T5, "d_model": 128, "d_ff": 256, "d_kv": 32, "num_heads": 4, "num_layers": 2}
        return T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **sizes))

    @pytest.mark.parametrize(
        ("device", "cast", "dtype"), [("cpu", "float8_e4m3fn", "float32"), ("accounting", "int8", "bfloat16")]
    )
    def test_both_forms(self, tmp_path: Path, device: str, cast: str, dtype: str) -> None:
        model = saved(self.wide, tmp_path / "own")
        kwargs = {"input_ids": torch.arange(16).view(1, 16)}
        # Copies take longer than the arithmetic.
        slow = replace(
            Machine.preset("rtx-4090"), name="slow", link_latency_seconds=1e-7, launch_seconds=1e-7, link_bandwidth=1e9,
            disk_bandwidth=1e7,
        )  # fmt: skip
        options: dict[str, Any] = {
            "kwargs": kwargs,
            "device": device,
            "machine": slow,
            "dtype": dtype,
            "allow_cast": cast,
            "allow": ("offload", "cast"),
        }
        budget = int(0.45 * sum(p.numel() for p in model.parameters()) * getattr(torch, dtype).itemsize)
        p = plan(tmp_path / "own", budget, **options)
        assert p.cast_count > 0
        m: Any = p.build()
        wanted = outputs(m, "forward", kwargs)
        m.save_sharded(tmp_path / "original", "200KB")
        own = state_of(tmp_path / "own")
        new = state_of(tmp_path / "original")
        assert new.keys() == own.keys()
        assert all(torch.equal(new[name], own[name].to(getattr(torch, dtype))) for name in own)
        m.save_sharded(tmp_path / "stored", "200KB", stored=True)
        stored = state_of(tmp_path / "stored")
        values = [name for name in stored if ":values:" in name]
        assert len(values) == p.cast_count
        assert all(stored[name].dtype == getattr(torch, cast) for name in values)
        assert all(name.replace(":values:", ":scales:") in stored and name.partition(":")[0] not in stored for name in values)
        assert sum(t.nbytes for t in stored.values()) < sum(t.nbytes for t in new.values())
        again = plan(tmp_path / "stored", budget, **options).build()
        assert equal(outputs(again, "forward", kwargs), wanted)
        if dtype == "float32":  # where nothing is cast, it is cast back
            back = plan(tmp_path / "stored", "1GB", **{**options, **EXACT, "allow_cast": None}).build()
            (got,), (near,) = outputs(back, "forward", kwargs), wanted
            assert torch.allclose(got, near, atol=1e-5)

    def test_before_it_is_built(self, tmp_path: Path) -> None:
        p = plan(Mlp().eval(), "1GB", inputs=(x(),), device="accounting")
        with pytest.raises(PlannerError, match=r"m = p\.build\(\), then m\.save_sharded\(folder, stored=True\)"):
            p.save_sharded(tmp_path / "new", stored=True)


class TestRefusals:
    @pytest.fixture
    def save(self) -> Callable[..., None]:
        return plan(Mlp().eval(), "1GB", inputs=(x(),), device="accounting").save_sharded

    def test_places(self, save: Callable[..., None], tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(PlannerError, match="that is a file; name a folder"):
            save(tmp_path / "file")
        with pytest.raises(PlannerError, match="no such folder above it"):
            save(tmp_path / "no" / "such")
        with pytest.raises(BudgetError, match="max_shard_size"):
            save(tmp_path / "new", "large")
        save(tmp_path / "new")
        with pytest.raises(PlannerError, match=r"has a checkpoint already \(model\.safetensors\)"):
            save(tmp_path / "new")
        (tmp_path / "notes").mkdir()
        (tmp_path / "notes" / "readme.txt").write_text("mine")
        save(str(tmp_path / "notes"), 100)
        assert (tmp_path / "notes" / "readme.txt").read_text() == "mine"
        assert len(list((tmp_path / "notes").glob("*.safetensors"))) > 1
        assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "new", "notes"]

    def test_no_values(self, tmp_path: Path) -> None:
        with pytest.raises(PlannerError, match=r"the weight 'norm\.weight' has no values here: build the plan first"):
            plan(Mlp().to("meta").eval(), "1GB", inputs=(x(),), device="accounting").save_sharded(tmp_path / "new")

    def test_too_little_room(self, save: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100})())
        with pytest.raises(StoreError, match="has 100 B free; save elsewhere"):
            save(tmp_path / "new")
        assert not list(tmp_path.iterdir())

    def test_a_disk_that_fills_leaves_nothing(
        self, save: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        own, calls = os.fsync, []

        def full(fd: int) -> None:
            calls.append(fd)
            if len(calls) == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            own(fd)

        monkeypatch.setattr(os, "fsync", full)
        (tmp_path / "there").mkdir()
        for name in ("new", "there"):
            calls.clear()
            with pytest.raises(StoreError, match=r"cannot write .*model-00002-of-\d+\.safetensors: No space left on device"):
                save(tmp_path / name, 100)
        assert [path.name for path in tmp_path.iterdir()] == ["there"]
        assert not list((tmp_path / "there").iterdir())
