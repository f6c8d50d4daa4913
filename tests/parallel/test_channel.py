"""Frames between rank 0 and the other ranks."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Iterator

import pytest

from parallel.channel import Channel, Disconnected, Link


@pytest.fixture
def ends() -> Iterator[tuple[dict[int, Link], dict[int, Link]]]:
    """Links of rank 0 to ranks 1 to 3, and the other ends of these links."""
    ours, theirs = {}, {}
    for rank in (1, 2, 3):
        one, other = socket.socketpair()
        ours[rank], theirs[rank] = Link(one, send_timeout_s=0.1), Link(other)
    yield ours, theirs
    for link in (*ours.values(), *theirs.values()):
        link.close()


Ends = tuple[dict[int, Link], dict[int, Link]]


def test_frames_arrive_whole_and_in_order(ends: Ends) -> None:
    ours, theirs = ends
    channel = Channel(ours)
    rng = random.Random(0)
    sizes = [0, 1, 7, 8, 9, 65_535, 65_536, 65_537, 3_000_000, 0, 5]
    frames = [rng.randbytes(size) for size in sizes]
    received: dict[int, list[bytes]] = {}

    def read(rank: int) -> None:
        received[rank] = [theirs[rank].receive() for _ in frames]

    readers = [threading.Thread(target=read, args=(rank,)) for rank in theirs]
    for reader in readers:
        reader.start()
    for frame in frames:
        channel.broadcast(frame)
    for reader in readers:
        reader.join()
    assert received == dict.fromkeys(theirs, frames)


def test_news_of_every_rank(ends: Ends) -> None:
    ours, theirs = ends
    channel = Channel(ours)
    assert channel.frames(0) == []
    theirs[2].send(b"one")
    theirs[2].send(b"two")
    theirs[3].send(b"three")
    assert sorted(channel.frames(1)) == [(2, b"one"), (2, b"two"), (3, b"three")]
    theirs[1].send(b"last word")
    theirs[1].close()
    heard: list[tuple[int, bytes | None]] = []
    while (1, None) not in heard:
        heard += channel.frames(1)
    assert heard == [(1, b"last word"), (1, None)]
    assert channel.open == {2, 3}
    channel.broadcast(b"to those who are left")
    assert theirs[2].receive() == theirs[3].receive() == b"to those who are left"


def test_a_rank_that_reads_nothing_holds_nobody_up(ends: Ends) -> None:
    ours, theirs = ends
    channel = Channel(ours)
    readers = [threading.Thread(target=theirs[rank].receive) for rank in (1, 3)]
    for reader in readers:
        reader.start()
    channel.broadcast(bytes(5_000_000))
    for reader in readers:
        reader.join()
    assert channel.open == {1, 3}


def test_the_other_end_is_gone(ends: Ends) -> None:
    ours, theirs = ends
    ours[1].close()
    with pytest.raises(Disconnected):
        theirs[1].receive()
    with pytest.raises(Disconnected):
        theirs[1].send(b"hello?")
