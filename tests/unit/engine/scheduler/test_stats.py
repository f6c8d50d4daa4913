"""KV tokens read in a round: those that rows share count once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from engine.messages import AddRequest
from engine.params import SamplingParams
from engine.plan import RoundPlan, RowWork
from engine.scheduler.controller import DraftReads
from engine.scheduler.request import Request
from engine.scheduler.stats import StatsRecorder

CONTEXT, SHARED = 1000, 960


def window(context: int, budget: int) -> int:
    return min(context, 128)


def everything(context: int, budget: int) -> int:
    return context


def tokens_read(
    gammas: Sequence[int], shared: int, reads: Callable[[int, int], int], share: bool = True, prefilling: int = 0
) -> int:
    """KV tokens read by a round of rows with these gammas, beside rows that still compute their prompts."""
    recorder = StatsRecorder(
        pages_total=100,
        page_size=16,
        bytes_per_token=2,
        gamma_max=4,
        draft_reads={None: DraftReads(reads, share)},
        policy="window",
        draft_pages_per_row=0,
    )
    requests, work = [], []
    for row in range(len(gammas) + prefilling):
        request = Request(AddRequest(str(row), [0] * CONTEXT, SamplingParams(max_tokens=9)), (), row)
        if row < len(gammas):
            request.tokens.append(0)
            request.num_computed = CONTEXT
        requests.append(request)
        gamma, new = (gammas[row], 1) if row < len(gammas) else (0, 50)
        work.append(RowWork(row, request.num_computed, new, gamma, row < len(gammas)))
    recorder.record_plan(RoundPlan(0, [], [], work), requests, shared)
    assert recorder.totals.rounds == 1
    assert sum(recorder.totals.gamma_chosen) == len(gammas)
    return recorder.totals.kv_tokens_read


def test_a_verify_pass_reads_shared_tokens_once() -> None:
    assert tokens_read([0, 0, 0], 0, window) == 3 * (CONTEXT + 1)
    assert tokens_read([0, 0, 0], 2 * SHARED, window) == 3 * (CONTEXT + 1) - 2 * SHARED
    assert tokens_read([0, 0, 0], 2 * SHARED, window, prefilling=2) == 3 * (CONTEXT + 1) - 2 * SHARED


@pytest.mark.parametrize("share", [False, True])
def test_windows_share_nothing(share: bool) -> None:
    gammas = [2, 2, 1]
    apart = tokens_read(gammas, 0, window, share)
    assert tokens_read(gammas, 2 * SHARED, window, share) == apart - 2 * SHARED


def test_drafts_that_read_everything_share() -> None:
    """All three rows draft in the first step, two of them in the second, one in the third: a verify pass and the first
    step save two reads of the prefix, the second step one."""
    gammas = [3, 2, 1]
    apart = tokens_read(gammas, 0, everything)
    assert tokens_read(gammas, 2 * SHARED, everything) == apart - (2 + 2 + 1) * SHARED


def test_drafts_with_pages_or_lists_of_their_own_share_none() -> None:
    gammas = [3, 2, 1]
    apart = tokens_read(gammas, 0, everything, False)
    assert tokens_read(gammas, 2 * SHARED, everything, False) == apart - 2 * SHARED


def test_a_draft_step_beyond_the_budget_shares_nothing() -> None:
    """Rows of 1,001 tokens fill a budget of 1,002 with the second of three steps."""

    def reads(context: int, budget: int) -> int:
        return min(context, CONTEXT + 2)

    apart = tokens_read([3, 3], 0, reads)
    assert tokens_read([3, 3], SHARED, reads) == apart - (1 + 2) * SHARED
