"""`magicdec plan`: predict the gain of speculation, without a GPU or weights."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from models.shapes import SHAPES
from planner.cost_model import GAMMA_MAX
from planner.forecast import BUDGETS, deploy
from planner.hardware import NAMES
from server.cli import options


class Policy(StrEnum):
    window = "window"
    snapkv = "snapkv"


class Dtype(StrEnum):
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


_SHAPES = ", ".join(SHAPES)


def plan(
    model: Annotated[str, typer.Option(help=f"{_SHAPES}, or a directory with a config.json (no weights needed).")],
    gpu: Annotated[str, typer.Option(help=f"{', '.join(NAMES)}. cpu: this machine, measured now.")],
    draft: Annotated[str, typer.Option(help="self, or a draft model in the form of --model.")] = "self",
    tensor_parallel: Annotated[int, typer.Option("--tp", "--tensor-parallel-size", min=1, help="Number of ranks.")] = 1,
    batch: Annotated[str, typer.Option(help="Numbers of rows, comma-separated.")] = "1,8,32",
    context: Annotated[str, typer.Option(help="Tokens per row, comma-separated.")] = "8000",
    budget: Annotated[
        str | None, typer.Option(help="KV tokens that a draft step reads per row, or `all`; the best if not given.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(min=0, max=1, help="Acceptance rate; estimated from published ones if not given.")
    ] = None,
    gamma: Annotated[
        int | None, typer.Option(min=0, max=GAMMA_MAX, help="Tokens drafted per round; the best if not given.")
    ] = None,
    policy: Annotated[Policy, typer.Option(help="KV that a draft reads.")] = Policy.window,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of weights and KV.")] = Dtype.bfloat16,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the forecasts to this file.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Plot the forecasts to this PNG.")] = None,
) -> None:
    """Predict speed-up, best gamma and budget, memory and break-even context. Needs no weights and no GPU."""
    from bench.paper.forecast_report import check_plotting, plot, table

    batches, contexts = options.counts(batch, "--batch"), options.counts(context, "--context")
    for file, flag in ((json_file, "--json"), (plot_file, "--plot")):
        if file is not None and not file.absolute().parent.is_dir():
            raise typer.BadParameter(f"{file.parent} is not a directory", param_hint=flag)
    if plot_file is not None:
        check_plotting()
    deployment = deploy(
        model=model,
        draft=draft,
        gpu=gpu,
        ranks=tensor_parallel,
        policy=policy.value,
        dtype=dtype.value,
        alpha=alpha,
    )
    budgets = _budgets(budget)
    forecasts = [
        deployment.forecast(rows, length, budgets=budgets, gamma=gamma) for length in contexts for rows in batches
    ]
    print(table(forecasts))
    if json_file is not None:
        listed = [{**asdict(row), "budget": row.budget or "all"} for row in forecasts]
        json_file.write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
    if plot_file is not None:
        plot(forecasts, plot_file)


def _budgets(text: str | None) -> tuple[int | None, ...]:
    if text is None:
        return BUDGETS
    if text == "all":
        return (None,)
    (value, *more) = options.counts(text, "--budget")
    return (value, *more)
