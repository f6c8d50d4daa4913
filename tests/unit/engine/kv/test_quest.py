"""Pages chosen by bounds of their keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from torch import Tensor

from engine.kv.quest import QuestPolicy
from engine.messages import AddRequest
from engine.params import SamplingParams
from engine.speculation.drafters import SelfDrafter
from kernels.attention.base import AttentionBatch
from kernels.key_summaries import KeySummaries
from kernels.kv.kv_pool import KVPool, LayerKV
from kernels.reference_ops import REFERENCE
from tests.support.engines import complete, tiny_engine, tiny_model
from tests.support.profiles import examples, only_in_all
from tests.support.workloads import prompt_of


@given(pages=st.integers(1, 5), page_size=st.integers(1, 6), group=st.integers(1, 3), seed=st.integers(0, 50))
@examples(20, 80)
def test_scores_bound_the_products_with_all_keys(pages: int, page_size: int, group: int, seed: int) -> None:
    torch.manual_seed(seed)
    kv_heads, head_dim = 2, 8
    sizes: dict[str, Any] = {"num_layers": 2, "num_pages": 7, "page_size": page_size}
    sizes |= {"kv_heads": kv_heads, "head_dim": head_dim}
    pool = KVPool(**sizes, dtype=torch.float32, device=torch.device("cpu"))
    pool._data.normal_()
    summaries, layer = KeySummaries(pool, REFERENCE), pool.layer(1)
    listed = torch.randperm(7)[:pages]
    summaries.update(layer, listed)
    q = torch.randn(1, kv_heads * group, head_dim)
    scores = summaries.scores(layer, q, listed[None], 0, torch.tensor([pages]))[0]
    keys = layer.k[listed]  # [pages, kv_heads, page_size, head_dim]
    for head in range(kv_heads):
        for page in range(pages):
            mine = q[0].view(kv_heads, group, -1)[head]
            low, high = keys[page, head].amin(0), keys[page, head].amax(0)
            expected = torch.maximum(mine * low, mine * high).sum()
            torch.testing.assert_close(scores[head, page], expected)
            assert scores[head, page] >= (keys[page, head] @ mine.T).amax(0).sum() - 1e-4
    assert not summaries.bounds[0].any()


@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    rows=st.integers(2, 9),
    width=st.integers(2, 40),
    group=st.integers(1, 5),
    seed=st.integers(0, 50),
)
@examples(20, 80, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_neighbours_change_no_bit_of_a_score(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int, width: int, group: int, seed: int
) -> None:
    """Nor does a limit on memory. A target that chooses by scores would otherwise read other pages beside other rows,
    or with drafts."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"num_layers": 1, "num_pages": 60, "page_size": 4, "kv_heads": 2, "head_dim": 64}
    pool = KVPool(**sizes, dtype=dtype, device=torch.device("cpu"))
    pool._data.normal_()
    summaries, layer = KeySummaries(pool, REFERENCE), pool.layer(0)
    summaries.update(layer, torch.arange(60))
    q, pages = torch.randn(rows, 2 * group, 64).to(dtype), torch.randint(60, (rows, width))
    ends = torch.full((rows,), width)
    scores = summaries.scores(layer, q, pages, 0, ends)
    assert scores.dtype == torch.promote_types(dtype, torch.float32)
    for row in range(rows):
        alone = summaries.scores(layer, q[row : row + 1], pages[row : row + 1, 1:], 0, ends[:1])
        assert torch.equal(alone[0], scores[row, :, 1:])
    with monkeypatch.context() as patch:
        patch.setattr("kernels.key_summaries._BLOCK_BYTES", 3 * scores.nbytes // rows * 64)
        assert torch.equal(summaries.scores(layer, q, pages, 0, ends), scores)
    best, calls = summaries.best(layer, q, pages, 0, ends, 2), []

    def scores_watched(layer: LayerKV, q: Tensor, pages: Tensor, first: int, ends: Tensor) -> Tensor:
        calls.append(len(q))
        return KeySummaries.scores(summaries, layer, q, pages, first, ends)

    with monkeypatch.context() as patch:
        patch.setattr("kernels.key_summaries._BLOCK_BYTES", 2 * scores[0].numel() * 4)
        patch.setattr(summaries, "scores", scores_watched)
        assert torch.equal(summaries.best(layer, q, pages, 0, ends, 2), best)
    assert max(calls) == 2


@pytest.mark.parametrize(
    ("drafter", "temperature", "batch_tokens"),
    [
        *(("self", 0.0, 40), ("model", 1.0, 40)),
        *(only_in_all(*each) for each in (("self", 1.0, 40), ("self", 0.0, 300), ("self", 1.0, 300))),
    ],
)
def test_summaries_are_those_of_committed_keys(
    draft_dir: Path, drafter: str, temperature: float, batch_tokens: int
) -> None:
    """However prompts are chunked and drafts rejected, full pages have the bounds of the keys that the target wrote; a
    draft model's pages, of those that it wrote itself, partly as drafts."""
    speculation: dict[str, Any] = {"kv": {"policy": "quest", "budget": 16, "sink": 4, "interval": 2}}
    if drafter == "model":
        speculation |= {"drafter": "model", "model": str(draft_dir)}
    engine = tiny_engine(
        tiny_model(), gamma=4, page_size=4, scheduler={"max_batch_tokens": batch_tokens}, speculation=speculation
    )
    params = SamplingParams(max_tokens=60, temperature=temperature, seed=1, ignore_eos=True)
    engine.add(AddRequest("row", prompt_of(130, 3), params))
    emitted = 0
    while emitted < 50:
        emitted += sum(len(output.tokens) for output in engine.step())
    policy = engine._worker._drafter._drafter._policy  # type: ignore[attr-defined]
    assert isinstance(policy, QuestPolicy)
    (request,) = engine._scheduler.running
    full = policy._state.page_table[request.row, : (request.num_computed - request.draft_lag) // 4]
    assert len(full) > 40
    for index in range(policy.full._data.shape[0]):
        keys = policy.full.layer(index).k[full]
        assert torch.equal(policy.attention._summaries.bounds[index, 0, full], keys.amin(2))
        assert torch.equal(policy.attention._summaries.bounds[index, 1, full], keys.amax(2))
    stats = engine.stats()
    assert stats.rejections > 3  # or the drafts show little
    assert stats.accepted_tokens > 3


class Spy:
    """Attention that records the lists of each run."""

    def __init__(self, policy: QuestPolicy) -> None:
        self.inner = policy.attention._inner
        self.lists: list[list[Tensor]] = []
        self.lengths: list[int] = []

    def plan(self, batch: AttentionBatch) -> None:
        self.batch = batch
        self.lists.append([])
        self.inner.plan(batch)

    def run(self, layer: LayerKV, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        self.lists[-1].append(self.batch.pages_of(layer).clone())
        self.q = q
        return self.inner.run(layer, q, scale)


def test_pages_are_chosen_in_the_first_step_and_again_after_the_interval() -> None:
    kv = {"policy": "quest", "budget": 12, "sink": 4, "interval": 2}
    engine = tiny_engine(tiny_model(), gamma=5, page_size=4, speculation={"kv": kv})
    drafter = engine._worker._drafter._drafter
    assert isinstance(drafter, SelfDrafter)
    policy = drafter._policy
    assert isinstance(policy, QuestPolicy)
    spy = policy.attention._inner = Spy(policy)
    scores, scored = policy.attention._summaries.scores, []

    def scores_watched(layer: LayerKV, q: Tensor, pages: Tensor, first: int, ends: Tensor) -> Tensor:
        scored.append(pages.shape[1])
        return scores(layer, q, pages, first, ends)

    policy.attention._summaries.scores = scores_watched  # type: ignore[method-assign]
    engine.add(AddRequest("row", prompt_of(101, 3), SamplingParams(max_tokens=40, temperature=1.0, ignore_eos=True)))
    while not spy.lists:
        engine.step()
    assert len(spy.lists) == 5
    table, full = policy._state.page_table[0].tolist(), 101 // 4
    assert scored == [full] * (3 * len(spy.lists[0]))  # of the pages there are, not of those there may be
    for steps in zip(*spy.lists, strict=True):  # of each layer
        chosen = []
        for step, lists in enumerate(steps):
            for head in lists[0].tolist():
                assert head[0] == table[0]
                read = 101 + 1 + step - (full - 1 - 3) * 4
                assert head[4 : -(-read // 4)] == table[full : -(-(101 + 1 + step) // 4)]
            chosen.append([sorted(head[1:4]) for head in lists[0].tolist()])
        assert chosen[0] == chosen[1]
        assert chosen[2] == chosen[3]


def test_a_budget_over_the_context_accepts_everything() -> None:
    kv = {"policy": "quest", "budget": 256, "sink": 4}
    engine = tiny_engine(tiny_model(), gamma=4, page_size=8, speculation={"kv": kv})
    complete(engine, prompt_of(100, 2), SamplingParams(max_tokens=100, temperature=1.0, seed=5, ignore_eos=True))
    assert engine.stats().rejections == 0
