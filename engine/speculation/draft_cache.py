"""A draft's own KV cache: copies of the tokens a policy chose, per KV head, and a ring of the most recent ones.

Its page table is that of a window whose sink are the chosen tokens, and whose recent pages go round (`ring_table`).
While the context is within the budget every token stands at its own place, and the draft reads what the target reads.
Once it is longer, the first pages are overwritten by the tokens chosen from all that came before the recent ones.
Keys keep their positions in the text, so the order in which they are stored does not matter.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine.batch.rows import Ints, Round, Rows, ragged
from engine.config.speculation import SnapKVConfig, SpeculationConfig
from engine.kv.draft_spec import footprint
from engine.kv.policies import View, make_policy, ring_table
from engine.plan import RowStart
from kernels.attention.base import AttentionBackend
from kernels.attention.observed import ObservedAttention
from kernels.kv_cache import KVPool
from models.llama import Llama


class DraftCache:
    """SnapKV (arXiv 2404.14469) for all row slots of one rank, over a pool that holds everything.

    view: how a draft reads and writes the cache. pool: its bytes. attention: for the model whose queries choose; it
    remembers them. A row's cache is brought up to date when the row is about to draft, so a row that does not draft
    costs nothing but the copies of its prompt's last queries.
    """

    def __init__(
        self, settings: SpeculationConfig, model: Llama, full: KVPool, rows: Rows, inner: AttentionBackend
    ) -> None:
        """settings: whose policy is SnapKV. full: the pool that is chosen from, laid out by rows.page_table. inner: the
        attention that `attention` is made of.
        """
        max_rows, page = len(rows.tokens), rows.page_size
        config, kept = settings.settled_kv, footprint(settings, page)
        assert isinstance(config, SnapKVConfig)
        self._config = config
        self._reselect = config.reselect or 0
        self._rows = rows
        self._full = full
        self._ops, self._scale = model.ops, model.head_dim**-0.5
        self._chosen, self._recent, self._per_row = kept.first, config.recent // page, kept.pages  # in pages
        table = ring_table(max_rows, rows.page_table.shape[1], kept.first, kept.ring)
        self.view = View(make_policy(config, page), table.to(rows.device))
        self.pool = model.make_pool(max_rows * self._per_row, page)
        self._places = kept.queries  # by position
        shape = (model.num_layers, max_rows * self._places, model.heads, model.head_dim)
        self._queries = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self.attention = ObservedAttention(inner, self._queries)
        # Host, per row slot, in positions: where prefill ends; copied up to here; queries kept up to here; chosen when
        # so many were there.
        self._prefill = np.zeros(max_rows, dtype=np.int64)
        self._copied = np.zeros(max_rows, dtype=np.int64)
        self._observed = np.zeros(max_rows, dtype=np.int64)
        self._chosen_at = np.zeros(max_rows, dtype=np.int64)

    def start(self, start: RowStart) -> None:
        """A request takes a row slot."""
        self._prefill[start.row] = len(start.tokens)
        self._copied[start.row] = 0 if start.shared else start.computed
        self._observed[start.row] = self._chosen_at[start.row] = 0

    def observe(self, rows: Ints, first: Ints, queries: Ints) -> None:
        """The next forward of the observed model computes `queries[i]` tokens of row slot `rows[i]`, from position
        `first[i]`. Rows that decode are observed only if choosing is repeated.
        """
        prefill = first < self._prefill[rows]
        most = self._places if self._reselect else np.where(prefill, self._config.queries, 0)
        kept = np.minimum(queries, most)
        if not kept.any():
            self.attention.expect_nothing()
            return
        skipped = np.repeat(queries - kept, kept) + ragged(kept)
        index = np.repeat(queries.cumsum() - queries, kept) + skipped
        position = np.repeat(first, kept) + skipped
        place = np.repeat(rows, kept) * self._places + position % self._places
        self.attention.expect(self._rows.to_device(index), self._rows.to_device(place))
        self._observed[rows] = np.where(prefill, first + queries, self._observed[rows])

    def catch_up(self, rows: Round, upto: Ints) -> None:
        """Bring the rows that are about to draft up to date. upto: [drafting rows], positions that the full pool holds;
        up to its pending token, a row whose pool holds less writes the rest into the cache itself.
        """
        count = rows.drafting
        slots = rows.row[:count]
        self._copied[slots] = np.minimum(self._copied[slots], rows.computed[:count])  # behind: rejected drafts
        if self._reselect:
            self._observed[slots] = upto
        todo = []
        for row, computed, held in zip(slots.tolist(), rows.computed[:count].tolist(), upto.tolist(), strict=True):
            if candidates := self._due(row, computed, held):
                self._choose(row, computed, candidates)
                first = self._first_recent(held)  # what came before is chosen, or will not be read
            else:
                first = int(self._copied[row])
            todo.append(self._missing(first, held))
        self.wrote(slots, np.maximum(self._copied[slots], upto))
        full, cache, offset = self._places_of(np.repeat(slots, [len(each) for each in todo]), np.concatenate(todo))
        self.pool.data[:, :, cache, :, offset] = self._full.data[:, :, full, :, offset]

    def wrote(self, slots: Ints, upto: Ints) -> None:
        """The cache of these row slots now holds the positions before `upto`."""
        self._copied[slots] = upto

    def give_back(self, slots: Ints, first: Ints, upto: Ints) -> None:
        """Copy what drafts have just written, positions `first` to `upto` of each row slot, into the full pool, for a
        model that has no other KV of them."""
        count = upto - first
        full, cache, offset = self._places_of(np.repeat(slots, count), np.repeat(first, count) + ragged(count))
        self._full.data[:, :, full, :, offset] = self.pool.data[:, :, cache, :, offset]

    def _places_of(self, slots: Ints, positions: Ints) -> tuple[Tensor, Tensor, Tensor]:
        """Page in the full pool, page in the cache, and place in the page, of position `positions[i]` of `slots[i]`."""
        page = self._rows.page_size
        row_index, position = self._rows.to_device(slots), self._rows.to_device(positions)
        column, offset = position // page, position % page
        return self._rows.page_table[row_index, column], self.view.page_table[row_index, column], offset

    def _first_recent(self, upto: int) -> int:
        """The first position that is read as recent by a query at `upto`, the draft's first one."""
        return max(0, -(-(upto + 1) // self._rows.page_size) - self._recent) * self._rows.page_size

    def _due(self, row: int, computed: int, upto: int) -> int:
        """From how many tokens the row's cache is to be chosen anew; 0: it is not time to, or leaves no choice."""
        if self._chosen_at[row] and not 0 < self._reselect <= computed - self._chosen_at[row]:
            return 0
        candidates = min(self._first_recent(upto), int(self._observed[row]))
        # What fits into the first pages leaves no choice: they keep what came first.
        return candidates if candidates > self._chosen * self._rows.page_size else 0

    def _missing(self, first: int, upto: int) -> Ints:
        """Positions from `first` to `upto` that will be read. Behind the first pages, what is not recent any more never
        is."""
        prefix = self._chosen * self._rows.page_size
        recent = np.arange(max(first, self._first_recent(upto), prefix), upto)
        return np.concatenate([np.arange(first, min(upto, prefix)), recent])

    def _choose(self, row: int, computed: int, candidates: int) -> None:
        """Fill the first pages of the row with the best of its first `candidates` tokens, per layer and KV head."""
        self._chosen_at[row] = computed
        length = int(self._observed[row])
        count = self._chosen * self._rows.page_size
        queries = min(self._config.queries, length)
        places = row * self._places + np.arange(length - queries, length) % self._places
        asked = self._queries[:, self._rows.to_device(places)]
        pages = self._rows.page_table[row, : -(-length // self._rows.page_size)]
        for index in range(len(asked)):
            layer = self._full.layer(index)
            keys, values = (part[pages].transpose(0, 1).flatten(1, 2) for part in layer)  # [kv_heads, slots, head_dim]
            votes = self._ops.votes(
                asked[index], keys[:, :length], self._scale, candidates=candidates, kernel=self._config.kernel
            )
            best = votes.topk(count).indices.sort(-1).values
            chosen = self.pool.data[index, :, row * self._per_row :][:, : self._chosen]  # [2, pages, kv_heads, page, …]
            for target, part in zip(chosen, (keys, values), strict=True):
                picked = part.gather(1, best[..., None].expand(-1, -1, part.shape[-1]))
                target.copy_(picked.view(len(part), self._chosen, -1, part.shape[-1]).transpose(0, 1))
