"""Attention in Triton over pages of few bits, in Triton's interpreter, against the reference."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from kernels.attention.base import AttentionBatch, Ballot
from kernels.attention.reference_attention import ReferenceAttention
from kernels.flashinfer.flashinfer_attention import FlashInferAttention
from kernels.flashinfer.flashinfer_workspace import Workspace
from kernels.kv.kv_bits import SEALED_GROUP
from kernels.kv.kv_pool import FP8, write_kv
from tests.support import fake_flashinfer
from tests.support.drawn_batches import shared_batches
from tests.support.kv_layers import KINDS, layer_of
from tests.support.profiles import each_value, examples, is_all
from tests.support.shared_batches import always_share, check_against_reference

pytest.importorskip("triton", reason="Triton is not installed: there are no builds for this platform")

from kernels.attention.triton_attention import GpuAttention
from kernels.gpu import INTERPRETED, pointwise, tile
from kernels.gpu.attention import VOTE_BYTES

if not INTERPRETED:
    pytest.skip("tests/gpu has these on a GPU", allow_module_level=True)

PAGES, SEALED = 13, 7


@pytest.mark.parametrize("kind", KINDS)
@given(
    data=st.data(),
    kv_heads=st.integers(1, 2),
    group=st.sampled_from([1, 3, 5]),
    head_dim=st.sampled_from([16, 20, 128] if is_all() else [16, 20]),
    per_head=st.booleans(),
    unit=st.sampled_from([0, 8, 16, 64]),
    room=st.booleans(),
    span=st.sampled_from([64, 4096]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@examples(2, 40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_attention(
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    data: st.DataObject,
    kv_heads: int,
    group: int,
    head_dim: int,
    per_head: bool,
    unit: int,
    room: bool,
    span: int,
    dtype: torch.dtype,
) -> None:
    """Lists name sealed and exact pages in any order. unit: slots that share a vote; 0: none votes. room: whether votes
    are counted in the same pass."""
    always_share(monkeypatch)
    monkeypatch.setattr("kernels.gpu.attention.VOTE_BYTES", VOTE_BYTES if room else 0)
    queries = data.draw(st.sampled_from([(1,), (1, 4), (3, 1, 20)]))
    heads, rows, shared = kv_heads if per_head else 0, 5 if is_all() else 3, 9 if is_all() else 2
    drawn = data.draw(
        shared_batches(
            page_size=SEALED_GROUP, pages=PAGES, queries=queries, heads=heads, max_rows=rows, max_shared=shared
        )
    )
    torch.manual_seed(0)
    k, v = torch.randn(2, PAGES, kv_heads, SEALED_GROUP, head_dim) + torch.randn(2, 1, kv_heads, 1, head_dim)
    layer = layer_of(kind, k.to(dtype), v.to(dtype), SEALED)
    q = torch.randn(sum(drawn.query_lengths), kv_heads * (group + 2), head_dim).to(dtype)[:, : kv_heads * group]
    rows, longest, ballots = len(drawn.query_lengths), drawn.pages.shape[-1] * SEALED_GROUP, []
    results = []
    for backend in (GpuAttention(span), ReferenceAttention(SEALED_GROUP)):
        ballot = None
        if unit:
            ballot = Ballot(torch.tensor([[0, -1]] * rows), unit, torch.zeros(rows, kv_heads, longest // unit))
            ballots.append(ballot)
        backend.plan(AttentionBatch(drawn.query_lengths, drawn.kv_lengths, drawn.pages, ballot=ballot))
        results.append(backend.run(layer, q, head_dim**-0.5))
    check_against_reference(results[0], drawn, layer, q, head_dim**-0.5)
    for row, length in enumerate(drawn.kv_lengths if unit else ()):
        counted, expected = (each.votes[row, :, : -(-length // unit)] for each in ballots)
        torch.testing.assert_close(counted, expected, rtol=2e-3 if dtype == torch.float32 else 2e-2, atol=1e-4)
    ours = GpuAttention(span)  # shared pages are read once
    ours.plan(drawn)
    check_against_reference(ours.run(layer, q, head_dim**-0.5), drawn, layer, q, head_dim**-0.5)


@pytest.mark.parametrize(("kind", "window"), each_value(KINDS, [50, 130, 1]))
def test_attention_to_a_window(kind: str, window: int) -> None:
    """A page of NaN is listed in place of those that no query sees."""
    torch.manual_seed(0)
    k, v = torch.randn(2, PAGES, 2, SEALED_GROUP, 16)
    k[-1] = v[-1] = float("nan")
    layer, q = layer_of(kind, k, v, SEALED), torch.randn(8, 6, 16)
    queries, lengths = [1, 2, 5], [3 * SEALED_GROUP + 9, 64, 250]
    pages = torch.tensor([[0, 8, 2, 3], [10, 0, 0, 0], [9, 1, 4, 11]])
    oracle, ours = ReferenceAttention(SEALED_GROUP), GpuAttention(64)
    oracle.plan(AttentionBatch(queries, lengths, pages, window=window))
    expected, expected_lse = oracle.run(layer, q, 0.25)
    for row, (n, length) in enumerate(zip(queries, lengths, strict=True)):
        pages[row, : max(0, length - n + 1 - window) // SEALED_GROUP] = PAGES - 1
    ours.plan(AttentionBatch(queries, lengths, pages, window=window))
    o, lse = ours.run(layer, q, 0.25)
    torch.testing.assert_close(o, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["int8", "int4x2", "upper"])
def test_values_beyond_a_row_are_not_read(kind: str) -> None:
    """A page may hold what is no number beyond the row's end."""
    torch.manual_seed(0)
    k, v = torch.randn(2, 4, 1, SEALED_GROUP, 16)
    batch, q = AttentionBatch([2], [100], torch.tensor([[0, 1]])), torch.randn(2, 3, 16)
    results = []
    for spoiled in (False, True):
        if spoiled:
            v[1, :, 36:] = float("nan")
        ours = GpuAttention()
        ours.plan(batch)
        results.append(ours.run(layer_of(kind, k, v, 2), q, 0.25)[0])
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_are_written_in_fp8(dtype: torch.dtype) -> None:
    """Values, which are not rotated, get the codes of the reference, whether rounded, cut off, or NaN."""
    torch.manual_seed(0)
    ours, theirs = (layer_of("fp8", *torch.zeros(2, 3, 2, 4, 16)) for _ in range(2))
    qkv = (torch.randn(5, 8, 16) * 10.0 ** torch.randint(-4, 4, (5, 8, 16))).to(dtype)
    qkv[0, 6, :4] = torch.tensor([float("nan"), float("inf"), -1e30, 449.0])
    tables, index = torch.tensor([[1.0] * 8, [0.0] * 8]).unsqueeze(1), torch.zeros(5, dtype=torch.int64)
    slots = torch.tensor([0, 3, 4, 7, 11])
    write_kv(theirs, slots, qkv[:, 4:6], qkv[:, 6:])
    pointwise.rotary(qkv, tables[0], tables[1], index, slots, ours)
    for mine, expected in ((ours.k, theirs.k), (ours.v, theirs.v)):
        torch.testing.assert_close(mine.float(), expected.float(), rtol=0, atol=0, equal_nan=True)
    assert theirs.v.float().isnan().sum() == 1


def test_every_number_of_fp8_is_read() -> None:
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def convert(codes: tl.tensor, out: tl.tensor) -> None:
        i = tl.arange(0, 256)
        tl.store(out + i, tile.fp8_values(tl.load(codes + i)))

    codes, out = torch.arange(256, dtype=torch.uint8), torch.zeros(256)
    convert[(1,)](codes, out)
    torch.testing.assert_close(out, codes.view(FP8).float(), rtol=0, atol=0, equal_nan=True)


def test_fp8_in_flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long rows are not left to FA3, which has one type for queries and KV."""
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer)
    torch.manual_seed(0)
    layer, q = layer_of("fp8", *torch.randn(2, 20, 2, 16, 64)), torch.randn(201, 4, 64).bfloat16()
    batch = AttentionBatch([1, 200], [50, 230], torch.randint(20, (2, 15)))
    ours = FlashInferAttention(16, Workspace(torch.device("cpu"), (9, 0), multiprocessors=132))
    ours.plan(batch)
    check_against_reference(ours.run(layer, q, 0.1), batch, layer, q, 0.1)
    assert set(ours._wrappers) == {"short", "long"}
