"""Models with sliding layers over ranks: the same answers, and equal page tables of both kinds on all ranks."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache

import pytest
import torch

from engine.core import Engine
from tests.support.conversations import check_answers, check_hits, play, random_turns
from tests.support.engines import run
from tests.support.profiles import only_in_all
from tests.support.rank_law import model
from tests.support.ranks import threaded_engine
from tests.support.workloads import kv_of

SHAPES = {
    "some": replace(model(9, 3), vocab_size=67, num_layers=3, sliding_window=10, sliding_layers=(0, 2)),
    "all": replace(model(9, 3), vocab_size=67, num_layers=2, sliding_window=30, sliding_layers=(0, 1)),
}
MAX_LEN, PAGE = 150, 4


def start(layers: str, size: int, gamma: int, policy: str = "all", prefix: bool = True) -> Engine:
    """Start an engine that compares the row state of all ranks after every round."""
    engine, _ = threaded_engine(
        SHAPES[layers],
        size,
        gamma=gamma,
        dtype=torch.float64,
        digest_every=1,
        cache={"page_size": PAGE, "prefix": prefix, "num_pages": 120},
        speculation={"gamma": gamma, "kv": kv_of(policy, PAGE, 3)},
        scheduler={"max_rows": 6, "max_batch_tokens": 30},
        max_model_len=MAX_LEN,
    )
    return engine


@cache
def plain(layers: str) -> Engine:
    return start(layers, 1, 0, prefix=False)


@pytest.mark.parametrize(
    ("layers", "size", "policy"),
    [only_in_all("some", 2, "window"), ("some", 3, "quest"), ("all", 2, "window"), only_in_all("all", 3, "quest")],
)
def test_ranks_change_nothing(layers: str, size: int, policy: str) -> None:
    """Where all layers slide, drafts by window leave the window's KV alone, those that choose have all KV."""
    engine = start(layers, size, 3, policy)
    assert (engine._worker.model.num_kv_layers == 0) is (layers == "all" and policy == "window")
    played = play(engine, random_turns(random.Random(size), PAGE, 8), MAX_LEN)
    check_answers(played, run(plain(layers), played.requests))
    check_hits(engine, played)
    assert engine.stats().prefix_hits > 0
    engine.close()
