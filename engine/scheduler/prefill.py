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
    round. A waiting request waits if a running one goes on from the same page with the same tokens, and has computed by
    the end of the round at least as many of their common tokens as it would have itself. So it loses less than a page's
    tokens by waiting, or the rest of one round behind the common ones. Of waiting ones that would go on from the same
    page with the same tokens, the others wait for the one that gets furthest.
    """
    keys = [_next_digest(request, page_size) for request in requests]
    ends = [_start(request, page_size) + share for request, share in zip(requests, shares, strict=True)]

    def furthest(indices: Iterable[int]) -> dict[bytes, int]:
        """Find, by next digest, the request that gets furthest; the most urgent of equals."""
        found: dict[bytes, int] = {}
        for i in indices:
            if shares[i] and (key := keys[i]) is not None and ends[i] > ends[found.setdefault(key, i)]:
                found[key] = i
        return found

    running = furthest(i for i, request in enumerate(requests) if request.row is not None)
    waits, others = [], []
    for i, request in enumerate(requests):
        if request.row is not None or (key := keys[i]) is None:
            continue
        ahead = running.get(key)
        if ahead is not None and (
            ends[ahead] >= ends[i] or not _is_common(request, requests[ahead], ends[ahead], page_size)
        ):
            waits.append(request)
        else:
            others.append(i)
    first = furthest(others)
    return waits + [requests[i] for i in others if first.get(keys[i] or b"", i) != i]


def _next_digest(request: Request, page_size: int) -> bytes | None:
    """Return the digest of the page that a request goes on with; None for one that would not take over that page, or
    would keep it to itself."""
    place = _start(request, page_size) // page_size
    looks_up = request.row is not None or request.params.prompt_logprobs is None
    shares = looks_up and not request.is_private
    return request.digests[place] if shares and place < len(request.digests) else None


def _start(request: Request, page_size: int) -> int:
    """Return the first token that a request computes, once admitted if it waits."""
    return request.num_computed if request.row is not None else request.num_found * page_size


def _is_common(request: Request, other: Request, end: int, page_size: int) -> bool:
    """Whether two requests that go on from the same page have the same tokens up to the end of the page of token `end`,
    so that one can take over that page from the other."""
    tokens = slice(_start(request, page_size), (end // page_size + 1) * page_size)
    return tokens.stop < request.num_tokens and request.tokens[tokens] == other.tokens[tokens]
