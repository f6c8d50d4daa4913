"""`magicdec bench serve`: a load for any OpenAI-compatible server, and how it bore it."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from bench.serving.load import Item
    from bench.serving.load_client import RequestRecord, Target

VALUES: dict[str, dict[str, Any]] = {
    "as-is": {},
    "on": {"speculation": {"enabled": True}},
    "off": {"speculation": {"enabled": False}},
}


class Arrivals(StrEnum):
    poisson = "poisson"
    constant = "constant"


def serve(
    url: Annotated[str, typer.Option(help="Of the server, without /v1.")] = "http://127.0.0.1:8000",
    rate: Annotated[str | None, typer.Option(help="Requests per second, comma-separated: an open loop.")] = None,
    concurrency: Annotated[str | None, typer.Option(help="Requests under way, comma-separated: a closed loop.")] = None,
    arrivals: Annotated[Arrivals, typer.Option(help="How an open loop's requests arrive.")] = Arrivals.poisson,
    requests: Annotated[int, typer.Option(min=1, help="Per level of load and value of --speculation.")] = 50,
    warm_up: Annotated[int, typer.Option(min=0, help="Requests before the first, which do not count.")] = 2,
    prompt: Annotated[str, typer.Option(help="Tokens: N, uniform:A:B or lognormal:MEDIAN:SIGMA:MOST.")] = "1000",
    output: Annotated[str, typer.Option(help="Tokens to generate, likewise.")] = "64",
    shared_prefix: Annotated[int, typer.Option(min=0, help="Tokens that prompts of a group begin with.")] = 0,
    groups: Annotated[int, typer.Option(min=1, help="Groups of prompts with one beginning each.")] = 1,
    speculation: Annotated[
        str, typer.Option(help="as-is, or on and off by turns (a field of magicdec's own), comma-separated.")
    ] = "as-is",
    temperature: Annotated[float, typer.Option(min=0, max=100)] = 0.0,
    slo: Annotated[
        str | None, typer.Option(help="What counts as good, in ms: ttft:500,tpot:50,e2e:5000, any of them.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that a request may take.")] = 600.0,
    seed: Annotated[int, typer.Option(help="Of lengths, texts and arrivals.")] = 0,
    model: Annotated[str | None, typer.Option(help="Model id; the first one that is served, if not given.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="Sent as a bearer token.")] = None,
    tokenizer: Annotated[
        str, typer.Option(help="Directory with the model's tokenizer, to cut prompts by; or `default`.")
    ] = "default",
    text: Annotated[Path | None, typer.Option(help="Take prompts from this file, not from Python's manual.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results here.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw latency over throughput.")] = None,
) -> None:
    """Send a load over HTTP and report latency, throughput and goodput.

    Prompts are token ids, so their lengths are exact. In an open loop requests are sent when they are due, and what
    they wait counts from then. Every request is accounted for.
    """
    if (rate is None) == (concurrency is None):
        raise typer.BadParameter("give one of --rate and --concurrency", param_hint="--rate")
    levels = _levels(rate or concurrency or "", whole=rate is None)
    wanted = [value.strip() for value in speculation.split(",")]
    if unknown := [value for value in wanted if value not in VALUES]:
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(VALUES)}", param_hint="--speculation")
    import msgspec

    from bench.corpus import BenchError, read_text

    try:
        import aiohttp
    except ImportError:
        raise BenchError("sending a load needs aiohttp: pip install 'magicdec[load]'") from None
    from bench.paper.forecast_report import check_plotting
    from bench.serving.load import Lengths, items
    from bench.serving.load_client import Target, list_model
    from bench.serving.load_report import Slo, Summary, plot, table
    from models.default import resolve_model
    from models.tokenizer import Tokenizer

    if plot_file is not None:
        check_plotting()
    lengths = Lengths.parse(prompt), Lengths.parse(output)
    limits = None if slo is None else Slo.parse(slo)
    tokens = Tokenizer(resolve_model(tokenizer)).encode(read_text(text), add_special_tokens=False)
    load = items(tokens, requests + warm_up, *lengths, shared=shared_prefix, groups=groups, seed=seed)
    target = Target(url.rstrip("/").removesuffix("/v1"), model, api_key, timeout, {"temperature": temperature})
    try:
        target = replace(target, model=model or asyncio.run(list_model(target)))
    except (aiohttp.ClientError, TimeoutError, LookupError) as error:
        raise BenchError(f"{url}: no model is served there: {error or type(error).__name__}") from None
    summaries: list[Summary] = []
    for index, level in enumerate(levels):
        for value in wanted if index % 2 == 0 else wanted[::-1]:
            sent = replace(target, body=target.body | VALUES[value])
            if not summaries and warm_up:
                _run(sent, load[:warm_up], 1, closed=True, arrivals=arrivals, seed=seed)
            records = _run(sent, load[warm_up:], level, closed=rate is None, arrivals=arrivals, seed=seed)
            summaries.append(Summary.of(records, level, rate is None, value, limits))
    summaries.sort(key=lambda each: (each.level, wanted.index(each.speculation)))
    print(table(summaries))
    if json_file is not None:
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode(summaries), indent=2) + b"\n")
    if plot_file is not None:
        plot(summaries, plot_file)


def _run(
    target: Target, load: list[Item], level: float, *, closed: bool, arrivals: Arrivals, seed: int
) -> list[RequestRecord]:
    from tqdm import tqdm

    from bench.serving.load_client import LoadClient

    about = f"{level:g} {'users' if closed else 'requests/s'}"
    with tqdm(total=len(load), desc=about, unit="request", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:

        def done() -> None:
            bar.update()

        client = LoadClient(target, done)
        if closed:
            return asyncio.run(client.at_concurrency(load, int(level)))
        return asyncio.run(client.at_rate(load, level, arrivals.value, seed))


def _levels(text: str, *, whole: bool) -> list[float]:
    flag = "--concurrency" if whole else "--rate"
    try:
        levels = [float(value) for value in text.split(",")]
    except ValueError:
        levels = []
    if not levels or any(not 0 < level < 1e6 or (whole and level != int(level)) for level in levels):
        raise typer.BadParameter(f"{text!r} is no list of positive numbers", param_hint=flag)
    return levels
