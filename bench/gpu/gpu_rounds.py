"""Measure rounds of a model with random weights on one device: times of their parts, and device idle time.

A round here is what a rank does: draft, verify pass, commit, and the host's part in these. Scheduling, tokenizing and
sending answers are not in it (bench/micro/host.py measures them).
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch

from bench.corpus import BenchError
from bench.format_flags import USUAL_FORMATS, FormatFlags
from bench.gpu.device_busy import busy_seconds
from bench.gpu.synthetic import synthetic_acceptance
from engine.batch.tail_pages import num_exact_pages
from engine.config.deployment import EngineConfig, SchedulerConfig
from engine.config.speculation import SpeculationConfig
from engine.core import Engine
from engine.params import SamplingParams
from engine.plan import PageDelta, RoundPlan, RoundResult, RowStart, RowWork
from engine.scheduler.controller import FixedGamma
from engine.scheduler.sliding_pages import pool_pages
from engine.worker.sliding_limits import grouped
from engine.worker.weight_choice import target_weights
from kernels.kv.kv_bits import KV_BITS
from kernels.ops import Ops
from kernels.weights.matrix import DenseMatrix
from models.config import ModelConfig
from models.decoder import DecoderModel
from models.shapes import kv_token_bytes, rank_sliding_token_bytes
from parallel.group import Group
from parallel.matrix_layer import AS_STORED, Placement, WeightChoice
from planner.cost_model import speedup

_WARM_UPS = 3
"""Rounds before those that are timed: the first ones compile kernels."""
_PROFILED = 3
KEPT_BYTES = 6 << 30
"""Device memory reserved in addition to weights and KV: for activations, CUDA graphs and other allocations."""


@dataclass(frozen=True, slots=True)
class GpuResult:
    """Result of one (rows, context). Times in milliseconds, medians over rounds.

    policy: KV policy of drafts. t_target_ms: a plain round. t_draft_ms: one draft step. t_verify_ms: the target pass
    over gamma drafts. Both include what the policy does in them. t_round_ms: draft, verify and host work. floor_ms:
    lower bound of a plain round, its weight and KV bytes over the bandwidth of a copy. gap_plain, gap: fractions of a
    plain round, and of one with drafts, in which the device is idle; None where that was not observed. accepted:
    accepted drafts per row and round. speedup: measured, with synthetic acceptance `alpha`. predicted: the cost model's
    speed-up from the three times. plain_rounds_ms, rounds_ms: every timed round; half of the plain ones come before
    those with drafts, half after. weights, draft_weights: formats that the target and drafts multiply by. kv_format:
    of the target's computed pages.
    """

    shape: str
    rows: int
    context: int
    gamma: int
    policy: str
    budget: int
    temperature: float
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
    plain_tokens_per_second: float
    tokens_per_second: float
    plain_rounds_ms: list[float]
    rounds_ms: list[float]
    weights: str = "dense"
    draft_weights: str = "dense"
    kv_format: str = "dense"


def free_bytes(device: torch.device) -> int:
    """Return the bytes that weights and KV may take on a CUDA device, once dead models and torch's cache are freed."""
    release_memory(device)
    return torch.cuda.mem_get_info(device)[0] - KEPT_BYTES


def release_memory(device: torch.device) -> None:
    """Free the memory of dead objects that refer to each other, and what torch keeps for later allocations."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def random_shape(
    shape: ModelConfig, dtype: torch.dtype, device: torch.device, ops: Ops, weights: WeightChoice = AS_STORED
) -> DecoderModel:
    """Build a model with random weights drawn on the device. Tests use those of models.loader.random_model."""
    model = DecoderModel(shape, Placement(Group.single(), dtype, device, ops, weights))
    generator = torch.Generator(device).manual_seed(0)
    for slot in model.weight_slots():
        slot.tensor.fill_(1.0 if slot.source.endswith("norm.weight") else 0.0)
    for place in model.matrix_slots():
        weight = torch.empty(place.full_shape, dtype=dtype, device=device)
        place.fill(DenseMatrix(weight.normal_(0, place.full_shape[1] ** -0.5, generator=generator)))
    model.prepare()
    return model


class Bench:
    """Benchmark of one model, with KV for the largest of the points that fit.

    points: those that fit. left_out: the others, each with the reason.
    """

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
        policy: str = "window",
        temperature: float = 0.0,
        page_size: int = 16,
        rounds: int = 24,
        cuda_graphs: bool = True,
        only_first: bool = False,
        formats: FormatFlags = USUAL_FORMATS,
    ) -> None:
        """points: (rows, context). memory: bytes for weights and KV. policy: KV policy of drafts, one that reads the
        target's pages. temperature: of all rows. only_first: keep only the first of the points that fit."""
        page_size = KV_BITS[formats.kv].page_size(page_size)
        self._name, self._gamma, self._budget, self._page = name, gamma, budget, page_size
        speculation = SpeculationConfig.model_validate({"gamma": gamma, "kv": {"policy": policy, "budget": budget}})
        self._policy, self._summaries = policy, speculation.kv_state(page_size).summaries
        self._device, self._rounds, self._temperature = device, rounds, temperature
        self._config = formats.apply(
            EngineConfig.model_validate(
                {
                    "model": name,
                    "device": device.type,
                    "speculation": speculation,
                    "cache": {"page_size": page_size},
                }
            )
        )
        self._shape = shape = grouped(self._config, shape)
        choice = target_weights(self._config, ops)
        self._model = random_shape(shape, dtype, device, ops, choice)
        self.weight_bytes = self._model.matrix_bytes  # bytes that a forward reads
        drafts = self._model.drafting().matrix_bytes if choice.drafts else 0
        fixed = self.weight_bytes + drafts + self._model.table_bytes
        self._exact_bytes = kv_token_bytes(shape, dtype.itemsize)
        self._token_bytes = kv_token_bytes(shape, dtype.itemsize, formats.kv)
        self._sliding_bytes = rank_sliding_token_bytes(shape, 1, dtype.itemsize)
        # Tokens by which a row can grow while it is measured, with all drafts accepted, and one round's drafts.
        self._room = (rounds + _WARM_UPS + 1) * (gamma + 1) + 1
        self.points: list[tuple[int, int]] = []
        self.left_out: list[tuple[int, int, str]] = []
        for rows, context in points:
            if only_first and self.points:
                break
            if context + self._room > shape.max_model_len:
                self.left_out.append((rows, context, f"longer than the model's {shape.max_model_len} tokens"))
            elif (needed := fixed + self._bytes(rows, context)) > memory:
                reason = f"needs {needed / 1e9:.1f} GB, and {memory / 1e9:.1f} are free"
                self.left_out.append((rows, context, reason))
            else:
                self.points.append((rows, context))
        if not self.points:
            return
        longest = max(context for _, context in self.points) + self._room
        pages = max(rows * self._width(context) for rows, context in self.points)
        max_rows = max(rows for rows, _ in self.points)
        cache = {"num_pages": max(pages, -(-longest // page_size))}
        config = self._config.model_copy(
            update={
                "max_model_len": longest,
                "cuda_graphs": cuda_graphs,
                "cache": self._config.cache.model_copy(update=cache),
                "scheduler": self._scheduler(max_rows),
            }
        )
        self._engine = Engine(config, model=self._model, controller=FixedGamma(gamma), progress=False)
        target = self._engine._worker._target
        for pool in (target.pool, *([target.sliding.pool] if target.sliding else [])):
            pool.fill_random(0.1)
        self._run: Callable[[RoundPlan], RoundResult] = self._engine.profiler.run

    def measure(self, rows: int, context: int, *, alpha: float, ceiling: float) -> GpuResult:
        """Time rounds with and without drafts. alpha: synthetic acceptance. ceiling: bytes per second of a copy."""
        _, plain = self._time_rounds(rows, context, 0, self._rounds - self._rounds // 2)
        with synthetic_acceptance(alpha):
            drafted, seconds = self._time_rounds(rows, context, self._gamma, self._rounds)
        # The rest of the plain rounds comes last, so that a clock that drifts favours neither kind.
        plain += self._time_rounds(rows, context, 0, max(1, self._rounds // 2))[1]
        t_target, t_round = median(plain), median(seconds)
        t_verify = median(result.verify_seconds for result in drafted)
        t_draft = median(result.draft_seconds for result in drafted) / self._gamma
        accepted = sum(row.accepted for result in drafted for row in result.rows) / (rows * len(drafted))
        read = self.weight_bytes + rows * self._read_bytes(context)
        return GpuResult(
            shape=self._name,
            rows=rows,
            context=context,
            gamma=self._gamma,
            policy=self._policy,
            budget=self._budget,
            temperature=self._temperature,
            alpha=alpha,
            t_target_ms=1e3 * t_target,
            t_draft_ms=1e3 * t_draft,
            t_verify_ms=1e3 * t_verify,
            t_round_ms=1e3 * t_round,
            floor_ms=1e3 * read / ceiling,
            gap_plain=None,
            gap=None,
            accepted=accepted,
            speedup=(accepted + 1) * t_target / t_round,
            predicted=speedup(self._gamma, alpha, t_target, t_draft, t_verify),
            plain_tokens_per_second=rows / t_target,
            tokens_per_second=rows * (accepted + 1) / t_round,
            plain_rounds_ms=[1e3 * each for each in plain],
            rounds_ms=[1e3 * each for each in seconds],
            weights=self._engine.stats().weights["target"],
            draft_weights=self._engine.stats().weights["drafts"],
            kv_format=self._config.cache.format,
        )

    def observe_gaps(self, result: GpuResult) -> GpuResult:
        """Return the result of `measure` with its idle times. Call it after all measurements, since a profiler that was
        active once can slow launches from then on."""
        gap_plain = self._gap(result, 0, result.t_target_ms)
        with synthetic_acceptance(result.alpha):
            gap = self._gap(result, self._gamma, result.t_round_ms)
        return replace(result, gap_plain=gap_plain, gap=gap)

    def close(self) -> None:
        """Free the memory of model and engine."""
        if self.points:
            self._engine.close()
            del self._engine, self._run
        del self._model
        release_memory(self._device)

    def _time_rounds(self, rows: int, context: int, gamma: int, count: int) -> tuple[list[RoundResult], list[float]]:
        """Run `count` consecutive rounds after the warm-up. Returns their results and seconds."""
        lengths = self._start(rows, context)
        for _ in range(_WARM_UPS):
            self._round(lengths, gamma)
        results, seconds = [], []
        for _ in range(count):
            began = time.perf_counter()
            results.append(self._round(lengths, gamma))
            seconds.append(time.perf_counter() - began)
        return results, seconds

    def _gap(self, result: GpuResult, gamma: int, round_ms: float) -> float | None:
        """Measure the fraction of a round in which the device is idle. round_ms: its time without the profiler."""
        if self._device.type != "cuda":
            return None
        lengths = self._start(result.rows, result.context)
        self._round(lengths, gamma)

        def work() -> None:
            for _ in range(_PROFILED):
                self._round(lengths, gamma)

        busy = busy_seconds(work, self._device)
        return None if busy is None else max(0.0, 1 - 1e3 * busy / _PROFILED / round_ms)

    def _start(self, rows: int, context: int) -> list[int]:
        """Assign rows to row slots, each over pages of its own, which lie scattered as they do after some time of
        serving. Returns their lengths."""
        width, tokens = self._width(context), [0] * (context + 1)
        windows = self._engine.profiler.sliding_pages // rows  # pages of each row, which its windows pass through
        order = random.Random(0).sample(range(rows * width), rows * width)
        starts, pages = [], []
        for row in range(rows):
            params = SamplingParams(temperature=self._temperature, seed=row)
            starts.append(RowStart(row, tokens, context + 1, params, [], context))
            pages.append(PageDelta(row, 0, order[row * width : (row + 1) * width]))
            if windows:
                listed = [row * windows + column % windows for column in range(width)]
                pages.append(PageDelta(row, 0, listed, sliding=True))
        work = [RowWork(row, context, 1, 0, True) for row in range(rows)]
        self._check(self._run(RoundPlan(0, starts, pages, work)))
        return [context + 1] * rows

    def _round(self, lengths: list[int], gamma: int) -> RoundResult:
        """Run a round, and let the rows grow."""
        bits = self._config.cache.bits
        work = [RowWork(row, n, 1, bits.max_drafts(n + 1, gamma), True) for row, n in enumerate(lengths)]
        work.sort(key=lambda each: -each.gamma)
        result = self._run(RoundPlan(0, [], [], work))
        self._check(result)
        for each, row in zip(work, result.rows, strict=True):
            lengths[each.row] += row.accepted + 1
        return result

    def _check(self, result: RoundResult) -> None:
        """Raise BenchError for a round whose results are no numbers: its speed would mean nothing."""
        if result.failures:
            raise BenchError(f"{self._name}: {len(result.failures)} rows failed: {result.failures[0].reason}")

    def _width(self, context: int) -> int:
        return -(-(context + self._room) // self._page)

    def _bytes(self, rows: int, context: int) -> int:
        """Return the bytes of the rows' pages, also of sliding layers, and of what the policy keeps of these."""
        page_bytes = self._page * self._token_bytes + self._summaries * self._exact_bytes // 2  # a key is half of a KV
        config = self._config.model_copy(update={"scheduler": self._scheduler(rows)})
        kept = num_exact_pages(config) * self._exact_bytes
        num_pages = rows * self._width(context)
        kept += pool_pages(config, self._shape, num_pages, context + self._room).sliding * self._sliding_bytes
        return num_pages * page_bytes + self._page * kept

    def _read_bytes(self, context: int) -> int:
        """Return the bytes of a row's KV that a plain round reads: in layers with a window, no more than that."""
        full, sliding = (min(context, window or context) for window in self._shape.windows)
        return full * self._token_bytes + sliding * self._sliding_bytes

    def _scheduler(self, rows: int) -> SchedulerConfig:
        return SchedulerConfig(max_rows=rows, max_batch_tokens=rows * (self._gamma + 1) + 1)
