"""Random batches whose queries vote, for every attention backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.attention.base import AttentionBackend, AttentionBatch, Ballot, GraphAttention, GraphBatch
from kernels.attention.reference_attention import ReferenceAttention
from kernels.kv.kv_pool import KVPool, LayerKV
from tests.support.kv_layers import draw_sinks

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


@dataclass(frozen=True)
class VoteCase:
    """Sizes of a batch. rows: queries, slots before them, and the voters of each. per_head: lists per KV head. unit:
    slots that share a vote. shared: whether all rows list the same pages. sinks: whether layers have some."""

    rows: tuple[tuple[int, int, tuple[int, int]], ...]
    page_size: int
    kv_heads: int
    group: int
    head_dim: int
    per_head: bool
    per_layer: bool
    unit: int
    shared: bool
    sinks: bool
    seed: int

    @property
    def queries(self) -> list[int]:
        return [n for n, _, _ in self.rows]

    @property
    def lengths(self) -> list[int]:
        return [n + before for n, before, _ in self.rows]


def vote_cases(
    *,
    max_queries: int,
    max_before: int,
    head_dims: tuple[int, ...],
    page_sizes: tuple[int, ...],
    max_rows: int = 4,
) -> SearchStrategy[VoteCase]:
    """Draw cases. Voters are any two queries of a row, the same one twice, one, or none."""
    from hypothesis import strategies as st  # tests on GPUs go without

    @st.composite
    def cases(draw: st.DrawFn) -> VoteCase:
        rows = []
        for _ in range(draw(st.integers(1, max_rows))):
            n, before = draw(st.integers(1, max_queries)), draw(st.integers(0, max_before))
            place = st.integers(0, n - 1)
            voters = draw(st.one_of(st.tuples(place, place), st.tuples(place, st.just(-1)), st.just((-1, -1))))
            rows.append((n, before, voters))
        page_size = draw(st.sampled_from(page_sizes))
        return VoteCase(
            tuple(rows),
            page_size,
            draw(st.integers(1, 3)),
            draw(st.integers(1, 4)),
            draw(st.sampled_from(head_dims)),
            draw(st.booleans()),
            draw(st.booleans()),
            draw(st.sampled_from([unit for unit in range(1, page_size + 1) if page_size % unit == 0])),
            draw(st.booleans()),
            draw(st.booleans()),
            draw(st.integers(0, 1000)),
        )

    return cases()


@dataclass(frozen=True)
class VoteBatch:
    """A drawn batch, and its queries, of two layers."""

    case: VoteCase
    layers: tuple[LayerKV, LayerKV]
    pages: Tensor
    q: Tensor
    scale: float

    def attend(self, backend: AttentionBackend, layer: LayerKV, *, votes: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Run one layer. Returns output, log-sum-exp and votes, which are NaN where nothing was written."""
        case, ballot = self.case, self.ballot()
        batch = AttentionBatch(
            case.queries, case.lengths, self.pages, per_layer=case.per_layer, ballot=ballot if votes else None
        )
        backend.plan(batch)
        return *backend.run(layer, self.q, self.scale), ballot.votes

    def ballot(self) -> Ballot:
        """Make a ballot with votes of NaN."""
        case = self.case
        units = -(-max(case.lengths) // case.page_size) * case.page_size // case.unit
        counted = torch.full((len(case.rows), case.kv_heads, units), float("nan"), device=self.q.device)
        voters = torch.tensor([voters for _, _, voters in case.rows], device=self.q.device)
        return Ballot(voters, case.unit, counted)

    def expected_votes(self, layer: LayerKV, row: int) -> Tensor:
        """Compute a row's votes from softmax weights, [kv_heads, units of its list] float64."""
        case = self.case
        n, length = case.queries[row], case.lengths[row]
        lists = self.pages[layer.index] if case.per_layer else self.pages
        mine = lists[row] if case.per_head else lists[row].expand(case.kv_heads, -1)
        votes = torch.zeros(case.kv_heads, -(-length // case.unit) * case.unit, dtype=torch.float64)
        first = sum(case.queries[:row])
        for head in range(case.kv_heads):
            keys = layer.k[mine[head], head].flatten(0, 1)[:length].double().cpu()
            for behind in (each for each in case.rows[row][2] if each >= 0):
                sees = length - behind
                queries = self.q[first + n - 1 - behind].double().cpu().view(case.kv_heads, case.group, -1)
                for number, query in enumerate(queries[head]):
                    scores = keys[:sees] @ query * self.scale
                    if layer.sinks is not None:
                        sink = layer.sinks.double().cpu()[head * case.group + number]
                        scores = torch.cat([scores, sink[None]])
                    votes[head, :sees] += torch.softmax(scores, 0)[:sees]
        return votes.view(case.kv_heads, -1, case.unit).sum(2)


def draw_batch(case: VoteCase, dtype: torch.dtype, device: str = "cpu") -> VoteBatch:
    """Draw keys, values and queries."""
    torch.manual_seed(case.seed)
    num_pages, width = 67, -(-max(case.lengths) // case.page_size)
    pool = KVPool(
        num_layers=2,
        num_pages=num_pages,
        page_size=case.page_size,
        kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        dtype=dtype,
        device=torch.device(device),
    )
    pool._data.copy_(torch.randn(pool._data.shape))
    shape = [2] * case.per_layer + [len(case.rows)] + [case.kv_heads] * case.per_head + [width]
    pages = torch.randint(num_pages, shape)
    if case.shared:
        dim = 1 if case.per_layer else 0
        pages = pages.narrow(dim, 0, 1).expand(shape).clone()
    pages = pages.to(device)
    q = torch.randn(sum(case.queries), case.kv_heads * case.group, case.head_dim).to(device, dtype)
    one, other = (
        draw_sinks(each, case.kv_heads * case.group) if case.sinks else each for each in (pool.layer(0), pool.layer(1))
    )
    return VoteBatch(case, (one, other), pages, q, case.head_dim**-0.5)


def check_votes(backend: AttentionBackend, batch: VoteBatch, tolerance: float) -> None:
    """Hold a backend to the definition of votes; that results do not depend on them, to the bit; and, with lists per
    layer, that each layer reads its own."""
    for layer in batch.layers:
        plain, plain_lse, _ = batch.attend(backend, layer, votes=False)
        out, lse, votes = batch.attend(backend, layer, votes=True)
        assert torch.equal(out, plain)
        assert torch.equal(lse, plain_lse)
        _check_counts(batch, layer, votes, tolerance)


def _check_counts(batch: VoteBatch, layer: LayerKV, votes: Tensor, tolerance: float) -> None:
    for row, (_, _, voters) in enumerate(batch.case.rows):
        if max(voters) >= 0:
            expected = batch.expected_votes(layer, row)
            counted = votes[row, :, : expected.shape[1]].double().cpu()
            torch.testing.assert_close(counted, expected, rtol=tolerance, atol=tolerance / 100)


def check_captured(
    make: Callable[[GraphBatch], GraphAttention],
    capture: Callable[[Callable[[], None]], Callable[[], None]],
    batch: VoteBatch,
    *,
    votes: bool,
    tolerance: float,
) -> None:
    """Hold captured attention to the reference, and to the definition of votes: captured over other numbers, then
    replayed over the batch's, with both layers in one capture."""
    case, device = batch.case, batch.q.device
    rows, queries, ballot = len(case.rows), max(case.queries), batch.ballot()
    fixed = Ballot(torch.full_like(ballot.voters, -1), case.unit, ballot.votes)
    pages, lengths = torch.zeros_like(batch.pages), torch.ones(rows, dtype=torch.int64, device=device)
    attention = make(GraphBatch(queries, pages, lengths, per_layer=case.per_layer, ballot=fixed if votes else None))
    own = [[at >= queries - n for at in range(queries)] for n in case.queries]
    real = torch.tensor(own, device=device).flatten()
    q = torch.zeros(rows * queries, *batch.q.shape[1:], dtype=batch.q.dtype, device=device)
    outs = torch.zeros(len(batch.layers), *q.shape, dtype=q.dtype, device=device)
    lses = torch.zeros(outs.shape[:-1], device=device)
    counted = torch.zeros(len(batch.layers), *ballot.votes.shape, device=device)

    def work() -> None:
        for layer in batch.layers:
            out, lse = attention.run(layer, q, batch.scale)
            outs[layer.index].copy_(out)
            lses[layer.index].copy_(lse)
            counted[layer.index].copy_(fixed.votes)

    attention.plan([1] * rows)
    replay = capture(work)
    pages.copy_(batch.pages)
    lengths.copy_(torch.tensor(case.lengths))
    fixed.voters.copy_(ballot.voters)
    q[real] = batch.q
    attention.plan(case.lengths)
    replay()
    oracle = ReferenceAttention(case.page_size)
    for layer in batch.layers:
        expected, expected_lse, _ = batch.attend(oracle, layer, votes=False)
        torch.testing.assert_close(outs[layer.index, real], expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(lses[layer.index, real], expected_lse, rtol=tolerance, atol=tolerance)
        if votes:
            _check_counts(batch, layer, counted[layer.index], tolerance)
