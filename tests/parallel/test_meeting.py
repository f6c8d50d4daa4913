"""How ranks find rank 0 through a store, and who is not let in; where torchrun's variables put a process."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec
import pytest
from torch._C._distributed_c10d import HashStore

from parallel import meeting
from parallel.channel import Link
from parallel.elastic import ElasticError, Place, read_place
from parallel.group import CollectiveError, RankFailure
from parallel.meeting import Guests

ENVIRONMENT = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def host(threads: ThreadPoolExecutor, store: HashStore, size: int, timeout_s: float = 30) -> Future[Guests]:
    return threads.submit(meeting.receive, store, "127.0.0.1", size, timeout_s=timeout_s, link_timeout_s=30)


def visit(store: HashStore, rank: int, timeout_s: float = 30) -> Link:
    link, part = meeting.visit(store, rank, timeout_s=timeout_s, link_timeout_s=30)
    part.set(f"rank {rank}", "was here")
    return link


def close(guests: Guests, *links: Link) -> None:
    for link in (*guests.links.values(), *links):
        link.close()


def test_links_lead_to_the_right_ranks(threads: ThreadPoolExecutor) -> None:
    store = HashStore()
    coming = host(threads, store, 4)
    theirs = {rank: threads.submit(visit, store, rank) for rank in (3, 1, 2)}
    guests = coming.result()
    assert set(guests.links) == {1, 2, 3}
    assert set(guests.hosts.values()) == {socket.gethostname()}
    for rank, link in guests.links.items():
        link.send(b"%d" % rank)
        assert theirs[rank].result().receive() == b"%d" % rank
        assert guests.store.get(f"rank {rank}") == b"was here"
    close(guests, *(link.result() for link in theirs.values()))


def test_strangers_are_dropped_and_hold_up_nobody(threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_PATIENCE_S", 0.5)
    store = HashStore()
    coming = host(threads, store, 2)
    door = msgspec.json.decode(store.get(meeting._KEY), type=meeting._Door)
    address = (door.address, door.port)
    with (
        socket.create_connection(address) as silent,
        socket.create_connection(address) as ignorant,
        socket.create_connection(address) as nobody,
    ):
        ignorant.sendall(meeting._HELLO.pack(bytes(16), 1, b"host"))
        nobody.sendall(meeting._HELLO.pack(door.knock, 7, b"host"))
        for stranger in (ignorant, nobody, silent):
            stranger.settimeout(30)
            assert stranger.recv(1) == b""
        silent_too = socket.create_connection(address)
        link = visit(store, 1)
        close(coming.result(), link)
        silent_too.close()


def test_a_door_that_a_former_group_left(threads: ThreadPoolExecutor) -> None:
    """Nobody is there, or somebody else; the rank goes on looking, and finds the new one."""
    store = HashStore()
    with socket.create_server(("127.0.0.1", 0)) as other:
        old = meeting._Door("127.0.0.1", other.getsockname()[1], b"k" * 16, b"a" * 16)
        store.set(meeting._KEY, msgspec.json.encode(old).decode())
        looking = threads.submit(visit, store, 1)
        caller, _ = other.accept()
        with caller:
            assert caller.recv(100).startswith(old.knock)
            caller.sendall(b"b" * 16)
    guests = host(threads, store, 2).result()
    close(guests, looking.result())


def test_ranks_that_do_not_come(threads: ThreadPoolExecutor) -> None:
    store = HashStore()
    coming = host(threads, store, 4, timeout_s=1)
    link = visit(store, 2)
    with pytest.raises(RankFailure, match=r"ranks 1, 3 did not come to 127\.0\.0\.1:\d+ within 1 s"):
        coming.result()
    with pytest.raises(ConnectionError):
        link.receive()
    link.close()


def test_a_rank_0_that_is_not_there() -> None:
    store = HashStore()
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    store.set(meeting._KEY, msgspec.json.encode(meeting._Door("127.0.0.1", port, b"k" * 16, b"a" * 16)).decode())
    with pytest.raises(CollectiveError, match=f"rank 0 is not at 127.0.0.1:{port}: .*refused"):
        visit(store, 1, timeout_s=0.1)


def test_a_link_over_tcp_notices_silence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as end:
        Link(end, send_timeout_s=8)
        assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 8000
        assert end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 2


def test_the_place_of_a_process() -> None:
    place = read_place(ENVIRONMENT)
    assert place == Place(3, 4, 1, 2, "127.0.0.1", 29500, hosts_store=False)
    assert not place.one_host
    assert place.address() == "127.0.0.1"
    alone = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "False"}
    assert read_place(ENVIRONMENT | alone).hosts_store
    assert read_place(ENVIRONMENT | alone).one_host


@pytest.mark.parametrize("name", sorted(ENVIRONMENT.keys() - {"TORCHELASTIC_USE_AGENT_STORE"}))
def test_no_place_without_torchrun(name: str) -> None:
    with pytest.raises(ElasticError, match=f"^{name} is not set: start this program with torchrun$"):
        read_place({key: value for key, value in ENVIRONMENT.items() if key != name})


@pytest.mark.parametrize(
    ("wrong", "named"),
    [({"RANK": "x"}, "RANK is 'x'"), ({"RANK": "4"}, "rank 4 of 4"), ({"LOCAL_RANK": "2"}, "2 of 2 on this host")],
)
def test_places_that_cannot_be(wrong: dict[str, str], named: str) -> None:
    with pytest.raises(ElasticError, match=named):
        read_place(ENVIRONMENT | wrong)
