"""KV of fewer bits over ranks: the same answers as on one rank without speculation or a prefix cache."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from engine.core import Engine
from kernels.kv.kv_bits import SEALED_GROUP
from tests.support.conversations import check_answers, check_hits, play, random_turns
from tests.support.engines import run
from tests.support.profiles import is_all, only_in_all
from tests.support.rank_law import model
from tests.support.ranks import threaded_engine

SHAPE = replace(model(9, 3), vocab_size=67, max_position_embeddings=512)
MAX_LEN = 5 * SEALED_GROUP + 20
VIEWS: dict[str, dict[str, Any]] = {
    "all": {"policy": "all"},
    "window": {"policy": "window", "budget": 2 * SEALED_GROUP, "sink": 4},
    "relative": {"policy": "window", "budget": 2 * SEALED_GROUP, "sink": 4, "positions": "relative"},
    "snapkv": {"policy": "snapkv", "budget": 2 * SEALED_GROUP, "recent": SEALED_GROUP},
    "quest": {"policy": "quest", "budget": SEALED_GROUP, "sink": 4, "interval": 2},
    "verified": {"policy": "verified", "budget": SEALED_GROUP, "sink": 4},
}


def start(size: int, kv: str, view: str = "all", gamma: int = 0) -> Engine:
    """Start an engine that compares the row state of all ranks after every round. It has a prefix cache if it
    drafts."""
    page = 8 if kv == "fp8" else SEALED_GROUP
    engine, _ = threaded_engine(
        SHAPE,
        size,
        gamma=gamma,
        dtype=torch.float64,
        digest_every=1,
        cache={"format": kv, "page_size": page, "num_pages": 40 * SEALED_GROUP // page, "prefix": gamma > 0},
        speculation={"gamma": gamma, "kv": VIEWS[view]},
        scheduler={"max_rows": 4, "max_batch_tokens": 100},
        max_model_len=MAX_LEN,
    )
    return engine


@cache
def plain(kv: str) -> Engine:
    return start(1, kv)


OTHERS = [
    only_in_all(kv, view, size) for kv in ("int8", "int4x2", "fp8") for view in VIEWS for size in (2, 3)
]  # fmt: skip


@pytest.mark.parametrize(("kv", "view", "size"), [("int4x2", "verified", 2), only_in_all("int8", "window", 3), *OTHERS])
def test_ranks_change_nothing(kv: str, view: str, size: int) -> None:
    engine = start(size, kv, view, gamma=3)
    turns = random_turns(random.Random(size + 4), SEALED_GROUP, 5 if is_all() else 3, 150, 80)
    played = play(engine, turns, MAX_LEN)
    check_answers(played, run(plain(kv), played.requests))
    check_hits(engine, played)
    stats = engine.stats()
    assert stats.accepted_tokens > 0
    assert stats.prefix_hits > 0
    engine.close()
