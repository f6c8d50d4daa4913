"""Formats of sealed pages: error bounds, layout of records, and pools that hold them beside exact pages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.kv.grouped_codes import GroupedCodes
from kernels.kv.kv_bits import KV_BITS, SEALED_GROUP
from kernels.kv.kv_formats import KV_FORMATS
from kernels.kv.kv_pool import KVPool, LayerKV, write_kv
from kernels.kv.sealing_pool import SealingPool
from tests.support.kv_layers import SEALING
from tests.support.profiles import examples
from tests.support.rig import CPU

LARGEST = 65504.0
DRAFTING = {"int4x2"}
"""Formats of which drafts read less."""
LEVELS = {"int8": 255, "int4x2": 15}
GROUPS: dict[str, Callable[[int], Tensor]] = {
    "normal": lambda n: torch.randn(n),
    "outlier": lambda n: torch.randn(n).index_fill(0, torch.randint(n, (1,)), 300.0),
    "constant": lambda n: torch.randn(()).expand(n) * 1000,
    "zero": torch.zeros,
    "huge": lambda n: torch.randn(n) * 30000,
    "beyond": lambda n: torch.randn(n) * 1e6,
    "tiny": lambda n: torch.randn(n) * 1e-7,
    "far": lambda n: 5000 + torch.randn(n) / 100,
}
"""Numbers that share a scale. far: a narrow range far from zero, where float16 has steps of 4."""


@dataclass(frozen=True)
class Sealed:
    """Numbers and what a record says of them, with the groups in rows: [heads, groups, n]."""

    x: Tensor
    target: Tensor
    drafts: Tensor
    scales: Tensor
    mins: Tensor
    codes: Tensor


@st.composite
def groups(draw: st.DrawFn, kinds: tuple[str, ...] = tuple(GROUPS)) -> tuple[bool, int, list[str], int]:
    """Whether they are keys, the head_dim, the kinds of groups, and a seed."""
    is_key, head_dim = draw(st.booleans()), draw(st.sampled_from([8, 64, 80]))
    listed = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=8))
    return is_key, head_dim, listed, draw(st.integers(0, 2**32))


def seal(format: GroupedCodes, made: tuple[bool, int, list[str], int], *, spoilt: bool = False) -> Sealed:
    """Seal two heads. spoilt: put a NaN into the first group of each."""
    is_key, head_dim, kinds, seed = made
    torch.manual_seed(seed)
    count, length = (head_dim, SEALED_GROUP) if is_key else (SEALED_GROUP, head_dim)
    x = torch.stack([GROUPS[kinds[i % len(kinds)]](length) for i in range(2 * count)]).view(2, count, length)
    if spoilt:
        x[:, 0, int(torch.randint(length, ()))] = torch.nan
    page = x.mT.contiguous() if is_key else x
    records = format.seal_keys(page) if is_key else format.seal_values(page)
    read = format.read_keys if is_key else format.read_values
    found = [read(records, head_dim, torch.float32, drafts=drafts) for drafts in (False, True)]
    codes, parameters = records.tensor_split([records.shape[1] - 4 * count], 1)
    scales, mins = parameters.contiguous().view(torch.float16).float().chunk(2, 1)
    target, drafted = ((each.mT if is_key else each) for each in found)
    return Sealed(x, target, drafted, scales[..., None], mins[..., None], codes)


def slack(sealed: Sealed) -> Tensor:
    """Rounding of float32: of differences, of quotients, and of the result."""
    return 1e-4 * sealed.scales + 4e-7 * (sealed.x.clamp(-LARGEST, LARGEST).abs() + sealed.mins.abs())


def steps(sealed: Sealed, read: Tensor) -> Tensor:
    """Errors in steps, beyond the rounding of float32. Numbers beyond float16's range count as cut off there."""
    return ((read - sealed.x.clamp(-LARGEST, LARGEST)).abs() - slack(sealed)) / sealed.scales


@given(made=groups())
@examples(60, 1000)
def test_int8_is_within_half_a_step(made: tuple[bool, int, list[str], int]) -> None:
    sealed = seal(SEALING["int8"], made)
    assert steps(sealed, sealed.target).max() <= 0.5
    assert sealed.drafts.equal(sealed.target)


@given(made=groups())
@examples(60, 1000)
def test_int4x2_is_within_half_a_step_of_either_code(made: tuple[bool, int, list[str], int]) -> None:
    """A lower code that had to become 7 is within a whole step."""
    sealed = seal(SEALING["int4x2"], made)
    assert steps(sealed, sealed.drafts).max() <= 0.5
    largest = (sealed.target - sealed.drafts - sealed.scales * 7 / 16).abs() <= slack(sealed)
    lower = 16 * steps(sealed, sealed.target)
    assert torch.where(largest, 0, lower).max() <= 0.5
    assert lower.max() <= 1.01


@pytest.mark.parametrize("name", SEALING)
@given(made=groups())
@examples(30, 500)
def test_steps_are_no_larger_than_a_group_needs(name: str, made: tuple[bool, int, list[str], int]) -> None:
    """But for what float16 adds to minimum and scale, they are the range over the number of steps."""
    sealed = seal(SEALING[name], made)
    low, high = (each[..., None] for each in sealed.x.clamp(-LARGEST, LARGEST).aminmax(dim=-1))
    most = (high - low + low.abs() / 256 + 1e-6) / LEVELS[name]
    assert (sealed.scales <= most * (1 + 1 / 256) + 1e-6).all()


@pytest.mark.parametrize("name", SEALING)
@given(made=groups())
@examples(20, 300)
def test_no_number_stays_none(name: str, made: tuple[bool, int, list[str], int]) -> None:
    """And spoils its own group only, as attention would spoil the whole row."""
    sealed = seal(SEALING[name], made, spoilt=True)
    for read in (sealed.target, sealed.drafts):
        assert not read[:, 0].isfinite().any()
        assert read[:, 1:].isfinite().all()


@pytest.mark.parametrize("head_dim", [8, 64, 80, 128])
@pytest.mark.parametrize("name", SEALING)
def test_records_have_the_bytes_that_the_forecast_counts(name: str, head_dim: int) -> None:
    format, page = SEALING[name], torch.randn(3, 2, SEALED_GROUP, head_dim)
    records = format.seal_keys(page), format.seal_values(page)
    assert [each.dtype for each in records] == [torch.uint8] * 2
    assert [each.shape for each in records] == [(3, 2, size) for size in KV_BITS[name].record_bytes(head_dim)]
    whole = sum(KV_BITS[name].record_bytes(head_dim)) / SEALED_GROUP
    assert whole <= KV_BITS[name].token_bytes(head_dim, 4) < whole + 1
    assert KV_BITS[name].token_bytes(head_dim, 4) < KV_BITS["dense"].token_bytes(head_dim, 2) or head_dim == 8


def test_names_of_formats() -> None:
    assert list(KV_FORMATS) == list(KV_BITS) == ["dense", "fp8", "int8", "int4x2"]
    assert all(each.bits is KV_BITS[name] for name, each in KV_FORMATS.items())
    assert [*SEALING] == [name for name, bits in KV_BITS.items() if bits.seals] == ["int8", "int4x2"]
    assert KV_BITS["dense"].token_bytes(64, 2) == 256
    assert KV_BITS["int4x2"].token_bytes(64, 2, drafts=True) == 72  # 2 * 64 codes of half a byte, and 4 + 4 bytes


def test_drafts_end_with_the_page_that_will_be_sealed() -> None:
    for pending in range(2 * SEALED_GROUP):
        fitting = max(n for n in range(4) if (pending + n) // SEALED_GROUP == pending // SEALED_GROUP)
        assert all(bits.max_drafts(pending + 1, 3) == (fitting if bits.seals else 3) for bits in KV_BITS.values())


@pytest.mark.parametrize("is_key", [True, False])
def test_drafts_read_the_targets_upper_codes(is_key: bool) -> None:
    """The first half of the codes and the parameters, as many bytes as the forecast counts, and no other byte."""
    format, head_dim = SEALING["int4x2"], 64
    made = (is_key, head_dim, list(GROUPS), 0)
    sealed = seal(format, made)
    half = SEALED_GROUP * head_dim // 2
    upper, lower = sealed.codes.tensor_split([half], 1)
    pairs = upper.view(2, SEALED_GROUP // 2, head_dim)
    codes = torch.stack([pairs & 15, pairs >> 4], 2).view(2, SEALED_GROUP, head_dim)
    by_group = codes.mT if is_key else codes
    assert torch.allclose(sealed.drafts, sealed.scales * by_group + sealed.mins, rtol=1e-6)
    record = torch.cat(
        [upper, lower, *(each[..., 0].half().view(torch.uint8) for each in (sealed.scales, sealed.mins))], 1
    )
    read = format.read_keys if is_key else format.read_values
    others = record.clone()
    others[:, half : 2 * half] ^= 255
    before, after = (read(each, head_dim, torch.float32, drafts=True) for each in (record, others))
    assert before.equal(after)
    assert not read(record, head_dim, torch.float32, drafts=False).equal(
        read(others, head_dim, torch.float32, drafts=False)
    )
    assert record.shape[1] - half == KV_BITS["int4x2"].record_bytes(head_dim, drafts=True)[0 if is_key else 1]


# -- pools -------------------------------------------------------------------------------------------------------------

SEALED, EXACT, HEADS, DIM = 5, 3, 2, 16


def pool_of(name: str, dtype: torch.dtype = torch.float32, layers: int = 2) -> SealingPool:
    """Make a pool whose sealed pages all hold other numbers, and its exact ones too."""
    pool = SealingPool(
        SEALING[name],
        num_layers=layers,
        num_pages=SEALED,
        exact_pages=EXACT,
        page_size=SEALED_GROUP,
        kv_heads=HEADS,
        head_dim=DIM,
        dtype=dtype,
        device=CPU,
        scratch=True,
    )
    torch.manual_seed(0)
    for index in range(layers):
        for first in range(0, SEALED, EXACT):
            pool._data.normal_()
            pages = torch.arange(first, min(first + EXACT, SEALED))
            pool.layer(index).seal(pages - first, pages)
    pool._data.normal_()
    return pool


def page_of(layer: LayerKV, page: int, head: int) -> tuple[Tensor, Tensor]:
    """Read one page of one head, slowly: [page_size, head_dim] each."""
    if page >= SEALED:
        return layer.k[page - SEALED, head], layer.v[page - SEALED, head]
    sealed = layer.sealed
    assert sealed is not None
    dtype, drafts = layer.k.dtype, sealed.drafts
    k = sealed.codes.read_keys(sealed.k[page, head], DIM, dtype, drafts=drafts)
    return k, sealed.codes.read_values(sealed.v[page, head], DIM, dtype, drafts=drafts)


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", SEALING)
def test_lists_mix_sealed_and_exact_pages(name: str, dtype: torch.dtype, drafts: bool) -> None:
    pool = pool_of(name, dtype)
    layer = (pool.drafting() if drafts else pool).layer(1)
    for lists in (torch.tensor([[[0, 6, 4, 5]], [[7, 7, 1, 0]]]), torch.tensor([[[4, 5], [6, 0]]])):
        length = SEALED_GROUP + 7
        k, v = layer.gather(lists, length)
        assert k.shape == v.shape == (len(lists), HEADS, length, DIM)
        for row, of_heads in enumerate(lists.expand(-1, HEADS, -1).tolist()):
            for head, pages in enumerate(of_heads):
                whole = [
                    torch.cat(parts) for parts in zip(*(page_of(layer, each, head) for each in pages), strict=True)
                ]
                assert k[row, head].equal(whole[0][:length])
                assert v[row, head].equal(whole[1][:length])
        # One KV head, whose pages are those of all heads.
        by_head = lists * HEADS + torch.arange(HEADS)[:, None]
        single = layer.one_head().gather(by_head.flatten(0, 1)[:, None], length)
        for one, all_heads in zip(single, (k, v), strict=True):
            assert one.view_as(all_heads).equal(all_heads)


@pytest.mark.parametrize("name", SEALING)
def test_tokens_are_read_as_attention_reads_them(name: str) -> None:
    pool = pool_of(name)
    pages, offsets = torch.tensor([6, 0, 0, 4, 6, 2]), torch.tensor([3, 63, 0, 17, 4, 63])
    found = pool.read_tokens(pages, offsets)
    assert found.shape == (6, 2, 2, HEADS, DIM)
    for i, (page, offset) in enumerate(zip(pages.tolist(), offsets.tolist(), strict=True)):
        for layer in range(2):
            for head in range(HEADS):
                k, v = page_of(pool.layer(layer), page, head)
                assert found[i, layer, 0, head].equal(k[offset])
                assert found[i, layer, 1, head].equal(v[offset])
    none = torch.zeros(0, dtype=torch.int64)
    assert pool.read_tokens(none, none).shape == (0, 2, 2, HEADS, DIM)


@pytest.mark.parametrize("name", SEALING)
def test_bytes_of_pages(name: str) -> None:
    """They are those of the records of all layers, so that another key or value makes others."""
    pool = pool_of(name)
    every = torch.arange(SEALED)
    found = pool.page_bytes(every)
    assert pool.bytes_per_page == 2 * HEADS * sum(KV_BITS[name].record_bytes(DIM)) == found.shape[1]
    assert len({bytes(each.tolist()) for each in found}) == SEALED
    assert pool.page_bytes(torch.tensor([3, 1])).equal(found[[3, 1]])
    for kind in (0, 1):
        before = pool.page_bytes(every)
        pool._data[1, kind, 0, 1] += torch.randn(SEALED_GROUP, DIM)
        pool.layer(1).seal(torch.tensor([0]), torch.tensor([2]))
        after = pool.page_bytes(every)
        assert (before != after).any(1).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("name", SEALING)
def test_cleared_pages_are_zero(name: str) -> None:
    pool = pool_of(name)
    before, exact = pool.page_bytes(torch.arange(SEALED)), pool._data.clone()
    pool.clear([1, 4])
    after = pool.page_bytes(torch.arange(SEALED))
    assert not after[[1, 4]].any()
    assert after[[0, 2, 3]].equal(before[[0, 2, 3]])
    assert pool._data.equal(exact)
    k, v = pool.layer(0).gather(torch.tensor([[[1, 4]]]), 2 * SEALED_GROUP)
    assert not k.any()
    assert not v.any()


@pytest.mark.parametrize("name", SEALING)
def test_drafts_read_the_same_memory(name: str) -> None:
    pool = pool_of(name)
    drafting = pool.drafting()
    assert (drafting is pool) == (name not in DRAFTING)
    assert drafting.num_pages == drafting.first_exact == SEALED
    assert pool.scratch == SEALED + EXACT
    write_kv(pool.layer(0), torch.tensor([SEALED_GROUP + 5]), torch.ones(1, HEADS, DIM), torch.ones(1, HEADS, DIM))
    pool.layer(0).seal(torch.tensor([1]), torch.tensor([3]))
    mine, theirs = pool.layer(0), drafting.layer(0)
    assert theirs.k[1, :, 5].eq(1).all()
    assert mine.sealed is not None
    assert theirs.sealed is not None
    assert theirs.sealed.k.data_ptr() == mine.sealed.k.data_ptr()
    assert theirs.sealed.drafts == (name in DRAFTING)


def make_pool(name: str, page_size: int = SEALED_GROUP, scratch: bool = True, exact: int | None = None) -> KVPool:
    """exact: None: EXACT where pages are sealed."""
    return KV_FORMATS[name].make_pool(
        EXACT * KV_BITS[name].seals if exact is None else exact,
        num_layers=3,
        num_pages=9,
        page_size=page_size,
        kv_heads=HEADS,
        head_dim=DIM,
        dtype=torch.float32,
        device=CPU,
        scratch=scratch,
    )


@pytest.mark.parametrize("name", KV_FORMATS)
def test_pools_of_all_formats(name: str) -> None:
    pool, bits = make_pool(name), KV_BITS[name]
    assert (pool.seals, pool.layer(0).kind, pool.num_pages) == (bits.seals, name, 9)
    assert (pool.num_layers, pool.kv_heads, pool.head_dim, pool.device) == (3, HEADS, DIM, CPU)
    assert pool.page_ids - 1 == pool.scratch == 9 + EXACT * bits.seals
    assert pool.itemsize == (1 if name != "dense" else 4)
    assert pool.bytes_per_page == 3 * HEADS * SEALED_GROUP * bits.token_bytes(DIM, 4)
    exact = 3 * HEADS * SEALED_GROUP * KV_BITS[bits.written].token_bytes(DIM, 4)
    assert pool.nbytes == 9 * pool.bytes_per_page + (1 + EXACT * bits.seals) * exact
    assert (pool.drafting().layer(0).kind == "upper") == (name in DRAFTING)
    copies = pool.cache(2)
    assert (copies.layer(2).kind, copies.num_pages, copies.scratch) == (bits.written, 2, 2)
    assert copies.bytes_per_page == exact
    assert make_pool(name, scratch=False).cache(2).scratch is None


def test_pools_that_cannot_be() -> None:
    for name, exact, message in (
        ("dense", 1, "a dense pool seals no pages"),
        ("fp8", 1, "an fp8 pool seals no pages"),
        ("int8", 0, "a pool of int8 needs exact pages"),
    ):
        with pytest.raises(ValueError, match=message):
            make_pool(name, exact=exact)
    with pytest.raises(ValueError, match="pages of format int4x2 have 64 tokens, not 16"):
        make_pool("int4x2", page_size=16)


@pytest.mark.parametrize("name", KV_FORMATS)
def test_random_pools(name: str) -> None:
    """No page is empty, and the spread is the one asked for."""
    torch.manual_seed(0)
    pool = make_pool(name)
    pool.fill_random(0.1)
    for index in range(3):
        k, v = pool.layer(index).read(torch.arange(pool.page_ids)[None, None])
        for part in (k, v):
            each = part.float().flatten(3).std(-1)
            assert 0.07 < each.min() < each.max() < 0.13


@pytest.mark.parametrize("name", KV_FORMATS)
def test_written_tokens_are_read_back(name: str) -> None:
    """Those of other places stay."""
    torch.manual_seed(0)
    pool = make_pool(name)
    pages = pool.first_exact + torch.tensor([1, 0, 1])
    offsets, tokens = torch.tensor([3, 63, 4]), torch.randn(3, 3, 2, HEADS, DIM).bfloat16().float().round()
    pool.write_tokens(pages, offsets, tokens.to(pool._data.dtype))
    assert pool.read_tokens(pages, offsets).float().equal(tokens)
    everything = pool._data.float()
    everything[:, :, pages - pool.first_exact, :, offsets] = 0
    assert not everything.any()
    k, v = torch.randn(2, HEADS, 2 * SEALED_GROUP, DIM).round()
    layer = pool.layer(1)
    layer.write_pages(1, k, v)
    for part, written in ((layer.k, k), (layer.v, v)):
        assert part[1:3].transpose(0, 1).flatten(1, 2).float().equal(written)
        assert not part[3:].float().any()


@pytest.mark.parametrize("name", KV_FORMATS)
@pytest.mark.parametrize("drafts", [False, True])
def test_rounded_pages_are_what_is_read(name: str, drafts: bool) -> None:
    torch.manual_seed(0)
    pool, (k, v) = make_pool(name), torch.randn(2, 1, HEADS, SEALED_GROUP, DIM) * 3
    layer, slots = pool.layer(0), torch.arange(SEALED_GROUP)
    write_kv(layer, slots, k[0].transpose(0, 1), v[0].transpose(0, 1))
    if pool.seals:
        layer.seal(torch.tensor([0]), torch.tensor([0]))
    read = (pool.drafting() if drafts else pool).layer(0).read(torch.zeros(1, 1, 1, dtype=torch.int64))
    for rounded, found, exact in zip(KV_FORMATS[name].rounded(k, v, drafts=drafts), read, (k, v), strict=True):
        assert rounded.dtype == torch.float32
        assert rounded.equal(found[:, :, 0].float())
        assert rounded.equal(exact) == (name == "dense")
