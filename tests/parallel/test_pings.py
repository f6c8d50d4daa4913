"""Pings between rounds, over TCP as between two machines."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field

import msgspec
import pytest

from engine.plan import RoundPlan
from engine.ranks.executor import RankExecutor
from engine.ranks.protocol import RankReport, send_report, worker_loop
from parallel.channel import Disconnected, Link
from parallel.group import RankFailure

TIMEOUT_S = 0.8
PLAN = RoundPlan(1, [], [], [])


@dataclass
class Pair:
    """Rank 0 with two peers: rank 2 runs a worker loop, and the test holds rank 1's end of the connection."""

    ranks: RankExecutor
    end: Link
    followed: list[int] = field(default_factory=list)

    def wait(self, calls: int) -> None:
        for _ in range(calls):
            time.sleep(self.ranks.ping())

    def asked(self, count: int) -> None:
        """Ping until rank 1 has received `count` pings."""
        received = 0
        self.wait(count)
        while received < count:
            assert self.end.receive() == b""
            received += 1


@pytest.fixture
def pair() -> Iterator[Pair]:
    links: dict[int, Link] = {}
    ends: dict[int, Link] = {}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for rank in (1, 2):
            links[rank] = Link(socket.create_connection(listener.getsockname()), 10)
            ends[rank] = Link(listener.accept()[0])
    ranks = RankExecutor(links, timeout_s=TIMEOUT_S)
    pair = Pair(ranks, ends[1])

    def live() -> None:
        with suppress(Disconnected), closing(ends[2]):
            worker_loop(ends[2], lambda plan: pair.followed.append(plan.number), lambda step: step.action)

    follower = threading.Thread(target=live)
    follower.start()
    for end in ends.values():
        send_report(end, RankReport())
        send_report(end, RankReport())
    ranks.wait_ready(30)
    yield pair
    ranks.close()
    pair.end.close()
    follower.join()


def test_answers_may_be_late(pair: Pair) -> None:
    for _ in range(3):
        pair.asked(2)
        send_report(pair.end, RankReport())
        send_report(pair.end, RankReport())


def test_a_round_may_start_while_a_ping_is_out(pair: Pair) -> None:
    pair.wait(1)
    with pair.ranks.round(PLAN):
        assert pair.end.receive() == b""
        send_report(pair.end, RankReport())
        assert pair.end.receive() != b""  # the plan, which follows the ping
    while not pair.followed:
        time.sleep(0.01)
    pair.asked(1)
    assert pair.followed == [1]


def test_a_rank_that_says_nothing(pair: Pair) -> None:
    with pytest.raises(RankFailure, match=r"rank 1 did not answer within 0\.8 s$"):
        pair.wait(1000)
    with pytest.raises(RankFailure, match="rank 1 did not answer"):
        pair.ranks.ping()


def test_a_rank_that_takes_no_plan() -> None:
    """Rank 0 does not wait for the rank a second time inside the round."""
    ours, theirs = socket.socketpair()
    ranks = RankExecutor({1: Link(ours, 0.2)}, timeout_s=0.2)
    plan = msgspec.structs.replace(PLAN, clear=list(range(1_000_000)))
    with (
        closing(theirs),
        closing(ranks),
        pytest.raises(RankFailure, match="rank 1 cannot be reached"),
        ranks.round(plan),
    ):
        pytest.fail("the round began")


def test_a_rank_0_that_kept_the_others_waiting() -> None:
    ours, theirs = socket.socketpair()
    ranks, end = RankExecutor({1: Link(ours)}, timeout_s=0.2), Link(theirs)
    send_report(end, RankReport(failure="failed: CollectiveError: rank 0 did not answer", lost=True))
    with closing(end), closing(ranks), pytest.raises(RankFailure, match=r"lost each other: .*rank 0 did not answer"):
        ranks.check()


def test_a_rank_0_that_stood_still_blames_nobody(pair: Pair) -> None:
    pair.wait(1)
    time.sleep(2 * TIMEOUT_S)
    assert pair.end.receive() == b""
    send_report(pair.end, RankReport())
    pair.wait(2)


def test_a_failure_in_answer_to_a_ping(pair: Pair) -> None:
    pair.asked(1)
    send_report(pair.end, RankReport(failure="failed: RuntimeError: it broke"))
    with pytest.raises(RankFailure, match="rank 1 failed: RuntimeError: it broke"):
        pair.wait(1000)
