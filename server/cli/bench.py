"""`magicdec bench`: measurements."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from server.cli import options

app = typer.Typer(no_args_is_help=True, help="Measure speed.")


@app.callback()
def bench() -> None:
    """Measure speed."""


@app.command()
def decode(
    batch: Annotated[str, typer.Option(help="Rows, comma-separated.")] = "4",
    context: Annotated[str, typer.Option(help="Prompt tokens per row, comma-separated.")] = "2000",
    new_tokens: Annotated[int, typer.Option(help="Tokens per row and value of --speculation.")] = 64,
    speculation: Annotated[str, typer.Option(help="off and numbers of drafted tokens, comma-separated.")] = "off,1,3",
    text: Annotated[Path | None, typer.Option(help="Take prompts from this file, not from Python's manual.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results here.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    config: options.ConfigFile = None,
    model: options.Model = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    tensor_parallel_size: options.TensorParallel = None,
    budget: options.Budget = None,
    threads: options.Threads = None,
) -> None:
    """Decode real text offline; prefill is outside the clock, and all values of --speculation share one run."""
    batches, contexts = options.counts(batch, "--batch"), options.counts(context, "--context")
    gammas = list(dict.fromkeys(options.gamma(value.strip()) for value in speculation.split(",")))
    fixed = [gamma for gamma in gammas if gamma != "auto"]
    if len(fixed) < len(gammas):
        raise typer.BadParameter("auto is no fixed number of tokens", param_hint="--speculation")
    overrides = options.engine_overrides(
        model=model,
        device=device,
        dtype=dtype,
        tensor_parallel_size=tensor_parallel_size,
        budget=budget,
        threads=threads,
        speculation=str(max(fixed)),
    )
    import torch

    from bench.bandwidth import read_bandwidth
    from bench.corpus import passages, read_text
    from bench.decode import DecodeResult, measure, table
    from engine.config import load_config
    from models.default import resolve_model
    from models.tokenizer import Tokenizer

    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise typer.BadParameter(f"{json_file.parent} is no directory", param_hint="--json")
    if not 0 <= temperature <= 100:
        raise typer.BadParameter("must be from 0 to 100", param_hint="--temperature")
    if new_tokens < 1:
        raise typer.BadParameter("must be at least 1", param_hint="--new-tokens")
    settings = load_config(config, overrides).engine
    tokenizer = Tokenizer(resolve_model(settings.model))
    prose = read_text(text)
    results: list[DecodeResult] = []
    for rows in batches:
        for length in contexts:
            print(f"batch {rows}, context {length} …", file=sys.stderr)
            prompts = passages(tokenizer, prose, count=rows, length=length)
            results += measure(settings, prompts, fixed, new_tokens=new_tokens, temperature=temperature)
    where = "cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu"
    print(table(results, read_bandwidth(torch.device(where))))
    if json_file is not None:
        listed = [{**asdict(result), "speculation": result.speculation or "off"} for result in results]
        json_file.write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")


@app.command()
def broadcast(
    ranks: Annotated[str, typer.Option(help="Ranks, comma-separated.")] = "2,4,8",
    rows: Annotated[int, typer.Option(min=1, help="Decoding rows in a plan.")] = 64,
    floats: Annotated[int, typer.Option(min=1, help="float32 numbers that one all-reduce sums.")] = 4096,
) -> None:
    """Send plans to rank processes without a model, and sum a few numbers over them."""
    counts = options.counts(ranks, "--ranks")
    if min(counts) < 2:
        raise typer.BadParameter("a single rank has nobody to talk to", param_hint="--ranks")
    from bench.broadcast import measure, table

    print(table(measure(count, rows, floats) for count in counts))
