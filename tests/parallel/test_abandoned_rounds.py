"""Rounds that one rank cannot finish: all ranks abandon them and stay in step. Ranks are threads."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch

from parallel import shm
from parallel.group import CollectiveError, Group, RoundAbandoned
from parallel.shm import ShmGroup
from tests.support.profiles import is_all

pytestmark = pytest.mark.skipif(not shm.available(), reason="needs shared memory between ranks")
ROUNDS = 300 if is_all() else 100


class Failing(ShmGroup):
    """Group that can run out of memory inside an exchange, after it published its own part and before it reads the
    others'."""

    fails = False

    def _await(self, rank: int, place: int, least: int) -> int:
        if self.fails:
            self.fails = False
            raise MemoryError
        return super()._await(rank, place, least)


@dataclass
class Ends:
    """Ends of one rank: of the group of all ranks, and of the group of the first ranks if it is one of them."""

    whole: Failing
    first: Failing | None


def ends(size: int, count: int, timeout_s: float = 30) -> list[Ends]:
    memory = shm.create(size)
    try:
        offset = shm.area_bytes(size)
        return [
            Ends(
                Failing(memory, rank, size, timeout_s),
                Failing(memory, rank, count, timeout_s, offset) if rank < count else None,
            )
            for rank in range(size)
        ]
    finally:
        os.close(memory)


def on_ranks(size: int, work: Callable[[int], list[list[int]]]) -> list[list[list[int]]]:
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(work, range(size)))


@dataclass(frozen=True)
class Script:
    """One round. steps: for each collective, whether it is of the first ranks only, and its number of elements. fails:
    for each failing rank, the step where it fails (the number of steps: after all of them), and whether it fails inside
    that step rather than before it."""

    steps: list[tuple[bool, int]]
    fails: dict[int, tuple[int, bool]]


def scripts(size: int, seed: int) -> list[Script]:
    made = random.Random(seed)
    found = []
    for _ in range(ROUNDS):
        steps = [(made.random() < 0.5, made.choice([1, 7, 300_000])) for _ in range(made.randrange(6))]
        failing = made.sample(range(size), made.choice([0, 0, 1, 1, 2]))
        found.append(Script(steps, {rank: (made.randint(0, len(steps)), made.random() < 0.3) for rank in failing}))
    return found


def play(script: Script, mine: Ends, number: int) -> list[int]:
    """Run one rank's part of a round. Returns the ranks that failed."""
    rank = mine.whole.rank
    groups = [mine.whole] if mine.first is None else [mine.whole, mine.first]
    for each in groups:
        each.begin_round()
    at, inside = script.fails.get(rank, (-1, False))
    finished = failed = False
    try:
        for step, (first, count) in enumerate(script.steps):
            group = mine.first if first else mine.whole
            if step == at:
                if group is None or not inside:
                    raise MemoryError
                group.fails = True
            if group is not None:
                total = group.all_reduce(torch.full((count,), 10.0**rank * (number + step)))
                assert (total == (number + step) * sum(10.0**r for r in range(group.size))).all()
        if at == len(script.steps):
            raise MemoryError
        finished = True
    except MemoryError:
        failed = True
    except RoundAbandoned:
        assert script.fails
    if not finished:
        for each in groups:
            each.abandon()
    return mine.whole.agree(failed)


@pytest.mark.parametrize(("size", "count", "seed"), [(2, 1, 0), (2, 2, 1), (3, 2, 2), (4, 2, 3), (4, 3, 4)])
def test_ranks_never_lose_step(size: int, count: int, seed: int) -> None:
    """Ranks stay in step wherever one or two fail: before, in, between and after collectives, of either group."""
    rounds = scripts(size, seed)
    groups = ends(size, count)

    def work(rank: int) -> list[list[int]]:
        return [play(script, groups[rank], number) for number, script in enumerate(rounds, 1)]

    first, *others = on_ranks(size, work)
    assert all(other == first for other in others)
    for script, failed in zip(rounds, first, strict=True):
        assert bool(failed) == bool(script.fails)
        assert set(failed) <= set(script.fails)
    assert any(len(failed) == 2 for failed in first)


def test_nobody_waits_for_a_rank_that_is_gone_for_good() -> None:
    """The timeout also applies at the end of a round."""
    first, _ = ends(2, 1, timeout_s=0.2)
    first.whole.begin_round()
    with pytest.raises(CollectiveError, match=r"rank 1 did not answer within 0\.2 s"):
        first.whole.agree(False)


def test_a_group_of_one_can_always_abandon() -> None:
    group = Group.single()
    assert group.can_abandon
    group.begin_round()
    group.abandon()
    assert group.agree(True) == [0]
    assert group.agree(False) == []
