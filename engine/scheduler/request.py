"""State of a request: its tokens, the pages it owns, and the progress of its KV."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from engine.messages import FINISH_LENGTH, FINISH_STOP, AddRequest, PromptLogprobs
from engine.ngram.ngram_index import NgramIndex
from engine.params import SamplingParams
from engine.plan import RowWork
from engine.scheduler.prefix_index import IndexedPage
from kernels.kv.kv_bits import KV_BITS, KVBits

_DENSE = KV_BITS["dense"]


class Request:
    """State of one request: counters, not phases. Prefill, decode and verification all advance `num_computed` towards
    `num_tokens`.

        tokens   [ prompt ............ | output ...... pending ]
        computed [ valid target KV ................. )              num_tokens - 1 once prefill is done
        pages    [ reserved slots, num_reserved in all .............. drafts ... )

    The scheduler owns every field; `row` is None while the request waits. draft_lag: number of computed tokens that a
    draft model lacks and has to compute before it drafts; stays 0 where drafts read the target's own KV. number: its
    place in order of arrival. cached_tokens: prompt tokens found in the prefix cache at the first admission. ngrams:
    index of its tokens, once they are searched for drafts.

    Of the KV manager: digests: those of its leading full pages, as far as they were needed. matched: pages found
    while it waits; matched_at: the index's `removals` when they were last checked. num_found: leading ones of
    `matched` that it can take over; matched_window, missing_pages: what that was computed for, and what it lacked.
    num_indexed: leading pages that the prefix index names, or named until it became private. num_drafted: those of
    them that are known to hold a draft model's KV. num_counted: leading pages whose readers include it, once it
    decodes. sliding_pages: its pages in the pool of sliding layers, from place sliding_first on. sliding_branch:
    number of its first pages that another request had computed when it was admitted. is_private: whether its pages
    are its own, and the index names none that it computes from now on.
    """

    __slots__ = (
        "_kv_bits",
        "arrival",
        "cached_tokens",
        "digests",
        "draft_lag",
        "eos",
        "finish_reason",
        "id",
        "is_private",
        "matched",
        "matched_at",
        "matched_window",
        "missing_pages",
        "ngrams",
        "num_computed",
        "num_counted",
        "num_drafted",
        "num_found",
        "num_indexed",
        "num_prompt",
        "num_reserved",
        "number",
        "pages",
        "params",
        "priority",
        "prompt_logprobs",
        "row",
        "salt",
        "scheduled",
        "sliding_branch",
        "sliding_first",
        "sliding_pages",
        "stop_reason",
        "tokens",
    )

    def __init__(self, message: AddRequest, eos: Sequence[int], number: int, kv_bits: KVBits = _DENSE) -> None:
        """kv_bits: of the target's KV."""
        self.id = message.id
        self.number = number
        self._kv_bits = kv_bits
        self.params: SamplingParams = message.params
        self.arrival = message.arrival
        self.priority = message.priority
        self.salt = message.cache_salt
        self.digests: list[bytes] = []
        self.matched: list[IndexedPage] = []
        self.matched_at = self.num_found = 0
        self.matched_window = (0, 0)
        self.missing_pages: tuple[int, ...] = ()
        self.num_indexed = self.num_drafted = self.num_counted = 0
        self.is_private = False
        self.cached_tokens = 0
        self.prompt_logprobs: list[PromptLogprobs] = []
        self.ngrams: NgramIndex | None = None
        self.tokens: list[int] = list(message.prompt)
        self.num_prompt = len(message.prompt)
        self.num_computed = 0
        self.draft_lag = 0
        self.num_reserved = 0
        self.pages: list[int] = []
        self.sliding_first = self.sliding_branch = 0
        self.sliding_pages: list[int] = []
        self.row: int | None = None
        self.eos = frozenset(eos if message.params.ends_at_eos else ())
        self.scheduled: float | None = None
        self.finish_reason: str | None = None
        self.stop_reason: int | None = None

    def forget_matches(self) -> None:
        """Forget what was found while the request waited."""
        self.matched.clear()
        self.num_found, self.matched_window, self.missing_pages = 0, (0, 0), ()

    @property
    def needs_catch_up(self) -> bool:
        """Whether a draft model lacks more tokens than the one that it computes along with the pending one."""
        return self.draft_lag > 1

    @property
    def num_tokens(self) -> int:
        """Committed tokens: prompt and output."""
        return len(self.tokens)

    @property
    def most_tokens(self) -> int:
        """Number of tokens that it may have in the end."""
        return self.num_prompt + self.params.max_tokens

    @property
    def may_grow(self) -> bool:
        """Whether it may need more pages than it has."""
        return self.num_reserved < self.most_tokens

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_uncomputed(self) -> int:
        """Committed tokens whose target KV is missing; 1 (the pending token) for a decoding row."""
        return len(self.tokens) - self.num_computed

    @property
    def decoding(self) -> bool:
        return self.num_uncomputed == 1 and self.num_output > 0

    @property
    def max_draft_tokens(self) -> int:
        """Largest useful number of drafts: a verify pass yields up to one token more, and none beyond `max_tokens` is
        needed. Some KV formats have limits of their own."""
        limits = [self.params.max_tokens - self.num_output - 1]
        if self.params.max_draft_tokens is not None:
            limits.append(self.params.max_draft_tokens)
        return self._kv_bits.max_drafts(self.num_tokens, min(limits))

    @property
    def stop_ids(self) -> set[int]:
        """Tokens that end the request, and that min_tokens forbids at first."""
        return {*self.eos, *self.params.stop_token_ids}

    def finish_if_scored(self) -> None:
        """End a request for its prompt's log-probabilities alone, max_tokens = 0, once they are computed."""
        if self.params.max_tokens == 0 and self.num_uncomputed == 0:
            self.finish_reason = FINISH_LENGTH

    def count_lag(self, work: RowWork, accepted: int, by_model: bool) -> None:
        """Count what a draft model lacks after a round. accepted: number of drafts. by_model: whether it drafted."""
        if work.model_drafts and by_model:
            self.draft_lag = int(accepted == work.gamma)  # then the last draft was never fed
        else:  # it was fed no drafts, neither those that the plan contained nor the target's
            self.draft_lag += work.new - work.catch_up + accepted

    def commit(self, tokens: Iterable[int]) -> list[int]:
        """Append output tokens up to and including the one that ends the request; return those appended.

        The last token of an ended request counts as not computed, whether it was drafted or not.
        """
        appended = []
        for token in tokens:
            self.tokens.append(token)
            appended.append(token)
            if token in self.eos:
                self.finish_reason = FINISH_STOP
            elif token in self.params.stop_token_ids:
                self.finish_reason, self.stop_reason = FINISH_STOP, token
            elif self.num_output >= self.params.max_tokens:
                self.finish_reason = FINISH_LENGTH
            if self.finish_reason is not None:
                self.num_computed = self.num_tokens - 1
                break
        return appended
