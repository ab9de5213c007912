"""The command line: what it prints, its JSON, its exit codes, and targets of every kind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel

from planner import Machine, Plan, PlannerError
from planner.cli import main
from planner.cli.parser import make_parser
from planner.cli.random_weights import RandomWeights
from planner.cli.run import require_host_memory
from planner.cli.targets import resolve
from planner.presets import Preset

FACTORIES = """
import torch
from torch import nn

class Mlp(nn.Module):
    def __init__(self, hidden=64):
        super().__init__()
        self.up, self.down = nn.Linear(8, hidden), nn.Linear(hidden, 8)
    def forward(self, x, scale=None):
        y = self.down(self.up(x).relu())
        return y if scale is None else y * scale
    def total(self):
        return self.up.weight.sum() + self.down.weight.sum()

class Branches(nn.Module):
    def forward(self, x):
        return x[: int(x.sum())]

def made(batch=2): return Mlp().eval(), (torch.ones(batch, 8),), {"scale": torch.ones(8)}
def on_meta():
    with torch.device("meta"):
        return Mlp().eval(), (torch.empty(2, 8),)
def bare(): return Mlp().eval()
def language():
    from transformers import LlamaConfig, LlamaForCausalLM
    config = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=99)
    return LlamaForCausalLM(config).eval(), (torch.full((1, 8), 7),), {"max_new_tokens": 4, "min_new_tokens": 4}
def training(): return Mlp(), (torch.ones(2, 8),)
def branches(): return Branches().eval(), (torch.ones(2),)
def raises(): raise ValueError("no weights here")
def wrong(): return 3, 4
number = 5
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints, as the libraries save them, and a module of factories."""
    root = tmp_path_factory.mktemp("models")
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=99, max_position_embeddings=16, **sizes)).save_pretrained(root / "bert")
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=sizes, vision_config=vision)).save_pretrained(root / "clip")
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    unet.half().conv_norm_out.float()
    unet.save_pretrained(root / "pipe" / "unet")  # nearly all of it in half precision
    AutoencoderKL(
        block_out_channels=(8, 8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=1,
        up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=8, sample_size=32,
    ).save_pretrained(root / "pipe" / "vae")  # fmt: skip
    AutoencoderKL(norm_num_groups=8, block_out_channels=(8,)).save_pretrained(root / "shallow")
    (root / "pipe" / "model_index.json").write_text("{}")
    for name, text in {"noclass": "{}", "broken": "{", "odd": '{"_class_name": "NoSuchModel"}'}.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(text)
    (root / "noconfig").mkdir()
    (root / "bare").mkdir()  # a config without weights that says no dtype
    config = json.loads((root / "pipe" / "unet" / "config.json").read_text())
    (root / "bare" / "config.json").write_text(json.dumps(config))
    (root / "cli_factories.py").write_text(FACTORIES)
    (root / "cli_broken.py").write_text("import no_such_package\n")
    return root


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder as the working directory, importable for one test."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return folder


def answer(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    code = main([*argv, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert err == ""
    return json.loads(out)


def test_plan_prints_the_plan(capsys: pytest.CaptureFixture[str], golden: Callable[[str, str], None]) -> None:
    assert main(["plan", "clip-l-text", "--budget", "160MB", "--machine", "rtx-3060"]) == 0
    golden("cli_plan", capsys.readouterr().out)


def test_presets(capsys: pytest.CaptureFixture[str], golden: Callable[[str, str], None]) -> None:
    assert main(["presets"]) == 0
    golden("cli_presets", capsys.readouterr().out)
    listed = answer(capsys, "presets")
    assert [entry["name"] for entry in listed] == list(Preset.names())
    assert listed[0]["sizes"]["height"] == {"default": "8 * sample_size", "step": 8, "offset": 0, "most": None}


def test_machines(capsys: pytest.CaptureFixture[str], golden: Callable[[str, str], None]) -> None:
    assert main(["machines"]) == 0
    golden("cli_machines", capsys.readouterr().out)
    assert [entry["name"] for entry in answer(capsys, "machines")] == list(Machine.names())


def test_save_show_load(capsys: pytest.CaptureFixture[str], tmp_path: Path, golden: Callable[[str, str], None]) -> None:
    path = tmp_path / "clip.json"
    argv = ["plan", "clip-l-text", "--budget", "200MB", "--machine", "rtx-4090", "-o", str(path), "--code"]
    data = answer(capsys, *argv)
    assert data["file"] == str(path)
    assert data["code"].startswith("# CLIPTextModel.forward: budget 200 MB")
    assert main(["show", str(path)]) == 0
    golden("cli_show", capsys.readouterr().out)
    assert answer(capsys, "show", str(path)) == json.loads(path.read_text())
    p = Plan.load(path, Preset.load("clip-l-text").module())
    assert (p.peak_bytes, p.code) == (data["peak_bytes"], data["code"])


def test_compare(capsys: pytest.CaptureFixture[str], here: Path, golden: Callable[[str, str], None]) -> None:
    assert main(["compare", "clip-l-text", "--budget", "160MB", "--machine", "rtx-3060", "--repeats", "2"]) == 0
    golden("cli_compare", capsys.readouterr().out)
    data = answer(capsys, "compare", "cli_factories:made", "--budget", "1MB", "--repeats", "2")
    assert (data["target"], data["repeats"], data["rows"][0]["policy"]) == ("cli_factories:made", 2, "vramplan")
    documented_by(capsys, "compare", {*data, *data["rows"][0]})


def test_frontier(capsys: pytest.CaptureFixture[str], here: Path, tmp_path: Path, golden: Callable[[str, str], None]) -> None:
    assert main(["frontier", "clip-l-text", "--machine", "rtx-3060", "--budgets", "80MB,160MB,300000000"]) == 0
    golden("cli_frontier", capsys.readouterr().out)
    argv = ["frontier", "cli_factories:made"]
    data = answer(capsys, *argv, "--points", "3", "--compare", "--plot", str(tmp_path / "curve.png"))
    assert [row["budget_bytes"] for row in data["rows"]][::2] == [data["minimum_bytes"], data["resident_bytes"]]
    assert data["budget_bytes"] is None
    assert data["file"] == str(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").exists()
    documented_by(capsys, "frontier", {*data, *data["rows"][0]})


def documented_by(capsys: pytest.CaptureFixture[str], command: str, fields: set[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    documented = capsys.readouterr().out
    assert all(field in documented for field in fields)


def test_json_is_documented(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    data = answer(capsys, "plan", "cli_factories:made", "--budget", "1MB", "--batch", "3", "--code", "-o", str(here / "p.json"))
    assert data["inputs"] == {"args[0]": "f32[3, 8]", "scale": "f32[8]"}
    assert data["peak_bytes"] <= data["reserved_bytes"] <= data["budget_bytes"] == 10**6
    assert sum(data["peak_parts"].values()) == data["peak_bytes"]
    ran = answer(capsys, "run", "cli_factories:made", "--budget", "1MB")
    for command, fields in (("plan", data), ("run", ran), ("run", ran["measured"]), ("presets", Preset.names() and {"sizes"})):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        documented = capsys.readouterr().out
        assert all(field in documented for field in fields)


def test_help_names_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert "  3  infeasible" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("target", "weights"),
    [("bert", "checkpoint"), ("pipe/unet", "checkpoint"), ("cli_factories:made", "factory"),
     ("cli_factories:on_meta", "random"), pytest.param("pipe/vae", "checkpoint", marks=pytest.mark.slow)],
)  # fmt: skip
def test_run_measures_what_was_predicted(capsys: pytest.CaptureFixture[str], here: Path, target: str, weights: str) -> None:
    least = answer(capsys, "plan", target, "--budget", "1GB", "--device", "accounting")["minimum_bytes"]
    data = answer(capsys, "run", target, "--budget", str(least), "--device", "accounting", "--calls", "3")
    assert data["weights"] == weights
    assert data["measured"]["peak_bytes"] == data["plan"]["peak_bytes"] == least
    padding = data["measured"]["copied_bytes"] - data["plan"]["streamed_bytes"] - data["plan"]["band_bytes"]
    assert 0 <= padding < 64 * 200  # up to an alignment per weight
    assert data["plan"]["streamed_bytes"] > 0
    assert data["measured"]["calls"] == len(data["call_seconds"]) == 3


def test_generations_are_planned_and_run(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    ask = ("cli_factories:language", "--method", "generate", "--budget", "1MB", "--device", "accounting")
    data = answer(capsys, "plan", *ask, "-o", str(here / "language.json"))
    assert data["program"] == "LlamaForCausalLM.generate"
    assert sum(data["peak_parts"].values()) == data["peak_bytes"]
    assert answer(capsys, "run", *ask, "--calls", "1")["measured"]["peak_bytes"] == data["peak_bytes"]
    assert main(["show", str(here / "language.json")]) == 0
    assert "  phase     decode" in capsys.readouterr().out.splitlines()


def test_run_prints_a_table(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    assert main(["run", "cli_factories:made", "--budget", "1MB", "--calls", "1", "--device", "accounting"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[0] == "Mlp.forward on accounting, planned for cpu: call 1, factory weights"
    peak = next(row.split() for row in rows if row.startswith("  peak"))
    assert peak[1] == peak[3]  # predicted, measured


def test_folders_take_sizes_and_dtype(here: Path) -> None:
    target = resolve("pipe/unet", {"height": 128, "batch": 1})
    assert target.kwargs["sample"].shape == (1, 4, 16, 8)
    assert target.kwargs["sample"].dtype == torch.float16  # that of most weights
    assert resolve("pipe/vae").kwargs["z"].shape == (1, 4, 4, 4)
    assert resolve("bert").kwargs["input_ids"].shape == (1, 16)
    assert {p.dtype for p in resolve("bare", dtype="bfloat16").module.parameters()} == {torch.bfloat16}
    assert resolve("bare", dtype="bfloat16").load is None


def test_factories_take_methods(here: Path) -> None:
    with pytest.raises(PlannerError, match="too many positional"):
        resolve("cli_factories:on_meta", method="total")
    assert resolve("cli_factories:bare", method="total").args == ()


ERRORS: dict[str, tuple[str, int, str]] = {
    "no budget": ("plan bert", 2, "--budget"),
    "no command": ("", 2, "COMMAND"),
    "not a number": ("plan bert --budget 1GB --height tall", 2, "invalid int value: 'tall'"),
    "budget without unit": ("plan cli_factories:made --budget 6gigs", 2, "'gigs'"),
    "budget below the minimum": ("plan cli_factories:made --budget 100", 3, "the least possible is"),
    "unknown preset": ("plan sdxl-unett --budget 1GB", 2, "did you mean sdxl-unet"),
    "nothing like it": ("plan qqq --budget 1GB", 2, "`vramplan presets` lists the presets"),
    "unknown folder": ("plan no/such --budget 1GB", 2, "no folder 'no/such'"),
    "pipeline": ("plan pipe --budget 1GB", 2, "model_index.json' names no class of a pipeline"),
    "pipeline of another command": ("run pipe --budget 1GB", 2, "are for one model, such as its components:\n  pipe/unet"),
    "call of a model": ("plan bert --budget 1GB --call prompt=x", 2, "--call is for folders of whole pipelines"),
    "a file": ("plan bert/config.json --budget 1GB", 2, "is a file; give the folder"),
    "no config": ("plan noconfig --budget 1GB", 2, "no config.json in 'noconfig'"),
    "no class": ("plan noclass --budget 1GB", 2, "names no class"),
    "broken config": ("plan broken --budget 1GB", 2, "cannot be read"),
    "unknown class": ("plan odd --budget 1GB --dtype float32", 2, "no model class 'NoSuchModel'"),
    "several modalities": ("plan clip --budget 1GB", 2, "module:factory"),
    "another latent scale": ("plan shallow --budget 1GB", 2, "the inputs of AutoencoderKL in 'shallow' are not known"),
    "unknown dtype of a folder": ("plan bare --budget 1GB", 2, "add --dtype bfloat16"),
    "wrong size": ("plan sd15-unet --budget 1GB --height 500", 2, "write height=496 or height=504"),
    "size that is not there": ("plan bert --budget 1GB --frames 3", 2, "its sizes are batch, tokens"),
    "another method": ("plan pipe/vae --budget 1GB --method encode", 2, "of 'decode' are known, not those of 'encode'"),
    "unknown machine": ("plan cli_factories:made --budget 1GB --machine rtx-4080", 2, "rtx-4090"),
    "unknown device": ("plan cli_factories:made --budget 1GB --device tpu", 2, "no device 'tpu'"),
    "no such module": ("plan cli_nowhere:f --budget 1GB", 2, "cannot be imported"),
    "module that fails": ("plan cli_broken:f --budget 1GB", 2, "no_such_package"),
    "no such factory": ("plan cli_factories:nothing --budget 1GB", 2, "no callable 'nothing'"),
    "not callable": ("plan cli_factories:number --budget 1GB", 2, "no callable 'number'"),
    "factory that raises": ("plan cli_factories:raises --budget 1GB", 2, "ValueError: no weights here"),
    "factory of nothing": ("plan cli_factories:wrong --budget 1GB", 2, "returned int, int"),
    "factory without inputs": ("plan cli_factories:bare --budget 1GB", 2, "return (module, (x,))"),
    "factory without sizes": ("plan cli_factories:bare --budget 1GB --height 8", 2, "cannot be called with --height 8"),
    "dtype of a factory": ("plan cli_factories:made --budget 1GB --dtype float16", 2, "--dtype is for presets and folders"),
    "method of a factory": ("plan cli_factories:made --budget 1GB --method fly", 2, "has no method 'fly'"),
    "training": ("plan cli_factories:training --budget 1GB", 2, "module.eval()"),
    "data decides": ("plan cli_factories:branches --budget 1GB", 4, "how many bytes its Python takes depends on values"),
    "no calls": ("run cli_factories:made --budget 1GB --calls 0", 2, "--calls 2"),
    "calls in a row": ("compare cli_factories:made --budget 1GB --repeats 0", 2, "write repeats=28"),
    "a frontier of one": ("frontier cli_factories:made --points 1", 2, "write points=12"),
    "budgets and points": ("frontier cli_factories:made --budgets 1MB --points 3", 2, "give one of them"),
    "budgets without unit": ("frontier cli_factories:made --budgets 1MB,6gigs", 2, "'gigs'"),
    "an image of no kind": ("frontier cli_factories:made --points 2 --plot curve.doc", 2, "write it as png, svg or pdf"),
    "no plan file": ("show no.json", 2, "cannot read the plan"),
    "another file": ("show bert/config.json", 2, "no plan file"),
    "no folder to write to": ("plan cli_factories:made --budget 1GB -o no/such/p.json", 2, "cannot write the plan"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_message_and_a_code(capsys: pytest.CaptureFixture[str], here: Path, case: str) -> None:
    command, code, message = ERRORS[case]
    try:
        found = main(command.split())
    except SystemExit as exit_:  # argparse
        found = exit_.code if isinstance(exit_.code, int) else -1
    out, err = capsys.readouterr()
    assert found == code
    assert message in err
    assert "Traceback" not in err
    assert out == ""


def test_errors_as_json(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    assert main(["plan", "cli_factories:made", "--budget", "100", "--json"]) == 3
    out, err = capsys.readouterr()
    data = json.loads(out)
    assert data["error"] in err
    assert (data["kind"], data["exit_code"], data["budget_bytes"]) == ("InfeasibleBudget", 3, 100)
    assert main(["plan", "cli_factories:made", "--budget", str(data["minimum_bytes"])]) == 0
    capsys.readouterr()
    assert main(["plan", "cli_factories:branches", "--budget", "1GB", "--json"]) == 4
    assert json.loads(capsys.readouterr().out)["kind"] == "UnknownSize"


def test_debug_shows_where(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    assert main(["plan", "cli_factories:raises", "--budget", "1GB", "--debug"]) == 2
    assert "in raises" in capsys.readouterr().err


def test_unexpected_errors_are_code_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(arguments: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("planner.cli.COMMANDS", {"machines": fail})
    assert main(["machines"]) == 1
    assert capsys.readouterr().err == "vramplan: ZeroDivisionError: a bug (unexpected; --debug shows where)\n"


def test_an_interrupt_is_no_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("planner.cli.COMMANDS", {"machines": stop})
    assert main(["machines"]) == 130
    assert capsys.readouterr().err == "vramplan: interrupted\n"


def test_the_commands_of_the_readme_exist() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    lines = [line.partition("#")[0].split() for line in readme.splitlines() if line.startswith("vramplan ")]
    assert len(lines) >= 5
    for line in lines:
        make_parser().parse_args(line[1:])


def test_weights_that_do_not_fit_the_host() -> None:
    target = resolve("clip-l-text")
    require_host_memory(target, available_bytes=300_000_000)
    with pytest.raises(PlannerError, match=r"take 246 MB of host memory, and 200 MB are free; `vramplan plan clip-l-text`"):
        require_host_memory(target, available_bytes=200_000_000)


def test_random_weights_fit_and_are_cheap() -> None:
    module = Preset.load("clip-l-text").module()
    weights = RandomWeights(module)
    storages = {}
    for name, parameter in module.named_parameters():
        value = weights[name]
        assert (value.shape, value.dtype) == (parameter.shape, parameter.dtype)
        storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    assert sum(storages.values()) < 16_000_000  # for 246 MB of weights
    matrix = weights["encoder.layers.0.mlp.fc1.weight"].float()
    assert torch.linalg.matrix_rank(matrix) == 768
    assert matrix.std() == pytest.approx(768**-0.5, rel=0.1)
    assert weights["final_layer_norm.weight"].float().mean() == pytest.approx(1, abs=0.01)
    assert len(weights) == len(list(weights))


def test_in_a_process_of_its_own(here: Path) -> None:
    command = [sys.executable, "-m", "planner.cli", "plan", "cli_factories:branches", "--budget", "1GB"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, cwd=here, env=environment, timeout=120, check=False)
    assert done.returncode == 4
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("vramplan: Branches.forward cannot be captured")
