"""Responses are kept within bounds, for those who made them."""

from __future__ import annotations

import tracemalloc

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from server.chat.response_store import ResponseStore, StoredResponse


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def stored(id: str, owner: bytes = b"", text: str = "") -> StoredResponse:
    return StoredResponse(owner, {"id": id, "output": [{"text": text}]}, [{"text": "asked"}])


def size(each: StoredResponse) -> int:
    return len(msgspec.json.encode([each.response, each.input]))


def test_a_conversation_ends_with_the_output() -> None:
    assert stored("a", text="said").conversation == [{"text": "asked"}, {"text": "said"}]


def test_only_the_owner_finds_a_response() -> None:
    store = ResponseStore(10, 10**6, 10)
    store.put(stored("a", b"one"))
    assert store.get("a", b"two") is None
    assert not store.delete("a", b"two")
    assert store.get("a", b"one") == stored("a", b"one")
    assert store.delete("a", b"one")
    assert store.get("a", b"one") is None
    assert not store.delete("a", b"one")


def test_responses_expire() -> None:
    clock = Clock()
    store = ResponseStore(10, 10**6, 10, clock)
    store.put(stored("a"))
    clock.now = 5
    store.put(stored("b"))
    clock.now = 9.9
    assert store.get("a", b"")
    clock.now = 10
    assert store.get("a", b"") is None
    assert store.get("b", b"")


def test_the_oldest_goes_first() -> None:
    store = ResponseStore(2, 10**6, 10)
    assert all(store.put(stored(id)) for id in "abc")
    assert [id for id in "abc" if store.get(id, b"")] == ["b", "c"]


def test_a_response_too_large_for_the_store_is_not_kept() -> None:
    small = stored("a")
    store = ResponseStore(10, size(small) + 10, 10)
    assert store.put(small)
    assert not store.put(stored("b", text="x" * 100))
    assert store.get("a", b"")
    assert store.get("b", b"") is None


def test_bounds_are_those_of_memory() -> None:
    store = ResponseStore(10, 10**6, 10)
    tracemalloc.start()
    try:
        for number in range(9):
            empty: list[list[str]] = [[] for _ in range(30_000)]  # in Python some twenty times as large as in JSON
            assert store.put(StoredResponse(b"", {"id": f"r{number}", "output": empty}, []))
            del empty
        assert tracemalloc.get_traced_memory()[0] < 2 * 10**6
    finally:
        tracemalloc.stop()


def test_what_is_nested_deeply_is_read_back() -> None:
    store = ResponseStore(10, 10**6, 10)
    nested: list[object] = []
    for _ in range(200):  # more than a body may be nested
        nested = [nested]
    deep = StoredResponse(b"", {"id": "a", "output": []}, [{"status": nested}])
    assert store.put(deep)
    assert store.get("a", b"") == deep


def test_a_store_for_none_keeps_none() -> None:
    store = ResponseStore(0, 10**6, 10)
    assert not store.is_on
    assert not store.put(stored("a"))
    assert store.get("a", b"") is None


@given(
    st.lists(
        st.tuples(st.sampled_from(["put", "delete", "wait"]), st.integers(0, 9), st.integers(0, 300)), max_size=40
    ),
    st.integers(1, 5),
    st.integers(100, 1000),
)
def test_bounds_hold_and_the_newest_stay(steps: list[tuple[str, int, int]], count: int, limit: int) -> None:
    """Against a list that is cut from the front."""
    clock = Clock()
    store = ResponseStore(count, limit, 50, clock)
    kept: list[tuple[StoredResponse, float]] = []
    for number, (what, which, length) in enumerate(steps):
        if what == "wait":
            clock.now += length / 10
        elif what == "put":
            new = stored(f"r{number}", text="x" * length)
            fits = size(new) <= limit
            assert store.put(new) is fits
            kept += [(new, clock.now + 50)] if fits else []
        elif kept:
            gone = kept[which % len(kept)][0]
            assert store.delete(gone.response["id"], b"") is (
                gone.response["id"] in {e.response["id"] for e, _ in kept}
            )
            kept = [each for each in kept if each[0] is not gone]
        kept = [each for each in kept if each[1] > clock.now]
        while len(kept) > count or sum(size(each) for each, _ in kept) > limit:
            kept.pop(0)
        ids = {each.response["id"] for each, _ in kept}
        assert {f"r{id}" for id in range(number + 1) if store.get(f"r{id}", b"")} == ids
