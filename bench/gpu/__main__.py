"""Measure rounds of large models on one GPU: times of their parts, speed-up, and distance from the memory bandwidth.

    python -m bench.gpu
    python -m bench.gpu --shapes llama-3.1-8b --points 32x8000,8x64000 --gamma 4 --json gpu.json
    python -m bench.gpu --terms vegas --json vegas.json

Weights are random, in the shapes of known models, and the KV cache is filled at random: speed depends on neither. With
random weights no draft would be accepted, so each draft is accepted at random with probability --synthetic-acceptance;
every line of the table notes it.

--terms vegas: the terms on which others have published (bench/paper/vegas_terms.py), with their numbers beside. Drafts
read KV by each policy that has a number of tokens per round there, and are accepted as often. Points then are upper
bounds: as many rows as fit.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from bench.corpus import BenchError
from bench.format_flags import USUAL_FORMATS, FormatFlags, add_format_flags, read_format_flags
from bench.gpu.gpu_report import GpuReport, device_state, table
from bench.gpu.gpu_rounds import Bench, GpuResult, free_bytes
from bench.micro.bandwidth import copy_bandwidth
from bench.paper import vegas_terms
from bench.paper.vegas_terms import TERMS, TermsLine, terms_budget
from engine.oom import OutOfMemory, is_out_of_memory
from engine.worker.kernels import choose_ops
from models.known_shapes import SHAPES
from planner.cost_model import acceptance_for

_SHAPES = ("llama-3.1-8b", "llama-2-7b-32k")
_POINTS = "32x8000,16x16000,8x32000,4x8000,8x8000,2x16000,8x2000,32x2000,128x2000,32x16000,16x32000,8x64000"
"""What tells most comes first, in case the time ends. Of the 8B model 32x8000, 16x16000 and 8x32000 fit into 80 GB, of
the 7B model, whose KV takes four times as much, 4x8000, 8x8000 and 2x16000."""
_CPU_BYTES = 8 << 30


class Program:
    """One run. Measures point after point until its time is over."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._terms = TERMS.get(arguments.terms)
        self._device = torch.device(arguments.device)
        self._began = time.monotonic()
        cuda = self._device.type == "cuda"
        self._shapes = arguments.shapes or (self._terms.shapes if self._terms else _SHAPES)
        head_dims = [SHAPES[shape].head_dim for shape in self._shapes]
        self._formats = FormatFlags("dense", "same") if self._terms else read_format_flags(arguments)
        kv_format = self._formats.kv
        self._ops = ops = choose_ops(arguments.kernels, self._device, torch.bfloat16, head_dims, kv_format=kv_format)
        if missing := self._formats.missing(ops.weight_formats):
            raise BenchError(f"{ops.kind} kernels do not multiply by {missing[0]} weights")
        if kv_format not in ops.kv_formats:
            raise BenchError(f"{ops.kind} kernels do not read {kv_format} KV")
        ceiling = copy_bandwidth(self._device, size=2 << 30 if cuda else 1 << 28)
        self._graphs = ops.make_graphs is not None and not arguments.no_graphs
        name = torch.cuda.get_device_name(self._device) if cuda else "CPU"
        if cuda:
            name += f" with {torch.cuda.get_device_properties(self._device).total_memory / 1e9:.1f} GB"
        graphs = "with" if self._graphs else "no"
        about = f"{name}, torch {torch.__version__}, kernels {ops.name}, {graphs} CUDA graphs, bfloat16"
        self.report = GpuReport(about, ceiling, arguments.json)
        _say(about)

    def run(self) -> None:
        """Measure all shapes at all points."""
        arguments, terms = self._arguments, self._terms
        _say(table([]))  # the head of lines to come
        if terms is None:
            for shape in self._shapes:
                points, alpha = arguments.points or _read_points(_POINTS), arguments.synthetic_acceptance
                self._measure(shape, points, alpha, gamma=arguments.gamma, budget=arguments.budget)
            return
        for shape in self._shapes:
            for max_rows, context in arguments.points or [(terms.max_rows, terms.context)]:
                for policy, tokens in terms.tokens.items():
                    self._measure(
                        shape,
                        [(rows, context) for rows in range(max_rows, 0, -1)],
                        acceptance_for(terms.gamma, tokens),
                        gamma=terms.gamma,
                        policy=policy,
                        budget=terms_budget(context),
                        temperature=terms.temperature,
                        largest=True,
                    )

    def show(self) -> None:
        """Print what has been measured."""
        report, terms = self.report, self._terms
        drafts = "" if terms else f"; drafts read {self._arguments.budget} tokens"
        print("\n".join([*report.notes, f"{report.about}{drafts}"]))
        print(f"{report.ceiling / 1e9:.0f} GB/s in a copy; floors are bytes over this rate\n")
        print(table(report.results))
        if terms is not None:
            print("\n" + vegas_terms.table(_terms_lines(report.results), terms.setting))

    def _measure(
        self,
        shape: str,
        points: Sequence[tuple[int, int]],
        alpha: float,
        *,
        gamma: int,
        budget: int,
        policy: str = "window",
        temperature: float = 0.0,
        largest: bool = False,
    ) -> None:
        """Measure a shape at all points that fit. alpha: synthetic acceptance. largest: only the first that fits."""
        name = shape if self._terms is None else f"{shape}, {policy}"
        if self._is_late():
            self._note(f"{name}: no time was left")
            return
        bench: Bench | None = None
        with self._noting_failures(name):
            bench = Bench(
                shape,
                SHAPES[shape],
                points,
                gamma=gamma,
                policy=policy,
                budget=budget,
                device=self._device,
                dtype=torch.bfloat16,
                ops=self._ops,
                memory=free_bytes(self._device) if self._device.type == "cuda" else _CPU_BYTES,
                temperature=temperature,
                rounds=self._arguments.rounds,
                cuda_graphs=self._graphs,
                only_first=largest,
                formats=self._formats,
            )
            # Of points that fall, only the last one that does not fit tells something.
            for rows, context, reason in bench.left_out[-1:] if largest else bench.left_out:
                self._note(f"{name}, {rows} x {context}: {reason}")
        if bench is not None:
            self._measure_points(bench, name, alpha)
            bench.close()
        self.report.save()

    def _measure_points(self, bench: Bench, name: str, alpha: float) -> None:
        results = self.report.results
        first = len(results)
        for rows, context in bench.points:
            if self._is_late():
                self._note(f"{name}, {rows} x {context}: no time was left")
                continue
            with self._noting_failures(f"{name}, {rows} x {context}"):
                results.append(bench.measure(rows, context, alpha=alpha, ceiling=self.report.ceiling))
                state = device_state(self._device)
                self.report.states.append(f"{name}, {rows} x {context}: {state}")
                _say(f"{table(results[-1:]).splitlines()[1]}  {state}")
            self.report.save()
        for index in range(first, len(results)):
            if not self._is_late():
                with self._noting_failures(f"{name}, idle times"):
                    results[index] = bench.observe_gaps(results[index])

    @contextmanager
    def _noting_failures(self, what: str) -> Iterator[None]:
        """Turn memory that does not suffice, and results that are no numbers, into a note: the next point may work."""
        try:
            yield
        except (RuntimeError, MemoryError, BenchError) as error:
            if not (isinstance(error, OutOfMemory | BenchError) or is_out_of_memory(error)):
                raise
            self._note(f"{what}: {type(error).__name__}: {str(error).splitlines()[0]}")

    def _is_late(self) -> bool:
        return time.monotonic() - self._began > float(self._arguments.seconds)

    def _note(self, text: str) -> None:
        self.report.notes.append(text)
        _say(text)


def _terms_lines(results: Sequence[GpuResult]) -> list[TermsLine]:
    return [
        TermsLine(
            shape=result.shape,
            rows=result.rows,
            context=result.context,
            policy=result.policy,
            tokens_per_round=result.accepted + 1,
            plain_tokens_per_second=result.plain_tokens_per_second,
            tokens_per_second=result.tokens_per_second,
            t_target_ms=result.t_target_ms,
            t_draft_ms=result.t_draft_ms,
            t_verify_ms=result.t_verify_ms,
            t_choose_ms=None,
        )
        for result in results
    ]


def main() -> int:
    arguments = _arguments()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device is present", file=sys.stderr)
        return 1
    logging.basicConfig(format="%(message)s")
    logging.getLogger("engine").setLevel(logging.INFO)  # time and memory of captured graphs, reasons for slow kernels
    try:
        program = Program(arguments)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    try:
        program.run()
    finally:
        program.show()
    return 0 if program.report.results else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measured = [name for name, terms in TERMS.items() if terms.shapes]
    parser.add_argument("--terms", choices=measured, help="measure on the terms of others, beside their numbers")
    parser.add_argument("--shapes", help=f"any of: {', '.join(SHAPES)}; {','.join(_SHAPES)} if not given")
    parser.add_argument("--points", help=f"ROWSxCONTEXT, comma-separated; skipped if too large; else {_POINTS}")
    parser.add_argument("--gamma", type=int, help="3 if not given")
    parser.add_argument("--budget", type=int, help="512 if not given")
    parser.add_argument("--synthetic-acceptance", type=float, metavar="ALPHA", help="0.8 if not given")
    parser.add_argument("--kernels", default="auto", choices=("auto", "flashinfer", "triton", "cpu", "reference"))
    add_format_flags(parser)
    parser.add_argument("--no-graphs", action="store_true", help="launch every kernel individually")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--seconds", type=float, default=300, help="start no further point after this many seconds")
    parser.add_argument("--json", type=Path, help="write results to this file, after each point")
    arguments = parser.parse_args()
    for name, usual in {"gamma": 3, "budget": 512, "synthetic_acceptance": 0.8}.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, usual)
        elif arguments.terms:
            parser.error(f"--terms {arguments.terms} sets --{name.replace('_', '-')}")
    if arguments.terms and read_format_flags(arguments) != USUAL_FORMATS:
        parser.error(f"--terms {arguments.terms} sets dense weights and KV")
    arguments.shapes = arguments.shapes.split(",") if arguments.shapes else None
    try:
        arguments.points = _read_points(arguments.points) if arguments.points else None
    except ValueError:
        parser.error("--points are ROWSxCONTEXT")
    if unknown := [shape for shape in arguments.shapes or () if shape not in SHAPES]:
        parser.error(f"--shapes: {unknown[0]!r} is not one of {', '.join(SHAPES)}")
    if not 0 <= arguments.synthetic_acceptance <= 1 or not 1 <= arguments.gamma <= 16 or arguments.rounds < 2:
        parser.error("--synthetic-acceptance is from 0 to 1, --gamma from 1 to 16, --rounds at least 2")
    return arguments


def _read_points(text: str) -> list[tuple[int, int]]:
    """Read (rows, context) of each ROWSxCONTEXT. Raises ValueError."""
    points = []
    for point in text.split(","):
        rows, context = map(int, point.split("x"))
        if min(rows, context) < 1:
            raise ValueError(point)
        points.append((rows, context))
    return points


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
