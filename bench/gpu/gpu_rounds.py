"""Measure rounds of a model with random weights on one device: times of their parts, and device idle time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from bench.gpu.synthetic import synthetic_acceptance
from bench.micro.bandwidth import wait
from engine.config.deployment import EngineConfig
from engine.core import Engine
from engine.plan import RoundPlan, RoundResult, RowWork
from engine.scheduler.controller import FixedGamma
from engine.worker.profiler import blank_rows
from kernels.ops import Ops
from models.config import ModelConfig
from models.llama import Llama
from parallel.group import Group
from parallel.layers import Placement
from planner.cost_model import speedup

_WARM_UPS = 2


@dataclass(frozen=True, slots=True)
class GpuResult:
    """Result of one (rows, context). Times in milliseconds, medians over rounds.

    t_target_ms: a plain round. t_draft_ms: one draft step. t_verify_ms: the target pass over gamma drafts. t_round_ms:
    draft, verify and host work. floor_ms: lower bound of a plain round, its weight and KV bytes over the bandwidth of a
    copy. gap_plain, gap: fractions of a plain round, and of one with drafts, in which the device is idle; None where
    that cannot be observed. accepted: accepted drafts per row and round. speedup: measured, with synthetic acceptance
    `alpha`. predicted: the cost model's speed-up from the three times.
    """

    shape: str
    rows: int
    context: int
    gamma: int
    budget: int
    alpha: float
    t_target_ms: float
    t_draft_ms: float
    t_verify_ms: float
    t_round_ms: float
    floor_ms: float
    gap_plain: float | None
    gap: float | None
    accepted: float
    speedup: float
    predicted: float


def random_shape(shape: ModelConfig, dtype: torch.dtype, device: torch.device, ops: Ops) -> Llama:
    """Build a model with random weights drawn on the device. Tests use those of models.loader.random_model."""
    model = Llama(shape, Placement(Group.single(), dtype, device, ops))
    generator = torch.Generator(device).manual_seed(0)
    for slot in model.weight_slots():
        if len(slot.full_shape) == 1:
            slot.tensor.fill_(1.0 if slot.source.endswith("norm.weight") else 0.0)
        else:
            slot.tensor.normal_(0, slot.full_shape[1] ** -0.5, generator=generator)
    model.prepare()
    return model


class Bench:
    """Benchmark of one model, with KV for the largest of the points that fit."""

    def __init__(
        self,
        name: str,
        shape: ModelConfig,
        points: Sequence[tuple[int, int]],
        *,
        gamma: int,
        budget: int,
        device: torch.device,
        dtype: torch.dtype,
        ops: Ops,
        memory: int,
        page_size: int = 16,
        rounds: int = 12,
        cuda_graphs: bool = True,
    ) -> None:
        """memory: bytes for weights and KV. Points that need more go to `left_out`."""
        self._name, self._gamma, self._budget, self._page = name, gamma, budget, page_size
        self._device, self._rounds = device, rounds
        self._model = random_shape(shape, dtype, device, ops)
        self.weight_bytes = self._model.matrix_bytes  # bytes that a forward reads
        weights = self.weight_bytes + self._model.table_bytes
        self._token_bytes = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * dtype.itemsize
        # Tokens by which a row can grow: all rounds, warm-ups and profiled rounds included, with all drafts accepted.
        self._room = (rounds + _WARM_UPS + 3) * (gamma + 2) + 1
        self.points = [point for point in points if weights + self._bytes(*point) <= memory]
        self.left_out = [point for point in points if point not in self.points]
        if not self.points:
            return
        longest = max(context for _, context in self.points) + self._room
        pages = max(rows * self._width(context) for rows, context in self.points)
        max_rows = max(rows for rows, _ in self.points)
        config = EngineConfig.model_validate(
            {
                "model": name,
                "device": device.type,
                "max_model_len": longest,
                "cuda_graphs": cuda_graphs,
                "cache": {"page_size": page_size, "num_pages": max(pages, -(-longest // page_size))},
                "scheduler": {"max_rows": max_rows, "max_batch_tokens": max_rows * (gamma + 1) + 1},
                "speculation": {"gamma": gamma, "kv": {"policy": "window", "budget": budget}},
            }
        )
        self._engine = Engine(config, model=self._model, controller=FixedGamma(gamma), progress=False)
        self._engine._worker._target.pool.data.normal_(0, 0.1)
        self._run: Callable[[RoundPlan], RoundResult] = self._engine.profiler.run

    def measure(self, rows: int, context: int, *, alpha: float, ceiling: float) -> GpuResult:
        _, _, t_target = self._rounds_of(rows, context, 0)
        gap_plain = self._gap(rows, context, 0)
        with synthetic_acceptance(alpha):
            drafted, tokens, round_s = self._rounds_of(rows, context, self._gamma)
            gap = self._gap(rows, context, self._gamma)
        t_verify = median(result.verify_seconds for result in drafted)
        t_draft = median(result.draft_seconds for result in drafted) / self._gamma
        read = self.weight_bytes + rows * context * self._token_bytes
        return GpuResult(
            shape=self._name,
            rows=rows,
            context=context,
            gamma=self._gamma,
            budget=self._budget,
            alpha=alpha,
            t_target_ms=1e3 * t_target,
            t_draft_ms=1e3 * t_draft,
            t_verify_ms=1e3 * t_verify,
            t_round_ms=1e3 * round_s,
            floor_ms=1e3 * read / ceiling,
            gap_plain=gap_plain,
            gap=gap,
            accepted=tokens / (rows * len(drafted)) - 1,
            speedup=tokens / len(drafted) / rows * t_target / round_s,
            predicted=speedup(self._gamma, alpha, t_target, t_draft, t_verify),
        )

    def close(self) -> None:
        if self.points:
            self._engine.close()
            del self._engine, self._run
        del self._model

    def _rounds_of(self, rows: int, context: int, gamma: int) -> tuple[list[RoundResult], int, float]:
        """Run consecutive rounds. Returns their results, the number of tokens, and the seconds of the median round."""
        lengths = self._start(rows, context)
        results, seconds = [], []
        for i in range(self._rounds + _WARM_UPS):
            began = time.perf_counter()
            result = self._round(lengths, gamma)
            if i >= _WARM_UPS:
                results.append(result)
                seconds.append(time.perf_counter() - began)
        return results, sum(row.accepted + 1 for result in results for row in result.rows), median(seconds)

    def _gap(self, rows: int, context: int, gamma: int) -> float | None:
        """Measure the fraction of three rounds in which no kernel runs. None where that cannot be observed."""
        if self._device.type != "cuda":
            return None
        lengths = self._start(rows, context)
        self._round(lengths, gamma)
        wait(self._device)
        began = time.perf_counter()
        with _busy_seconds() as busy:
            for _ in range(3):
                self._round(lengths, gamma)
            wait(self._device)
            taken = time.perf_counter() - began
        return max(0.0, 1 - busy[0] / taken) if busy else None

    def _start(self, rows: int, context: int) -> list[int]:
        """Assign rows to row slots, each over pages of its own. Returns their lengths."""
        width = self._width(context)
        starts, pages = blank_rows(rows, context, width, rows * width)
        work = [RowWork(row, context, 1, 0, True) for row in range(rows)]
        self._run(RoundPlan(0, starts, pages, work))
        return [context + 1] * rows

    def _round(self, lengths: list[int], gamma: int) -> RoundResult:
        result = self._run(RoundPlan(0, [], [], [RowWork(i, n, 1, gamma, True) for i, n in enumerate(lengths)]))
        for i, row in enumerate(result.rows):
            lengths[i] += row.accepted + 1
        return result

    def _width(self, context: int) -> int:
        return -(-(context + self._room) // self._page)

    def _bytes(self, rows: int, context: int) -> int:
        return rows * self._width(context) * self._page * self._token_bytes


@contextlib.contextmanager
def _busy_seconds() -> Iterator[list[float]]:
    """Collect the seconds in which kernels run inside the block.

    The yielded list has them after the block ends. It stays empty where the device cannot be profiled.
    """
    found: list[float] = []
    try:
        watch = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        watch.__enter__()  # type: ignore[no-untyped-call]
    except RuntimeError:
        yield found
        return
    try:
        yield found
    finally:
        watch.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        events = watch.events() or ()  # type: ignore[no-untyped-call]
        if spans := sorted((event.time_range.start, event.time_range.end) for event in events):
            found.append(_covered(spans) / 1e6)


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    """Compute the length of the union of (start, end) spans, given in ascending order."""
    covered, reached = 0.0, float("-inf")
    for start, end in spans:
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered
