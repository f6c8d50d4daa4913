"""Measure steps of the engine on a CPU beside other processes, and under a CPU quota.

    python -m bench.micro.neighbours --rows 1 --context 2048 --gamma 0

By turns: on the idle machine; with a process that keeps the first core busy; with one that the system places; and,
where a control group can be made, with a CPU quota. Engines run in processes of their own, because they count their
cores when they start: one without a quota for the first three, one with it.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from bench.corpus import BenchError
from bench.format_flags import USUAL_FORMATS, FormatFlags, add_format_flags, exits_on_error, read_format_flags
from bench.machine import CpuQuota, busy, describe_processor, first_cores
from bench.micro.blank_rounds import BlankRounds, cpu_config
from kernels.cpu.cpus import usable_cores


@dataclass(frozen=True, slots=True)
class Steps:
    """The steps to measure. turns: number of turns of each condition, of `steps` steps each."""

    model: str
    rows: int
    context: int
    gamma: int
    steps: int
    turns: int
    formats: FormatFlags = USUAL_FORMATS


@dataclass(slots=True)
class Times:
    """Milliseconds of the steps under one condition. threads: the engine's."""

    condition: str
    threads: int
    ms: list[float] = field(default_factory=list)

    def line(self, idle: float) -> str:
        """Format a line of the table. idle: the median on the idle machine."""
        ordered = sorted(self.ms)
        middle, ninetieth = median(ordered), ordered[math.ceil(0.9 * len(ordered)) - 1]
        columns = (middle, ninetieth, ordered[-1], middle / idle)
        return f"{self.condition:28}{self.threads:8}{''.join(f'{value:10.2f}' for value in columns)}"


def serve(pipe: Connection, steps: Steps, entry: Path | None) -> None:
    """Measure a turn for every message, until an empty one. entry: of a control group, entered first."""
    if entry is not None:
        entry.write_text("0", encoding="ascii")
    config = cpu_config(steps.model, steps.rows, steps.gamma, steps.formats)
    rounds = BlankRounds(config, steps.rows, steps.context, steps.gamma, steps.steps)
    pipe.send(torch.get_num_threads())
    while pipe.recv():
        rounds.restart()
        taken = []
        for _ in range(steps.steps):
            began = perf_counter()
            rounds.step()
            taken.append(1e3 * (perf_counter() - began))
        pipe.send(taken)
    rounds.close()


class Measured:
    """An engine in a process of its own."""

    def __init__(self, steps: Steps, quota: CpuQuota | None) -> None:
        """Start the engine. Raises BenchError if it does not start."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, steps, quota and quota.entry), daemon=True)
        self._process.start()
        theirs.close()
        self.threads: int = self._receive()

    def turn(self) -> list[float]:
        """Return the milliseconds of each step. Raises BenchError if the process ended."""
        self._pipe.send(True)
        taken: list[float] = self._receive()
        return taken

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._pipe.send(False)
        self._process.join()

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            raise BenchError("the engine's process ended") from None


def measure(steps: Steps, quota_cpus: float, say: Callable[[str], None]) -> list[Times]:
    """Measure all conditions, by turns. say: prints why one is left out."""
    with contextlib.ExitStack() as stack:
        free = stack.enter_context(contextlib.closing(Measured(steps, None)))
        first = first_cores(1)[0]
        conditions: list[tuple[Times, Measured, Sequence[int | None]]] = [
            (Times("idle", free.threads), free, []),
            (Times(f"a busy process on core {first}", free.threads), free, [first]),
            (Times("a busy process anywhere", free.threads), free, [None]),
        ]
        try:
            quota = stack.enter_context(CpuQuota(quota_cpus))
            limited = stack.enter_context(contextlib.closing(Measured(steps, quota)))
            conditions.append((Times(f"a quota of {quota_cpus:g} CPUs", limited.threads), limited, []))
        except BenchError as error:
            say(str(error))
        for _ in range(steps.turns):
            for times, engine, neighbours in conditions:
                with busy(neighbours):
                    times.ms += engine.turn()
    return [times for times, _, _ in conditions]


def table(steps: Steps, found: Sequence[Times]) -> str:
    """Format the times as text. found: those of the idle machine first."""
    idle = median(found[0].ms)
    lines = [
        f"{describe_processor()}; {usable_cores()} cores; {steps.rows} rows of {steps.context} tokens, "
        f"gamma {steps.gamma}; {steps.turns} turns of {steps.steps} steps",
        f"{'ms per step':28}{'threads':>8}{'median':>10}{'90 %':>10}{'max':>10}{'x idle':>10}",
    ]
    return "\n".join([*lines, *(times.line(idle) for times in found)])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--gamma", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20, help="steps of a turn")
    parser.add_argument("--turns", type=int, default=5, help="turns of each condition")
    parser.add_argument("--quota", type=float, help="quota in CPUs; default: half a CPU less than there are cores")
    add_format_flags(parser)
    given = parser.parse_args(arguments)
    if min(given.rows, given.context, given.steps, given.turns) < 1 or given.gamma < 0:
        parser.error("--rows, --context, --steps and --turns must be at least 1, --gamma at least 0")
    quota = usable_cores() - 0.5 if given.quota is None else given.quota
    flags = read_format_flags(given)
    steps = Steps(given.model, given.rows, given.context, given.gamma, given.steps, given.turns, flags)
    with exits_on_error():
        print(table(steps, measure(steps, quota, lambda line: print(line, file=sys.stderr))))


if __name__ == "__main__":
    main()
