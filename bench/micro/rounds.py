"""Measure T_T, T_D and T_V of the cost model on the real engine, over rows and context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import msgspec

from bench.corpus import BenchError
from bench.paper.forecast_report import check_plotting
from engine.config.deployment import EngineConfig, SchedulerConfig
from engine.control.step_times import StepSample, StepTimes
from engine.core import Engine
from engine.scheduler.controller import FixedGamma
from planner.cost_model import best_gamma, speedup


class RoundTimes(msgspec.Struct):
    """Times at one (rows, context, gamma), in milliseconds.

    speedup: at the given acceptance. best_gamma: from 0 to the largest measured one; verify passes between measured
    gammas are interpolated. best_speedup: at best_gamma. plain_shared_price, shared_price: time of a KV token that
    attention reads once for all rows, relative to one that it reads for one row, in a plain step and in a verify pass;
    None: not measured. weights, draft_weights: formats that the target and drafts multiply by.
    """

    rows: int
    context: int
    gamma: int
    t_target_ms: float
    t_draft_ms: float
    t_verify_ms: float
    speedup: float
    best_gamma: int
    best_speedup: float
    plain_shared_price: float | None = None
    shared_price: float | None = None
    weights: str = "dense"
    draft_weights: str = "dense"


def measure(
    config: EngineConfig,
    rows: Sequence[int],
    contexts: Sequence[int],
    gammas: Sequence[int],
    *,
    alpha: float,
    repeats: int = 3,
) -> list[RoundTimes]:
    """Measure every combination of rows, context and gamma; and rows that share pages, at the longest context, where
    attention reads these once.

    config: has the drafter and KV policy to measure. alpha: acceptance, for the speed-ups. Raises BenchError for a
    combination that the engine has no room for.
    """
    max_gamma = max(gammas)
    tokens = max(max(rows) * (max_gamma + 1) + 1, config.scheduler.max_batch_tokens)
    scheduler = SchedulerConfig(max_rows=max(rows), max_batch_tokens=tokens, max_waiting=config.scheduler.max_waiting)
    speculation = config.speculation.model_copy(update={"gamma": max_gamma})
    config = config.model_copy(update={"scheduler": scheduler, "speculation": speculation})
    engine = Engine(config, controller=FixedGamma(max_gamma), progress=False)
    found: list[RoundTimes] = []
    try:
        for count in rows:
            batches = [
                [engine.profiler.measure(count, context, gamma, repeats) for gamma in (0, *gammas)]
                for context in contexts
            ]
            longest = max(contexts)
            prices: dict[int, float | None] = {}
            # The price is relative to the cost of a token, which takes two contexts to see.
            if count > 1 and min(contexts) < longest and engine.profiler.shareable(longest):
                sharing = [
                    engine.profiler.measure(count, longest, gamma, repeats, sharing=True) for gamma in (0, *gammas)
                ]
                times = StepTimes([*chain(*batches), *sharing], lambda context, budget: context)
                prices = {gamma: times.shared_price(count, gamma) for gamma in (0, *gammas)}
            for samples in batches:
                found += _times(samples, prices, max_gamma, alpha, engine.stats().weights)
    except ValueError as error:
        raise BenchError(str(error)) from error
    finally:
        engine.close()
    return found


def _times(
    samples: list[StepSample],
    prices: Mapping[int, float | None],
    max_gamma: int,
    alpha: float,
    weights: Mapping[str, str],
) -> list[RoundTimes]:
    """Convert the samples of one batch. The first sample is the one without drafts. prices: of a shared token, by
    gamma. weights: see EngineStats."""
    plain, *others = samples
    rows, context, target = plain.rows, plain.context, plain.verify_s
    # The number of KV tokens that drafts read does not matter: all samples are of one batch.
    times = StepTimes(samples, lambda context, budget: 1)
    draft = times.draft(rows, 1)
    best, gain = best_gamma(
        alpha, target, draft, lambda gamma: times.verify(rows, rows * context, [gamma])[0], gamma_max=max_gamma
    )
    return [
        RoundTimes(
            rows=rows,
            context=context,
            gamma=sample.gamma,
            t_target_ms=1e3 * target,
            t_draft_ms=1e3 * sample.draft_s / sample.gamma,
            t_verify_ms=1e3 * sample.verify_s,
            speedup=speedup(sample.gamma, alpha, target, sample.draft_s / sample.gamma, sample.verify_s),
            best_gamma=best,
            best_speedup=gain,
            plain_shared_price=prices.get(0),
            shared_price=prices.get(sample.gamma),
            weights=weights["target"],
            draft_weights=weights["drafts"],
        )
        for sample in others
    ]


def table(times: Sequence[RoundTimes], alpha: float) -> str:
    """Format times as a text table."""
    names = ("rows", "context", "gamma", "T_T ms", "T_D ms", "T_V ms", "T_D/T_T", "T_V/T_T", "x plain", "best gamma")
    lines = ["".join(f"{name:>11}" for name in names)]
    for at in times:
        cells = (
            str(at.rows),
            str(at.context),
            str(at.gamma),
            f"{at.t_target_ms:.1f}",
            f"{at.t_draft_ms:.1f}",
            f"{at.t_verify_ms:.1f}",
            f"{at.t_draft_ms / at.t_target_ms:.2f}",
            f"{at.t_verify_ms / at.t_target_ms:.2f}",
            f"{at.speedup:.2f}",
            f"{at.best_gamma} ({at.best_speedup:.2f})",
        )
        lines.append("".join(f"{cell:>11}" for cell in cells))
    lines.append(f"weights: {times[0].weights}, drafts {times[0].draft_weights}")
    lines.append(f"x plain and best gamma are what an acceptance of {alpha:g} would give")
    return "\n".join(lines + _price_lines(times))


def _price_lines(times: Sequence[RoundTimes]) -> list[str]:
    """Format the prices of a shared token, one line for each number of rows; none if none were measured."""
    prices: dict[int, dict[int, float]] = {}
    for at in times:
        for gamma, price in ((0, at.plain_shared_price), (at.gamma, at.shared_price)):
            if price is not None:
                prices.setdefault(at.rows, {})[gamma] = price
    head = "time of a KV token that rows share, relative to one that a row reads alone:"
    lines = [
        f"{rows:>6} rows: " + ", ".join(f"{price:.2f} at gamma {gamma}" for gamma, price in sorted(by_gamma.items()))
        for rows, by_gamma in prices.items()
    ]
    return [head, *lines] if lines else []


def plot(times: Sequence[RoundTimes], path: Path) -> None:
    """Plot times over context to a PNG, one panel per number of rows. Raises PlotError without matplotlib."""
    check_plotting()
    from matplotlib.figure import Figure

    rows = sorted({at.rows for at in times})
    figure = Figure(figsize=(3.5 * len(rows), 3.5), layout="constrained")
    for axes, count in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        here = [at for at in times if at.rows == count]
        max_gamma = max(at.gamma for at in here)
        last = [at for at in here if at.gamma == max_gamma]
        contexts = [at.context for at in last]
        axes.plot(contexts, [at.t_target_ms for at in last], marker="o", label="plain step")
        axes.plot(contexts, [at.t_draft_ms for at in last], marker="o", label="draft step")
        axes.plot(contexts, [at.t_verify_ms for at in last], marker="o", label=f"verify, gamma {max_gamma}")
        axes.set(xlabel="context (tokens per row)", title=f"{count} row{'s' * (count > 1)}")
        axes.set_ylim(bottom=0)
    figure.axes[0].set_ylabel("ms")
    figure.axes[0].legend()
    figure.savefig(path, dpi=120)
