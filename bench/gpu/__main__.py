"""Measure rounds of large models on one GPU: times of their parts, speed-up, and distance from the memory bandwidth.

    python -m bench.gpu
    python -m bench.gpu --shapes llama-3.1-8b --points 32x8000,8x64000 --gamma 4 --json gpu.json

Weights are random, in the shapes of known models, and the KV cache is filled at random: speed depends on neither. With
random weights no draft would be accepted, so each draft is accepted at random with probability --synthetic-acceptance;
every line of the table notes it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import msgspec
import torch

from bench.gpu.gpu_rounds import Bench, GpuResult
from bench.micro.bandwidth import copy_bandwidth
from engine.worker.kernels import choose_ops
from models.shapes import SHAPES

_POINTS = "8x2000,32x2000,128x2000,32x8000,32x16000,16x32000,8x64000"
_KEPT_BYTES = 6 << 30
"""Device memory reserved in addition to weights and KV: for activations, CUDA graphs and other allocations."""
_CPU_BYTES = 8 << 30


def table(results: Sequence[GpuResult]) -> str:
    head = ("rows", "context", "gamma", "T_T ms", "floor", "of it", "T_D ms", "T_V ms", "T_V/T_T", "round", "gap", "x")
    lines = ["".join(f"{name:>9}" for name in (*head, "x model"))]
    for each in results:
        gaps = "-" if each.gap_plain is None or each.gap is None else f"{each.gap_plain:.0%} {each.gap:.0%}"
        cells = (
            each.rows,
            each.context,
            each.gamma,
            f"{each.t_target_ms:.2f}",
            f"{each.floor_ms:.2f}",
            f"{each.floor_ms / each.t_target_ms:.0%}",
            f"{each.t_draft_ms:.2f}",
            f"{each.t_verify_ms:.2f}",
            f"{each.t_verify_ms / each.t_target_ms:.2f}",
            f"{each.t_round_ms:.2f}",
            gaps,
            f"{each.speedup:.2f}",
            f"{each.predicted:.2f}",
        )
        said = f"  {each.shape}, synthetic acceptance {each.alpha:g} (came to {each.accepted:.2f} tokens)"
        lines.append("".join(f"{cell:>9}" for cell in cells) + said)
    return "\n".join(lines)


def main() -> int:
    arguments, points = _arguments()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device is present", file=sys.stderr)
        return 1
    began, cuda = time.monotonic(), device.type == "cuda"
    shapes = [SHAPES[shape] for shape in arguments.shapes.split(",")]
    ops = choose_ops(arguments.kernels, device, torch.bfloat16, [shape.head_dim for shape in shapes])
    ceiling = copy_bandwidth(device, size=2 << 30 if cuda else 1 << 28)
    name = torch.cuda.get_device_name(device) if cuda else "CPU"
    graphs = ops.graphs is not None and not arguments.no_graphs
    about = f"{name}, torch {torch.__version__}, kernels {ops.name}, {'with' if graphs else 'no'} CUDA graphs, bfloat16"
    print(about, file=sys.stderr)
    results: list[GpuResult] = []
    notes: list[str] = []
    for shape in arguments.shapes.split(","):
        bench = Bench(
            shape,
            SHAPES[shape],
            points,
            gamma=arguments.gamma,
            budget=arguments.budget,
            device=device,
            dtype=torch.bfloat16,
            ops=ops,
            memory=torch.cuda.mem_get_info(device)[0] - _KEPT_BYTES if cuda else _CPU_BYTES,
            rounds=arguments.rounds,
            cuda_graphs=graphs,
        )
        notes += [f"{shape}, {rows} x {context}: does not fit" for rows, context in bench.left_out]
        for rows, context in bench.points:
            if time.monotonic() - began > arguments.seconds:
                notes.append(f"{shape}, {rows} x {context}: no time was left")
                continue
            results.append(bench.measure(rows, context, alpha=arguments.synthetic_acceptance, ceiling=ceiling))
            print(table(results[-1:]).splitlines()[1], file=sys.stderr, flush=True)
        bench.close()
    if arguments.json:
        said = {"device": about, "copy_bandwidth": ceiling, "results": [asdict(result) for result in results]}
        arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(said), indent=2))
    print("\n".join([*notes, f"{about}; drafts read {arguments.budget} tokens"]))
    print(f"{ceiling / 1e9:.0f} GB/s in a copy; floors are bytes over this rate\n")
    print(table(results))
    return 0


def _arguments() -> tuple[argparse.Namespace, list[tuple[int, int]]]:
    """Parse the command line. Returns the arguments, and the points as (rows, context)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="llama-3.1-8b,llama-2-7b-32k", help=f"any of: {', '.join(SHAPES)}")
    parser.add_argument("--points", default=_POINTS, help="ROWSxCONTEXT, comma-separated; skipped if too large")
    parser.add_argument("--gamma", type=int, default=3)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--synthetic-acceptance", type=float, default=0.8, metavar="ALPHA")
    parser.add_argument("--kernels", default="auto", choices=("auto", "flashinfer", "triton", "cpu", "reference"))
    parser.add_argument("--no-graphs", action="store_true", help="launch every kernel individually")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--seconds", type=float, default=300, help="start no further point after this many seconds")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    try:
        points = []
        for point in arguments.points.split(","):
            rows, context = map(int, point.split("x"))
            if min(rows, context) < 1:
                raise ValueError
            points.append((rows, context))
    except ValueError:
        parser.error("--points are ROWSxCONTEXT")
    if unknown := [shape for shape in arguments.shapes.split(",") if shape not in SHAPES]:
        parser.error(f"--shapes: {unknown[0]!r} is not one of {', '.join(SHAPES)}")
    if not 0 <= arguments.synthetic_acceptance <= 1 or not 1 <= arguments.gamma <= 16 or arguments.rounds < 1:
        parser.error("--synthetic-acceptance is from 0 to 1, --gamma from 1 to 16, --rounds at least 1")
    return arguments, points


if __name__ == "__main__":
    sys.exit(main())
