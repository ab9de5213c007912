"""The command line and folders of whole pipelines: planned, saved and shown; what they do not have is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from planner import PipelinePlan, Plan, PlanFileError, PlannerError
from planner.cli import main
from tests.pipelines import PIPELINES
from tests.planner.toys import Mlp, planned, x

CALL = ["--call", "num_inference_steps=3", "--height", "32", "--width", "32", "--call", "output_type=pt"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipe, _ = PIPELINES["StableDiffusion"]()
    root = tmp_path_factory.mktemp("shell") / "sd"
    pipe.save_pretrained(root)
    return root


def test_a_pipeline_is_planned_saved_and_shown(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "sd.json")
    plan = ["plan", str(folder), "--budget", "400KB", "--device", "accounting", "--machine", "rtx-4090", *CALL]
    assert main([*plan, "--json", "-o", out]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["program"] == "StableDiffusionPipeline"
    assert data["call"] == {
        "num_inference_steps": 3, "height": 32, "width": 32, "output_type": "pt", "prompt": "a photograph"
    }  # fmt: skip
    assert data["minimum_bytes"] <= data["reserved_bytes"] <= data["budget_bytes"] == 400_000
    assert [(part["name"], part["calls"]) for part in data["parts"]] == [
        ("text_encoder.forward", 2),
        ("unet.forward", 3),
        ("vae.decode", 1),
    ]
    assert data["step_seconds"] == pytest.approx(sum(part["seconds"] for part in data["parts"]))
    assert main(["show", out]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("StableDiffusionPipeline on accounting, planned for rtx-4090\n  budget    400 KB")
    assert "part      unet.forward, stays for:" in shown
    again = PipelinePlan.load(out, folder)
    assert (again.peak_bytes, again.step_seconds) == (data["peak_bytes"], data["step_seconds"])
    assert [each.to_json() for each in again.early] == [
        {**each, "pieces": tuple(map(tuple, each["pieces"]))} for each in data["early"]
    ]
    with pytest.raises(PlanFileError, match=r"is the plan of a whole pipeline: PipelinePlan\.load\(path, pipe\)"):
        Plan.load(out, folder)
    with pytest.raises(PlanFileError, match="is the plan of a whole pipeline"):
        Plan.load(out, folder / "unet")


def test_the_plan_of_a_model_is_no_pipelines(folder: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "mlp.json")
    planned(Mlp(), x()).save(out)
    with pytest.raises(PlanFileError, match=r"is the plan of one model, not of a whole pipeline: Plan\.load"):
        PipelinePlan.load(out, folder)
    with pytest.raises(PlannerError, match=r"the plan is for one model; give its folder:(.|\n)*Plan\.load\(path, '.*/vae'\)"):
        Plan.load(out, folder)


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--method", "decode"], 2, "--method is for one model, and"),
        (["--repeats", "28"], 2, "--repeats is for one model, and"),
        (["--opaque-bytes", "1MB"], 2, "--opaque-bytes is for one model, and"),
        (["--tokens", "9"], 2, "--tokens is for one model, and"),
        (["--batch", "2"], 2, "write --call num_images_per_prompt=2"),
        (["--frames", "9"], 2, "is not called with num_frames; it takes prompt, height, width"),
        (["--call", "colour=1"], 2, "is not called with colour; it takes prompt"),
        (["--call", "prompt"], 2, "--call takes NAME=VALUE"),
        (["--machine", "rtx-4080"], 2, "rtx-4090"),
        (CALL, 3, "the least possible is"),
    ],
    ids=str,
)
def test_what_cannot_be_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str], more: list[str], code: int, message: str
) -> None:
    assert main(["plan", str(folder), "--budget", "1KB", "--device", "accounting", *more]) == code
    out, err = capsys.readouterr()
    assert message in err
    assert out == ""
    assert "Traceback" not in err


def test_what_the_shell_cannot_give_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline"}))
    assert main(["plan", str(tmp_path), "--budget", "1GB"]) == 2
    assert "needs class_labels: write --call class_labels=VALUE" in capsys.readouterr().err
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "NoSuchPipeline"}))
    assert main(["plan", str(tmp_path), "--budget", "1GB"]) == 2
    assert "is a NoSuchPipeline, which diffusers" in capsys.readouterr().err
