"""A short run of tests/support/chaos.py."""

from __future__ import annotations

from tests.support import chaos
from tests.support.profiles import is_all


def test_a_little_chaos() -> None:
    summary = chaos.run(8 if is_all() else 3, seed=3, calm_s=1.0)
    print(summary)
    assert summary.wrong == []
    assert summary.requests["answered"] > 0
    assert summary.restarts > 0
