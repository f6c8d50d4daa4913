"""Pages that verify passes choose, and the views that list them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.batch.row_state import RowState
from engine.config.speculation import SpeculationConfig
from engine.kv.policy import DraftSite
from engine.kv.verified import VerifiedPolicy
from engine.params import SamplingParams
from engine.plan import RowStart
from kernels.attention.base import AttentionBackend, AttentionBatch
from kernels.attention.reference_attention import ReferenceAttention
from tests.support.engines import tiny_model
from tests.support.profiles import examples

PAGE, ROWS, LENGTH = 4, 3, 200


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


class Rig:
    """A policy over a pool of random KV, whose forwards are attention alone."""

    def __init__(self, budget: int, sink: int, seed: int = 0) -> None:
        model = tiny_model()
        self.state = RowState(max_rows=ROWS, max_model_len=LENGTH, page_size=PAGE, device=torch.device("cpu"))
        width = self.state.page_table.shape[1]
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(ROWS * width, generator=generator)
        self.state.page_table.copy_(order.view(ROWS, width))
        self.pool = model.make_pool(ROWS * width, PAGE)
        self.pool._data.copy_(torch.randn(self.pool._data.shape, generator=generator) * 2)
        self.model, self.generator = model, generator
        settings = SpeculationConfig(gamma=3, kv={"policy": "verified", "budget": budget, "sink": sink})  # type: ignore[arg-type]
        self.policy = VerifiedPolicy(DraftSite(settings, model, self.state, lambda: self.pool), settings.kv)  # type: ignore[arg-type]

    def start(self, row: int, tokens: int) -> None:
        self.policy.start(RowStart(row, [0] * tokens, tokens, SamplingParams(), []))

    def forward(
        self, rows: np.ndarray, first: np.ndarray, queries: np.ndarray, drafts: np.ndarray
    ) -> list[torch.Tensor]:
        """Run a forward over the full pool. Returns the queries of each layer."""
        self.policy.watch(rows, first, queries, drafts)
        attention: AttentionBackend = ReferenceAttention(PAGE)
        if self.policy.observer.due:
            attention = self.policy.observer.around(attention)
        ends = (first + queries).tolist()
        pages = self.state.page_table[torch.from_numpy(rows)][:, : -(-max(ends) // PAGE)]
        attention.plan(AttentionBatch(queries.tolist(), ends, pages))
        asked = []
        for index in range(self.model.num_layers):
            shape = (int(queries.sum()), self.model.heads, self.model.head_dim)
            asked.append(torch.randn(shape, generator=self.generator, dtype=self.model.dtype))
            attention.run(self.pool.layer(index), asked[-1], self.model.head_dim**-0.5)
        return asked

    def listed(self, row: int, context: int, budget: int = 0) -> list[list[int]]:
        """List the positions that a draft of a row reads, by layer."""
        view, rows, contexts = self.policy.view(budget), ints(row), ints(context)
        read = context - int(view.skipped(rows, contexts)[0])
        lists = view.pages(torch.from_numpy(rows), torch.from_numpy(contexts), -(-read // PAGE))
        place = {page: index for index, page in enumerate(self.state.page_table[row].tolist())}
        return [
            [place[page] * PAGE + offset for page in pages for offset in range(PAGE)][:read]
            for pages in lists[:, 0].tolist()
        ]

    def best(self, row: int, layer: int, voters: list[tuple[torch.Tensor, int]], pages: range, count: int) -> list[int]:
        """Choose pages by softmax weights written out. voters: queries, and the number of slots that each sees."""
        k = self.pool.layer(layer).k[self.state.page_table[row]].transpose(0, 1).flatten(1, 2)
        votes = torch.zeros(k.shape[1] // PAGE, dtype=k.dtype)
        for query, sees in voters:
            for head, q in enumerate(query):
                keys = k[head // (self.model.heads // self.model.kv_heads), :sees]
                weights = torch.zeros(k.shape[1], dtype=k.dtype)
                weights[:sees] = torch.softmax(keys @ q * self.model.head_dim**-0.5, 0)
                votes += weights.view(-1, PAGE).sum(1)
        return sorted(pages, key=lambda page: -float(votes[page]))[:count]


@given(
    length=st.integers(1, 120),
    drafts=st.integers(0, 4),
    sink=st.integers(1, 9),
    pages=st.integers(1, 6),
    ahead=st.integers(1, 9),
    seed=st.integers(0, 50),
)
@examples(25, 100)
def test_drafts_read_sink_best_pages_and_all_that_is_newer(
    length: int, drafts: int, sink: int, pages: int, ahead: int, seed: int
) -> None:
    """After a verify pass of a row with `length` committed tokens. ahead: tokens of the draft's query beyond them."""
    rig = Rig(pages * PAGE, sink, seed)
    rig.start(1, length)
    queries = rig.forward(ints(1), ints(length - 1), ints(1 + drafts), ints(drafts))
    end, sinks = length // PAGE, -(-sink // PAGE)
    context = length + ahead
    for layer, positions in enumerate(rig.listed(1, context)):
        assert len(set(positions)) == len(positions)
        voters = [(queries[layer][0], length), (queries[layer][-1], length + drafts)][: 1 + (drafts > 0)]
        if end - sinks <= pages:
            assert positions == list(range(context))  # nothing is left out: as dense attention
            continue
        chosen = rig.best(1, layer, voters, range(sinks, end), pages)
        newer = range(end * PAGE, context)
        assert positions[: sinks * PAGE] == list(range(sinks * PAGE))
        assert positions[-len(newer) :] == list(newer)
        middle = positions[sinks * PAGE : -len(newer)]
        assert middle == [page * PAGE + offset for page in chosen for offset in range(PAGE)]
        half = rig.policy.view(0)
        assert half.leading(ints(1), ints(context)).tolist() == [sinks * PAGE]


def test_narrower_budgets_read_the_best_of_the_chosen() -> None:
    rig = Rig(32, 4)
    narrow = SpeculationConfig(gamma="auto", kv={"policy": "verified", "budget": 32, "sink": 4})  # type: ignore[arg-type]
    rig.policy = VerifiedPolicy(DraftSite(narrow, rig.model, rig.state, lambda: rig.pool), narrow.kv)  # type: ignore[arg-type]
    assert narrow.kv_budgets(PAGE) == [32, 16, 8]
    rig.start(0, 100)
    rig.forward(ints(0), ints(99), ints(3), ints(2))
    wide, half = rig.listed(0, 101, 32), rig.listed(0, 101, 16)
    for all_read, read in zip(wide, half, strict=True):
        assert read == all_read[:4] + all_read[4:20] + all_read[36:]


def test_only_rows_that_sample_vote() -> None:
    """A prompt's chunks do not vote before the last one, whose last query chooses for the first drafts."""
    rig = Rig(8, 4)
    rig.start(0, 60)
    rig.start(2, 40)
    rig.forward(ints(2), ints(39), ints(1), ints(0))
    before = rig.listed(2, 41)
    rig.forward(ints(0), ints(0), ints(32), ints(0))
    assert rig.listed(0, 33) == [list(range(33))] * rig.model.num_layers
    queries = rig.forward(ints(2, 0), ints(40, 32), ints(1, 28), ints(0, 0))
    assert rig.listed(2, 41) != before  # in a round of votes all rows that sample vote
    for layer, positions in enumerate(rig.listed(0, 61)):
        chosen = rig.best(0, layer, [(queries[layer][-1], 60)], range(1, 15), 2)
        assert positions == [0, 1, 2, 3, *(page * PAGE + at for page in chosen for at in range(PAGE)), 60]


def test_numbers_of_a_captured_vote_follow_the_batch() -> None:
    """Kernels read voters row by row, without a stride. Rows that are missing from a batch do not vote."""
    rig = Rig(8, 4)
    watch: Any = rig.policy.observer.in_graph(3, 4, 9)
    rig.start(0, 20)
    rig.start(2, 12)
    assert watch.ballot.voters.is_contiguous()
    for _ in range(2):
        rig.policy.watch(ints(2, 0), ints(30, 45), ints(4, 2), ints(3, 1))
        watch.copy()
        assert watch.ballot.voters.tolist() == [[3, 0], [1, 0], [-1, -1]]
        assert watch._vote.voters is watch.ballot.voters
        assert watch._vote.slots.tolist() == [2, 0, ROWS]
        assert watch._vote.ends.tolist() == [31 // PAGE, 46 // PAGE, 0]
        watch.copy()
        assert watch.ballot.voters.tolist() == [[-1, -1]] * 3
        assert watch._vote.slots.tolist() == [ROWS] * 3


def test_rows_that_decode_plainly_vote_seldom() -> None:
    rig = Rig(8, 4)
    rig.start(0, 50)
    votes = []
    for step in range(40):
        first = 49 + step
        rig.policy.watch(ints(0), ints(first), ints(1), ints(0))
        votes.append(rig.policy.observer.due)
        assert len(rig.listed(0, first + 2)[0]) <= 4 + 8 + PAGE - 1 + 16 + 2
    assert votes[0]  # the end of the prompt
    assert sum(votes) == 3


def test_a_new_request_does_not_read_by_its_predecessors_choice() -> None:
    rig = Rig(8, 4)
    rig.start(0, 80)
    rig.forward(ints(0), ints(79), ints(1), ints(0))
    assert len(rig.listed(0, 81)[0]) == 4 + 8 + 1
    rig.start(0, 60)
    assert rig.listed(0, 61) == [list(range(61))] * rig.model.num_layers


def test_kv_that_is_no_number_chooses_pages_of_the_row() -> None:
    """A row with such KV fails in that forward; until then it reads its own pages, and rows beside it the best ones."""
    rig = Rig(8, 4)
    rig.start(0, 60)
    rig.start(1, 60)
    rig.pool._data[:, :, rig.state.page_table[0, 5:9]] = float("nan")
    best, seen = rig.policy.observer._best, []

    def watched(votes: torch.Tensor, count: int) -> torch.Tensor:
        seen.append(bool(votes.isfinite().all()))
        return best(votes, count)

    rig.policy.observer._best = watched
    queries = rig.forward(ints(0, 1), ints(59, 59), ints(3, 3), ints(2, 2))
    assert seen == [True] * rig.model.num_layers
    for layer, positions in enumerate(rig.listed(0, 61)):
        assert positions[:4] == [0, 1, 2, 3]
        assert len(set(positions)) == len(positions) == 4 + 8 + 1
        chosen = rig.best(1, layer, [(queries[layer][3], 60), (queries[layer][5], 62)], range(1, 15), 2)
        expected = [0, 1, 2, 3, *(page * PAGE + at for page in chosen for at in range(PAGE)), 60]
        assert rig.listed(1, 61)[layer] == expected


@pytest.mark.parametrize("pages", [2, 30])
def test_a_row_that_drafts_before_it_votes_reads_the_most_recent_pages(pages: int) -> None:
    """A preempted row resumes like that if all of its KV but the pending token's is found. pages: of the budget."""
    rig = Rig(pages * PAGE, 4)
    for row, tokens in ((0, 100), (1, 80), (2, 10)):
        rig.start(row, tokens)
    rig.forward(ints(1), ints(79), ints(1), ints(0))
    voted = rig.listed(1, 81)
    batch: Any = SimpleNamespace(row=ints(0, 1, 2), num_drafting=3, latest=np.zeros(3, dtype=bool))
    rig.policy.prepare(batch, ints(99, 80, 9))
    recent = list(range(100)) if pages == 30 else [0, 1, 2, 3, *range(92, 96), *range(88, 92), *range(96, 100)]
    assert rig.listed(0, 100) == [recent] * rig.model.num_layers
    assert rig.listed(1, 81) == voted
    assert rig.listed(2, 10) == [list(range(10))] * rig.model.num_layers
    rig.start(0, 100)
    assert rig.listed(0, 100) == [list(range(100))] * rig.model.num_layers


def test_a_row_reads_the_latest_pages_where_the_plan_says_so() -> None:
    """As with sink + window, until its next vote. A row that drafts nothing keeps its choice."""
    rig = Rig(2 * PAGE, 4)
    for row in range(3):
        rig.start(row, 80)
    rig.forward(ints(0, 1, 2), ints(79, 79, 79), ints(1, 1, 1), ints(0, 0, 0))
    voted = [rig.listed(row, 81) for row in range(3)]
    batch: Any = SimpleNamespace(row=ints(1, 0, 2), num_drafting=2, latest=np.array([True, False, True]))
    rig.policy.prepare(batch, ints(80, 80))
    latest = [0, 1, 2, 3, *range(76, 80), *range(72, 76), 80]
    assert rig.listed(1, 81) == [latest] * rig.model.num_layers
    assert (rig.listed(0, 81), rig.listed(2, 81)) == (voted[0], voted[2])
    assert latest not in voted[1]
    asked = rig.forward(ints(1), ints(80), ints(3), ints(2))
    for layer, queries in enumerate(asked):
        best = rig.best(1, layer, [(queries[0], 81), (queries[2], 83)], range(1, 20), 2)
        assert rig.listed(1, 83)[layer][:12] == [0, 1, 2, 3, *(4 * page + at for page in best for at in range(4))]
