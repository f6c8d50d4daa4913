"""TCP bootstrap: link the ranks of several hosts to rank 0.

Rank 0 opens a TCP port and publishes its address and two tokens in a store that all ranks can reach. A rank that
connects sends the first token and its number; rank 0 replies with the second token. So neither mistakes a stranger for
the other, and a rank detects an address that an earlier group left in the store, which outlives a restart. The first
token also names this group's own part of the store.

multiprocessing.connection authenticates peers too, but its listener handles one caller at a time and waits for it
without a time-out, so that a caller that connects and stays silent would block the start.
"""

from __future__ import annotations

import hmac
import secrets
import selectors
import socket
import struct
import time

import msgspec
from torch._C._distributed_c10d import PrefixStore, Store

from parallel.channel import Link
from parallel.group import CollectiveError, RankFailure

_KEY = "magicdec/rank-0"
_TOKEN_BYTES = 16
_HELLO = struct.Struct(f"<{_TOKEN_BYTES}sI64s")
"""The first token, the rank, the name of its host padded with zeros."""
_HELLO_TIMEOUT_S = 5.0
"""Time for a connection to send its hello, or for the reply to arrive."""
_RETRY_S = 0.2


class _Endpoint(msgspec.Struct):
    """Address of rank 0's listener, and the tokens by which the two sides identify each other."""

    address: str
    port: int
    token: bytes
    reply_token: bytes

    def namespace(self, store: Store) -> Store:
        """This group's own part of the store."""
        return PrefixStore(f"magicdec/{self.token.hex()}", store)


class Connections(msgspec.Struct):
    """The ranks that connected to rank 0."""

    links: dict[int, Link]
    """Links by rank; the caller closes them."""
    hosts: dict[int, str]
    """Host names, by rank."""
    store: Store
    """This group's own part of the store."""


def accept_ranks(store: Store, address: str, size: int, *, timeout_s: float, link_timeout_s: float) -> Connections:
    """Accept, on rank 0, the connections of ranks 1 … size - 1 on a free port of `address`, one of this host's.

    link_timeout_s: a rank that reads nothing, or whose host does not answer, for this long counts as gone.
    Raises RankFailure if they do not connect within timeout_s.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family, backlog=size) as listener:
        port = listener.getsockname()[1]
        endpoint = _Endpoint(address, port, secrets.token_bytes(_TOKEN_BYTES), secrets.token_bytes(_TOKEN_BYTES))
        store.set(_KEY, msgspec.json.encode(endpoint).decode())
        missing = set(range(1, size))
        connections = Connections({}, {}, endpoint.namespace(store))
        try:
            with _Acceptor(listener, endpoint, missing) as acceptor:
                deadline = time.monotonic() + timeout_s
                while missing:
                    if (left := deadline - time.monotonic()) <= 0:
                        names = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, sorted(missing)))}"
                        raise RankFailure(f"{names} did not connect to {address}:{port} within {timeout_s:g} s")
                    for rank, host, connection in acceptor.accepted(min(left, _RETRY_S)):
                        connections.links[rank], connections.hosts[rank] = Link(connection, link_timeout_s), host
        except BaseException:
            for link in connections.links.values():
                link.close()
            raise
    return connections


class _Acceptor:
    """Reads the hellos of all callers concurrently, so that a silent one blocks nobody."""

    def __init__(self, listener: socket.socket, endpoint: _Endpoint, missing: set[int]) -> None:
        """missing: ranks to accept; those that connect are taken out."""
        self._listener, self._endpoint, self._missing = listener, endpoint, missing
        self._callers: dict[socket.socket, tuple[bytearray, float]] = {}  # bytes received, and the deadline for more
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)

    def __enter__(self) -> _Acceptor:
        return self

    def __exit__(self, *_: object) -> None:
        for caller in list(self._callers):
            self._release(caller).close()
        self._selector.close()

    def accepted(self, timeout_s: float) -> list[tuple[int, str, socket.socket]]:
        """Wait at most timeout_s for events. Returns rank, host and connection of callers that proved who they are."""
        found = []
        for key, _ in self._selector.select(timeout_s):
            assert isinstance(key.fileobj, socket.socket)
            if key.fileobj is self._listener:
                self._accept()
            elif (rank := self._read(key.fileobj)) is not None:
                found.append(rank)
        now = time.monotonic()
        for caller in [caller for caller, (_, deadline) in self._callers.items() if now > deadline]:
            self._release(caller).close()
        return found

    def _accept(self) -> None:
        try:
            caller, _ = self._listener.accept()
        except OSError:  # the caller is gone already
            return
        caller.setblocking(False)
        self._callers[caller] = bytearray(), time.monotonic() + _HELLO_TIMEOUT_S
        self._selector.register(caller, selectors.EVENT_READ)

    def _read(self, caller: socket.socket) -> tuple[int, str, socket.socket] | None:
        received, _ = self._callers[caller]
        try:
            data = caller.recv(_HELLO.size - len(received))
        except OSError:
            data = b""
        received += data
        if data and len(received) < _HELLO.size:
            return None
        self._release(caller)
        if data:
            token, rank, host = _HELLO.unpack(received)
            if hmac.compare_digest(token, self._endpoint.token) and rank in self._missing:
                caller.setblocking(True)
                try:
                    caller.sendall(self._endpoint.reply_token)
                except OSError:
                    pass
                else:
                    self._missing.remove(rank)
                    return rank, host.rstrip(b"\0").decode(errors="replace"), caller
        caller.close()
        return None

    def _release(self, caller: socket.socket) -> socket.socket:
        self._selector.unregister(caller)
        del self._callers[caller]
        return caller


def connect(store: Store, rank: int, *, timeout_s: float, link_timeout_s: float) -> tuple[Link, Store]:
    """Connect to rank 0, from any other rank. Returns the link to it, and this group's own part of the store.

    Raises CollectiveError if that fails for timeout_s, or if the store cannot be reached.
    """
    host = socket.gethostname().encode()[:64]
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            endpoint = msgspec.json.decode(store.get(_KEY), type=_Endpoint)  # waits until there is one
        except RuntimeError as error:
            raise CollectiveError(f"rank 0 has not published its address: {error}") from error
        reason = "it belongs to another group"
        try:
            connection = socket.create_connection((endpoint.address, endpoint.port), timeout=_HELLO_TIMEOUT_S)
            try:
                connection.sendall(_HELLO.pack(endpoint.token, rank, host))
                if connection.recv(_TOKEN_BYTES, socket.MSG_WAITALL) == endpoint.reply_token:
                    connection.settimeout(None)
                    return Link(connection, link_timeout_s), endpoint.namespace(store)
            except BaseException:
                connection.close()
                raise
            connection.close()
        except OSError as error:
            reason = str(error)
        if time.monotonic() > deadline:
            raise CollectiveError(f"rank 0 is not at {endpoint.address}:{endpoint.port}: {reason}")
        time.sleep(_RETRY_S)
