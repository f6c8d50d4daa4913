"""Responses kept in memory, so that later requests can continue or read them."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response, and the items that it answers: those of earlier turns too, so that it needs no other response.

    owner: of the API key that made it; nothing is found with another.
    """

    owner: bytes
    response: dict[str, Any]
    input: list[dict[str, Any]]

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """Items up to the end of the response."""
        output: list[dict[str, Any]] = self.response["output"]
        return [*self.input, *output]


@dataclass(frozen=True, slots=True)
class _Kept:
    """data: response and input as JSON. Objects take many times its size, how many depends on what clients send."""

    owner: bytes
    data: bytes
    expires: float


class ResponseStore:
    """Responses by id. Those that are too old or too many are dropped, the oldest first."""

    def __init__(
        self, max_count: int, max_bytes: int, lifetime_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_count, self._max_bytes, self._lifetime_s = max_count, max_bytes, lifetime_s
        self._clock = clock
        self._kept: OrderedDict[str, _Kept] = OrderedDict()  # in the order in which they expire
        self._bytes = 0

    @property
    def is_on(self) -> bool:
        return self._max_count > 0

    def put(self, stored: StoredResponse) -> bool:
        """Keep a response. Returns whether there is room for it, however many others are dropped."""
        if not self.is_on:
            return False
        data = msgspec.json.encode([stored.response, stored.input])
        if len(data) > self._max_bytes:
            return False
        self._kept[stored.response["id"]] = _Kept(stored.owner, data, self._clock() + self._lifetime_s)
        self._bytes += len(data)
        self._drop_old()
        return True

    def get(self, id: str, owner: bytes) -> StoredResponse | None:
        kept = self._find(id, owner)
        return None if kept is None else StoredResponse(owner, *msgspec.json.decode(kept.data))

    def delete(self, id: str, owner: bytes) -> bool:
        """Forget a response. Returns whether it was there. Responses that continue it keep their conversations."""
        kept = self._find(id, owner)
        if kept is not None:
            del self._kept[id]
            self._bytes -= len(kept.data)
        return kept is not None

    def _find(self, id: str, owner: bytes) -> _Kept | None:
        self._drop_old()
        kept = self._kept.get(id)
        return kept if kept is not None and kept.owner == owner else None

    def _drop_old(self) -> None:
        now = self._clock()
        while self._kept:
            oldest = next(iter(self._kept.values()))
            if len(self._kept) <= self._max_count and self._bytes <= self._max_bytes and oldest.expires > now:
                return
            self._kept.popitem(last=False)
            self._bytes -= len(oldest.data)
