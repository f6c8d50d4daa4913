"""Drafting with a separate, smaller model of the same vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from engine.batch.rows import Ints, Round, Rows
from engine.batch.runner import Runner
from engine.kv.policies import View
from engine.sampling.sampler import Sampler
from engine.speculation.draft_cache import DraftCache
from engine.speculation.drafters import Drafter, draft
from engine.speculation.verify import Verdict
from parallel.group import Group


class ModelDrafter:
    """The draft model has KV of its own, and has to see every token that the target commits before it drafts.

    It sees them when they are needed: rows that do not draft cost nothing, and the plan says how many tokens of a row
    that is about to draft are computed first, or some of them, if they are too many for one round. A row that
    drafts round after round lacks nothing but its pending token - or one more, if all drafts of the round before held:
    the last of them was proposed, but never fed. Both are fed together.

    computed: host, per row slot; the committed tokens whose KV the draft model has.
    """

    def __init__(
        self,
        rows: Rows,
        full: Runner,
        runner: Runner,
        sampler: Sampler,
        *,
        row_block: int,
        block: int,
        cache: DraftCache | None = None,
        views: Mapping[int, View] | None = None,
    ) -> None:
        """full: the draft model as it reads while it computes prompts. runner: as it reads while it drafts; with a
        cache, that one's pool and view. sampler: the draft model's own. row_block, block: most tokens of one row, and
        of all, in one forward over prompts. views: other views to draft with, by the budget that a round may ask for.
        """
        self._rows = rows
        self._full = full
        self._runner = runner
        self._sampler = sampler
        self._row_block, self._block = row_block, block
        self._cache = cache
        self._views = views or {}
        self._computed = np.zeros(len(rows.tokens), dtype=np.int64)

    def propose(self, rows: Round) -> Tensor:
        for start in rows.starts:
            self._computed[start.row] = 0 if start.shared else start.computed
            self._sampler.start(start)
            if self._cache is not None:
                self._cache.start(start)
        held = np.minimum(self._computed[rows.row], rows.computed)  # behind: rejected drafts
        self._feed(rows, held, held + rows.catch_up)
        held += rows.catch_up
        count = rows.drafting
        if count:
            if self._cache is not None:
                self._cache.catch_up(rows, held[:count])
            behind = rows.computed[:count] - held[:count]
            view = self._views.get(rows.budget)
            draft(rows, self._runner, self._sampler, view=view, behind=behind if behind.any() else None)
            drafted = rows.computed[:count] + rows.gamma[:count]
            if self._cache is not None:
                self._cache.give_back(rows.row[:count], held[:count], drafted)
                self._cache.wrote(rows.row[:count], drafted)
            held[:count] = drafted
        self._computed[rows.row] = held
        return rows.gamma_asked

    def _feed(self, rows: Round, held: Ints, wanted: Ints) -> None:
        """Compute the KV of each row's tokens held … wanted - 1."""
        for index, first, tokens in self._blocks(held, wanted):
            slots = rows.row[index]
            if self._cache is not None:
                self._cache.observe(slots, first, tokens)
            ahead = first - rows.computed[index]
            nothing = np.empty(0, dtype=np.int64)
            batch = self._rows.batch(slots, rows.computed[index], ahead, tokens, self._full.view, nothing)
            self._full.forward(batch)

    def _blocks(self, held: Ints, wanted: Ints) -> Iterator[tuple[Ints, Ints, Ints]]:
        """What goes into one forward, again and again: which rows, from where, and how many tokens of each."""
        held = held.copy()
        while len(late := np.flatnonzero(held < wanted)):
            tokens = np.minimum(wanted[late] - held[late], self._row_block)
            before = tokens.cumsum() - tokens
            tokens = np.minimum(tokens, self._block - before)
            taken = tokens > 0
            late, tokens = late[taken], tokens[taken]
            yield late, held[late], tokens
            held[late] += tokens

    def observe(self, rows: Round, verdict: Verdict) -> None:
        self._sampler.observe(rows, verdict.chosen, verdict.accepted)


class SharedDrafts:
    """The drafts of the ranks that hold the draft model, made known to all; O(rows × gamma) traffic, once per round."""

    def __init__(self, drafter: Drafter | None, group: Group) -> None:
        """drafter: this rank's, if it has one; rank 0 has, and proposes as many tokens as it is asked for. group: all
        ranks of the target."""
        self._drafter = drafter
        self._group = group

    def propose(self, rows: Round) -> Tensor:
        if self._drafter is not None:
            self._drafter.propose(rows)
        if rows.gamma_max:
            drafts = rows.drafts()
            rows.place(self._group.all_reduce(drafts if self._group.rank == 0 else torch.zeros_like(drafts)))
        return rows.gamma_asked

    def observe(self, rows: Round, verdict: Verdict) -> None:
        if self._drafter is not None:
            self._drafter.observe(rows, verdict)
