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
    """Find the waiting requests that wait another round, because another prefill computes what they need.

    requests: prefills, most urgent first, running and waiting ones; shares: the tokens that each would get in this
    round. A waiting request waits if another one goes on from the same page with the same tokens, and has computed by
    the end of the round at least as many of their common tokens as it would have itself. So it loses less than a page's
    tokens by waiting, or the rest of one round behind the common ones; and the other tokens of the round are not spent
    on what is computed in it.
    """
    computing: dict[bytes, int] = {}  # by digest of a page: the index of the request that goes on with it, and furthest
    waits = []
    ends = [_start(request, page_size) + share for request, share in zip(requests, shares, strict=True)]
    for i in sorted(range(len(requests)), key=lambda i: requests[i].row is None):
        request = requests[i]
        place = _start(request, page_size) // page_size
        if place >= len(request.digests):
            continue
        first = computing.setdefault(request.digests[place], i)
        if request.row is not None:
            if ends[i] > ends[first]:
                computing[request.digests[place]] = i
            continue
        is_sooner = ends[first] >= ends[i] or not _is_common(request, requests[first], place, ends[first], page_size)
        if first != i and shares[first] and is_sooner:
            waits.append(request)
    return waits


def _start(request: Request, page_size: int) -> int:
    """Return the first token that a request computes, once admitted if it waits."""
    return request.num_computed if request.row is not None else len(request.matched) * page_size


def _is_common(request: Request, other: Request, place: int, end: int, page_size: int) -> bool:
    """Whether two requests that have the same tokens in the page at `place` have the same up to the page of token
    `end`, so that one can take over that page from the other."""
    tokens = slice(place * page_size, (end // page_size + 1) * page_size)
    return tokens.stop < request.num_tokens and request.tokens[tokens] == other.tokens[tokens]
