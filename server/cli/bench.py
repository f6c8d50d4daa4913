"""`magicdec bench`: measure speed and acceptance."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from engine.config.deployment import EngineConfig
from engine.config.kv import POLICIES
from engine.config.speculation import DRAFTERS
from kernels.kv.kv_bits import KV_BITS
from server.cli import options

app = typer.Typer(no_args_is_help=True, help="Measure speed and acceptance.")

TextFile = Annotated[Path | None, typer.Option(help="Take prompts from this file instead of Python's manual.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")]
ACCEPTANCE_BUDGETS = (64, 128, 256, 512, 1024)
ACCEPTANCE_POLICIES = (*POLICIES, "relative")


@app.callback()
def bench() -> None:
    """Measure speed and acceptance."""


@app.command()
@options.engine_flags("speculation", "policy", "max_model_len", "prefix_cache", "kv_format", "drafter")
def decode(
    overrides: dict[str, Any],
    batch: Annotated[str, typer.Option(help="Numbers of rows, comma-separated.")] = "4",
    context: Annotated[str, typer.Option(help="Prompt tokens per row, comma-separated.")] = "2000",
    shared: Annotated[
        int,
        typer.Option(
            min=0, help="Tokens of --context that all prompts begin with: once with shared pages, once without."
        ),
    ] = 0,
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode per row and value of --speculation.")] = 64,
    history: Annotated[int, typer.Option(min=0, help="Untimed tokens per row that auto learns from first.")] = 0,
    speculation: Annotated[
        str, typer.Option(help="off, auto or numbers of tokens to draft, comma-separated.")
    ] = "off,1,3,auto",
    policy: Annotated[
        str | None, typer.Option(help=f"KV that a draft reads: {', '.join(POLICIES)}; comma-separated.")
    ] = None,
    kv_format: Annotated[
        str | None, typer.Option(help=f"Numbers that KV is stored in: {', '.join(KV_BITS)}; comma-separated.")
    ] = None,
    drafter: Annotated[
        str | None,
        typer.Option(help="Where drafts come from: auto, self, model, ngram, together; comma-separated. Else a model."),
    ] = None,
    task: Annotated[
        Literal["free", "summary", "edit", "json"],
        typer.Option(help="Kind of work in the prompts. edit and json do not use --text."),
    ] = "free",
    text: TextFile = None,
    json_file: JsonFile = None,
    temperature: Annotated[str, typer.Option(help="Sampling temperatures, comma-separated; 0 is greedy.")] = "0",
    config: options.ConfigFile = None,
) -> None:
    """Measure offline decoding of real text. Prefill is not timed; all values of --speculation, --drafter, --policy
    and --kv-format share one run.

    Rows have pages of their own. With --shared, engines whose rows share the pages of their common tokens, by the
    prefix cache, take turns with these.
    """
    batches, contexts = options.counts(batch, "--batch"), options.counts(context, "--context")
    if shared >= min(contexts):
        raise typer.BadParameter(f"must be less than --context, {min(contexts)}", param_hint="--shared")
    gammas = list(dict.fromkeys(options.gamma(value.strip()) for value in speculation.split(",")))
    policies = options.names(policy, POLICIES, "--policy") if policy is not None else [None]
    formats = options.names(kv_format, list(KV_BITS), "--kv-format") if kv_format is not None else [None]
    drafters = options.names(drafter, DRAFTERS, "--drafter") if drafter is not None else [None]
    if shared and task != "free":
        raise typer.BadParameter("needs --task free", param_hint="--shared")
    temperatures = options.temperatures(temperature, "--temperature")
    import torch

    from bench.corpus import read_text
    from bench.micro.bandwidth import read_bandwidth
    from bench.offline.decode import DecodeResult, measure, table
    from bench.tasks import cutter
    from engine.config.deployment import load_config
    from engine.config.speculation import SpeculationConfig
    from models.default import resolve_model
    from models.tokenizer import Tokenizer

    _check_file(json_file, "--json")
    if new_tokens < 1:
        raise typer.BadParameter("must be at least 1", param_hint="--new-tokens")
    fixed = [gamma for gamma in gammas if gamma != "auto"]
    overrides["engine.speculation.gamma"] = max(fixed) if fixed == gammas else "auto"
    if max(fixed, default=0) > SpeculationConfig().gamma_max:
        overrides["engine.speculation.gamma_max"] = max(fixed)
    settings = [
        _with_drafter(
            load_config(
                config,
                options.policy_override(name)
                | ({} if format is None else {"engine.cache.format": format})
                | _overrides_of(source, overrides)
                | {"engine.cache.prefix": prefix},
            ).engine,
            source,
        )
        for format in formats
        for source in drafters
        for name in policies
        for prefix in ((True, False) if shared else (len(temperatures) > 1,))
    ]
    cut = cutter(task, Tokenizer(resolve_model(settings[0].model)), read_text(text))
    results: list[DecodeResult] = []
    for rows in batches:
        for length in contexts:
            print(f"batch {rows}, context {length} …", file=sys.stderr)
            results += measure(
                settings,
                cut(rows, length, shared),
                gammas,
                new_tokens=new_tokens,
                history=history,
                temperatures=temperatures,
                shared=shared,
            )
    where = "cuda" if settings[0].device != "cpu" and torch.cuda.is_available() else "cpu"
    print(table(results, read_bandwidth(torch.device(where))))
    if json_file is not None:
        _write(json_file, [{**asdict(result), "speculation": result.speculation or "off"} for result in results])


@app.command()
@options.engine_flags(
    *("speculation", "drafter", "draft", "store", "policy", "budget", "verification"),
    *("max_model_len", "tensor_parallel_size", "prefix_cache"),
)
def acceptance(
    overrides: dict[str, Any],
    draft: Annotated[str, typer.Option(help="self or directories of draft models, comma-separated.")] = "self",
    policy: Annotated[
        str, typer.Option(help=f"KV that a draft reads: {', '.join(ACCEPTANCE_POLICIES)}; comma-separated.")
    ] = "window,relative,snapkv",
    budget: Annotated[
        str | None,
        typer.Option(help="KV tokens per draft step, comma-separated; 64 to 1024 if not given, of two pages at least."),
    ] = None,
    recent: Annotated[str, typer.Option(help="Recent tokens that snapkv keeps, comma-separated.")] = "64",
    reselect: Annotated[
        str, typer.Option(help="Tokens after which snapkv selects again, comma-separated; 0: never.")
    ] = "0",
    context: Annotated[str, typer.Option(help="Prompt tokens, comma-separated.")] = "2000",
    passages: Annotated[int, typer.Option(min=1, help="Passages of the text per context.")] = 8,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate after each passage.")] = 64,
    gamma: Annotated[int, typer.Option(min=1, max=16, help="Tokens drafted per round.")] = 3,
    sampling: Annotated[
        str, typer.Option(help="Temperatures or temperature:top-p pairs, comma-separated; 0 is greedy.")
    ] = "0",
    verification: Annotated[
        str | None, typer.Option(help="Run the engine with each of these: coupled, rejection; comma-separated.")
    ] = None,
    text: TextFile = None,
    json_file: JsonFile = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Plot acceptance over budget to this PNG.")] = None,
    config: options.ConfigFile = None,
) -> None:
    """Measure how often the target agrees with drafts, by policy, budget and context.

    All drafters propose after the same tokens of one text. With --verification each one runs by itself, as in
    serving.
    """
    contexts, given_budgets = options.counts(context, "--context"), budget and options.counts(budget, "--budget")
    recents, reselects = options.counts(recent, "--recent"), options.counts(reselect, "--reselect", minimum=0)
    policies = options.names(policy, ACCEPTANCE_POLICIES, "--policy")
    verifications = options.names(verification, ("coupled", "rejection"), "--verification") if verification else []
    drawn = [_sampling(part.strip()) for part in sampling.split(",")]
    _check_file(json_file, "--json")
    _check_file(plot_file, "--plot")
    import torch

    from bench.corpus import BenchError, read_text
    from bench.corpus import passages as cut
    from bench.offline.acceptance_report import plot, table
    from bench.offline.acceptance_sweep import AcceptanceResult, Setup, combine_setups, measure
    from bench.offline.verification import measure_rounds
    from bench.paper.forecast_report import check_plotting
    from engine.config.deployment import load_config
    from engine.params import SamplingParams
    from engine.worker.loading import load_target
    from models.default import resolve_model
    from models.tokenizer import Tokenizer

    if plot_file is not None:
        check_plotting()
    settings = load_config(config, overrides).engine
    if settings.tensor_parallel_size > 1:
        raise BenchError("acceptance is measured on one rank: it does not depend on their number")
    budgets = given_budgets or [each for each in ACCEPTANCE_BUDGETS if each >= 2 * settings.cache.page_size]
    if settings.threads:
        torch.set_num_threads(settings.threads)
    tokenizer, prose = Tokenizer(resolve_model(settings.model)), read_text(text)
    with_drafts = Setup("self", "all").config(settings, gamma)  # whatever drafts by the config
    target = load_target(with_drafts, progress=sys.stderr.isatty())
    setups = list(combine_setups([part.strip() for part in draft.split(",")], policies, budgets, recents, reselects))
    if not setups:
        raise typer.BadParameter("snapkv needs a budget larger than --recent", param_hint="--budget")
    params = [SamplingParams(temperature=t, top_p=p) for t, p in drawn]
    results: list[AcceptanceResult] = []
    for length in contexts:
        print(f"context {length} …", file=sys.stderr)
        prompts = cut(tokenizer, prose, count=passages, length=length)
        if not verifications:
            results += measure(settings, target, prompts, setups, gamma=gamma, new_tokens=new_tokens, sampling=params)
        for setup in setups if verifications else []:
            for kind in verifications:
                results += measure_rounds(
                    settings, target, prompts, setup, kind, gamma=gamma, new_tokens=new_tokens, sampling=params
                )
    print(table(results))
    if json_file is not None:
        _write(json_file, [{**asdict(result), "alpha": result.alpha} for result in results])
    if plot_file is not None:
        plot(results, plot_file)


def _sampling(text: str) -> tuple[float, float]:
    """Parse temperature and top-p."""
    temperature, _, top_p = text.partition(":")
    try:
        drawn = float(temperature), float(top_p or 1)
    except ValueError:
        drawn = -1, 0
    if not (0 <= drawn[0] <= 100 and 1e-6 <= drawn[1] <= 1):
        raise typer.BadParameter(f"{text!r} is not a temperature, nor temperature:top-p", param_hint="--sampling")
    return drawn


def _overrides_of(drafter: str | None, overrides: dict[str, Any]) -> dict[str, Any]:
    """Return the overrides of one drafter in a comparison: without a draft model or a store that is not for it."""
    if drafter is None:
        return overrides
    foreign = {
        **({"engine.speculation.model": None} if drafter in ("self", "ngram") else {}),
        **({"engine.speculation.store": None} if drafter in ("self", "model") else {}),
    }
    return overrides | foreign | {"engine.speculation.drafter": drafter}


def _with_drafter(engine: EngineConfig, asked: str | None) -> EngineConfig:
    """Let the model alone draft where no drafter is asked for, and no store set: comparisons vary the number of drafts,
    and one of a fixed number is not compared with another drafter's."""
    speculation = engine.speculation
    if asked is not None or speculation.drafter != "auto" or speculation.store is not None:
        return engine
    alone = speculation.model_copy(update={"drafter": speculation.drafting_model})
    return engine.model_copy(update={"speculation": alone})


def _check_file(file: Path | None, flag: str) -> None:
    if file is not None and not file.absolute().parent.is_dir():
        raise typer.BadParameter(f"{file.parent} is not a directory", param_hint=flag)


def _write(file: Path, listed: list[dict[str, Any]]) -> None:
    file.write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")


@app.command()
def broadcast(
    ranks: Annotated[str, typer.Option(help="Numbers of ranks, comma-separated.")] = "2,4,8",
    rows: Annotated[int, typer.Option(min=1, help="Decoding rows in a plan.")] = 64,
    floats: Annotated[int, typer.Option(min=1, help="float32 values per all-reduce.")] = 4096,
) -> None:
    """Measure the time to send plans to rank processes without a model, and to all-reduce a few values."""
    counts = options.counts(ranks, "--ranks")
    if min(counts) < 2:
        raise typer.BadParameter("expected at least 2 ranks", param_hint="--ranks")
    from bench.micro.broadcast import measure, table

    print(table(measure(count, rows, floats) for count in counts))
