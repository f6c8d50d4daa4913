"""Render acceptance results as a table and a plot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.offline.acceptance_sweep import AcceptanceResult
from bench.paper.forecast_report import check_plotting

if TYPE_CHECKING:
    from matplotlib.artist import Artist

_COLUMNS = (
    *(("context", 9), ("draft", 14), ("policy", 10), ("recent", 8), ("reselect", 10)),
    *(("T", 6), ("top-p", 7), ("verified", 11)),
)


def table(results: Iterable[AcceptanceResult]) -> str:
    """Format results as a text table: one line per context and setup, one column per budget."""
    listed = list(results)
    found: dict[tuple[object, ...], dict[int | None, float]] = {}
    for r in listed:
        columns = (_name(r.draft), r.policy, r.recent or "-", r.reselect or "-")
        key: tuple[object, ...] = (r.context, *columns, f"{r.temperature:g}", f"{r.top_p:g}", r.verification)
        found.setdefault(key, {})[r.budget] = r.alpha
    budgets: list[int | None] = [*sorted({r.budget for r in listed if r.budget})]
    if any(r.budget is None for r in listed):
        budgets.append(None)
    lines = ["".join(f"{name:>{width}}" for name, width in _COLUMNS) + "".join(f"{b or 'all':>8}" for b in budgets)]
    for key, alphas in found.items():
        line = "".join(f"{cell!s:>{width}}" for cell, (_, width) in zip(key, _COLUMNS, strict=True))
        lines.append(line + "".join(f"{alphas[b]:>8.3f}" if b in alphas else f"{'-':>8}" for b in budgets))
    return "\n".join(lines)


def plot(results: Sequence[AcceptanceResult], path: Path) -> None:
    """Plot acceptance over budget to a PNG: one panel per context, one line per setup; dotted if it reads all KV.

    Raises PlotError without matplotlib, OSError if the file cannot be written.
    """
    check_plotting()
    from matplotlib.figure import Figure

    contexts = sorted({result.context for result in results})
    figure = Figure(figsize=(1 + 3.6 * len(contexts), 3.6), layout="constrained")
    pictures = figure.subplots(1, len(contexts), sharey=True, squeeze=False)[0]
    labels = list(dict.fromkeys(_label(result, results) for result in results))
    drawn: dict[str, Artist] = {}
    for axes, context in zip(pictures, contexts, strict=True):
        lines: dict[str, dict[int | None, float]] = {}
        for result in results:
            if result.context == context:
                lines.setdefault(_label(result, results), {})[result.budget] = result.alpha
        for label, alphas in lines.items():
            color = f"C{labels.index(label) % 10}"
            budgets = sorted(budget for budget in alphas if budget is not None)
            if budgets:
                (drawn[label],) = axes.plot(budgets, [alphas[b] for b in budgets], marker="o", ms=3.5, color=color)
            if None in alphas:
                drawn[label] = axes.axhline(alphas[None], linestyle=":", color=color)
        ticks = sorted({result.budget for result in results if result.budget})
        if ticks:
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.minorticks_off()
        axes.set_xlabel("budget (KV tokens)")
        axes.set_title(f"context {context:,}", fontsize=10)
        axes.grid(alpha=0.3)
    pictures[0].set_ylabel("acceptance")
    pictures[-1].legend(list(drawn.values()), list(drawn), fontsize=8, loc="lower right")
    figure.savefig(path, format="png", dpi=90)


def _name(draft: str) -> str:
    return draft if draft == "self" else Path(draft).name


def _label(result: AcceptanceResult, among: Sequence[AcceptanceResult]) -> str:
    """Name a line by the settings in which it differs from the others."""
    parts = [result.policy]
    if result.recent and len({other.recent for other in among if other.recent}) > 1:
        parts.append(f"recent {result.recent}")
    if result.reselect:
        parts.append(f"again every {result.reselect}")
    if len({other.draft for other in among}) > 1:
        parts.append(_name(result.draft))
    if len({(other.temperature, other.top_p) for other in among}) > 1:
        parts.append(f"T {result.temperature:g}" + (f", top-p {result.top_p:g}" if result.top_p < 1 else ""))
    if len({other.verification for other in among}) > 1:
        parts.append(result.verification)
    return ", ".join(parts)
