"""CPU attention over sealed pages: results are those over a dense pool of the numbers that records hold, and the same
to the bit whatever else is in the batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from torch import Tensor

from kernels.attention.base import AttentionBatch, Ballot
from kernels.attention.cpu_attention import CpuAttention
from kernels.attention.reference_attention import ReferenceAttention
from kernels.cpu.library import SEGMENT, CpuKernels
from kernels.kv.kv_bits import SEALED_GROUP
from kernels.kv.kv_pool import LayerKV
from kernels.kv.sealing_pool import SealingPool
from tests.support.kv_layers import SEALING, draw_sinks
from tests.support.profiles import each_value, examples

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}
READS = [("int8", False), ("int4x2", False), ("int4x2", True)]
EXACT = 7


def sealed_layer(
    read: tuple[str, bool], pages: int, kv_heads: int, head_dim: int, dtype: torch.dtype, spread: float = 0.3
) -> LayerKV:
    """Return a layer of `pages` sealed pages and EXACT others. Channels, and tokens, differ in size and offset."""
    name, drafts = read
    pool = SealingPool(
        SEALING[name],
        num_layers=1,
        num_pages=pages,
        exact_pages=max(pages, EXACT),
        page_size=SEALED_GROUP,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    layer = (pool.drafting() if drafts else pool).layer(0)
    for part in (layer.k, layer.v):
        channels, tokens = torch.randn(head_dim) * spread, torch.randn(SEALED_GROUP, 1)
        part.copy_(torch.randn(part.shape) * (1 + channels.abs()) * (0.5 + tokens.abs()) + channels)
    layer.k.mul_(0.2)  # scores in which a key's rounding to 16 bits is little
    layer.seal(torch.arange(pages), torch.randperm(pages))
    layer.k.normal_(0, 0.2)
    layer.v.normal_()
    return replace(layer, k=layer.k[:EXACT], v=layer.v[:EXACT])


def as_dense(layer: LayerKV) -> LayerKV:
    """Return the layer with the numbers of its records in exact pages, under the same ids."""
    k, v = (part[0].movedim(0, 1) for part in layer.read(torch.arange(layer.num_sealed + len(layer.k))[None, None]))
    return LayerKV(k.contiguous(), v.contiguous(), sinks=layer.sinks)


def run(kernels: CpuKernels, layer: LayerKV, batch: AttentionBatch, q: Tensor, threads: int) -> tuple[Tensor, ...]:
    """Return results, log-sum-exps and votes."""
    backend, before = CpuAttention(kernels), torch.get_num_threads()
    votes: list[Tensor] = []
    if batch.ballot is not None:
        votes.append(batch.ballot.votes.clone().fill_(-1))
        batch = replace(batch, ballot=replace(batch.ballot, votes=votes[0]))
    backend.plan(batch)
    torch.set_num_threads(threads)
    try:
        return *backend.run(layer, q, q.shape[2] ** -0.5), *votes
    finally:
        torch.set_num_threads(before)


def last_queries(batch: AttentionBatch) -> Tensor:
    return torch.tensor(batch.query_lengths).cumsum(0) - 1


def lasts_of(batch: AttentionBatch) -> AttentionBatch:
    """Return the batch with only the last query of each row."""
    return replace(batch, query_lengths=[1] * len(batch.query_lengths), ballot=None)


def check(kernels: CpuKernels, layer: LayerKV, batch: AttentionBatch, heads: int, threads: int = 2) -> None:
    """Compare the batch with itself on a dense pool, with plain torch, and with each row's last query alone. An odd
    number of heads has sinks."""
    if heads % 2:
        layer = draw_sinks(layer, heads)
    dtype, head_dim = layer.k.dtype, layer.k.shape[3]
    q = torch.randn(sum(batch.query_lengths), heads, head_dim).to(dtype)
    mine = run(kernels, layer, batch, q, threads)
    tolerance, largest = TOLERANCE[dtype], as_dense(layer).v.abs().max().item()
    for own, dense, scale in zip(mine, run(kernels, as_dense(layer), batch, q, 1), (largest, 10, 1), strict=False):
        torch.testing.assert_close(own.float(), dense.float(), rtol=tolerance, atol=tolerance * scale)
    for again in (run(kernels, layer, batch, q, 1), run(kernels, layer, lasts_of(batch), q[last_queries(batch)], 1)):
        places = slice(None) if len(again[0]) == len(q) else last_queries(batch)
        assert torch.equal(again[0], mine[0][places])
        assert torch.equal(again[1], mine[1][places])
    oracle = ReferenceAttention(SEALED_GROUP)
    oracle.plan(replace(batch, ballot=None))
    expected, expected_lse = oracle.run(layer, q, head_dim**-0.5)
    torch.testing.assert_close(mine[0].float(), expected.float(), rtol=0, atol=tolerance * largest)
    torch.testing.assert_close(mine[1], expected_lse, rtol=1e-3, atol=max(1e-3, tolerance / 4))


ROW = st.tuples(
    st.sampled_from([1, 1, 2, 3, 5, 70]),  # queries; 70 are not cut by segment
    st.sampled_from([0, 3, 64, 200, SEGMENT, SEGMENT + 70, 2 * SEGMENT + 5]),  # slots before them
    st.integers(0, 4),  # the row before that it shares with
    st.sampled_from([0, 0, SEGMENT, 2 * SEGMENT]),  # slots that it shares
)


@pytest.mark.parametrize(("dtype", "read"), each_value(list(TOLERANCE), READS), ids=str)
@given(
    rows=st.lists(ROW, min_size=1, max_size=4),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 4]),
    head_dim=st.sampled_from([16, 48, 64, 80, 128]),
    per_head=st.sampled_from([False, False, True]),
    one_head=st.booleans(),
    unit=st.sampled_from([None, None, 1, 16, 64]),
    exact_share=st.sampled_from([0.0, 0.2, 1.0]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
@examples(6, 60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_agrees_with_a_dense_pool(
    kernels: CpuKernels,
    dtype: torch.dtype,
    read: tuple[str, bool],
    rows: list[tuple[int, int, int, int]],
    kv_heads: int,
    group: int,
    head_dim: int,
    per_head: bool,
    one_head: bool,
    unit: int | None,
    exact_share: float,
    threads: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    sealed = 20
    queries, lengths = [n for n, *_ in rows], [n + before for n, before, *_ in rows]
    layer = sealed_layer(read, sealed, kv_heads, head_dim, dtype)
    if one_head:
        layer, sealed, kv_heads, exact = layer.one_head(), sealed * kv_heads, 1, EXACT * kv_heads
    else:
        exact = EXACT
    width = -(-max(lengths) // SEALED_GROUP)
    shape = (len(rows), kv_heads, width) if per_head else (len(rows), width)
    is_exact = torch.rand(shape) < exact_share
    pages = torch.where(is_exact, sealed + torch.randint(exact, shape), torch.randint(sealed, shape))
    for index, (_, _, other, shared) in enumerate(rows[1:], 1):
        pages[index, ..., : shared // SEALED_GROUP] = pages[other % index, ..., : shared // SEALED_GROUP]
    ballot = None
    if unit is not None:
        voters = torch.stack([torch.randint(-1, n, (2,)) for n in queries])
        voters[:, 0] = voters.amax(1)
        ballot = Ballot(voters, unit, torch.zeros(len(rows), kv_heads, width * SEALED_GROUP // unit))
    batch = AttentionBatch(queries, lengths, pages, ballot=ballot)
    check(kernels, layer, batch, kv_heads * group, threads)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "read", "group"),
    each_value([16, 64, 80, 128], [*TOLERANCE], READS, [1, 4, 7]),
    ids=str,
)
def test_all_numbers_of_queries(
    kernels: CpuKernels, dtype: torch.dtype, head_dim: int, read: tuple[str, bool], group: int
) -> None:
    """Few queries read a block in place, others pack it."""
    torch.manual_seed(0)
    layer = sealed_layer(read, 6, 1, head_dim, dtype)
    pages = torch.tensor([[3, 1, 5, 0, 2, 4, 8]])
    for queries in (1, 2, 3, 4, 5, 8, 33):
        check(kernels, layer, AttentionBatch([queries], [6 * SEALED_GROUP + 40], pages), group)


def test_numbers_of_any_size(kernels: CpuKernels) -> None:
    """Offsets that are large beside what is left of the numbers, and codes whose products are not small."""
    torch.manual_seed(0)
    for read in READS:
        for dtype in TOLERANCE:
            for spread in (1e-6, 300.0):
                layer = sealed_layer(read, 4, 2, 64, dtype, spread)
                q, pages = torch.zeros(1, 2, 64, dtype=dtype), torch.arange(4)[None]
                batch = AttentionBatch([1], [4 * SEALED_GROUP], pages)
                out, _ = run(kernels, layer, batch, q, 1)
                dense, _ = run(kernels, as_dense(layer), batch, q, 1)
                torch.testing.assert_close(
                    out.float(), dense.float(), rtol=0, atol=TOLERANCE[dtype] * as_dense(layer).v.abs().max().item()
                )


def test_what_is_not_listed_is_not_read(kernels: CpuKernels) -> None:
    """A record of infinite numbers, past a row's end, does not reach it."""
    torch.manual_seed(0)
    layer = sealed_layer(("int8", False), 3, 2, 64, torch.float32)
    batch = AttentionBatch([2], [SEALED_GROUP + 10], torch.tensor([[0, 1]]))
    q = torch.randn(2, 4, 64)
    clean = run(kernels, layer, batch, q, 1)
    assert layer.sealed is not None
    infinite = torch.tensor([float("inf")] * (SEALED_GROUP - 10), dtype=torch.float16).view(torch.uint8)
    layer.sealed.v[1, :, -len(infinite) :] = infinite  # minima of the values of slots that the row does not list
    for own, before in zip(run(kernels, layer, batch, q, 1), clean, strict=True):
        assert torch.equal(own, before)


def test_records_must_fit(kernels: CpuKernels) -> None:
    layer = sealed_layer(("int8", False), 3, 2, 64, torch.float32)
    assert layer.sealed is not None
    batch, q = AttentionBatch([1], [10], torch.tensor([[0]])), torch.randn(1, 4, 64)
    short = replace(layer.sealed, k=layer.sealed.k[..., :-1].contiguous())
    fewer = replace(layer.sealed, v=layer.sealed.v[:2])
    for wrong in (short, fewer):
        with pytest.raises(RuntimeError, match="sealed pages"):
            run(kernels, replace(layer, sealed=wrong), batch, q, 1)
    with pytest.raises(RuntimeError, match="kind of sealed pages"):
        run(kernels, replace(layer, k=layer.k[:, :, :32].contiguous(), v=layer.v[:, :, :32].contiguous()), batch, q, 1)
