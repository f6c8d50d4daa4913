"""Plan and result of a round, and steps between rounds that change weights. Rank 0 sends plans and steps to all ranks;
a plan contains only changes to their row state."""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec

from engine.messages import PromptLogprobs, TokenLogprobs
from engine.params import SamplingParams

DrafterName = Literal["self", "model"]
"""A model that drafts: the target itself, or a smaller one."""
WeightAction = Literal["check", "load", "build", "release"]


class RowStart(msgspec.Struct, array_like=True):
    """Start of a request in a row slot. Its tokens are sent once, here."""

    row: int
    tokens: list[int]
    """Prompt and, after a preemption, the output so far."""
    num_prompt: int
    params: SamplingParams
    stop_ids: list[int]
    """Tokens that min_tokens forbids."""
    computed: int = 0
    """Leading tokens whose target KV exists."""


class PageDelta(msgspec.Struct, array_like=True):
    """Pages set in a row's page table: appended, or in place of others with the same KV."""

    row: int
    first: int
    """Index in the row's page list of the first of `pages`."""
    pages: list[int]
    sliding: bool = False
    """Whether it is the table of the pages of sliding layers."""


class RowWork(msgspec.Struct, array_like=True):
    """One row's part of a round: `new` committed tokens get their KV, `gamma` drafts after them are verified."""

    row: int
    computed: int
    """Committed tokens whose KV is valid before the round."""
    new: int
    gamma: int
    samples: bool
    """False for a prefill chunk that does not reach the last token; it yields no token."""
    catch_up: int = 0
    """Committed tokens whose KV a draft model computes before it drafts, from the first one that it lacks."""
    num_prompt_logprobs: int = 0
    """Number of new tokens, the first ones, that need prompt logprobs: each gives those of the token after it."""
    draft_lag: int = 0
    """Computed tokens, the last ones, whose KV a draft model lacks before the round; 0 in chunks of prompts."""
    proposed: list[int] = []
    """The first of the `gamma` drafts, found in text by the host. A model drafts the rest, after them."""
    latest: bool = False
    """Whether the drafts read the latest pages in place of those that a policy has chosen, where it allows both."""

    @property
    def model_drafts(self) -> int:
        """Number of drafts that a model makes."""
        return self.gamma - len(self.proposed)


class DraftOrigin(NamedTuple):
    """Where a row's drafts of a round come from. from_text: number of them, the first ones, that were found in text.
    by_model: whether a draft model made the others, if there are any; else the target itself."""

    from_text: int = 0
    by_model: bool = False


NO_DRAFTS = DraftOrigin()


class RoundPlan(msgspec.Struct, tag="round", omit_defaults=True):
    """Plan of one round. `work` is ordered by falling `model_drafts`, so that the rows of each draft step are a
    prefix."""

    number: int
    starts: list[RowStart]
    pages: list[PageDelta]
    work: list[RowWork]
    budget: int = 0
    """KV tokens that draft steps of this round read per row, if that number can be chosen; 0: as configured."""
    drafter: DrafterName | None = None
    """The model that makes the round's drafts, if there are two; None: the only one, or the draft model."""
    clear: list[int] = []
    """Pages to fill with zeros before the round, and those of the same ids in the pool of sliding layers."""
    audit: list[int] = []
    """Pages whose KV is hashed before the round."""
    sliding_audit: list[int] = []
    """The same, in the pool of sliding layers."""


class WeightStep(msgspec.Struct, tag="weights", omit_defaults=True):
    """Step of a change of weights, which all ranks perform together between two rounds."""

    action: WeightAction
    """check: whether `path` can replace the target's weights; nothing changes. load: free the worker and its KV, then
    load the target from `path`, and a draft model that is not loaded. build: make a worker of what was loaded. release:
    free all of it."""
    path: str = ""


class RowFailure(msgspec.Struct, array_like=True):
    """A row whose request has failed. The other rows of the round are not affected."""

    row: int
    reason: str
    is_request_fault: bool
    """Whether the request is the cause: its own fields exclude every token."""


class RowResult(msgspec.Struct, array_like=True):
    """Outcome of verification for one row that samples, in the order of the plan."""

    drafted: int
    """Number of proposed tokens: at most the plan's gamma."""
    accepted: int
    tokens: list[int]
    """accepted + 1 tokens: the accepted drafts, and the bonus token, which a failed row lacks."""
    logprobs: list[TokenLogprobs] | None


class RoundResult(msgspec.Struct):
    """Outcome of a round. Times in seconds, on rank 0."""

    number: int
    rows: list[RowResult]
    draft_seconds: float
    verify_seconds: float
    prompt_logprobs: list[PromptLogprobs] = []
    """Prompt logprobs of the plan's rows (RowWork.num_prompt_logprobs), in its order."""
    failures: list[RowFailure] = []
    audit: list[int] = []
    """Hashes of the plan's `audit` pages, then of its `sliding_audit` pages, over all ranks."""
