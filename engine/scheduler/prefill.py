"""Share a round's prefill tokens among prompts: short ones do not wait for long ones, and long ones go on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


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
