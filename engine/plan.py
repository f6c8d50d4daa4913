"""What rank 0 tells all ranks to run for one round, and what comes back. Only what changed crosses."""

from __future__ import annotations

import msgspec

from engine.messages import PromptLogprobs, TokenLogprobs
from engine.params import SamplingParams


class RowStart(msgspec.Struct, array_like=True):
    """A request enters a row slot. Its tokens cross here, once."""

    row: int
    tokens: list[int]
    """Prompt and, after a preemption, the output so far."""
    num_prompt: int
    params: SamplingParams
    stop_ids: list[int]
    """Tokens that min_tokens forbids."""
    computed: int = 0
    """Tokens whose KV is taken to be there already."""
    shared: bool = False
    """It is, in pages of another row; a draft's own KV of them is not."""


class PageDelta(msgspec.Struct, array_like=True):
    """Pages appended to a row's page table."""

    row: int
    first: int
    """Index in the row's page list of the first of `pages`."""
    pages: list[int]


class RowWork(msgspec.Struct, array_like=True):
    """What one row does in the round: `new` committed tokens get their KV, `gamma` drafts are verified behind them."""

    row: int
    computed: int
    """Committed tokens whose KV is valid before the round."""
    new: int
    gamma: int
    samples: bool
    """False for a prefill chunk that does not reach the last token: it yields nothing."""
    catch_up: int = 0
    """Committed tokens whose KV a draft model computes before it drafts, from the first one that it lacks."""
    told: int = 0
    """Of the new tokens, how many first ones are to be told the log-probability of the token behind them."""


class StepPlan(msgspec.Struct, omit_defaults=True):
    """One round. `work` is ordered by falling gamma, so that the rows of each draft step are a prefix."""

    step: int
    starts: list[RowStart]
    pages: list[PageDelta]
    work: list[RowWork]
    budget: int = 0
    """KV tokens that draft steps of this round read per row, where that can be chosen; 0: as configured."""
    clear: list[int] = []
    """Pages to fill with zeros before the round."""


class RowResult(msgspec.Struct, array_like=True):
    """What verification decided for one row that samples, in the order of the plan."""

    drafted: int
    """Tokens that were proposed: at most the plan's gamma."""
    accepted: int
    tokens: list[int]
    """accepted + 1 tokens: the drafts that hold, and one more."""
    logprobs: list[TokenLogprobs] | None


class StepResult(msgspec.Struct):
    step: int
    rows: list[RowResult]
    draft_seconds: float
    verify_seconds: float
    prompts: list[PromptLogprobs] = []
    """What rows are told of their prompts (RowWork.told), in the order of the plan."""
