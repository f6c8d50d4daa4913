"""A draft's own KV cache: copies of the tokens a policy chose, per KV head, and a ring of the most recent ones.

Its page table is that of a window whose sink is the chosen tokens, and whose recent pages wrap around (`ring_table`).
While the context is within the budget, every token is at its own place and the draft reads the same KV as the target.
Once it is longer, the first pages are overwritten by the tokens chosen from all that came before the recent ones.
Keys keep their positions in the text, so the order in which they are stored does not matter.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine.batch.round_batch import RoundBatch
from engine.batch.view import View
from engine.config.kv import SnapKVConfig
from engine.kv.policy import DraftSite, KVPolicy, ring_table
from engine.kv.query_capture import QueryCapture
from engine.kv.window import WindowView
from engine.plan import RowStart
from kernels.ragged import Ints, ragged_arange


class SnapKVPolicy(KVPolicy):
    """SnapKV (arXiv 2404.14469) for all row slots of one rank, over a pool that holds everything.

    A row's cache is brought up to date when the row is about to draft, so a row that does not draft costs nothing but
    the copies of its prompt's last queries.
    """

    def __init__(self, site: DraftSite, config: SnapKVConfig) -> None:
        super().__init__(site)
        state, model, page, max_rows = site.state, site.model, site.page_size, site.max_rows
        kept = site.settings.kv_state(page)
        self._config = config
        self._reselect = config.reselect or 0
        self._state, self._full_table = state, site.page_table
        self._ops = model.ops
        self._chosen, self._recent, self._per_row = kept.first, config.recent // page, kept.pages  # in pages
        table = ring_table(max_rows, state.page_table.shape[1], kept.first, kept.ring).to(state.device)
        self._view = WindowView(
            table,
            budget=config.budget,
            sink=config.budget - config.recent,
            page_size=page,
            shares=False,
            sliding=site.sliding,
        )
        self.pool = self.full.cache(max_rows * self._per_row)
        self._places = kept.queries  # by position
        shape = (model.num_kv_layers, max_rows * self._places, model.heads, model.head_dim)
        self._queries = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self.observer: QueryCapture = QueryCapture(self._queries)
        # Host, per row slot, in positions: end of prefill; end of the copied KV; end of the queries that are kept; the
        # length at which tokens were last chosen (0: never).
        self._prefill = np.zeros(max_rows, dtype=np.int64)
        self._copied = np.zeros(max_rows, dtype=np.int64)
        self._captured = np.zeros(max_rows, dtype=np.int64)
        self._chosen_at = np.zeros(max_rows, dtype=np.int64)

    def view(self, budget: int) -> View:
        return self._view

    def start(self, start: RowStart) -> None:
        self._prefill[start.row] = len(start.tokens)
        self._copied[start.row] = self._captured[start.row] = self._chosen_at[start.row] = 0

    def watch(self, rows: Ints, first: Ints, queries: Ints, drafts: Ints) -> None:
        """Keep queries of the next forward; those of decoding rows only if choosing is repeated."""
        self._copied[rows] = np.minimum(self._copied[rows], first)  # what is computed again is copied again
        prefill = first < self._prefill[rows]
        max_queries = self._places if self._reselect else np.where(prefill, self._config.queries, 0)
        kept = np.minimum(queries, max_queries)
        if not kept.any():
            self.observer.capture_nothing()
            return
        skipped = np.repeat(queries - kept, kept) + ragged_arange(kept)
        index = np.repeat(queries.cumsum() - queries, kept) + skipped
        position = np.repeat(first, kept) + skipped
        place = np.repeat(rows, kept) * self._places + position % self._places
        self.observer.capture(self._state.to_device(index), self._state.to_device(place))
        self._captured[rows] = np.where(prefill, first + queries, self._captured[rows])

    def prepare(self, batch: RoundBatch, end: Ints) -> None:
        count = batch.num_drafting
        slots, lengths = batch.row[:count], batch.computed[:count]
        # Drafts may have been rejected, also where other tokens have been committed in their place since.
        self._copied[slots] = np.minimum(self._copied[slots], lengths - batch.draft_lag[:count])
        if self._reselect:
            self._captured[slots] = end
        missing = []
        for row, computed, stop in zip(slots.tolist(), lengths.tolist(), end.tolist(), strict=True):
            if candidates := self._num_candidates(row, computed, stop):
                self._choose(row, computed, candidates)
                first = self._first_recent(stop)  # earlier ones are chosen, or will not be read
            else:
                first = int(self._copied[row])
            missing.append(self._readable(first, stop))
        self._copied[slots] = np.maximum(self._copied[slots], end)
        full, cache, offset = self._locate(np.repeat(slots, [len(each) for each in missing]), np.concatenate(missing))
        self.pool.write_tokens(cache, offset, self.full.read_tokens(full, offset))

    def keep_drafts(self, rows: Ints, first: Ints, end: Ints) -> None:
        count = end - first
        full, cache, offset = self._locate(np.repeat(rows, count), np.repeat(first, count) + ragged_arange(count))
        self.full.write_tokens(full, offset, self.pool.read_tokens(cache, offset))
        self._copied[rows] = end

    def _locate(self, slots: Ints, positions: Ints) -> tuple[Tensor, Tensor, Tensor]:
        """Return page in the full pool, page in the cache, and offset in the page, of position `positions[i]` of
        `slots[i]`."""
        page = self._state.page_size
        row_index, position = self._state.to_device(slots), self._state.to_device(positions)
        column, offset = position // page, position % page
        return self._full_table[row_index, column], self._view.page_table[row_index, column], offset

    def _first_recent(self, end: int) -> int:
        """Return the first position that is read as recent by a query at `end`, the draft's first one."""
        return max(0, -(-(end + 1) // self._state.page_size) - self._recent) * self._state.page_size

    def _num_candidates(self, row: int, computed: int, end: int) -> int:
        """Return the number of tokens to choose the row's cache from now; 0: it is not due, or there is no choice."""
        if self._chosen_at[row] and not 0 < self._reselect <= computed - self._chosen_at[row]:
            return 0
        candidates = min(self._first_recent(end), int(self._captured[row]))
        # Tokens that all fit into the first pages leave no choice: these pages hold the first tokens.
        return candidates if candidates > self._chosen * self._state.page_size else 0

    def _readable(self, first: int, end: int) -> Ints:
        """Return the positions in first … end - 1 that will be read: those of the first pages, and the recent ones."""
        prefix = self._chosen * self._state.page_size
        recent = np.arange(max(first, self._first_recent(end), prefix), end)
        return np.concatenate([np.arange(first, min(end, prefix)), recent])

    def _choose(self, row: int, computed: int, candidates: int) -> None:
        """Fill the first pages of the row with the best of its first `candidates` tokens, per layer and KV head."""
        self._chosen_at[row] = computed
        length = int(self._captured[row])
        count = self._chosen * self._state.page_size
        num_queries = min(self._config.queries, length)
        places = row * self._places + np.arange(length - num_queries, length) % self._places
        queries = self._queries[:, self._state.to_device(places)]
        pages = self._full_table[row, : -(-length // self._state.page_size)]
        for index in range(len(queries)):
            # [kv_heads, slots, head_dim]
            both = self.full.layer(index).read(pages[None, None])
            keys, values = (part[0].flatten(1, 2).to(queries.dtype) for part in both)
            scale, sinks = self.observer.terms[index]
            sizes = {"candidates": candidates, "kernel": self._config.kernel}
            scores = self._ops.snapkv_scores(queries[index], keys[:, :length], scale, sinks=sinks, **sizes)
            best = scores.topk(count).indices.sort(-1).values
            place = best[..., None].expand(-1, -1, keys.shape[-1])
            picked = (part.gather(1, place) for part in (keys, values))
            self.pool.layer(index).write_pages(row * self._per_row, *picked)
