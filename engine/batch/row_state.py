"""A rank's state of its rows: tokens, page tables and lengths, in fixed-address tensors indexed by row slot.

A plan only patches them. Index tensors are built from host integers alone, so that building them never
waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.batch.row_failures import RowFailures
from engine.batch.shared_prefixes import PageLists
from engine.batch.tail_pages import TailPages
from engine.batch.view import DenseView, View
from engine.plan import PageDelta, RoundPlan
from kernels.attention.base import AttentionBatch, SharedPrefix
from kernels.ops import Ops
from kernels.ragged import Ints, ragged_arange
from kernels.reference_ops import REFERENCE
from kernels.transfer import send, send_all
from models.batch import ForwardBatch


class RowState:
    """State of all row slots on one rank.

    tokens: [max_rows, max_model_len] int32. Drafts follow the committed tokens until they are committed or
        overwritten.
    page_table: [max_rows, max_pages] int64, page ids in order: what drafts read, and tokens are written to.
    sealed_table: the same, with the page that a group is sealed to where `page_table` has the exact one that the row
        holds; without sealed pages it is `page_table`.
    first_exact: first page id that tokens are written to.
    sliding_table: [max_rows, max_pages] int64, or [0, 0] where no layer slides: page ids in the pool of sliding layers,
        in order. Those behind a row's window may be any valid ids, and are not read.
    windows: view of these, as the target reads them; None: no layer slides.
    computed: [max_rows] int64, number of committed tokens whose target KV is valid.
    num_prompt: [max_rows] int64, on the host: number of a row's first tokens that are its prompt.
    failures: host, rows that have failed.
    """

    def __init__(
        self,
        *,
        max_rows: int,
        max_model_len: int,
        page_size: int,
        device: torch.device,
        ops: Ops = REFERENCE,
        tails: TailPages | None = None,
        first_exact: int = 0,
        sliding_window: int = 0,
    ) -> None:
        """ops: arithmetic of `device`. tails: exact pages of rows, where others are sealed. sliding_window: of sliding
        layers; 0: the model has none."""
        self.page_size = page_size
        self.device = device
        self.ops = ops
        self.failures = RowFailures(max_rows)
        self.tokens = torch.zeros(max_rows, max_model_len, dtype=torch.int32, device=device)
        self.page_table = torch.zeros(max_rows, -(-max_model_len // page_size), dtype=torch.int64, device=device)
        self.first_exact, self._tails = first_exact, tails
        self.sealed_table = self.page_table if tails is None else torch.zeros_like(self.page_table)
        sizes = self.page_table.shape if sliding_window else (0, 0)
        self.sliding_table = torch.zeros(sizes, dtype=torch.int64, device=device)
        self.windows = DenseView(self.sliding_table, shares=False, window=sliding_window) if sliding_window else None
        self.computed = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self.num_prompt = np.zeros(max_rows, dtype=np.int64)
        self._lists = PageLists(*self.page_table.shape)

    def apply(self, plan: RoundPlan) -> None:
        """Apply the plan's changes: new rows, and pages set in rows."""
        for start in plan.starts:
            tokens = torch.tensor(start.tokens, dtype=torch.int32)
            self.tokens[start.row, : len(tokens)] = send(tokens, self.device)
            self.computed[start.row].fill_(start.computed)
            self.num_prompt[start.row] = start.num_prompt
            self._lists.clear(start.row)
            if self._tails is not None:
                self._tails.drop(start.row)
        deltas = [delta for delta in plan.pages if not delta.sliding]
        for delta in deltas:
            self._lists.write(delta.row, delta.first, delta.pages)
        tables = [self.sealed_table] if self._tails is None else [self.sealed_table, self.page_table]
        self._set_pages(tables, deltas)
        if self.windows is not None:
            self._set_pages([self.sliding_table], [delta for delta in plan.pages if delta.sliding])
        if self._tails is not None:
            self._place_tails(self._tails, plan)

    def _set_pages(self, tables: Sequence[Tensor], deltas: Sequence[PageDelta]) -> None:
        """Set the pages of `deltas` in page tables."""
        if not deltas:
            return
        counts = [len(delta.pages) for delta in deltas]
        row = np.repeat([delta.row for delta in deltas], counts)
        column = np.repeat([delta.first for delta in deltas], counts) + ragged_arange(np.array(counts))
        page = np.concatenate([np.array(delta.pages, dtype=np.int64) for delta in deltas])
        row_index, columns, pages = self.to_device(np.stack([row, column, page]))
        for table in tables:
            table[row_index, columns] = pages

    def _place_tails(self, tails: TailPages, plan: RoundPlan) -> None:
        """Enter into the page table the exact pages that rows hold, and take out those that they hold no more."""
        old = tails.update(plan)
        held = tails.pages_of(work.row for work in plan.work)
        old_rows, old_columns, rows, columns, pages = send_all(self.device, *old, *held)
        self.page_table[old_rows, old_columns] = self.sealed_table[old_rows, old_columns]
        self.page_table[rows, columns] = pages + self.first_exact

    def reset_rows(self, plan: RoundPlan) -> None:
        """Zero the rows of an abandoned round. Ranks left them in different states; zeroed, they agree again until the
        rows start anew."""
        for work in plan.work:
            self._lists.clear(work.row)
            for state in (self.tokens, self.page_table, self.sealed_table, self.computed):
                state[work.row].zero_()
            if self.windows is not None:
                self.sliding_table[work.row].zero_()
        if self._tails is not None:
            self._tails.abandon(plan)
            rows, columns, pages = send_all(self.device, *self._tails.pages_of(range(len(self.tokens))))
            self.page_table.copy_(self.sealed_table)
            self.page_table[rows, columns] = pages + self.first_exact

    def forward_inputs(
        self, rows: Ints, computed: Ints, ahead: Ints, queries: Ints, view: View, logit_index: Ints
    ) -> ForwardBatch:
        """Build the inputs of a forward that reads and writes KV through `view`.

        rows: row slots. computed: the device's counters of these rows, for shapes only; positions come from the
        counters themselves. ahead: offset of each row's first query from its computed tokens; may be negative. queries:
        number of queries of each row. All [n]. logit_index: [m], indices into all queries.
        """
        steps = ragged_arange(queries) + np.repeat(ahead, queries)
        row_slots, first_ahead, row_index, step, logit_places = send_all(
            self.device, rows, ahead + 1, np.repeat(rows, queries), steps, logit_index
        )
        position = self.computed[row_index] + step
        column, offset = position // self.page_size, position % self.page_size
        page = view.page_table[row_index, column]
        context = computed + ahead + 1  # tokens that each row's first query may read
        contexts, query_lengths = self.computed[row_slots] + first_ahead, queries.tolist()

        def read(view: View) -> AttentionBatch:
            skipped = view.skipped(rows, context)
            kv_lengths = context + queries - 1 - skipped
            return AttentionBatch(
                query_lengths=query_lengths,
                kv_lengths=kv_lengths.tolist(),
                pages=view.pages(row_slots, contexts, -(-int(kv_lengths.max()) // self.page_size)),
                per_layer=view.per_layer,
                skipped=skipped.tolist(),
                prefixes=self._prefixes(rows, context, view),
                rows=row_slots,
                window=view.window,
            )

        sliding_slots, sliding = None, None
        if view.sliding is not None:
            sliding_slots = view.sliding.page_table[row_index, column] * self.page_size + offset
            sliding = read(view.sliding)
        return ForwardBatch(
            token_ids=self.tokens[row_index, position].long(),
            positions=position,
            slots=(page - view.first_page) * self.page_size + offset,
            attention=read(view),
            logit_index=logit_places,
            sliding_slots=sliding_slots,
            sliding_attention=sliding,
        )

    def _prefixes(self, rows: Ints, context: Ints, view: View) -> list[SharedPrefix]:
        """Return the prefixes that rows share, if attention makes use of them. context: tokens that each row's first
        query may read, itself included: it sees all shared pages, and at least one slot after them."""
        if not self.ops.reads_prefixes or len(rows) < 2 or view.per_layer or view.window or not view.shares:
            return []
        pages = np.minimum(view.leading(rows, context), context - 1) // self.page_size
        if self._tails is not None:  # drafts list the group before their own exactly, and each row has its own page
            pages = np.maximum(pages - 1, 0)
        return self._lists.prefixes(rows, pages)

    def to_device(self, array: Ints) -> Tensor:
        """Copy a host array to the device without waiting for it."""
        return send(torch.from_numpy(array), self.device)
