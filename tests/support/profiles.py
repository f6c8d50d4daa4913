"""Two profiles of tests: `make test` runs a fixed few examples and cases, `make test-all` many random ones and all."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings

FAST, ALL = "fast", "all"


def is_all() -> bool:
    """Whether this run leaves nothing out."""
    return settings.get_current_profile_name() == ALL


def only_in_all(*values: Any, **more: Any) -> Any:
    """A parameter set that `make test` skips: another one, which always runs, finds the same faults less directly."""
    return pytest.param(*values, marks=pytest.mark.skipif(not is_all(), reason="only in `make test-all`"), **more)


def examples(fast: int, every: int, **more: Any) -> settings:
    """Settings of a property test: its number of examples in the profiles FAST and ALL."""
    return settings(max_examples=every if is_all() else fast, **more)
