"""Render forecasts of planner.forecast as a table and a plot."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from planner.forecast import Forecast

_COLUMNS = (
    *("batch", "context", "shared", "policy", "budget", "alpha", "gamma", "x plain", "tok/s", "T_T ms", "T_D ms"),
    *("T_V ms", "choose ms", "MB/row", "GB/step", "GB/GPU", "fits", "max batch", "break-even"),
)


class PlotError(RuntimeError):
    """A plot cannot be drawn; the message names the missing package."""


def table(forecasts: Sequence[Forecast]) -> str:
    """Format forecasts of one deployment as a text table, one line each.

    choose ms: of a round. MB/row, GB/step: what a draft step reads, of each row's KV and in all, on one GPU.
    """
    first = forecasts[0]
    hidden = set() if any(row.shared for row in forecasts) else {"shared"}
    draft = f"{first.draft} as draft" if first.draft != "self" else "self-speculation"
    shown = [
        [cell for name, cell in zip(_COLUMNS, cells, strict=True) if name not in hidden]
        for cells in (_COLUMNS, *map(_cells, forecasts))
    ]
    widths = [max(map(len, column)) + 2 for column in zip(*shown, strict=True)]
    title = (
        f"{first.model} on {first.tensor_parallel} x {first.gpu}, {draft}{_formats(first)}; "
        f"{first.usable_bytes / 1e9:.1f} GB of each for weights and KV"
    )
    lines = ("".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)) for cells in shown)
    return "\n".join([title, *lines])


def _formats(row: Forecast) -> str:
    """Describe weights and KV that are not dense."""
    said = "" if row.kv_format == "dense" else f", {row.kv_format} KV"
    if {row.weights, row.draft_weights} != {"dense"}:
        said += f", {row.weights} weights, drafts {row.draft_weights}"
    return said


def _cells(row: Forecast) -> tuple[str, ...]:
    return (
        str(row.batch),
        str(row.context),
        str(row.shared),
        row.policy,
        "all" if row.budget is None else str(row.budget),
        f"{row.alpha:.2f}",
        str(row.gamma or "off"),
        f"{row.speedup:.2f}",
        f"{row.tokens_per_second:.0f}",
        f"{row.t_target_ms:.1f}",
        f"{row.t_draft_ms:.1f}",
        f"{row.t_verify_ms:.1f}",
        f"{row.t_choose_ms:.2f}",
        f"{row.draft_row_read_bytes / 1e6:.1f}",
        f"{row.draft_read_bytes / 1e9:.2f}",
        f"{row.memory_bytes / 1e9:.1f}",
        "yes" if row.fits else "no",
        str(row.largest_batch),
        "never" if row.break_even_context is None else str(row.break_even_context),
    )


def check_plotting() -> None:
    """Raise PlotError, with the command to install it, if matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise PlotError("plots need matplotlib: pip install 'magicdec[plot]'")


def plot(forecasts: Sequence[Forecast], path: Path) -> None:
    """Plot speed-up over batch to a PNG, one line per policy and context; over context if there is a single batch.

    Hollow markers: does not fit into memory.

    Raises PlotError without matplotlib, OSError if the file cannot be written.
    """
    check_plotting()
    from matplotlib.figure import Figure

    first = forecasts[0]
    over_batch = len({row.batch for row in forecasts}) > 1
    policies = list(dict.fromkeys(row.policy for row in forecasts))
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for value in sorted({row.context if over_batch else row.batch for row in forecasts}):
        for policy in policies:
            points = sorted(
                (row.batch, row.speedup, row.fits) if over_batch else (row.context, row.speedup, row.fits)
                for row in forecasts
                if (policy, value) == (row.policy, row.context if over_batch else row.batch)
            )
            places, speeds = [point[0] for point in points], [point[1] for point in points]
            label = f"context {value:,}" if over_batch else f"batch {value}"
            label = label if len(policies) == 1 else f"{policy}, {label}"
            (line,) = axes.plot(places, speeds, marker="o", label=label)
            beyond = [(place, speed) for place, speed, fits in points if not fits]
            if beyond:
                axes.plot(*zip(*beyond, strict=True), "o", mfc="white", mec=line.get_color(), linestyle="none")
    ticks = sorted({row.batch if over_batch else row.context for row in forecasts})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.axhline(1.0, color="gray", linewidth=0.8)
    axes.set_xlabel("batch (rows)" if over_batch else "context (tokens)")
    axes.set_ylabel("speed-up over plain decoding, predicted")
    draft = "self-speculation" if first.draft == "self" else f"{first.draft} as draft"
    sharing = f", first {first.shared:,} tokens shared" if first.shared else ""
    axes.set_title(f"{first.model}, {draft}, {first.tensor_parallel} × {first.gpu}{_formats(first)}{sharing}")
    axes.legend()
    figure.savefig(path, format="png", dpi=150)
