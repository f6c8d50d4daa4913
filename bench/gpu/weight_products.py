"""Measure the matrix products of a decoder layer by format of weights and number of rows, beside dense ones by torch.

    python -m bench.gpu.weight_products
    python -m bench.gpu.weight_products --shape llama-2-7b-32k --formats int4,fp8 --rows 1,16,256

Each line has the time of all products of a layer, gates included, the bytes of weights per second, and how close that
is to copying as many bytes: the floor of few rows. "fp8, bfloat16 inputs" is weight-only where the device would
multiply fp8 by fp8 otherwise. Weights are random; two layers alternate, so that caches do not hold them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.micro.bandwidth import copy_bandwidth, wait
from engine.worker.kernels import choose_ops
from kernels.ops import Gate, Linear, Ops
from kernels.weights.weight_format import FORMATS
from models.config import ModelConfig
from models.known_shapes import SHAPES

_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_LAYERS = 2
_REPEATS = 5
_SECONDS = 0.02  # per measurement


@dataclass(frozen=True, slots=True)
class ProductLine:
    """Products of a layer. seconds: of one layer. nbytes: of its weights. floor: bytes per second of a copy."""

    format: str
    rows: int
    seconds: float
    nbytes: int
    floor: float
    dense_seconds: float

    def __str__(self) -> str:
        rate = self.nbytes / self.seconds
        return (
            f"{self.format:>22}{self.rows:>6}{self.seconds * 1e6:>10.1f}{self.nbytes / 1e6:>8.1f}"
            f"{rate / 1e9:>8.0f}{rate / self.floor:>8.0%}{self.dense_seconds / self.seconds:>8.2f}"
        )


HEAD = f"{'format':>22}{'rows':>6}{'us/layer':>10}{'MB':>8}{'GB/s':>8}{'of copy':>8}{'x dense':>8}"


def matrices(shape: ModelConfig) -> list[tuple[int, int, bool]]:
    """List the matrices of a layer: output features, input features, and whether they are gated."""
    heads, kv_heads = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    return [
        (heads + 2 * kv_heads, shape.hidden_size, False),
        (shape.hidden_size, heads, False),
        (2 * shape.intermediate_size, shape.hidden_size, True),
        (shape.hidden_size, shape.intermediate_size, False),
    ]


def make_layers(shape: ModelConfig, ops: Ops, format: str, device: torch.device) -> list[list[tuple[Linear, int]]]:
    """Make the products of a few layers, each with its number of input features."""
    layers: list[list[tuple[Linear, int]]] = []
    for _ in range(_LAYERS):
        layer = []
        for columns, features, gated in matrices(shape):
            weight = torch.randn(columns, features, dtype=torch.bfloat16, device=device) * features**-0.5
            gate: Gate | None = "silu" if gated else None
            layer.append((ops.linear(FORMATS[format].quantize(weight), None, gated=gate), features))
        layers.append(layer)
    return layers


def measure(layers: list[list[tuple[Linear, int]]], rows: int, ops: Ops, device: torch.device) -> float:
    """Measure the seconds that a layer takes, in a captured graph where the device has them: the best of a few."""
    inputs: dict[int, Tensor] = {}
    for _, features in layers[0]:
        inputs[features] = torch.randn(rows, features, dtype=torch.bfloat16, device=device)

    def work() -> None:
        for layer in layers:
            for linear, features in layer:
                linear(inputs[features])

    graphs = ops.make_graphs() if ops.make_graphs is not None else None
    run = graphs.capture(work) if graphs is not None else work
    try:
        count = max(1, round(_SECONDS / _timed(run, 1, device)))
        return min(_timed(run, count, device) for _ in range(_REPEATS)) / len(layers)
    finally:
        if graphs is not None:
            graphs.release()


def _timed(run: Callable[[], object], count: int, device: torch.device) -> float:
    run()
    wait(device)
    began = time.perf_counter()
    for _ in range(count):
        run()
    wait(device)
    return (time.perf_counter() - began) / count


def lines(
    shape: ModelConfig, kinds: Mapping[str, tuple[Ops, str]], rows: Sequence[int], device: torch.device, floor: float
) -> Iterator[ProductLine]:
    """Measure each kind of weights, those of "dense" first. kinds: kernels and format, by name."""
    dense: dict[int, float] = {}
    for name, (ops, format) in kinds.items():
        layers = make_layers(shape, ops, format, device)
        nbytes = sum(linear.nbytes for linear, _ in layers[0])
        for count in rows:
            seconds = measure(layers, count, ops, device)
            yield ProductLine(name, count, seconds, nbytes, floor, dense.setdefault(count, seconds))


def kinds_on(device: torch.device, formats: Sequence[str], kernels: Ops) -> dict[str, tuple[Ops, str]]:
    """List what is measured: dense weights and the given formats."""
    kinds = {name: (kernels, name) for name in ("dense", *formats) if name in kernels.weight_formats}
    if device.type == "cuda" and "fp8" in kinds:
        from kernels.gpu.cuda_graphs import CudaGraphs
        from kernels.gpu.gpu_ops import GpuOps
        from kernels.gpu.products.fp8_products import multiplies_fp8

        if multiplies_fp8(device, torch.bfloat16):
            kinds["fp8, bfloat16 inputs"] = GpuOps(make_recorder=partial(CudaGraphs, device)), "fp8"
    return kinds


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    dense = [name for name, shape in SHAPES.items() if shape.experts is None]
    parser.add_argument("--shape", default="llama-3.1-8b", choices=dense, help="default: %(default)s")
    parser.add_argument("--formats", default="int8,int4,fp8", help="comma-separated; default: %(default)s")
    parser.add_argument("--rows", default=",".join(map(str, _ROWS)), help="comma-separated; default: %(default)s")
    parser.add_argument("--kernels", default="auto", choices=("auto", "flashinfer", "triton", "cpu", "reference"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    options = parser.parse_args(arguments)
    formats = options.formats.split(",")
    if unknown := [name for name in formats if name not in FORMATS]:
        parser.error(f"--formats: {unknown[0]!r} is not one of {', '.join(FORMATS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device is present", file=sys.stderr)
        return 1
    device, shape = torch.device(options.device), SHAPES[options.shape]
    ops = choose_ops(options.kernels, device, torch.bfloat16, [shape.head_dim])
    floor = copy_bandwidth(device, size=2 << 30 if device.type == "cuda" else 1 << 28)
    print(f"{options.shape}, {ops.name}; a copy moves {floor / 1e9:.0f} GB/s\n{HEAD}")
    rows = [int(count) for count in options.rows.split(",")]
    for line in lines(shape, kinds_on(device, formats, ops), rows, device, floor):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
