"""Version and commit of this build."""

from __future__ import annotations

import json
import subprocess
from importlib import metadata
from pathlib import Path

_DISTRIBUTION = "magicdec"


def build() -> dict[str, str]:
    """Return the package's version and the commit of its source ("unknown" if none). Runs git: call it once."""
    return {"version": _version(), "commit": _commit() or "unknown"}


def _version() -> str:
    """Return the version of the installed package; "0" in a tree that was never installed."""
    try:
        return metadata.version(_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "0"


def _commit() -> str | None:
    """Return the Git commit of the checkout this runs from, or that the package was installed from; None if unknown."""
    root = Path(__file__).resolve().parent.parent
    if (root / ".git").exists():
        try:
            found = subprocess.run(
                ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=5, check=True
            )
            return found.stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None
    try:
        source = metadata.distribution(_DISTRIBUTION).read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return None
    if source is None:
        return None
    found_commit = json.loads(source).get("vcs_info", {}).get("commit_id")
    return found_commit if isinstance(found_commit, str) else None
