"""The `magicdec` command."""

from __future__ import annotations

import importlib.util
import io
import sys
from collections.abc import Sequence
from pathlib import Path

PACKAGES = ("server", "bench", "planner", "engine", "models", "parallel", "kernels")


def main() -> None:
    """Run the command line. Errors that the user can fix end in a message on stderr and status 2."""
    if (fault := foreign_package(Path(__file__).parents[2])) is not None:
        sys.exit(_fail(fault))
    for stream in (sys.stdout, sys.stderr):
        # A terminal's or a pipe's encoding may lack characters of a text; they are written as escapes.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    from server.cli.app import app  # not earlier: the check above ensures that it imports our packages

    try:
        app(repeated(sys.argv[1:], "--served-model-name"))
    except (ValueError, RuntimeError, OSError) as error:
        if not is_expected(error):
            raise
        sys.exit(_fail(str(error)))


def repeated(arguments: Sequence[str], flag: str) -> list[str]:
    """Write `flag` before each of the values that follow it: other servers take several at once."""
    found: list[str] = []
    values = 0  # that follow the flag
    for argument in arguments:
        values = 1 if argument == flag else values + 1 if values and not argument.startswith("-") else 0
        found += [flag, argument] if values > 2 else [argument]
    return found


def is_expected(error: Exception) -> bool:
    """Whether the error's message is meant for the user: a type of this program, or about a file they named."""
    ours = isinstance(error, (ValueError, RuntimeError)) and type(error).__module__.partition(".")[0] in PACKAGES
    return ours or (isinstance(error, OSError) and error.filename is not None)


def foreign_package(root: Path) -> str | None:
    """Describe the fault if one of our top-level packages would be imported from elsewhere than `root`; else None.

    Other distributions install packages of the same names (`kernels` is one), and sys.path decides which is imported.
    """
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        found = [Path(place).resolve() for place in (spec and spec.submodule_search_locations) or ()]
        if found != [(root / name).resolve()]:
            where = f"is found in {found[0]}" if found else "is not found"
            return (
                f"the package {name!r} of magicdec {where} instead of {root / name}: "
                "another distribution has one of this name; uninstall it, or use an environment without it"
            )
    return None


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
