"""If any rank runs out of memory, at any point of a round, the requests of that round fail and the ranks stay in
step."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import count, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.batch.round_batch import RoundBatch
from engine.messages import RETRY_MEMORY, AddRequest, RequestOutput
from engine.params import SamplingParams
from engine.plan import RoundPlan
from engine.speculation.verify import Verdict
from engine.worker.worker import Worker
from kernels.kv.kv_bits import SEALED_GROUP
from parallel import shm
from parallel.shm import ShmGroup
from tests.support.engines import run, tokens
from tests.support.profiles import is_all, only_in_all
from tests.support.rank_law import alone, model
from tests.support.rank_law import requests as all_requests
from tests.support.ranks import DRAFT, ThreadRanks, threaded_engine, write_random_model

pytestmark = pytest.mark.skipif(not shm.available(), reason="needs shared memory between ranks")
SHAPE = (9, 3)
PLACES = ("before", "behind", "end")
WINDOW = {"budget": 16, "sink": 4}
VERIFIED = {"policy": "verified", "budget": 8, "sink": 4}
QUEST = {"policy": "quest", "budget": 8, "sink": 4}
SNAPKV = {"policy": "snapkv", "budget": 16, "recent": 8, "queries": 5, "kernel": 3}


def requests() -> list[AddRequest]:
    """Requests of all kinds, more than fit into a batch."""
    return all_requests() if is_all() else all_requests()[::2]


class Shortage:
    """Injector that makes ranks run out of memory at random moments: before their part of an exchange, after it, or at
    the end of a round."""

    def __init__(self, ranks: ThreadRanks, seed: int) -> None:
        self._random = random.Random(seed)
        self._due: dict[tuple[int, str], int] = {}
        self.happened: list[tuple[int, str]] = []
        for rank in ranks.workers:
            for group in {id(group): group for group in ranks.groups(rank)}.values():
                assert isinstance(group, ShmGroup)
                self._watch_exchanges(rank, group)
            self._watch_ends(ranks.workers[rank], rank)

    def order(self, rank: int, place: str) -> None:
        """Schedule one failure of `rank` at `place`, after a small random number of visits."""
        self._due[rank, place] = self._random.randint(1, 3 if place == "end" else 60)

    def end(self) -> None:
        """Cancel all scheduled failures."""
        self._due.clear()

    def _at(self, rank: int, place: str) -> None:
        left = self._due.pop((rank, place), None)
        if left == 1:
            self.happened.append((rank, place))
            torch.empty(1 << 60, dtype=torch.uint8)
        elif left is not None:
            self._due[rank, place] = left - 1

    def _watch_exchanges(self, rank: int, group: ShmGroup) -> None:
        swap = group._exchange_parts

        def watched(x: Tensor) -> Tensor:
            self._at(rank, "before")
            found = swap(x)
            self._at(rank, "behind")
            return found

        group._exchange_parts = watched  # type: ignore[method-assign]

    def _watch_ends(self, worker: Worker, rank: int) -> None:
        drafter = worker._drafter
        observe = drafter.observe

        def watched(batch: RoundBatch, verdict: Verdict) -> None:
            observe(batch, verdict)
            self._at(rank, "end")

        drafter.observe = watched  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def draft_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draft = replace(DRAFT, vocab_size=model(*SHAPE).vocab_size)
    return write_random_model(tmp_path_factory.mktemp("models") / "draft", draft)


@pytest.mark.parametrize(
    ("size", "speculation"),
    [
        (2, {"kv": VERIFIED}),
        only_in_all(3, {"kv": SNAPKV}),
        (2, {"kv": WINDOW, "verification": "rejection"}),
        only_in_all(2, {"kv": SNAPKV, "drafter": "model"}),
        (3, {"kv": QUEST, "drafter": "model", "tensor_parallel_size": 2}),
        (3, {"kv": SNAPKV, "drafter": "model", "tensor_parallel_size": 1}),
    ],
)
def test_the_batch_fails_and_the_rest_goes_on(draft_dir: Path, size: int, speculation: dict[str, Any]) -> None:
    """Greedy, sampled, truncated and penalised rows, and prompts in several chunks. The ranks' states are compared in
    every round."""
    speculation = {"gamma": 2, **speculation}
    if "drafter" in speculation:
        speculation["model"] = str(draft_dir)
    engine, ranks = threaded_engine(
        model(*SHAPE),
        size,
        gamma=2,
        share=True,
        digest_every=1,
        speculation=speculation,
        scheduler={"max_rows": 3, "max_batch_tokens": 24},
    )
    ranks.workers[0] = engine._worker
    try:
        if "verification" in speculation:
            expected = {id: tokens(outputs) for id, outputs in run(engine, requests()).items()}
        else:
            expected = {id: tokens(outputs) for id, outputs in alone(SHAPE, torch.float64).items()}
        shortage = Shortage(ranks, seed=size)
        for place in PLACES:
            for rank in range(size):
                shortage.order(rank, place)
                shortage.order((rank + 1) % size, PLACES[rank % len(PLACES)])
                assert check(run(engine, requests()), expected) > 0
        assert set(shortage.happened) >= set(product(range(size), PLACES))
        shortage.end()
        assert check(run(engine, requests()), expected) == 0
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("nth", "before"),
    [
        pytest.param(1, True, id="1-before"),
        pytest.param(2, False, id="2-behind"),
        pytest.param(4, True, id="4-before"),
        *(only_in_all(nth, True, id=f"{nth}-before") for nth in (2, 3)),
        *(only_in_all(nth, False, id=f"{nth}-behind") for nth in (1, 3, 4)),
    ],
)
def test_ranks_hold_the_same_exact_pages_afterwards(nth: int, before: bool) -> None:
    """One rank fails before, or behind, the changes that a plan makes to its rows."""
    engine, ranks = threaded_engine(
        model(*SHAPE),
        2,
        gamma=2,
        share=True,
        digest_every=1,
        cache={"format": "int8", "num_pages": 40, "memory_gb": None, "page_size": SEALED_GROUP},
        max_model_len=250,
        speculation={"gamma": 2, "kv": {"policy": "all"}},
        scheduler={"max_rows": 3, "max_batch_tokens": 100},
    )
    ranks.workers[0] = engine._worker
    try:
        state, calls = ranks.workers[1]._state, count(1)
        apply = state.apply

        def failing(plan: RoundPlan) -> None:
            fails = next(calls) == nth
            if fails and before:
                torch.empty(1 << 60, dtype=torch.uint8)
            apply(plan)
            if fails:
                torch.empty(1 << 60, dtype=torch.uint8)

        state.apply = failing  # type: ignore[method-assign]
        params = SamplingParams(max_tokens=40, ignore_eos=True)
        for turn in range(2):
            sent = [
                AddRequest(f"{turn}.{i}", [2 + (7 * place + i) % 59 for place in range(70)], params) for i in range(3)
            ]
            failed = [outputs[-1].error is not None for outputs in run(engine, sent).values()]
            assert any(failed) == (turn == 0)
    finally:
        engine.close()


def check(outputs: dict[str, list[RequestOutput]], expected: dict[str, list[int]]) -> int:
    """Check that every request either failed cleanly or has the expected text. Returns the number of failed
    requests."""
    failed = [id for id, mine in outputs.items() if mine[-1].error is not None]
    for id, mine in outputs.items():
        if id in failed:
            assert (mine[-1].finish_reason, mine[-1].retry) == ("abort", RETRY_MEMORY)
            assert tokens(mine) == expected[id][: len(tokens(mine))]
        else:
            assert tokens(mine) == expected[id]
    return len(failed)
