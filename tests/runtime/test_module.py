"""A planned module behaves as the original, refuses what it cannot do, and lets go of everything at the end."""

from __future__ import annotations

import copy
import gc
import inspect
import json
import pickle
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from planner import plan
from runtime.errors import InputError, ModuleUnusable, PlannerError
from runtime.module import PlannedModule
from tests.planner.toys import Counter, Lookup, Mlp, planned, snapshot, x
from tests.zoo import ZOO


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, scale: float = 1.0, *, bias: Tensor | None = None) -> Tensor:
        """Scaled and shifted."""
        y = self.layer(x) * scale
        return y if bias is None else y + bias


def reference(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).eval()


class TestSurface:
    def test_signature_and_class(self) -> None:
        module = Keywords().eval()
        built = planned(module, x()).build()
        assert isinstance(built, Keywords)
        assert isinstance(built, PlannedModule)
        assert inspect.signature(built.forward) == inspect.signature(module.forward)
        assert inspect.signature(type(built).forward) == inspect.signature(Keywords.forward)
        assert built.forward.__doc__ == module.forward.__doc__
        assert built.forward.__name__ == "forward"

    def test_all_spellings_of_a_call_run_one_program(self) -> None:
        module = Keywords().eval()
        built = planned(module, x(), 2.0).build()
        wanted = module(x(), 2.0)
        for got in (built(x(), 2.0), built(x(), scale=2.0), built(x=x(), scale=2.0), built.forward(x(), 2.0)):
            assert torch.equal(got, wanted)
        assert len(built._runner.programs) == 1

    def test_attributes_pass_through(self) -> None:
        module = Counter().eval()
        built = planned(module, x()).build()
        assert built.scale == 2.0
        assert built.layer is module.layer
        assert built.training is False
        built.note = "mine"
        assert module.note == "mine"
        module.other = "yours"
        assert built.other == "yours"
        with pytest.raises(AttributeError):
            _ = built.nothing

    def test_attributes_that_the_program_reads_are_guarded(self) -> None:
        built = planned(Counter(), x()).build()
        built.scale = 5.0
        with pytest.raises(ModuleUnusable, match=r"an attribute of the module changed .*plan and build it again"):
            built(x())
        built.scale = 2.0
        built(x())

    def test_state_dict(self) -> None:
        module = Lookup().eval()
        before = {k: v.clone() for k, v in module.state_dict().items()}
        built = planned(module, torch.arange(4), least=True).build()
        after = built.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[k], v) for k, v in before.items())
        assert [n for n, _ in built.named_parameters()] == [n for n, _ in module.named_parameters()]
        assert built.head.weight is built.table.weight

    def test_parameters_keep_their_identity(self) -> None:
        module = Lookup().eval()
        before = {n: id(p) for n, p in module.named_parameters()}
        planned(module, torch.arange(4)).build()
        assert {n: id(p) for n, p in module.named_parameters()} == before

    @pytest.mark.parametrize("grad", [True, False])
    @pytest.mark.parametrize("least", [True, False])
    def test_weights_that_require_gradients(self, grad: bool, least: bool) -> None:
        """`matmul` folds a batch, and so rounds otherwise, where a weight requires gradients, also when none are recorded."""
        module = nn.Linear(32, 32).eval().requires_grad_(grad)
        values = torch.randn(2, 12, 32).transpose(0, 1)
        with torch.no_grad():
            wanted = module(values)
            built = planned(module, values, least=least).build()
            assert torch.equal(built(values), wanted)

    def test_runs_without_grad(self) -> None:
        built = planned(Mlp(), x()).build()
        value = x().requires_grad_()
        result = built(value)
        assert not result.requires_grad
        assert torch.is_grad_enabled()

    def test_root_hooks_run(self) -> None:
        module = Mlp().eval()
        built = planned(module, x()).build()
        wanted = module(x())
        handle = built.register_forward_hook(lambda m, args, out: out * 2)
        assert torch.equal(built(x()), wanted * 2)
        handle.remove()
        assert torch.equal(built(x()), wanted)

    @pytest.mark.parametrize(
        "action",
        [
            lambda m: m.to(torch.float64), lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to("meta"),
            lambda m: m.double(), lambda m: m.cpu(), lambda m: m.cuda(), lambda m: m.to_empty(device="cpu"),
        ],
    )  # fmt: skip
    def test_moving_and_casting_are_refused(self, action: Callable[[nn.Module], Any]) -> None:
        module = Mlp().eval()
        built = planned(module, x()).build()
        before = snapshot(module)
        with pytest.raises(ModuleUnusable, match=r"close\(\) it, move or cast the original, and plan again"):
            action(built)
        assert snapshot(module) == before

    def test_training_is_refused_and_eval_is_fine(self) -> None:
        built = planned(Mlp(), x()).build()
        with pytest.raises(ModuleUnusable, match="Train the original"):
            built.train()
        assert built.eval() is built
        assert built.train(False) is built
        assert not built.up.training

    @pytest.mark.parametrize("action", [copy.copy, copy.deepcopy, pickle.dumps, lambda m: torch.save(m, "/dev/null")])
    def test_copies_are_refused(self, action: Callable[[nn.Module], Any]) -> None:
        built = planned(Mlp(), x()).build()
        with pytest.raises(ModuleUnusable, match=r"m\.state_dict\(\)"):
            action(built)
        built(x())

    def test_the_original_can_be_copied_after_close(self) -> None:
        module = Mlp().eval()
        planned(module, x()).build().close()
        assert torch.equal(copy.deepcopy(module)(x()), module(x()))
        assert torch.equal(pickle.loads(pickle.dumps(module))(x()), module(x()))


class TestCalls:
    def test_new_signatures_share_the_arenas(self) -> None:
        module = Mlp(hidden=64).eval()
        made = planned(module, x(), least=True)
        made = made.replan(made.minimum_bytes + 1000)
        built = made.build()
        for rows in (3, 5, 2, 3, 5, 1, 2):
            assert torch.equal(built(x(rows)), module(x(rows)))
            assert built.report().peak_bytes <= made.budget_bytes
        assert len(built._runner.programs) == 4
        assert built.report().calls == 7

    def test_a_signature_that_does_not_fit_leaves_the_module_usable(self) -> None:
        module = Mlp().eval()
        built = planned(module, x(), least=True).build()
        with pytest.raises(PlannerError, match="the least possible is"):
            built(x(1000))
        assert torch.equal(built(x()), module(x()))

    def test_constants_that_depend_on_the_signature(self) -> None:
        class Rows(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(8, 8)

            def forward(self, x: Tensor) -> Tensor:
                y = self.layer(x)
                for row in range(x.shape[0]):
                    y = y + torch.tensor([float(row + x.shape[0])] * 8)
                return y

        module = Rows().eval()
        built = planned(module, x(2)).build()
        for rows in (2, 5, 3, 2, 5):
            assert torch.equal(built(x(rows)), module(x(rows)))

    def test_strides_of_inputs(self) -> None:
        module = Mlp().eval()
        built = planned(module, x()).build()
        turned = x(8).t().contiguous().t()
        assert torch.equal(built(turned), module(turned))

    def test_recursion_raises(self) -> None:
        built = planned(Mlp(), x()).build()
        seen: list[ModuleUnusable] = []

        class Again(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if func is torch.ops.aten.relu_.default:
                    with pytest.raises(ModuleUnusable, match="called from inside itself") as caught:
                        built(x())
                    seen.append(caught.value)
                return func(*args, **(kwargs or {}))

        with Again():
            built(x())
        assert len(seen) == 1
        built(x())

    @pytest.mark.parametrize("concurrent", ["wait", "raise"])
    def test_a_second_thread(self, concurrent: Any) -> None:
        module = Mlp().eval()
        built = planned(module, x()).build(concurrent=concurrent)
        wanted = module(x())
        inside, go_on = threading.Event(), threading.Event()
        results: list[Any] = []

        class Pause(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if func is torch.ops.aten.relu_.default:
                    inside.set()
                    assert go_on.wait(20)
                return func(*args, **(kwargs or {}))

        def first() -> None:
            with Pause():
                results.append(built(x()))

        def second() -> None:
            try:
                results.append(built(x()))
            except ModuleUnusable as error:
                results.append(error)

        threads = [threading.Thread(target=first), threading.Thread(target=second)]
        threads[0].start()
        assert inside.wait(20)
        threads[1].start()
        threads[1].join(0.2 if concurrent == "wait" else 20)
        assert threads[1].is_alive() == (concurrent == "wait")
        go_on.set()
        for thread in threads:
            thread.join(20)
        errors = [r for r in results if isinstance(r, ModuleUnusable)]
        assert len(errors) == (concurrent == "raise")
        assert all("concurrent='wait'" in str(e) for e in errors)
        assert all(torch.equal(r, wanted) for r in results if isinstance(r, Tensor))
        assert torch.equal(built(x()), wanted)

    def test_many_threads(self) -> None:
        module = Mlp().eval()
        wanted = {(rows, seed): module(x(rows, seed)) for rows in (3, 4) for seed in range(4)}
        built = planned(module, x()).build()
        wrong: list[int] = []

        def work(seed: int) -> None:
            for rows in (3, 4, 3):
                if not torch.equal(built(x(rows, seed)), wanted[rows, seed]):
                    wrong.append(seed)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not wrong

    @pytest.mark.parametrize("least", [False, True])
    def test_an_exception_inside_a_call(self, least: bool) -> None:
        module = Lookup().eval()
        made = planned(module, torch.arange(4), least=least)
        built = made.build()
        ids = torch.tensor([0, 3, 9, 10])
        wanted = module(ids)
        for _ in range(2):
            with pytest.raises(IndexError) as caught:
                built(torch.tensor([0, 3, 9, 99]))
            assert torch.equal(built(ids), wanted)
            assert built.report().peak_bytes == made.peak_bytes
        del caught

    def test_outputs_never_alias_an_arena(self) -> None:
        class Views(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(8, 8)
                self.register_buffer("count", torch.zeros(8))

            def forward(self, x: Tensor) -> Any:
                self.count.add_(1)
                return self.layer.weight, self.layer.weight.t()[1:], self.count, self.layer.bias.view(2, 4), self.layer(x)

        for least in (False, True):
            module = Views().eval()
            copied = reference(module)
            built = planned(module, x(), least=least).build()
            first, kept = built(x()), [t.clone() for t in copied(x())]
            built(x() * 2)
            built.close()
            assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))

    @pytest.mark.parametrize("least", [False, True])
    @pytest.mark.parametrize(
        "write",
        [
            lambda m: m.up.weight.mul_(2),
            lambda m: m.load_state_dict(Mlp().state_dict()),
            lambda m: [p.zero_() for p in m.parameters()],
            lambda m: nn.init.ones_(m.norm.weight),
        ],
    )
    def test_weights_written_in_place_are_seen(self, least: bool, write: Callable[[Any], Any]) -> None:
        module = Mlp().eval()
        built = planned(module, x(), least=least).build()
        built(x())
        with torch.no_grad():
            write(module)
        assert torch.equal(built(x()), module(x()))

    def test_constants_written_in_place_are_seen(self) -> None:
        module = Counter().eval()
        built = planned(module, x()).build()
        built(x())
        module.constant.mul_(3)
        module.count.zero_()
        copied = reference(module)
        assert torch.equal(built(x()), copied(x()))

    def test_exchanged_data_is_refused(self) -> None:
        module = Mlp().eval()
        built = planned(module, x()).build()
        module.up.weight.data = torch.zeros(16, 8)
        with pytest.raises(ModuleUnusable, match=r"'up\.weight' was exchanged .*p\.copy_"):
            built(x())

    def test_casting_the_original_is_noticed(self) -> None:
        module = Mlp().eval()
        built = planned(module, x()).build()
        module.half()
        with pytest.raises(ModuleUnusable):
            built(x())

    def test_inference_mode(self) -> None:
        module = Counter().eval()
        copied = reference(module)
        built = planned(module, x()).build()
        with torch.inference_mode():
            assert torch.equal(built(x(5)), copied(x(5)))
        with torch.no_grad():
            module.layer.weight.mul_(2)
            copied.layer.weight.mul_(2)
        assert torch.equal(built(x(5)), copied(x(5)))
        assert torch.equal(built(x()), copied(x()))

    def test_made_in_inference_mode(self) -> None:
        with torch.inference_mode():
            module = Counter().eval()
            built = planned(module, x(), least=True).build()
            first = built(x())
        again = built(x())
        assert torch.equal(again, first + 1)


class TestState:
    @pytest.mark.parametrize("least", [False, True])
    def test_written_through_and_kept(self, least: bool) -> None:
        module = Counter().eval()
        copied = reference(module)
        made = planned(module, x(), least=least)
        built = made.build()
        for calls, rows in enumerate((3, 2, 3, 1), 1):
            assert torch.equal(built(x(rows)), copied(x(rows)))
            assert module.count.item() == calls == built.count.item() == module.state_dict()["count"].item()
        built.close()
        assert module.count.item() == 4
        assert torch.equal(module(x()), copied(x()))

    def test_written_by_the_user(self) -> None:
        module = Counter().eval()
        built = planned(module, x()).build()
        built(x())
        module.count.fill_(41)
        built(x())
        assert module.count.item() == 42
        module.load_state_dict({**module.state_dict(), "count": torch.tensor(7.0)})
        built(x())
        assert module.count.item() == 8


class TestClose:
    def test_everything_goes(self) -> None:
        module = Counter().eval()
        wanted = reference(module)
        built = planned(module, x()).build()
        built(x())
        executor = built._runner.executor
        kept = [*executor._resident.buffers, executor._state["count"]]
        arenas = [weakref.ref(tensor.untyped_storage()) for tensor in kept]
        del kept
        assert all(ref() is not None for ref in arenas)
        built.close()
        gc.collect()
        assert [ref() for ref in arenas] == [None, None]
        built.close()
        with pytest.raises(ModuleUnusable, match="closed"):
            built(x())
        wanted(x())
        assert torch.equal(module(x()), wanted(x()))
        assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), wanted.state_dict().values(), strict=True))

    def test_restore_gives_the_original(self) -> None:
        module = Mlp().eval()
        before = snapshot(module)
        made = planned(module, x(), least=True)
        assert made.restore() is module
        made.build()(x())
        assert made.restore() is module
        assert snapshot(module) == before
        assert torch.equal(made.build()(x()), module(x()))
        module_again = made.restore()
        assert module_again.train().up.weight.requires_grad
        assert module_again.double()(x().double()).dtype == torch.float64

    def test_two_plans_one_after_the_other(self) -> None:
        module = Mlp().eval()
        wanted = module(x())
        for least in (True, False, True):
            made = planned(module, x(), least=least)
            assert torch.equal(made.build()(x()), wanted)
            made.restore()


class TestMeta:
    def sources(self, tmp_path: Path, kind: str, real: nn.Module) -> Any:
        state = {k: v.contiguous() for k, v in real.state_dict().items()}
        if kind == "module":
            return real
        if kind == "state dict":
            return state
        if kind == "single file":
            save_file(state, tmp_path / "model.safetensors")
            return tmp_path
        names = sorted(state)
        shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for file, members in shards.items():
            save_file({n: state[n] for n in members}, tmp_path / file)
        if kind == "sharded with index":
            index = {"metadata": {}, "weight_map": {n: file for file, members in shards.items() for n in members}}
            (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        return str(tmp_path)

    @pytest.mark.parametrize("kind", ["module", "state dict", "single file", "sharded", "sharded with index"])
    @pytest.mark.parametrize("least", [False, True])
    def test_build(self, tmp_path: Path, kind: str, least: bool) -> None:
        real = Mlp().eval()
        module = Mlp().to("meta").eval()
        before = snapshot(module)
        made = planned(module, x(), least=least)
        built = made.build(weights=self.sources(tmp_path, kind, real))
        assert torch.equal(built(x()), real(x()))
        assert all(torch.equal(a, b) for a, b in zip(built.state_dict().values(), real.state_dict().values(), strict=True))
        assert made.restore() is module
        assert snapshot(module) == before
        assert all(p.is_meta for p in module.parameters())

    def test_tied_weights_saved_once(self, tmp_path: Path) -> None:
        real, module = Lookup().eval(), Lookup().to("meta").eval()
        module.head.weight = module.table.weight
        state = real.state_dict()
        del state["head.weight"]
        save_file(state, tmp_path / "model.safetensors")
        built = planned(module, torch.arange(4), least=True).build(weights=tmp_path)
        assert torch.equal(built(torch.arange(4)), real(torch.arange(4)))
        assert built.head.weight is built.table.weight

    def test_state_and_other_dtypes(self) -> None:
        real, module = Counter().eval(), Counter().eval()
        module.to("meta")
        copied = reference(real)
        built = planned(module, x()).build(weights=real.double())
        for _ in range(2):
            assert torch.equal(built(x()), copied(x()))
        assert module.count.item() == 2
        built.close()
        assert module.count.is_meta

    def test_a_real_model_takes_other_weights(self) -> None:
        module, other = Mlp().eval(), Mlp().eval()
        built = planned(module, x()).build(weights=other)
        assert torch.equal(built(x()), other(x()))

    @pytest.mark.parametrize("name", ["bert", "lstm", "t5_encoder"])
    def test_models(self, name: str) -> None:
        real, args, kwargs = ZOO[name]()
        module = ZOO[name]()[0].to("meta")
        made = planned(module, *args, kwargs=kwargs, budget="1GB", least=True, allow=("offload",))
        built = made.build(weights=real)
        with torch.no_grad():  # with grad, eager may take other kernels
            got, wanted = built(*args, **kwargs), real(*args, **kwargs)
        for a, b in zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(wanted), strict=True):
            assert torch.equal(a, b)


def test_wrong_calls() -> None:
    built = planned(Mlp(), x()).build()
    with pytest.raises(InputError, match=r"forward\(x: "):
        built()
    with pytest.raises(InputError, match=r"x\.to\('cpu'\)"):
        built(x().to("meta"))
    with pytest.raises(PlannerError):
        built("text")
    built(x())


@pytest.mark.parametrize("step", ["pin", "enforce", "allocate"])
def test_a_build_that_fails_leaves_the_module_as_it_was(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Mlp().eval()
    expected = {name: value.clone() for name, value in module.state_dict().items()}
    p = planned(module, x())

    def refuse(*_: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr("runtime.devices.accounting.AccountingDevice." + step, refuse)
        with pytest.raises(RuntimeError, match="out of memory"):
            p.build()
    assert all(torch.equal(value, expected[name]) for name, value in module.state_dict().items())
    with torch.no_grad():
        wanted = module(x())
    assert torch.equal(p.build()(x()), wanted)


@pytest.mark.parametrize("device", ["accounting", "cpu"])
def test_a_tied_weight_that_only_a_later_program_reads(device: str) -> None:
    """The store had it under its first name, and the program knows it by the last."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Embedding(5, 4)
            self.inner = nn.Embedding(5, 4)
            self.inner.weight = self.shared.weight
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x if x.is_floating_point() else self.inner(x))

    module, x, ids = Tied().eval(), torch.randn(2, 4), torch.tensor([1, 4])
    expected = module(x).detach(), module(ids).detach()
    p = plan(module, "1MB", inputs=(x,), device=device)
    m = p.build()
    assert torch.equal(m(x), expected[0])
    assert torch.equal(m(ids), expected[1])
    with torch.no_grad():
        module.shared.weight.mul_(2)
    wanted = torch.nn.functional.linear(module.shared.weight[ids], module.layer.weight, module.layer.bias).detach()
    assert torch.allclose(m(ids), wanted)
    p.restore()
