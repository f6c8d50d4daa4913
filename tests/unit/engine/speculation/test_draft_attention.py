"""Sparse draft attention against plain definitions: selected keys, top keys, and keys at relative positions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.kv.snapkv import SnapKVPolicy
from engine.kv.window import WindowView
from engine.messages import AddRequest
from engine.params import SamplingParams
from engine.speculation.drafters import SelfDrafter
from kernels.attention.base import AttentionBatch
from kernels.attention.reference_attention import ReferenceAttention
from kernels.attention.relative import RelativeAttention
from kernels.attention.topk_attention import TopKAttention
from kernels.key_scores import snapkv_scores
from kernels.kv.kv_pool import LayerKV, write_kv
from kernels.rope import apply_rope, rotary_frequencies, rotary_tables
from tests.support.engines import TINY, tiny_engine, tiny_model
from tests.support.profiles import examples
from tests.support.rig import PagedRows
from tests.support.workloads import prompt_of

HEADS, KV_HEADS, DIM, PAGE = 4, 2, 8, 4


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def paged(keys: list[Tensor], values: list[Tensor]) -> tuple[LayerKV, Tensor]:
    """Write rows [length, kv_heads, dim] to a pool, with pages in random order. Returns the layer and the page
    table."""
    widths = [-(-len(k) // PAGE) for k in keys]
    order = torch.randperm(sum(widths), generator=torch.Generator().manual_seed(1))
    layer = LayerKV(*torch.zeros(2, sum(widths), KV_HEADS, PAGE, DIM, dtype=torch.float64))
    table = torch.zeros(len(keys), max(widths), dtype=torch.int64)
    for row, (k, v) in enumerate(zip(keys, values, strict=True)):
        table[row, : widths[row]], order = order[: widths[row]], order[widths[row] :]
        position = torch.arange(len(k))
        write_kv(layer, table[row, position // PAGE] * PAGE + position % PAGE, k, v)
    return layer, table


def weigh(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Compute the softmax of scores [heads, length], with sinks [heads] among them."""
    return torch.softmax(scores if sinks is None else torch.cat([scores, sinks[:, None]], 1), -1)[:, : scores.shape[1]]


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, sinks: Tensor | None) -> Tensor:
    """Attend from one query [heads, dim] to k, v [length, kv_heads, dim]."""
    group = HEADS // KV_HEADS
    weights = weigh(torch.einsum("hd,lhd->hl", q, k.repeat_interleave(group, 1)) * scale, sinks)
    return torch.einsum("hl,lhd->hd", weights, v.repeat_interleave(group, 1))


@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=4),
    queries=st.integers(1, 3),
    pages=st.integers(2, 6),
    has_sinks=st.booleans(),
)
@examples(20, 80)
def test_relative_positions_are_positions_in_the_cache(
    lengths: list[int], queries: int, pages: int, has_sinks: bool
) -> None:
    lengths = [max(length, queries) for length in lengths]
    rotary = rotary_tables(rotary_frequencies(DIM, 10000.0), 100, dtype=torch.float64, device=torch.device("cpu"))
    raw = [random(length, KV_HEADS, DIM, seed=i) for i, length in enumerate(lengths)]
    values = [random(length, KV_HEADS, DIM, seed=50 + i) for i, length in enumerate(lengths)]
    asked = [random(queries, HEADS, DIM, seed=90 + i) for i in range(len(lengths))]

    def at(x: Tensor, positions: Tensor) -> Tensor:
        return apply_rope(x, rotary[0][positions], rotary[1][positions])

    layer, table = paged([at(k, torch.arange(len(k))) for k in raw], values)
    sinks = random(HEADS, seed=6) if has_sinks else None
    layer = replace(layer, sinks=sinks)
    window = WindowView(table, budget=pages * PAGE, sink=PAGE, page_size=PAGE)
    contexts = np.array(lengths) - queries + 1
    skipped = window.skipped(np.arange(len(lengths)), contexts).tolist()
    read = [length - out for length, out in zip(lengths, skipped, strict=True)]
    listed = window.pages(torch.arange(len(lengths)), torch.from_numpy(contexts), -(-max(read) // PAGE))
    backend = RelativeAttention(
        ReferenceAttention(PAGE), ReferenceAttention(PAGE), page_size=PAGE, sink_pages=1, rotary=rotary
    )
    backend.plan(AttentionBatch([queries] * len(lengths), read, listed, skipped=skipped))
    q = torch.cat([at(x, torch.arange(length - queries, length)) for x, length in zip(asked, lengths, strict=True)])
    out = backend.run(layer, q, DIM**-0.5)[0].split(queries)  # type: ignore[no-untyped-call]
    for row, length in enumerate(lengths):
        for i in range(queries):
            seen = length - queries + i + 1
            kept = [p for p in range(seen) if p < PAGE or p >= PAGE + skipped[row]] if skipped[row] else range(seen)
            index = torch.tensor(list(kept))
            keys = at(raw[row][index], torch.arange(len(index)))
            query = at(asked[row][i : i + 1], torch.tensor([len(index) - 1]))[0]
            expected = attend(query, keys, values[row][index], DIM**-0.5, sinks)
            torch.testing.assert_close(out[row][i], expected, rtol=0, atol=2e-5)  # angles are float32


@given(
    rows=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 3)), min_size=1, max_size=4),
    budget=st.integers(1, 50),
    window=st.sampled_from([0, 1, 5, 20]),
    has_sinks=st.booleans(),
)
@examples(30, 100)
def test_top_k_keeps_the_keys_with_most_attention(
    rows: list[tuple[int, int]], budget: int, window: int, has_sinks: bool
) -> None:
    """Among those that a query sees: slots before the window of all queries hold NaN here."""
    lengths = [max(rows[i]) for i in range(len(rows))]
    queries = [min(rows[i]) for i in range(len(rows))]
    keys = [random(length, KV_HEADS, DIM, seed=i) for i, length in enumerate(lengths)]
    values = [random(length, KV_HEADS, DIM, seed=50 + i) for i, length in enumerate(lengths)]
    q = random(sum(queries), HEADS, DIM, seed=7)
    for key, value, n, length in zip(keys, values, queries, lengths, strict=True):
        gone = max(0, length - n + 1 - window) if window else 0
        key[:gone] = value[:gone] = float("nan")
    layer, table = paged(keys, values)
    sinks = 3 * random(HEADS, seed=6) if has_sinks else None
    layer = replace(layer, sinks=sinks)
    batch = AttentionBatch(queries, lengths, table, window=window)
    backend, dense = TopKAttention(PAGE, budget), ReferenceAttention(PAGE)
    backend.plan(batch)
    dense.plan(batch)
    out, total = backend.run(layer, q, 0.7)
    if budget >= max(lengths):
        expected, expected_total = dense.run(layer, q, 0.7)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(total, expected_total)
    group, first = HEADS // KV_HEADS, 0
    for row, n in enumerate(queries):
        for i in range(n):
            seen = lengths[row] - n + i + 1
            for head in range(KV_HEADS):
                mine = q[first + i, head * group : (head + 1) * group]
                first_seen = max(0, seen - window) if window else 0
                scores = mine @ keys[row][first_seen:seen, head].T * 0.7
                of_head = slice(head * group, (head + 1) * group)
                mine_sinks = None if sinks is None else sinks[of_head]
                best = weigh(scores, mine_sinks).sum(0).topk(min(budget, seen - first_seen)).indices
                expected = weigh(scores[:, best], mine_sinks) @ values[row][first_seen + best, head]
                torch.testing.assert_close(out[first + i, of_head], expected)
                expected_total = scores[:, best].logsumexp(-1)
                if mine_sinks is not None:
                    expected_total = torch.logaddexp(expected_total, mine_sinks)
                torch.testing.assert_close(total[first + i, of_head], expected_total)
        first += n


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize(("length", "queries", "candidates", "kernel"), [(20, 6, 14, 5), (9, 4, 7, 3), (5, 5, 5, 1)])
def test_snapkv_scores_are_attention_of_the_last_queries(
    length: int, queries: int, candidates: int, kernel: int, has_sinks: bool
) -> None:
    q, k = random(queries, HEADS, DIM), random(KV_HEADS, length, DIM, seed=1)
    sinks = 3 * random(HEADS, seed=2) if has_sinks else None
    votes = snapkv_scores(q, k, 0.5, candidates=candidates, kernel=kernel, sinks=sinks)
    summed = torch.zeros(HEADS, candidates, dtype=torch.float64)
    for i in range(queries):
        seen = length - queries + i + 1
        for head in range(HEADS):
            scores = k[head // (HEADS // KV_HEADS), :seen] @ q[i, head] * 0.5
            weights = weigh(scores[None], None if sinks is None else sinks[head : head + 1])[0]
            summed[head, : min(seen, candidates)] += weights[:candidates]
    for head in range(KV_HEADS):
        for key in range(candidates):
            near = [p for p in range(key - kernel // 2, key + kernel // 2 + 1) if 0 <= p < candidates]
            mean = summed[head * 2 : head * 2 + 2, near].sum() / kernel
            assert votes[head, key].item() == pytest.approx(mean.item())


class Spy(ReferenceAttention):
    """Attention that records every query, layer by layer."""

    def __init__(self, page_size: int) -> None:
        super().__init__(page_size)
        self.queries: list[Tensor] = []
        self.sinks: list[Tensor | None] = []

    def run(self, layer: LayerKV, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        self.queries.append(q.clone())
        self.sinks.append(layer.sinks)
        return super().run(layer, q, scale)


@pytest.mark.parametrize("batch_tokens", [13, 64, 200])
@pytest.mark.parametrize("prompt", [70, 131])
def test_snapkv_copies_what_the_last_queries_attend_to(prompt: int, batch_tokens: int) -> None:
    """However the prompt is chunked, the cache holds the selected tokens first, then the recent ones in their ring."""
    config = replace(TINY, has_sinks=True, attention_scale=0.7)
    model, page, recent, queries, kernel = tiny_model(config=config), 4, 8, 6, 3
    for slot in model.weight_slots():
        if slot.source.endswith("sinks"):  # heads of a group vote with very different weights
            slot.tensor.copy_(torch.tensor([8.0, -8.0]).repeat(TINY.num_heads // 2))
    budget = 32
    kv = {"policy": "snapkv", "budget": budget, "recent": recent, "queries": queries, "kernel": kernel}
    engine = tiny_engine(
        model, gamma=2, page_size=page, scheduler={"max_batch_tokens": batch_tokens}, speculation={"kv": kv}
    )
    text = prompt_of(prompt, 5)
    other = prompt_of(30, 6)
    engine.add(AddRequest("other", other, SamplingParams(max_tokens=60, ignore_eos=True)))
    engine.add(AddRequest("row", text, SamplingParams(max_tokens=40, ignore_eos=True)))
    emitted: list[int] = []
    while len(emitted) < 2:  # the first round that drafts fills the cache
        emitted += [token for output in engine.step() if output.id == "row" for token in output.tokens]

    drafter = engine._worker._drafter._drafter
    assert isinstance(drafter, SelfDrafter)
    cache = drafter._policy
    assert isinstance(cache, SnapKVPolicy)

    oracle = PagedRows(model, [prompt], page)
    spy = oracle.attention = Spy(page)
    oracle.forward({0: text}, {})
    request = next(request for request in engine._scheduler.running if request.id == "row")
    assert request.row is not None
    first_recent = (-(-(prompt + 1) // page) - recent // page) * page
    count = budget - recent
    for index in range(TINY.num_layers):
        layer = oracle.pool.layer(index)
        keys = torch.stack(
            [part[oracle.pages[0]].transpose(0, 1).flatten(1, 2)[:, :prompt] for part in (layer.k, layer.v)]
        )
        votes = snapkv_scores(
            spy.queries[index][-queries:],
            keys[0],
            0.7,
            candidates=first_recent,
            kernel=kernel,
            sinks=spy.sinks[index],
        )
        best = votes.topk(count).indices.sort(-1).values
        stored = cache.pool.layer(index)
        pages = cache.view(0).page_table[request.row]
        for head in range(TINY.num_kv_heads):
            for part, whole in zip((stored.k, stored.v), keys, strict=True):
                copied = part[pages[: count // page], head].flatten(0, 1)
                torch.testing.assert_close(copied, whole[head, best[head]])
        for position in np.arange(first_recent, prompt).tolist():
            copied = stored.k[pages[position // page], :, position % page]
            torch.testing.assert_close(copied, keys[0, :, position])
