"""`magicdec profile`: time plain steps, draft steps and verify passes on this machine; and how far heads look."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from server.cli import options

app = typer.Typer()
_PASSAGES = 4


@app.callback(invoke_without_command=True)
@options.engine_flags("speculation", "max_model_len", "prefix_cache")
def profile(
    overrides: dict[str, Any],
    command: typer.Context,
    rows: Annotated[str, typer.Option(help="Numbers of rows, comma-separated.")] = "1,4,16",
    context: Annotated[str, typer.Option(help="Tokens per row, comma-separated.")] = "256,2000,7500",
    gammas: Annotated[str, typer.Option("--gamma", help="Tokens drafted per round, comma-separated.")] = "1,3,6",
    alpha: Annotated[float, typer.Option(min=0, max=1, help="Acceptance rate for the predicted gain.")] = 0.8,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the times to this file.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Plot the times to this PNG.")] = None,
    config: options.ConfigFile = None,
) -> None:
    """Measure rounds over rows and context, on the real engine but without computing prompts."""
    if command.invoked_subcommand is not None:
        if any(_is_given(command, name) for name in command.params):
            raise typer.BadParameter(f"its options come after `{command.invoked_subcommand}`", param_hint="profile")
        return
    counts = options.counts(rows, "--rows"), options.counts(context, "--context"), options.counts(gammas, "--gamma")
    for file, flag in ((json_file, "--json"), (plot_file, "--plot")):
        if file is not None and not file.absolute().parent.is_dir():
            raise typer.BadParameter(f"{file.parent} is not a directory", param_hint=flag)
    overrides["engine.speculation.gamma"] = max(counts[2])
    import msgspec

    from bench.micro.rounds import measure, plot, table
    from bench.paper.forecast_report import check_plotting
    from engine.config.deployment import load_config

    if plot_file is not None:
        check_plotting()
    times = measure(load_config(config, overrides).engine, *counts, alpha=alpha)
    print(table(times, alpha))
    if json_file is not None:
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode(times), indent=2))
    if plot_file is not None:
        plot(times, plot_file)
        print(f"drawn into {plot_file}", file=sys.stderr)


def _is_given(command: typer.Context, name: str) -> bool:
    source = command.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


@app.command()
@options.engine_flags(
    *("tensor_parallel_size", "speculation", "drafter", "draft", "store", "draft_weights"),
    *("policy", "budget", "verification"),
    *("target_kv", "target_budget", "kv_format", "max_model_len", "gpu_memory_utilization", "prefix_cache"),
)
def heads(
    overrides: dict[str, Any],
    output: Annotated[Path, typer.Option("--output", "-o", help="Write the shares to this file (JSON).")],
    text: Annotated[Path | None, typer.Option(help="Take passages from this file instead of Python's manual.")] = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens of each passage.")] = 4096,
    config: options.ConfigFile = None,
) -> None:
    """Measure how much each KV head looks beyond the first and the most recent tokens, for `engine.target_kv.heads`.

    Sink and window are those of `target_kv` in the config file, or else its defaults.
    """
    if not output.absolute().parent.is_dir():
        raise typer.BadParameter(f"{output.parent} is not a directory", param_hint="--output")
    import msgspec
    import torch

    from bench.corpus import passages, read_text
    from bench.micro.head_shares import describe, measure
    from engine.config.deployment import load_config
    from engine.config.target_reading import TargetQuestConfig
    from engine.worker.loading import load_target
    from models.default import resolve_model
    from models.tokenizer import Tokenizer

    settings = load_config(config, overrides).engine
    if settings.threads:
        torch.set_num_threads(settings.threads)
    # Without `heads`, whose file may be the one to write.
    target, page = settings.target_kv or TargetQuestConfig(policy="quest"), settings.cache.page_size
    settings = settings.model_copy(update={"target_kv": None})
    texts = passages(Tokenizer(resolve_model(settings.model)), read_text(text), count=_PASSAGES, length=context)
    model = load_target(settings, progress=sys.stderr.isatty())
    found = measure(model, texts, sink=-(-target.sink // page) * page, window=target.window)
    output.write_bytes(msgspec.json.format(msgspec.json.encode(found)))
    print(describe(found))
