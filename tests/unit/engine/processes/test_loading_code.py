"""Imports without garbage collection."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from engine.processes.loading_code import without_collecting


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """What other tests leave is garbage again afterwards; the imports of all tests stay frozen."""
    collecting = gc.isenabled()
    yield
    (gc.enable if collecting else gc.disable)()


@pytest.mark.parametrize("collecting", [True, False])
def test_what_is_loaded_is_never_gone_through(collecting: bool) -> None:
    (gc.enable if collecting else gc.disable)()
    with without_collecting():
        assert not gc.isenabled()
        loaded = [[object()] for _ in range(5)]
    assert gc.isenabled() == collecting
    alive = {id(each) for each in gc.get_objects()}
    assert not alive & {id(each) for each in loaded}
    later = [object()]
    assert any(each is later for each in gc.get_objects())


def test_an_import_that_fails() -> None:
    with pytest.raises(ImportError), without_collecting():
        raise ImportError("no torch")
    assert gc.isenabled()
