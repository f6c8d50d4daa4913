"""Ranks find rank 0 through a store, strangers are rejected, and torchrun's variables determine a process's rank."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec
import pytest
from torch._C._distributed_c10d import HashStore

from parallel import tcp_bootstrap
from parallel.channel import Link
from parallel.group import CollectiveError, RankFailure
from parallel.tcp_bootstrap import Connections
from parallel.torchrun_env import TorchrunEnv, TorchrunEnvError, read_torchrun_env

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


def accept(threads: ThreadPoolExecutor, store: HashStore, size: int, timeout_s: float = 30) -> Future[Connections]:
    return threads.submit(tcp_bootstrap.accept_ranks, store, "127.0.0.1", size, timeout_s=timeout_s, link_timeout_s=30)


def connect(store: HashStore, rank: int, timeout_s: float = 30) -> Link:
    link, part = tcp_bootstrap.connect(store, rank, timeout_s=timeout_s, link_timeout_s=30)
    part.set(f"rank {rank}", "was here")
    return link


def close(connections: Connections, *links: Link) -> None:
    for link in (*connections.links.values(), *links):
        link.close()


def test_links_lead_to_the_right_ranks(threads: ThreadPoolExecutor) -> None:
    store = HashStore()
    accepting = accept(threads, store, 4)
    theirs = {rank: threads.submit(connect, store, rank) for rank in (3, 1, 2)}
    connections = accepting.result()
    assert set(connections.links) == {1, 2, 3}
    assert set(connections.hosts.values()) == {socket.gethostname()}
    for rank, link in connections.links.items():
        link.send(b"%d" % rank)
        assert theirs[rank].result().receive() == b"%d" % rank
        assert connections.store.get(f"rank {rank}") == b"was here"
    close(connections, *(link.result() for link in theirs.values()))


def test_strangers_are_dropped_and_hold_up_nobody(threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_bootstrap, "_HELLO_TIMEOUT_S", 0.5)
    store = HashStore()
    accepting = accept(threads, store, 2)
    endpoint = msgspec.json.decode(store.get(tcp_bootstrap._KEY), type=tcp_bootstrap._Endpoint)
    address = (endpoint.address, endpoint.port)
    with (
        socket.create_connection(address) as silent,
        socket.create_connection(address) as ignorant,
        socket.create_connection(address) as nobody,
    ):
        ignorant.sendall(tcp_bootstrap._HELLO.pack(bytes(16), 1, b"host"))
        nobody.sendall(tcp_bootstrap._HELLO.pack(endpoint.token, 7, b"host"))
        for stranger in (ignorant, nobody, silent):
            stranger.settimeout(30)
            assert stranger.recv(1) == b""
        silent_too = socket.create_connection(address)
        link = connect(store, 1)
        close(accepting.result(), link)
        silent_too.close()


def test_an_endpoint_that_a_former_group_left(threads: ThreadPoolExecutor) -> None:
    """The old address refuses connections or belongs to another process. The rank keeps looking and finds the new
    one."""
    store = HashStore()
    with socket.create_server(("127.0.0.1", 0)) as other:
        old = tcp_bootstrap._Endpoint("127.0.0.1", other.getsockname()[1], b"k" * 16, b"a" * 16)
        store.set(tcp_bootstrap._KEY, msgspec.json.encode(old).decode())
        looking = threads.submit(connect, store, 1)
        caller, _ = other.accept()
        with caller:
            assert caller.recv(100).startswith(old.token)
            caller.sendall(b"b" * 16)
    connections = accept(threads, store, 2).result()
    close(connections, looking.result())


def test_ranks_that_do_not_come(threads: ThreadPoolExecutor) -> None:
    store = HashStore()
    accepting = accept(threads, store, 4, timeout_s=1)
    link = connect(store, 2)
    with pytest.raises(RankFailure, match=r"ranks 1, 3 did not connect to 127\.0\.0\.1:\d+ within 1 s"):
        accepting.result()
    with pytest.raises(ConnectionError):
        link.receive()
    link.close()


def test_a_rank_0_that_is_not_there() -> None:
    store = HashStore()
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    store.set(
        tcp_bootstrap._KEY,
        msgspec.json.encode(tcp_bootstrap._Endpoint("127.0.0.1", port, b"k" * 16, b"a" * 16)).decode(),
    )
    with pytest.raises(CollectiveError, match=f"rank 0 is not at 127.0.0.1:{port}: .*refused"):
        connect(store, 1, timeout_s=0.1)


def test_a_link_over_tcp_notices_silence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as end:
        Link(end, send_timeout_s=8)
        assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 8000
        assert end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 2


def test_the_place_of_a_process() -> None:
    place = read_torchrun_env(ENVIRONMENT)
    assert place == TorchrunEnv(3, 4, 1, 2, "127.0.0.1", 29500, hosts_store=False)
    assert not place.one_host
    assert place.address() == "127.0.0.1"
    alone = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "False"}
    assert read_torchrun_env(ENVIRONMENT | alone).hosts_store
    assert read_torchrun_env(ENVIRONMENT | alone).one_host


@pytest.mark.parametrize("name", sorted(ENVIRONMENT.keys() - {"TORCHELASTIC_USE_AGENT_STORE"}))
def test_no_place_without_torchrun(name: str) -> None:
    with pytest.raises(TorchrunEnvError, match=f"^{name} is not set: start this program with torchrun$"):
        read_torchrun_env({key: value for key, value in ENVIRONMENT.items() if key != name})


@pytest.mark.parametrize(
    ("wrong", "named"),
    [({"RANK": "x"}, "RANK is 'x'"), ({"RANK": "4"}, "rank 4 of 4"), ({"LOCAL_RANK": "2"}, "2 of 2 on this host")],
)
def test_places_that_cannot_be(wrong: dict[str, str], named: str) -> None:
    with pytest.raises(TorchrunEnvError, match=named):
        read_torchrun_env(ENVIRONMENT | wrong)
