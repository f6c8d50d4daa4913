"""The command `magicdec`. Each subcommand has a file here and imports what it needs when it is called."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from typing import Annotated

import typer

from server.cli import convert, fetch

PACKAGES = ("server", "bench", "engine", "models", "parallel", "kernels")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(fetch.fetch)
app.command()(convert.convert)


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
    """Serve a language model with speculative decoding that reads only part of the KV cache (MagicDec)."""


def main() -> None:
    """Run the command line. What the user can put right ends in one line on stderr and status 2."""
    if (fault := foreign_package(Path(__file__).parents[2])) is not None:
        sys.exit(_fail(fault))
    try:
        app()
    except (ValueError, OSError) as error:
        if not is_expected(error):
            raise
        sys.exit(_fail(str(error)))


def is_expected(error: Exception) -> bool:
    """Whether its message is meant for the user: raised by this program as such, or about a file they named."""
    ours = isinstance(error, ValueError) and type(error).__module__.partition(".")[0] in PACKAGES
    return ours or (isinstance(error, OSError) and error.filename is not None)


def foreign_package(root: Path) -> str | None:
    """What is wrong if one of our top-level packages would be imported from elsewhere than `root`.

    Other distributions install packages of the same names (`kernels` is one), and sys.path decides who wins.
    """
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        found = [Path(place).resolve() for place in (spec and spec.submodule_search_locations) or ()]
        if found != [(root / name).resolve()]:
            where = f"is found in {found[0]}" if found else "is not found"
            return (
                f"the package {name!r} of magicdec {where} instead of {root / name}: "
                f"another distribution has a package of this name; uninstall it, or use an environment without it"
            )
    return None


def _fail(message: str) -> int:
    typer.echo(f"error: {message}", err=True)
    return 2
