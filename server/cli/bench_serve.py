"""`magicdec bench serve`: load-test any OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from bench.serving.load import Job
    from bench.serving.load_client import PrefixCounts, RequestRecord, Target

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
    rate: Annotated[
        str | None, typer.Option(help="Requests, or conversations, per second of an open loop, comma-separated.")
    ] = None,
    concurrency: Annotated[
        str | None, typer.Option(help="Concurrent requests, or conversations, of a closed loop, comma-separated.")
    ] = None,
    arrivals: Annotated[Arrivals, typer.Option(help="Arrival process of an open loop.")] = Arrivals.poisson,
    requests: Annotated[
        int | None, typer.Option(min=1, help="Requests per level of load and value of --speculation; 50 if not given.")
    ] = None,
    conversations: Annotated[
        int | None, typer.Option(min=1, help="Send so many conversations instead of single requests.")
    ] = None,
    turns: Annotated[int | None, typer.Option(min=1, help="Turns of each conversation; 5 if not given.")] = None,
    think: Annotated[
        float | None, typer.Option(min=0, help="Mean seconds that a user thinks before the next turn; 1 if not given.")
    ] = None,
    documents: Annotated[
        int | None, typer.Option(min=1, help="Send questions about so many documents instead of single requests.")
    ] = None,
    questions: Annotated[int | None, typer.Option(min=1, help="Questions per document; 8 if not given.")] = None,
    document: Annotated[
        str | None, typer.Option(help="Tokens of a document, in the form of --prompt; 4000 if not given.")
    ] = None,
    warm_up: Annotated[int, typer.Option(min=0, help="Requests before the first level, not counted.")] = 2,
    prompt: Annotated[
        str,
        typer.Option(
            help="Tokens of a prompt, of a turn's new text or of a question: N, uniform:MIN:MAX or "
            "lognormal:MEDIAN:SIGMA:MAX."
        ),
    ] = "1000",
    output: Annotated[str, typer.Option(help="Tokens to generate, in the same form.")] = "64",
    shared_prefix: Annotated[
        int,
        typer.Option(
            min=0, help="Tokens of the prefix that a group of prompts shares; of conversations, of a system message."
        ),
    ] = 0,
    groups: Annotated[
        int, typer.Option(min=1, help="Groups of prompts or conversations, each with its own prefix.")
    ] = 1,
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

    Prompts of single requests are token ids, so their lengths are exact. An open loop sends requests when they are
    due, and measures latency from then. Every request is accounted for.

    With --conversations, users chat: each turn sends the whole history, with the server's own answers in it, and new
    text; a turn without an answer is the last. With --documents, each prompt is a document and a question, in random
    order. Both show what the server's prefix cache finds. At each level and value of --speculation, all prompts have
    another beginning, so that nothing is known from before.
    """
    _check_kind(
        {"--requests": requests},
        {"--conversations": conversations, "--turns": turns, "--think": think},
        {"--documents": documents, "--questions": questions, "--document": document},
    )
    if documents is not None and (shared_prefix or groups > 1):
        raise typer.BadParameter("documents are what prompts share", param_hint="--shared-prefix")
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
    from bench.serving import load
    from bench.serving.conversations import conversations as converse
    from bench.serving.load import Lengths
    from bench.serving.load_client import Target, list_model, read_prefix_counts
    from bench.serving.load_report import Slo, Summary, plot, table
    from models.default import resolve_model
    from models.tokenizer import Tokenizer

    if plot_file is not None:
        check_plotting()
    lengths = Lengths.parse(prompt), Lengths.parse(output)
    long = Lengths.parse(document or "4000")
    limits = None if slo is None else Slo.parse(slo)
    encoder = Tokenizer(resolve_model(tokenizer))
    tokens = encoder.encode(read_text(text), add_special_tokens=False)
    jobs: Sequence[Job]
    if conversations is not None:
        think_s, count = 1.0 if think is None else think, turns or 5
        jobs = converse(
            tokens,
            encoder.decode,
            conversations,
            count,
            *lengths,
            think_s=think_s,
            shared=shared_prefix,
            groups=groups,
            seed=seed,
        )
        total = conversations * count
    elif documents is not None:
        jobs = load.questions(tokens, documents, questions or 8, long, *lengths, seed=seed)
        total = len(jobs)
    else:
        jobs = load.items(tokens, requests or 50, *lengths, shared=shared_prefix, groups=groups, seed=seed)
        total = len(jobs)
    first = load.items(tokens, warm_up, *lengths, seed=seed)
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
                _run(sent, first, 1, closed=True, arrivals=arrivals, seed=seed, total=warm_up)
            before, mark = asyncio.run(read_prefix_counts(target)), load.draw_mark(tokens)
            fresh = [job.marked(mark) for job in jobs]
            records = _run(sent, fresh, level, closed=rate is None, arrivals=arrivals, seed=seed, total=total)
            hit_rate = _hit_rate(before, asyncio.run(read_prefix_counts(target)))
            summaries.append(Summary.from_records(records, level, rate is None, value, limits, hit_rate))
    summaries.sort(key=lambda each: (each.level, wanted.index(each.speculation)))
    print(table(summaries))
    if json_file is not None:
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode(summaries), indent=2) + b"\n")
    if plot_file is not None:
        plot(summaries, plot_file)


def _run(
    target: Target, jobs: Sequence[Job], level: float, *, closed: bool, arrivals: Arrivals, seed: int, total: int
) -> list[RequestRecord]:
    from tqdm import tqdm

    from bench.serving.load_client import LoadClient

    about = f"{level:g} {'users' if closed else 'requests/s'}"
    with tqdm(total=total, desc=about, unit="request", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:

        def done() -> None:
            bar.update()

        client = LoadClient(target, done)
        if closed:
            return asyncio.run(client.at_concurrency(jobs, int(level)))
        return asyncio.run(client.at_rate(jobs, level, arrivals.value, seed))


def _hit_rate(before: PrefixCounts | None, after: PrefixCounts | None) -> float | None:
    """Share of prompt tokens found in the server's prefix cache between two readings; None if none was looked up."""
    if before is None or after is None or after.queries <= before.queries:
        return None
    return (after.hits - before.hits) / (after.queries - before.queries)


def _check_kind(*kinds: dict[str, Any]) -> None:
    """Refuse flags that would have no effect. kinds: for each kind of load, its flags and what was given; the first
    flag of a kind selects it, except of the first kind, which needs none. Raises typer.BadParameter."""
    given = [[flag for flag, value in kind.items() if value is not None] for kind in kinds]
    for kind, flags in list(zip(kinds, given, strict=True))[1:]:
        selects = next(iter(kind))
        if flags and selects not in flags:
            raise typer.BadParameter(f"only with {selects}", param_hint=flags[0])
    used = [flags[0] for flags in given if flags]
    if len(used) > 1:
        raise typer.BadParameter(f"not with {used[0]}", param_hint=used[1])


def _levels(text: str, *, whole: bool) -> list[float]:
    flag = "--concurrency" if whole else "--rate"
    try:
        levels = [float(value) for value in text.split(",")]
    except ValueError:
        levels = []
    if not levels or any(not 0 < level < 1e6 or (whole and level != int(level)) for level in levels):
        raise typer.BadParameter(f"{text!r} is not a list of positive numbers", param_hint=flag)
    return levels
