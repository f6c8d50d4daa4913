"""The subcommands. Each has a module here, which imports its dependencies only when it is called."""

from __future__ import annotations

import importlib.metadata
from typing import Annotated

import typer

from server.cli import (
    bench,
    bench_serve,
    checkpoints,
    generate,
    kernels,
    make_draft,
    plan,
    profile,
    quantize,
    serve,
    store,
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(serve.serve)
app.command()(generate.generate)
app.command()(plan.plan)
app.command()(checkpoints.fetch)
app.command()(checkpoints.convert)
app.command()(kernels.kernels)
app.command()(make_draft.make_draft)
app.command()(quantize.quantize)
bench.app.command()(bench_serve.serve)
app.add_typer(bench.app, name="bench")
app.add_typer(profile.app, name="profile")
app.add_typer(store.app, name="store")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"magicdec {importlib.metadata.version('magicdec')}")
        raise typer.Exit


@app.callback()
def magicdec(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Serve a language model with speculative decoding whose drafts read only part of the KV cache (MagicDec)."""
