"""Share a round's prefill tokens among prompts: short ones do not wait for long ones, long ones go on, and equal
beginnings are computed once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from engine.scheduler.request import Request


class PrefillNeed(NamedTuple):
    """A prompt in need of prefill. remaining: its uncomputed tokens. limit: tokens it can take in one round."""

    priority: int
    remaining: int
    limit: int


def share_prefill(needs: Sequence[PrefillNeed], tokens: int) -> list[int]:
    """Share `tokens` among prompts. Returns the tokens of each.

    needs: most urgent first: by priority, then by arrival. Half of the tokens are handed out in this order. The others
    go to the prompt with the fewest remaining tokens within the most urgent priority, then to the next. So a prompt
    waits at most twice as long as if all tokens were handed out in order, however many shorter ones arrive; and prompts
    of equal length are computed one after another.
    """
    shares = [0] * len(needs)

    def hand_out(tokens: int, order: Iterable[int]) -> int:
        """Returns the number of tokens that nobody takes."""
        for i in order:
            more = min(needs[i].limit - shares[i], tokens)
            shares[i] += more
            tokens -= more
        return tokens

    unused = hand_out((tokens + 1) // 2, range(len(needs)))
    hand_out(tokens // 2 + unused, sorted(range(len(needs)), key=lambda i: (needs[i].priority, needs[i].remaining)))
    return shares


def find_waits(requests: Sequence[Request], shares: Sequence[int], page_size: int) -> list[Request]:
    """Find the waiting requests that wait another round, because a prefill before them computes what they need.

    requests: most urgent first, running and waiting ones; shares: the tokens that each would get in this round. The
    digests of waiting ones reach as far as they can take over pages. A request waits if another one goes on from the
    same page with the same tokens, and has computed by the end of the round at least as many of their common tokens as
    it would have itself. So it loses less than a page's tokens by waiting, or the rest of one round behind the common
    ones; and the other tokens of the round are not spent on what is computed in it.
    """
    computing: dict[bytes, int] = {}  # index of the request that goes on with the page of this digest
    waits = []
    for i in sorted(range(len(requests)), key=lambda i: requests[i].row is None):
        request = requests[i]
        place = _start(request, page_size) // page_size
        if place >= len(request.digests):
            continue
        first = computing.setdefault(request.digests[place], i)
        if request.row is not None or first == i or not shares[first]:
            continue
        end, other_end = (_start(requests[j], page_size) + shares[j] for j in (i, first))
        if other_end >= end or not _is_common(request, requests[first], other_end // page_size):
            waits.append(request)
    return waits


def _start(request: Request, page_size: int) -> int:
    """Return the first token that a request computes, once admitted if it waits."""
    return request.num_computed if request.row is not None else len(request.matched) * page_size


def _is_common(request: Request, other: Request, place: int) -> bool:
    """Whether two requests have the same tokens up to the end of this page, as far as they can share pages."""
    return place < min(len(request.digests), len(other.digests)) and request.digests[place] == other.digests[place]
