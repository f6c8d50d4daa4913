"""Drafters over ranks: every policy, and a draft model on all of the target's ranks or on the first ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from engine.core import Engine
from engine.ngram.ngram_drafts import Proposal
from engine.plan import RoundPlan
from engine.scheduler.controller import FixedGamma, RowDrafts, Way
from engine.scheduler.request import Request
from tests.support.engines import Scripted, run, tokens
from tests.support.profiles import is_all, only_in_all
from tests.support.rank_law import alone, model, requests
from tests.support.ranks import DRAFT, threaded_engine, write_random_model

SHAPE = (9, 3)
KV: dict[str, dict[str, Any]] = {
    "window": {"budget": 16, "sink": 4},
    "relative": {"budget": 16, "sink": 4, "positions": "relative"},
    "verified": {"policy": "verified", "budget": 8, "sink": 4},
    "quest": {"policy": "quest", "budget": 8, "sink": 4, "interval": 2},
    "snapkv": {"policy": "snapkv", "budget": 16, "recent": 8, "queries": 5, "kernel": 3},
    "topk": {"policy": "topk", "budget": 8},
    "all": {"policy": "all"},
}


@pytest.fixture(scope="module")
def draft_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draft = replace(DRAFT, vocab_size=model(*SHAPE).vocab_size)
    return write_random_model(tmp_path_factory.mktemp("models") / "draft", draft)


class InTurns(FixedGamma):
    """Controller under which rows alternate between rounds with drafts and rounds without."""

    def __init__(self) -> None:
        super().__init__(3)
        self._round = 0

    def choose(
        self,
        rows: Sequence[Request],
        shared_tokens: int = 0,
        proposals: Sequence[Proposal] = (),
        share: int | None = None,
    ) -> list[RowDrafts]:
        self._round += 1
        gammas = [3 if (self._round // 5 + i) % 3 else 0 for i in range(len(rows))]
        found = [len(each.tokens) for each in proposals] or [0] * len(rows)
        return [
            RowDrafts(min(gamma, count), gamma - min(gamma, count)) for gamma, count in zip(gammas, found, strict=True)
        ]


def start(size: int, speculation: dict[str, Any], gamma: int = 3) -> Engine:
    return threaded_engine(model(*SHAPE), size, gamma=gamma, digest_every=3, speculation=speculation)[0]


def of_model(draft_dir: Path, policy: str, count: int | None) -> dict[str, Any]:
    """Settings of speculation by a draft model on the first `count` ranks; None: on all."""
    return {
        "gamma": 3,
        "drafter": "model",
        "model": str(draft_dir),
        "tensor_parallel_size": count,
        "kv": KV[policy],
    }


def texts(engine: Engine) -> dict[str, list[int]]:
    try:
        outputs = run(engine, requests())
        stats = engine.stats()
    finally:
        engine.close()
    assert stats.accepted_tokens > 0
    assert stats.draft_tokens > 50
    return {request.id: tokens(outputs[request.id]) for request in requests()}


def expected() -> dict[str, list[int]]:
    return {id: tokens(outputs) for id, outputs in alone(SHAPE, torch.float64).items()}


def mostly_in_all(ranks: Sequence[tuple[int, int | None]], **always: int | None) -> list[Any]:
    """Parameter sets of every policy with every choice of ranks. `make test` runs the one with the given index, or
    none."""
    return [
        (policy, *each) if number == index else only_in_all(policy, *each)
        for policy, index in always.items()
        for number, each in enumerate(ranks)
    ]


@pytest.mark.parametrize(
    ("policy", "size"),
    [
        *(("quest", 1), ("relative", 2), ("verified", 3), ("snapkv", 2)),
        *(only_in_all("quest", size) for size in (2, 3, 4)),
        *(only_in_all("verified", size) for size in (1, 2, 4)),
        *(only_in_all(*each) for each in (("relative", 4), ("snapkv", 4), ("topk", 2), ("topk", 4))),
    ],
)
def test_self_speculation(policy: str, size: int) -> None:
    assert texts(start(size, {"gamma": 3, "kv": KV[policy]})) == expected()


# test_ranks has 2 ranks of 3, as processes.
@pytest.mark.parametrize(
    ("policy", "size", "count"),
    mostly_in_all([(2, None), (2, 1), (3, 2), (4, 3)], window=1, quest=0, snapkv=None, all=3),
)
def test_a_draft_model_on_all_ranks_or_fewer(draft_dir: Path, policy: str, size: int, count: int | None) -> None:
    engine = start(size, of_model(draft_dir, policy, count))
    assert texts(engine) == expected()


@pytest.mark.parametrize(
    ("policy", "size", "count"), mostly_in_all([(2, None), (3, 1), (4, 3)], window=None, quest=None, snapkv=0, all=1)
)
def test_ranks_agree_on_who_has_caught_up(draft_dir: Path, policy: str, size: int, count: int | None) -> None:
    """All ranks agree, including those without the draft model, while rows draft, catch up, do both, or neither."""
    speculation = of_model(draft_dir, policy, count)
    scheduler = {"max_rows": 4, "max_batch_tokens": 24}
    engine, ranks = threaded_engine(
        model(*SHAPE), size, gamma=3, digest_every=1, speculation=speculation, scheduler=scheduler
    )
    engine._scheduler.controller = InTurns()
    assert texts(engine) == expected()
    plans = [msgspec.msgpack.decode(frame, type=RoundPlan) for frame in ranks.plans if frame]
    kinds = {(work.gamma > 0, work.catch_up > 0) for plan in plans for work in plan.work}
    assert kinds == {(False, False), (False, True), (True, False), (True, True)}


@pytest.mark.parametrize(
    ("drafter", "policy", "count", "size"),
    [
        (*each, size) if size == always else only_in_all(*each, size)
        for *each, always in (
            ("ngram", "window", None, 2),
            ("together", "window", None, 1),
            ("together", "verified", None, 1),
            ("together", "quest", None, 1),
            ("together", "snapkv", None, None),
            ("together", "window", 1, 3),
            ("together", "snapkv", 1, 2),
        )
        for size in (1, 2, 3)
    ],
)
def test_drafts_from_the_text(draft_dir: Path, drafter: str, policy: str, count: int | None, size: int) -> None:
    """Rank 0 searches the text, and all ranks verify what it found, alone or before the drafts of a model."""
    speculation = of_model(draft_dir, policy, count) if count else {"gamma": 3, "kv": KV[policy]}
    engine = start(size, speculation | {"drafter": drafter})
    engine._scheduler.controller = InTurns() if drafter == "together" else engine._scheduler.controller
    try:
        outputs = run(engine, requests())
        stats = engine.stats()
    finally:
        engine.close()
    assert {request.id: tokens(outputs[request.id]) for request in requests()} == expected()
    assert stats.text_draft_tokens > 0


@pytest.mark.parametrize(
    ("policy", "own", "size", "count"),
    [
        ("window", "verified", 3, 2),
        ("all", "quest", 2, None),
        *(only_in_all(*each) for each in (("window", "snapkv", 2, 1), ("quest", "window", 3, None))),
    ],
)
def test_a_draft_model_and_the_target_by_turns(
    draft_dir: Path, policy: str, own: str, size: int, count: int | None
) -> None:
    """All ranks have the same drafter in each round, beside the text, those without the draft model too."""
    both = of_model(draft_dir, policy, count) | {"drafter": "together", "gamma": "auto", "gamma_max": 3}
    engine = start(size, both | {"self_kv": KV[own]})
    ways = [Way(0, name) for name in (None, None, "self", None, "self", "self", "self")]
    engine._scheduler.controller = Scripted([[0, 3, 1], [2], [0], [3, 3, 0, 1]] * 400, ways)
    assert texts(engine) == expected()


@pytest.mark.parametrize("drafter", [only_in_all("self"), "model"])
def test_rejection_does_not_depend_on_the_number_of_ranks(draft_dir: Path, drafter: str) -> None:
    speculation = {
        "gamma": 3,
        "drafter": drafter,
        "model": str(draft_dir) if drafter == "model" else None,
        "verification": "rejection",
        "kv": KV["window"],
    }
    first, *others = (texts(start(size, speculation)) for size in ((1, 2, 3) if is_all() else (1, 3)))
    assert all(other == first for other in others)
    assert first != expected()  # different text from the same distribution


def test_ranks_profile_together() -> None:
    """The ranks run the profile's rounds for gamma: auto, and then requests."""
    engine = start(2, {"gamma": "auto", "kv": KV["window"]})
    try:
        outputs = run(engine, requests())
    finally:
        engine.close()
    assert {request.id: tokens(outputs[request.id]) for request in requests()} == expected()
