"""A short run of tests/support/chaos.py."""

from __future__ import annotations

from tests.support import chaos
from tests.support.profiles import whole_test_only_in_all


@whole_test_only_in_all
def test_a_little_chaos() -> None:
    """`make test` has each fault by itself: test_faults.py kills, stops and breaks every rank in some phase,
    test_load.py has clients that vanish, test_supervisor.py engines that end while they start, and
    parallel/test_pings.py ranks that pause."""
    summary = chaos.run(8, seed=3, calm_s=1.0)
    print(summary)
    assert summary.wrong == []
    assert summary.requests["answered"] > 0
    assert summary.restarts > 0
