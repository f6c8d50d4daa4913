"""`magicdec plan`: predict the gain of speculation, without a GPU or weights."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from models.known_shapes import SHAPES
from models.shapes import is_quantized
from planner.cost_model import GAMMA_MAX
from planner.forecast import BUDGETS, default_efficiency, deploy
from planner.hardware import NAMES
from planner.policy_costs import POLICY_COSTS
from server.cli import options


class TermsName(StrEnum):
    vegas = "vegas"
    vegas_long = "vegas-long"


class Dtype(StrEnum):
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class WeightsName(StrEnum):
    dense = "dense"
    int8 = "int8"
    int4 = "int4"
    fp8 = "fp8"
    mxfp4 = "mxfp4"


class DraftWeightsName(StrEnum):
    same = "same"
    int8 = "int8"
    int4 = "int4"
    fp8 = "fp8"


class KVFormatName(StrEnum):
    dense = "dense"
    int8 = "int8"
    int4x2 = "int4x2"
    fp8 = "fp8"


_SHAPES = ", ".join(SHAPES)


_WITH_TERMS = {"terms", "gpu", "batch", "json_file"}
"""Parameters that do not contradict --terms."""


def plan(
    ctx: typer.Context,
    gpu: Annotated[str, typer.Option(help=f"{', '.join(NAMES)}. cpu: this machine, measured now.")],
    model: Annotated[
        str | None, typer.Option(help=f"{_SHAPES}, or a directory with a config.json (no weights needed).")
    ] = None,
    terms: Annotated[
        TermsName | None,
        typer.Option(help="In place of --model: the terms on which others published, with their numbers. One GPU."),
    ] = None,
    draft: Annotated[str, typer.Option(help="self, or a draft model in the form of --model.")] = "self",
    tensor_parallel: Annotated[int, typer.Option("--tp", "--tensor-parallel-size", min=1, help="Number of ranks.")] = 1,
    batch: Annotated[str, typer.Option(help="Numbers of rows, comma-separated.")] = "1,8,32",
    context: Annotated[str, typer.Option(help="Tokens per row, comma-separated.")] = "8000",
    shared: Annotated[
        int,
        typer.Option(
            min=0, metavar="TOKENS", help="First tokens of every context that are the same: read and kept once for all."
        ),
    ] = 0,
    budget: Annotated[
        str | None, typer.Option(help="KV tokens that a draft step reads per row, or `all`; the best if not given.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(min=0, max=1, help="Acceptance rate; estimated from published ones if not given.")
    ] = None,
    gamma: Annotated[
        int | None, typer.Option(min=0, max=GAMMA_MAX, help="Tokens drafted per round; the best if not given.")
    ] = None,
    policy: Annotated[
        str, typer.Option(help=f"KV that a draft reads, comma-separated: {', '.join(POLICY_COSTS)}.")
    ] = "window",
    dtype: Annotated[Dtype, typer.Option(help="Dtype of dense weights and KV.")] = Dtype.bfloat16,
    weights: Annotated[
        WeightsName | None,
        typer.Option(
            help="Weights of the target; dense if not given. mxfp4: of experts alone; served in codes of 8 bits.",
            show_default=False,
        ),
    ] = None,
    draft_weights: Annotated[
        DraftWeightsName,
        typer.Option(
            help="Weights of drafts. same: the target's, or dense of a draft model. By how much rounding lowers "
            "acceptance is not estimated: give it with --alpha."
        ),
    ] = DraftWeightsName.same,
    kv_format: Annotated[
        KVFormatName,
        typer.Option(help="Numbers that the target's KV is stored in. int4x2: 8 bits, of which drafts read 4."),
    ] = KVFormatName.dense,
    layer_us: Annotated[
        float | None,
        typer.Option(
            min=0, max=1e6, help="Fixed microseconds per layer; on GPUs 135, fitted to 8 of them, if not given."
        ),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the forecasts to this file.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Plot the forecasts to this PNG.")] = None,
) -> None:
    """Predict speed-up, best gamma and budget, memory and break-even context. Needs no weights and no GPU."""
    from bench.paper.forecast_report import check_plotting, plot, table

    if terms is not None:
        _plan_terms(ctx, terms, gpu, batch, json_file)
        return
    if model is None:
        raise typer.BadParameter("name a model, or --terms", param_hint="--model")
    if weights is None and is_quantized(model):
        raise typer.BadParameter(f"name the format of the quantized weights of {model}", param_hint="--weights")
    policies = options.names(policy, tuple(POLICY_COSTS), "--policy")
    batches, contexts = options.counts(batch, "--batch"), options.counts(context, "--context")
    _check_folder(json_file, "--json")
    _check_folder(plot_file, "--plot")
    if plot_file is not None:
        check_plotting()
    deployment = deploy(
        model=model,
        draft=draft,
        gpu=gpu,
        ranks=tensor_parallel,
        policy=policies[0],
        dtype=dtype.value,
        alpha=alpha,
        weights=(weights or WeightsName.dense).value,
        draft_weights=None if draft_weights is DraftWeightsName.same else draft_weights.value,
        kv_format=kv_format.value,
        efficiency=None if layer_us is None else replace(default_efficiency(gpu), layer_s=1e-6 * layer_us),
    )
    budgets = _budgets(budget)
    forecasts = [
        replace(deployment, policy=each).forecast(rows, length, budgets=budgets, gamma=gamma, shared=shared)
        for length in contexts
        for rows in batches
        for each in policies
    ]
    print(table(forecasts))
    if json_file is not None:
        listed = [{**asdict(row), "budget": row.budget or "all"} for row in forecasts]
        _write_json(json_file, listed)
    if plot_file is not None:
        plot(forecasts, plot_file)


def _plan_terms(ctx: typer.Context, terms: TermsName, gpu: str, batch: str, json_file: Path | None) -> None:
    """Predict on the terms of others, with each of the efficiencies that may hold."""
    from bench.paper.vegas_terms import EFFICIENCIES, TERMS, predict, table

    given = {parameter.name: parameter for parameter in ctx.command.params if _is_given(ctx, parameter.name)}
    for name in given.keys() - _WITH_TERMS:
        raise typer.BadParameter(f"--terms {terms.value} sets it", param_hint=given[name].opts[0])
    if gpu == "cpu":
        raise typer.BadParameter("--terms are those of a GPU", param_hint="--gpu")
    rows: int | None = None
    if "batch" in given:
        rows, *more = options.counts(batch, "--batch")
        if more:
            raise typer.BadParameter("--terms take one number of rows", param_hint="--batch")
    _check_folder(json_file, "--json")
    forecasts = {name: predict(TERMS[terms.value], gpu, each, rows) for name, each in EFFICIENCIES.items()}
    setting = TERMS[terms.value].setting
    shown = (f"Predicted for one {gpu}, {name}:\n{table(lines, setting)}" for name, lines in forecasts.items())
    print("\n\n".join(shown))
    if json_file is not None:
        listed = [{"assumed": name, **asdict(line)} for name, lines in forecasts.items() for line in lines]
        _write_json(json_file, listed)


def _is_given(ctx: typer.Context, name: str | None) -> bool:
    """Whether a parameter is on the command line."""
    source = ctx.get_parameter_source(name) if name else None
    return source is not None and source.name == "COMMANDLINE"


def _check_folder(file: Path | None, flag: str) -> None:
    """Raise typer.BadParameter for a file whose folder does not exist."""
    if file is not None and not file.absolute().parent.is_dir():
        raise typer.BadParameter(f"{file.parent} is not a directory", param_hint=flag)


def _write_json(file: Path, listed: list[dict[str, Any]]) -> None:
    file.write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")


def _budgets(text: str | None) -> tuple[int | None, ...]:
    if text is None:
        return BUDGETS
    if text == "all":
        return (None,)
    (value, *more) = options.counts(text, "--budget")
    return (value, *more)
