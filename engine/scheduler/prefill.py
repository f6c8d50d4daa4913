"""Share a round's prefill tokens among prompts: short ones do not wait for long ones, and long ones go on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class PrefillNeed(NamedTuple):
    """A prompt in need of prefill. remaining: its uncomputed tokens. limit: tokens it can take in one round."""

    priority: int
    remaining: int
    limit: int


def share_prefill(needs: Sequence[PrefillNeed], tokens: int) -> list[int]:
    """Share `tokens` among prompts. Returns the tokens of each.

    needs: most urgent first: by priority, then by arrival. The first prompt is sure of half of the tokens. All others
    go to the prompt with the fewest remaining tokens within the most urgent priority, then to the next. So prompts of
    equal length are computed one after another; and of equal priority, a prompt waits at most twice as long as if
    prompts were computed in order of arrival, since the older ones always get half of the tokens.
    """
    shares = [0] * len(needs)
    if not needs:
        return shares
    shares[0] = min(needs[0].limit, (tokens + 1) // 2)
    left = tokens - shares[0]
    for i in sorted(range(len(needs)), key=lambda i: (needs[i].priority, needs[i].remaining)):
        more = min(needs[i].limit - shares[i], left)
        shares[i] += more
        left -= more
    return shares
