"""`magicdec bench serve`: load-test any OpenAI-compatible server."""

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
    url: Annotated[str, typer.Option(help="URL of the server, without /v1.")] = "http://127.0.0.1:8000",
    rate: Annotated[str | None, typer.Option(help="Requests per second of an open loop, comma-separated.")] = None,
    concurrency: Annotated[
        str | None, typer.Option(help="Concurrent requests of a closed loop, comma-separated.")
    ] = None,
    arrivals: Annotated[Arrivals, typer.Option(help="Arrival process of an open loop.")] = Arrivals.poisson,
    requests: Annotated[int, typer.Option(min=1, help="Requests per level of load and value of --speculation.")] = 50,
    warm_up: Annotated[int, typer.Option(min=0, help="Requests before the first level, not counted.")] = 2,
    prompt: Annotated[
        str, typer.Option(help="Prompt tokens: N, uniform:MIN:MAX or lognormal:MEDIAN:SIGMA:MAX.")
    ] = "1000",
    output: Annotated[str, typer.Option(help="Tokens to generate, in the same form.")] = "64",
    shared_prefix: Annotated[int, typer.Option(min=0, help="Tokens of the prefix that a group of prompts shares.")] = 0,
    groups: Annotated[int, typer.Option(min=1, help="Groups of prompts, each with its own prefix.")] = 1,
    speculation: Annotated[
        str,
        typer.Option(
            help="as-is, on or off, comma-separated, run alternately; on and off set a field of magicdec's own."
        ),
    ] = "as-is",
    temperature: Annotated[float, typer.Option(min=0, max=100)] = 0.0,
    slo: Annotated[str | None, typer.Option(help="Limits for goodput in ms, any of ttft:500,tpot:50,e2e:5000.")] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Timeout of a request in seconds.")] = 600.0,
    seed: Annotated[int, typer.Option(help="Seed of lengths, texts and arrivals.")] = 0,
    model: Annotated[str | None, typer.Option(help="Model id; the first served one if not given.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", help="API key, sent as a bearer token.")
    ] = None,
    tokenizer: Annotated[
        str, typer.Option(help="Directory with the model's tokenizer, to cut prompts to length; or `default`.")
    ] = "default",
    text: Annotated[Path | None, typer.Option(help="Take prompts from this file instead of Python's manual.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Plot latency over throughput to this PNG.")] = None,
) -> None:
    """Load-test a server over HTTP and report latency, throughput and goodput.

    Prompts are token ids, so their lengths are exact. An open loop sends requests when they are due, and measures
    latency from then. Every request is accounted for.
    """
    if (rate is None) == (concurrency is None):
        raise typer.BadParameter("give one of --rate and --concurrency", param_hint="--rate")
    levels = _levels(rate or concurrency or "", whole=rate is None)
    wanted = [value.strip() for value in speculation.split(",")]
    if unknown := [value for value in wanted if value not in VALUES]:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(VALUES)}", param_hint="--speculation")
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
            summaries.append(Summary.from_records(records, level, rate is None, value, limits))
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
        raise typer.BadParameter(f"{text!r} is not a list of positive numbers", param_hint=flag)
    return levels
