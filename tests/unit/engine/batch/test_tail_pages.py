"""Exact pages of rows: there are always enough, and each row holds those that its queries and drafts read."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from engine.batch.tail_pages import TailPages, num_exact_pages
from engine.config.deployment import EngineConfig
from engine.params import SamplingParams
from engine.plan import RoundPlan, RowStart, RowWork
from kernels.kv.kv_bits import SEALED_GROUP
from tests.support.profiles import examples


class Rows:
    """Rows that prefill and decode at random, as a scheduler plans them, and the groups that each must hold.

    begun: by row, its first group that was ever computed. computed, committed: tokens. ends: tokens that were committed
    by the latest round at least. needed: groups to hold.
    """

    def __init__(self, rng: random.Random, max_rows: int, max_batch_tokens: int) -> None:
        self._rng, self._tokens = rng, max_batch_tokens
        self.begun: dict[int, int] = {}
        self.computed: dict[int, int] = {}
        self.committed: dict[int, int] = {}
        self.ends: dict[int, int] = {}
        self.needed: dict[int, set[int]] = {row: set() for row in range(max_rows)}

    def plan(self, tails: TailPages) -> RoundPlan:
        """Start some rows, at a page as prefix hits do, and give random ones a part of the round."""
        rng, starts, work, left = self._rng, [], [], self._tokens
        rows = rng.sample(sorted(self.needed), rng.randint(1, len(self.needed)))
        for row in rows:
            if row not in self.begun or rng.random() < 0.05:
                first = rng.randrange(5)
                prompt = first * SEALED_GROUP + rng.choice([1, 63, 64, 65, rng.randint(1, 400)])
                self.begun[row], self.computed[row], self.committed[row] = first, first * SEALED_GROUP, prompt
                self.ends.pop(row, None)
                starts.append(RowStart(row, [0] * prompt, prompt, SamplingParams(), []))
                tails.drop(row)
        for row in rows:
            lacking = self.committed[row] - self.computed[row]
            new = min(lacking, left)
            if not new:
                continue
            gamma = 0
            if new == lacking == 1:
                gamma = min(rng.randint(0, 16), left - 1, -self.committed[row] % SEALED_GROUP)
            work.append(RowWork(row, self.computed[row], new, gamma, new == lacking))
            left -= new + gamma
        return RoundPlan(0, starts, [], work)

    def note(self, plan: RoundPlan) -> None:
        """Note what rows must hold after `update`: groups that they write to, and of one such group the one before it.
        Rows without work hold what they need after their latest round if all of its drafts were rejected."""
        working = {work.row: work for work in plan.work}
        for start in plan.starts:
            self.needed[start.row] = set()
        for row, needed in self.needed.items():
            begun = self.begun.get(row, 0)
            if row in working:
                work = working[row]
                last = (work.computed + work.new + work.gamma - 1) // SEALED_GROUP
                first = work.computed // SEALED_GROUP
                self.needed[row] = set(range(max(begun, first - (first == last)), last + 1)) & (
                    needed | set(range(first, last + 1))
                )
            else:
                first = self.ends.get(row, 0) // SEALED_GROUP - 1
                self.needed[row] = {group for group in needed if group >= first}
        self.ends |= {row: work.computed + work.new for row, work in working.items()}

    def commit(self, plan: RoundPlan) -> None:
        """Accept a random number of each row's drafts."""
        for work in plan.work:
            self.computed[work.row] += work.new
            if work.samples:
                accepted = self._rng.randint(0, work.gamma)
                self.computed[work.row] += accepted
                self.committed[work.row] += accepted + 1


@given(seed=st.integers(0, 2**32), max_rows=st.integers(1, 6), batch=st.sampled_from([0, 10, 100, 600]))
@examples(60, 2000)
def test_rows_hold_the_groups_that_they_read_exactly(seed: int, max_rows: int, batch: int) -> None:
    scheduler = {"max_rows": max_rows, "max_batch_tokens": max_rows + 1 + batch}
    config = EngineConfig.model_validate({"cache": {"format": "int8"}, "scheduler": scheduler})
    total = num_exact_pages(config)
    tails, rows = TailPages(max_rows, total, SEALED_GROUP), Rows(random.Random(seed), max_rows, max_rows + 1 + batch)
    for _ in range(60):
        plan = rows.plan(tails)
        before = [dict(held) for held in tails.held]
        released = sorted(zip(*(each.tolist() for each in tails.update(plan)), strict=True))
        rows.note(plan)
        assert [set(held) for held in tails.held] == [rows.needed[row] for row in range(max_rows)]
        held = [page for each in tails.held for page in each.values()]
        assert len(set(held)) == len(held) <= total
        assert set(held) <= set(range(total))
        kept = [
            {group: page for group, page in old.items() if group in tails.held[row]} for row, old in enumerate(before)
        ]
        assert all(page == tails.held[row][group] for row, old in enumerate(kept) for group, page in old.items())
        assert released == sorted(
            (row, group) for row, old in enumerate(before) for group in old.keys() - kept[row].keys()
        )
        rows.commit(plan)
    listed = tails.pages_of(list(range(max_rows)))
    expected = [(row, group, page) for row, held in enumerate(tails.held) for group, page in held.items()]
    assert list(zip(*(each.tolist() for each in listed), strict=True)) == expected
    for row in range(max_rows):
        tails.drop(row)
    assert sorted(tails._free) == list(range(total))


def test_dense_pages_need_no_others() -> None:
    assert num_exact_pages(EngineConfig()) == 0


def test_a_round_that_failed_before_its_rows_began_holds_nothing() -> None:
    """The slots of new requests still had the pages of former ones."""
    config = EngineConfig.model_validate(
        {"cache": {"format": "int8"}, "scheduler": {"max_rows": 4, "max_batch_tokens": 128}}
    )
    total = num_exact_pages(config)
    tails = TailPages(4, total, SEALED_GROUP)
    tails.update(RoundPlan(0, [], [], [RowWork(row, 2 * SEALED_GROUP - 1, 2, 0, True) for row in range(4)]))
    starts = [RowStart(row, [0] * 32, 32, SamplingParams(), []) for row in range(4)]
    tails.abandon(RoundPlan(1, starts, [], [RowWork(row, 0, 32, 0, True) for row in range(4)]))
    assert sorted(tails._free) == list(range(total))
