"""How ranks of several hosts come by their links to rank 0.

Rank 0 opens a TCP port and writes into a store that all can reach where it is, and two secrets. A rank that connects
says the first one and who it is; rank 0 answers with the second. So neither can take somebody else for the other: not a
stranger, and not what a group that has ended left in the store, which outlives a restart. The first secret also names
the part of the store that is this group's own.
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

_KEY = "magicdec/door"
_SECRET_BYTES = 16
_HELLO = struct.Struct(f"<{_SECRET_BYTES}sI64s")
"""The first secret, the rank, the name of its host padded with zeros."""
_PATIENCE_S = 5.0
"""How long a connection may take to say who it is, or an answer to come."""
_RETRY_S = 0.2


class _Door(msgspec.Struct):
    """Where rank 0 is, and how the two know each other."""

    address: str
    port: int
    knock: bytes
    answer: bytes

    def part_of(self, store: Store) -> Store:
        return PrefixStore(f"magicdec/{self.knock.hex()}", store)


class Guests(msgspec.Struct):
    """Who has come to rank 0."""

    links: dict[int, Link]
    """By rank; the receiver's to close."""
    hosts: dict[int, str]
    """Where they run, by rank."""
    store: Store
    """What only this group uses of the store."""


def receive(store: Store, address: str, size: int, *, timeout_s: float, link_timeout_s: float) -> Guests:
    """Rank 0: wait on a free port of `address`, one of this host's, until ranks 1 … size - 1 have come.

    link_timeout_s: a rank that takes nothing, or whose host does not answer, for this long counts as gone.
    Raises RankFailure if they do not come within timeout_s.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family, backlog=size) as listener:
        port = listener.getsockname()[1]
        door = _Door(address, port, secrets.token_bytes(_SECRET_BYTES), secrets.token_bytes(_SECRET_BYTES))
        store.set(_KEY, msgspec.json.encode(door).decode())
        absent = set(range(1, size))
        guests = Guests({}, {}, door.part_of(store))
        try:
            with _Doorkeeper(listener, door, absent) as keeper:
                deadline = time.monotonic() + timeout_s
                while absent:
                    if (left := deadline - time.monotonic()) <= 0:
                        names = f"rank{'s' * (len(absent) > 1)} {', '.join(map(str, sorted(absent)))}"
                        raise RankFailure(f"{names} did not come to {address}:{port} within {timeout_s:g} s")
                    for rank, host, connection in keeper.admitted(min(left, _RETRY_S)):
                        guests.links[rank], guests.hosts[rank] = Link(connection, link_timeout_s), host
        except BaseException:
            for link in guests.links.values():
                link.close()
            raise
    return guests


class _Doorkeeper:
    """Hears all who connect side by side, so that one who says nothing holds up nobody."""

    def __init__(self, listener: socket.socket, door: _Door, absent: set[int]) -> None:
        """absent: the ranks to admit; those who come are taken out."""
        self._listener, self._door, self._absent = listener, door, absent
        self._callers: dict[socket.socket, tuple[bytearray, float]] = {}  # what each has said, and until when it may
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)

    def __enter__(self) -> _Doorkeeper:
        return self

    def __exit__(self, *_: object) -> None:
        for caller in list(self._callers):
            self._release(caller).close()
        self._selector.close()

    def admitted(self, timeout_s: float) -> list[tuple[int, str, socket.socket]]:
        """Wait at most this long for something; returns rank, host and connection of those who may come in."""
        found = []
        for key, _ in self._selector.select(timeout_s):
            assert isinstance(key.fileobj, socket.socket)
            if key.fileobj is self._listener:
                self._accept()
            elif (guest := self._hear(key.fileobj)) is not None:
                found.append(guest)
        now = time.monotonic()
        for caller in [caller for caller, (_, until) in self._callers.items() if now > until]:
            self._release(caller).close()
        return found

    def _accept(self) -> None:
        try:
            caller, _ = self._listener.accept()
        except OSError:  # it has left again
            return
        caller.setblocking(False)
        self._callers[caller] = bytearray(), time.monotonic() + _PATIENCE_S
        self._selector.register(caller, selectors.EVENT_READ)

    def _hear(self, caller: socket.socket) -> tuple[int, str, socket.socket] | None:
        said, _ = self._callers[caller]
        try:
            data = caller.recv(_HELLO.size - len(said))
        except OSError:
            data = b""
        said += data
        if data and len(said) < _HELLO.size:
            return None
        self._release(caller)
        if data:
            knock, rank, host = _HELLO.unpack(said)
            if hmac.compare_digest(knock, self._door.knock) and rank in self._absent:
                caller.setblocking(True)
                try:
                    caller.sendall(self._door.answer)
                except OSError:
                    pass
                else:
                    self._absent.remove(rank)
                    return rank, host.rstrip(b"\0").decode(errors="replace"), caller
        caller.close()
        return None

    def _release(self, caller: socket.socket) -> socket.socket:
        self._selector.unregister(caller)
        del self._callers[caller]
        return caller


def visit(store: Store, rank: int, *, timeout_s: float, link_timeout_s: float) -> tuple[Link, Store]:
    """Any other rank: find rank 0. Returns the link to it, and what only this group uses of the store.

    Raises CollectiveError if it is not found within timeout_s, or the store is out of reach.
    """
    hello = socket.gethostname().encode()[:64]
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            door = msgspec.json.decode(store.get(_KEY), type=_Door)  # waits until there is one
        except RuntimeError as error:
            raise CollectiveError(f"rank 0 has not said where it is: {error}") from error
        reason = "it does not know this group"
        try:
            connection = socket.create_connection((door.address, door.port), timeout=_PATIENCE_S)
            try:
                connection.sendall(_HELLO.pack(door.knock, rank, hello))
                if connection.recv(_SECRET_BYTES, socket.MSG_WAITALL) == door.answer:
                    connection.settimeout(None)
                    return Link(connection, link_timeout_s), door.part_of(store)
            except BaseException:
                connection.close()
                raise
            connection.close()
        except OSError as error:
            reason = str(error)
        if time.monotonic() > deadline:
            raise CollectiveError(f"rank 0 is not at {door.address}:{door.port}: {reason}")
        time.sleep(_RETRY_S)
