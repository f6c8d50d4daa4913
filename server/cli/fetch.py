"""`magicdec fetch`: install the default models."""

from __future__ import annotations

import typer

from models.default import default_model_dir, missing_models


def fetch() -> None:
    """Download and convert the models `default` and `default-int4` unless they exist, and print the directory of the
    first."""
    directory = default_model_dir()
    if missing_models():
        from models.fetch import fetch as run

        run(lambda line: typer.echo(line, err=True))
    typer.echo(directory)
