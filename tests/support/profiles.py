"""Profiles of tests: `make test` runs a fixed few examples and cases, `make test-all` many random ones and all.
`make gpu-check` runs the same as `make test`, but makes no failing example smaller: each is another kernel to compile.

Hypothesis may be missing where only tests of GPUs run; there is the first profile only.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

if TYPE_CHECKING:
    from hypothesis import settings

Test = TypeVar("Test", bound=Callable[..., object])

FAST, ALL, GPU = "fast", "all", "gpu"
_HYPOTHESIS = importlib.util.find_spec("hypothesis") is not None


def load_profiles() -> None:
    """Register the profiles, and load the first."""
    if _HYPOTHESIS:
        from hypothesis import Phase, settings

        settings.register_profile(FAST, deadline=None, derandomize=True, database=None)
        unshrunk = (Phase.explicit, Phase.generate)
        settings.register_profile(GPU, settings.get_profile(FAST), phases=unshrunk)
        settings.register_profile(ALL, deadline=None)
        settings.load_profile(FAST)


def is_all() -> bool:
    """Whether this run leaves nothing out."""
    if not _HYPOTHESIS:
        return False
    from hypothesis import settings

    return settings.get_current_profile_name() == ALL


def _mark() -> pytest.MarkDecorator:
    return pytest.mark.skipif(not is_all(), reason="only in `make test-all`")


def only_in_all(*values: Any, **more: Any) -> Any:
    """A parameter set that `make test` skips: another one, which always runs, finds the same faults less directly."""
    return pytest.param(*values, marks=_mark(), **more)


def whole_test_only_in_all(test: Test) -> Test:
    """Decorate a test that `make test` skips: one that always runs finds the same faults less directly, or the test is
    of a program that only measures."""
    marked: Test = _mark()(test)
    return marked


def examples(fast: int, every: int, **more: Any) -> settings:
    """Settings of a property test: its number of examples in the profiles FAST and ALL."""
    from hypothesis import settings

    return settings(max_examples=every if is_all() else fast, **more)


def each_value(*axes: list[Any] | tuple[Any, ...]) -> list[Any]:
    """Parameter sets of all combinations of the axes' values. `make test` runs as many as the longest axis has values:
    the first values of all axes, the second ones, and so on, from the start again where an axis is shorter. So each
    value occurs, but not each pair."""
    kept = {tuple(number % len(axis) for axis in axes) for number in range(max(map(len, axes)))}
    places = itertools.product(*(range(len(axis)) for axis in axes))
    return [
        pytest.param(*values) if place in kept else only_in_all(*values)
        for place, values in zip(places, itertools.product(*axes), strict=True)
    ]
