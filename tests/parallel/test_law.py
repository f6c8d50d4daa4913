"""Output does not depend on the number of ranks, with speculation or without."""

from __future__ import annotations

import msgspec
import pytest
import torch

from engine.messages import AddRequest
from engine.params import SamplingParams
from engine.plan import RoundPlan
from parallel.group import RankFailure
from parallel.matrix_layer import AS_STORED, WeightChoice
from tests.support.engines import run, tokens
from tests.support.profiles import only_in_all
from tests.support.rank_law import alone, model, ops_of, requests
from tests.support.ranks import threaded_engine

SHAPES = [(8, 8), (9, 3), (8, 2), (8, 1)]
"""Numbers of query heads and KV heads: 1, 3, 4 and 8 query heads per KV head."""


def check(
    shape: tuple[int, int],
    size: int,
    gamma: int,
    dtype: torch.dtype,
    on_kernels: bool = False,
    weights: WeightChoice = AS_STORED,
) -> None:
    expected = alone(shape, dtype, on_kernels, weights)
    ops = ops_of(on_kernels)
    engine, _ = threaded_engine(model(*shape), size, gamma=gamma, dtype=dtype, digest_every=3, ops=ops, weights=weights)
    try:
        outputs = run(engine, requests())
        stats = engine.stats()
    finally:
        engine.close()
    for request in requests():
        assert tokens(outputs[request.id]) == tokens(expected[request.id]), request.params
        said = [at for output in outputs[request.id] for at in output.logprobs or ()]
        meant = [at for output in expected[request.id] for at in output.logprobs or ()]
        assert [at.top_ids for at in said] == [at.top_ids for at in meant]
        values = [torch.tensor([[at.logprob, *at.top_logprobs] for at in side]) for side in (said, meant)]
        torch.testing.assert_close(*values)
    if gamma:
        assert stats.rejections > 0, "the draft was never wrong: nothing was shown"
        assert stats.accepted_tokens > 0


# What ranks hold of any shape is tested in test_weights_of_ranks, and without speculation ranks split in the same ways
# and run the same forwards. So each shape occurs once in `make test`, and 8 ranks on compiled kernels alone.
@pytest.mark.parametrize(
    ("shape", "size", "gamma"),
    [
        *(
            (shape, size, 3) if size == always else only_in_all(shape, size, 3)
            for shape, always in zip(SHAPES, (2, 2, 3, 4), strict=True)
            for size in (2, 3, 4, 8)
        ),
        ((8, 2), 3, 0),
        *(only_in_all(shape, size, 0) for shape in SHAPES for size in (2, 3, 4, 8) if (shape, size) != ((8, 2), 3)),
    ],
    ids=str,
)
def test_ranks_never_change_output(shape: tuple[int, int], size: int, gamma: int) -> None:
    check(shape, size, gamma, torch.float64)


@pytest.mark.parametrize(("size", "gamma"), [(2, 3), (3, 0), only_in_all(8, 2)])
def test_nor_in_float32(size: int, gamma: int) -> None:
    check((9, 3), size, gamma, torch.float32)


@pytest.mark.parametrize(
    ("size", "gamma", "drafts"),
    [(2, 3, "int8"), (3, 0, None), (3, 4, "int4"), (8, 2, "fp8"), only_in_all(2, 2, None)],
)
def test_nor_on_compiled_kernels(size: int, gamma: int, drafts: str | None) -> None:
    check((9, 3), size, gamma, torch.float32, on_kernels=True, weights=WeightChoice(drafts=drafts))


@pytest.mark.parametrize(
    ("shape", "size", "weights"),
    [
        ((9, 3), 2, WeightChoice("int4", "fp8")),
        ((8, 2), 3, WeightChoice("fp8", "int4")),
        only_in_all((9, 3), 2, WeightChoice("fp8", "int4")),
        only_in_all((8, 2), 3, WeightChoice("int4", "fp8")),
    ],
    ids=str,
)
def test_nor_with_weights_of_few_bits(shape: tuple[int, int], size: int, weights: WeightChoice) -> None:
    """Whose inputs the reference kernels do not round: ranks multiply by parts of the same numbers."""
    check(shape, size, 3, torch.float64, weights=weights)


@pytest.mark.parametrize(
    ("size", "weights"),
    [
        *((2, "int8"), (3, "int4"), (2, "fp8")),
        *(only_in_all(*each) for each in ((3, "int8"), (2, "int4"), (3, "fp8"))),
    ],
)
def test_speculation_never_changes_the_text_of_few_bits(size: int, weights: str) -> None:
    """On kernels that round inputs, which each rank does for its own features."""
    found = []
    for gamma in (0, 3):
        chosen = WeightChoice(weights, "int8" if weights == "int4" else "int4")
        engine, _ = threaded_engine(
            model(9, 3), size, gamma=gamma, dtype=torch.bfloat16, ops=ops_of(True), weights=chosen
        )
        try:
            found.append({id: tokens(outputs) for id, outputs in run(engine, requests()).items()})
            assert not gamma or engine.stats().rejections > 0
        finally:
            engine.close()
    assert found[0] == found[1]


def test_only_changes_are_broadcast() -> None:
    """A long prompt is sent once; a round of decoding takes a few bytes per row, whatever the context length."""
    engine, ranks = threaded_engine(model(9, 3), 2, gamma=2, check_invariants=False)
    try:
        params = SamplingParams(max_tokens=40, ignore_eos=True)
        run(engine, [AddRequest(str(i), [2 + (i + j) % 59 for j in range(200)], params) for i in range(2)])
    finally:
        engine.close()
    plans = [msgspec.msgpack.decode(frame, type=RoundPlan) for frame in ranks.plans]
    assert sum(len(start.tokens) for plan in plans for start in plan.starts) == 400
    decoding = [len(frame) for frame, plan in zip(ranks.plans, plans, strict=True) if not plan.starts]
    assert len(decoding) > 10
    assert max(decoding) < 100
    pages = [delta for plan in plans for delta in plan.pages]
    assert sum(len(delta.pages) for delta in pages) <= 2 * 60  # each page is sent once


@pytest.mark.parametrize(
    ("kind", "named"), [("tokens", "tokens"), ("page_table", "page tables"), ("computed", "lengths")]
)
def test_a_rank_that_disagrees_is_an_error(kind: str, named: str) -> None:
    engine, ranks = threaded_engine(model(9, 3), 3, gamma=2, digest_every=2)
    try:
        engine.add(AddRequest("x", [5, 6, 7], SamplingParams(max_tokens=50, ignore_eos=True)))
        for _ in range(5):
            engine.step()
        getattr(ranks.workers[2]._state, kind)[9, ...] += 1  # in a row slot that no request uses
        with pytest.raises(RankFailure, match=f"rank 2 and rank 0 disagree about {named} after round 6"):
            engine.step()
        with pytest.raises(RankFailure, match="disagree"):
            engine.step()
    finally:
        engine.close()
