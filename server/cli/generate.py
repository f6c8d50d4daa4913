"""`magicdec generate`: complete one prompt in this process and stream it to the terminal."""

from __future__ import annotations

import secrets
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli import options

if TYPE_CHECKING:
    from engine.messages import EngineStats


@options.engine_flags()
def generate(
    overrides: dict[str, Any],
    prompt: Annotated[str | None, typer.Argument(help="The prompt; - reads it from standard input.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read the prompt from this file.")] = None,
    config: options.ConfigFile = None,
    max_tokens: Annotated[int, typer.Option(help="Maximum number of tokens to generate.")] = 256,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample from the k most likely tokens; 0: from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from the most likely tokens of this total probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Exclude tokens less likely than this times the most likely.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Sampling seed: same seed, same text; random if not given.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop at this string; can be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Continue past the end of sequence.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print rounds, acceptance and speed to stderr.")] = False,
) -> None:
    """Complete a prompt and stream the text to standard output."""
    text = _prompt(prompt, prompt_file)
    import msgspec

    from engine.config.deployment import load_config
    from engine.llm import LLM
    from engine.params import SamplingParams

    settings = load_config(config, overrides)
    fields = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": secrets.randbits(63) if seed is None else seed,
        "stop": tuple(stop or ()),
        "ignore_eos": ignore_eos,
    }
    try:
        params = msgspec.convert(fields, SamplingParams)
    except msgspec.ValidationError as error:
        raise typer.BadParameter(str(error)) from None
    with LLM(settings.engine, progress=sys.stderr.isatty()) as llm:
        began = time.perf_counter()
        first_at = None
        count = 0
        for piece in llm.stream(text, params):
            first_at = first_at or time.perf_counter()
            count += len(piece.token_ids)
            sys.stdout.write(piece.text)
            sys.stdout.flush()
        ended = time.perf_counter()
        sys.stdout.write("\n")
        if stats and first_at is not None:
            _report(llm.stats, count, first_at - began, ended - first_at)


def _prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise typer.BadParameter("give a prompt, or - for standard input, or --prompt-file")
    try:
        if prompt_file is not None:
            return prompt_file.read_text(encoding="utf-8")
        text = sys.stdin.buffer.read().decode("utf-8") if prompt == "-" else str(prompt)
        text.encode("utf-8")
        return text
    except UnicodeError:
        raise typer.BadParameter("the prompt is not UTF-8 text") from None


def _report(stats: EngineStats, tokens: int, prefill: float, decode: float) -> None:
    """Print statistics. Tokens per second are those of decoding: the first token belongs to the prefill."""
    from engine.scheduler.stats import acceptance_rate

    rounds = sum(stats.gamma_chosen)
    lines = [
        "weights       " + ", ".join(f"{model} {formats}" for model, formats in stats.weights.items()),
        f"KV            {stats.kv_format}, {stats.kv_token_bytes} bytes per token",
        f"prompt        {stats.prompt_tokens} tokens in {prefill:.2f} s",
        f"output        {tokens} tokens, {(tokens - 1) / decode if decode else 0:.1f} tokens/s after the first",
        f"rounds        {rounds}, {(tokens - 1) / rounds if rounds else 0:.2f} tokens each",
        f"drafted       {stats.draft_tokens} tokens, {stats.accepted_tokens} accepted",
    ]
    if stats.text_draft_tokens:
        lines.append(f"  from text   {stats.text_draft_tokens} tokens, {stats.text_accepted_tokens} accepted")
    if stats.model_draft_tokens:
        lines.append(f"  by a model  {stats.model_draft_tokens} tokens, {stats.model_accepted_tokens} accepted")
    if stats.draft_tokens:
        lines.append(f"acceptance    {acceptance_rate(stats):.3f}")
    lines.append(
        f"time          draft {stats.draft_seconds:.2f} s, target {stats.verify_seconds:.2f} s, "
        f"host {stats.host_seconds:.2f} s"
    )
    if stats.decode_seconds and stats.forecast_seconds:
        shares = " ".join(f"{gamma}:{count}" for gamma, count in enumerate(stats.gamma_chosen))
        lines.append(f"gamma         rounds by drafted tokens {shares}; estimated acceptance {stats.alpha:.3f}")
        lines.append(
            f"speed-up      {stats.plain_seconds / stats.decode_seconds:.2f} as estimated by the controller, "
            f"{stats.plain_seconds / stats.forecast_seconds:.2f} predicted"
        )
    print("\n".join(lines), file=sys.stderr)
