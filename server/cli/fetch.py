"""`magicdec fetch`: install the default model."""

from __future__ import annotations

import typer

from models.default import default_model_dir, is_model_dir


def fetch() -> None:
    """Download and convert the default model unless it exists, and print its directory."""
    directory = default_model_dir()
    if not is_model_dir(directory):
        from models.fetch import fetch as run

        run(lambda line: typer.echo(line, err=True))
    typer.echo(directory)
