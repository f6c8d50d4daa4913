"""Measure communication between ranks, with processes that load no model: broadcast of a plan, all-reduce, and
agreement that a round is finished."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import msgspec
import torch

from engine.plan import PageDelta, RoundPlan, RowWork
from parallel import rendezvous, shm
from parallel.channel import Channel, Disconnected, Link
from parallel.launch import RankProcesses
from parallel.rendezvous import Join, Transport

_ROUNDS = 300
_TIMEOUT_S = 60.0


class Task(msgspec.Struct):
    """Work of one rank process: answer _ROUNDS frames, all-reduce `floats` numbers as often, then agree as often."""

    join: Join
    floats: int


@dataclass(frozen=True, slots=True)
class BroadcastResult:
    """Medians in microseconds.

    send: encode a plan and pass it to the operating system; the cost of a round for rank 0. reached: from the start of
    send until every rank has decoded the plan and replied. shared, gloo: one all-reduce of a few rows, by transport;
    None where it is not available. agree: agreement that all ranks have finished a round, through shared memory; None
    without it.
    """

    ranks: int
    rows: int
    plan_bytes: int
    send: float
    reached: float
    shared: float | None
    gloo: float
    agree: float | None


def measure(ranks: int, rows: int, floats: int) -> BroadcastResult:
    """Measure all transports that this machine has.

    rows: rows of the plan, all decoding; one in 16 gets a page. floats: numbers per all-reduce.
    """
    work = [RowWork(row, 12_345, 1, 3, True) for row in range(rows)]
    plan = RoundPlan(123_456, [], [PageDelta(row, 700, [4321]) for row in range(0, rows, 16)], work)
    sums, agrees = {}, {}
    transports: list[Transport] = ["shared", "gloo"] if shm.available() else ["gloo"]
    for transport in transports:
        send, reached, sums[transport], agrees[transport] = _run(ranks, transport, plan, floats)
    size = len(msgspec.msgpack.encode(plan))
    return BroadcastResult(ranks, rows, size, send, reached, sums.get("shared"), sums["gloo"], agrees.get("shared"))


def _run(ranks: int, transport: Transport, plan: RoundPlan, floats: int) -> tuple[float, float, float, float]:
    memory = shm.create(ranks) if transport == "shared" else None
    store = rendezvous.host_store(ranks, _TIMEOUT_S) if memory is None else None
    processes = RankProcesses(
        [sys.executable, "-m", "bench.micro.broadcast"],
        ranks,
        send_timeout_s=_TIMEOUT_S,
        fds=() if memory is None else (memory,),
    )
    channel = Channel(processes.links)
    try:
        join = Join(0, ranks, transport, _TIMEOUT_S, store.port if store else None, memory)
        for rank in processes.links:
            task = Task(msgspec.structs.replace(join, rank=rank), floats)
            channel.send(rank, msgspec.msgpack.encode(task))
        _answers(channel, ranks - 1)
        group = rendezvous.join(join, torch.device("cpu"), store)
        encoder = msgspec.msgpack.Encoder()
        sending, reaching, summing, agreeing = [], [], [], []
        for _ in range(_ROUNDS):
            began = perf_counter()
            channel.broadcast(encoder.encode(plan))
            sent = perf_counter()
            _answers(channel, ranks - 1)
            sending.append(sent - began)
            reaching.append(perf_counter() - began)
        x = torch.zeros(floats)
        for _ in range(_ROUNDS):
            began = perf_counter()
            group.all_reduce(x)
            summing.append(perf_counter() - began)
        for _ in range(_ROUNDS):
            began = perf_counter()
            group.begin_round()
            group.agree(False)
            agreeing.append(perf_counter() - began)
    finally:
        channel.close()
        processes.close()
        if memory is not None:
            os.close(memory)
    return 1e6 * median(sending), 1e6 * median(reaching), 1e6 * median(summing), 1e6 * median(agreeing)


def _answers(channel: Channel, count: int) -> None:
    while count:
        for rank, frame in channel.frames(_TIMEOUT_S):
            if frame is None:
                raise RuntimeError(f"rank {rank} of the benchmark is gone")
            count -= 1


def table(results: Iterable[BroadcastResult]) -> str:
    """Format results as a text table."""
    head = ("ranks", "rows", "plan bytes", "send us", "reached us", "sum us", "sum us, gloo", "agree us")
    lines = ["".join(f"{name:>14}" for name in head)]
    for result in results:
        times = (result.send, result.reached, result.shared, result.gloo, result.agree)
        shown = ["-" if us is None else f"{us:.0f}" for us in times]
        cells = [str(result.ranks), str(result.rows), str(result.plan_bytes), *shown]
        lines.append("".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def _rank() -> None:
    torch.set_num_threads(1)
    link = Link.from_stdin()
    task = msgspec.msgpack.decode(link.receive(), type=Task)
    link.send(b"here")
    group = rendezvous.join(task.join, torch.device("cpu"))
    decoder = msgspec.msgpack.Decoder(RoundPlan)
    for _ in range(_ROUNDS):
        decoder.decode(link.receive())
        link.send(b"got it")
    x = torch.zeros(task.floats)
    for _ in range(_ROUNDS):
        group.all_reduce(x)
    for _ in range(_ROUNDS):
        group.begin_round()
        group.agree(False)
    try:
        link.receive()
    except Disconnected:
        os._exit(0)


if __name__ == "__main__":
    _rank()
