"""`magicdec profile`: time plain steps, draft steps and verify passes on this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from server.cli import options


@options.engine_flags("speculation", "max_model_len", "prefix_cache")
def profile(
    overrides: dict[str, Any],
    rows: Annotated[str, typer.Option(help="Numbers of rows, comma-separated.")] = "1,4,16",
    context: Annotated[str, typer.Option(help="Tokens per row, comma-separated.")] = "256,2000,7500",
    gammas: Annotated[str, typer.Option("--gamma", help="Tokens drafted per round, comma-separated.")] = "1,3,6",
    alpha: Annotated[float, typer.Option(min=0, max=1, help="Acceptance rate for the predicted gain.")] = 0.8,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the times to this file.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Plot the times to this PNG.")] = None,
    config: options.ConfigFile = None,
) -> None:
    """Measure rounds over rows and context, on the real engine but without computing prompts."""
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
