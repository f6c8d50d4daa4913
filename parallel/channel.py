"""Byte frames between rank 0 and every other rank, both ways: one stream socket per rank.

The content is opaque here. A frame is its length, 8 bytes little-endian, followed by its bytes.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
from collections.abc import Mapping

_LENGTH = struct.Struct("<Q")
_CHUNK = 1 << 16
_GONE = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR


class Disconnected(ConnectionError):
    """The other end is gone, or has stopped reading."""


class Link:
    """One end of a connection; owns the socket."""

    def __init__(self, connection: socket.socket, send_timeout_s: float | None = None) -> None:
        """send_timeout_s: a peer that reads nothing for this long counts as gone, and so does one whose host does not
        answer; None: wait forever."""
        self._socket = connection
        self._buffer = bytearray()
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if send_timeout_s is not None:
            seconds, rest = divmod(send_timeout_s, 1)
            # Not settimeout: it would also apply to `receive`, and cost a poll before every call.
            limit = struct.pack("ll", int(seconds), int(rest * 1e6))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            if connection.family != socket.AF_UNIX:
                _enable_keepalive(connection, send_timeout_s)

    @classmethod
    def from_stdin(cls) -> Link:
        """Wrap the socket that parallel.launch passes as standard input; this process exits with its peer."""
        link = cls(socket.socket(fileno=0))
        link.exit_with_peer()
        return link

    def exit_with_peer(self) -> None:
        """Exit this process as soon as the peer is gone, even in the middle of other work. The process must own nothing
        that needs cleanup."""
        threading.Thread(target=self._exit_when_gone, daemon=True).start()

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, data: bytes) -> None:
        """Send one frame. Raises Disconnected."""
        try:
            self._socket.sendall(_LENGTH.pack(len(data)) + data)
        except OSError as error:
            raise Disconnected(str(error)) from error

    def receive(self) -> bytes:
        """Wait for one frame. Raises Disconnected."""
        self._fill(_LENGTH.size)
        end = _LENGTH.size + _LENGTH.unpack_from(self._buffer)[0]
        self._fill(end)
        frame = bytes(memoryview(self._buffer)[_LENGTH.size : end])
        del self._buffer[:end]
        return frame

    @property
    def pending(self) -> bool:
        """Whether data is buffered, so that `receive` may find a frame although the socket is not readable."""
        return bool(self._buffer)

    def _fill(self, size: int) -> None:
        while len(self._buffer) < size:
            try:
                data = self._socket.recv(max(_CHUNK, size - len(self._buffer)))
            except OSError as error:
                raise Disconnected(str(error)) from error
            if not data:
                raise Disconnected("the other end closed the connection")
            self._buffer += data

    def _exit_when_gone(self) -> None:
        poll = select.poll()
        poll.register(self._socket, _GONE)
        poll.poll()
        os._exit(1)

    def close(self) -> None:
        self._socket.close()


def _enable_keepalive(connection: socket.socket, timeout_s: float) -> None:
    """Make a TCP connection fail once the other host has answered nothing for timeout_s, as after a power loss or with
    the cable unplugged. Options that the system lacks are skipped."""
    probe = max(1, int(timeout_s / 4))
    options = {
        "TCP_KEEPIDLE": probe,
        "TCP_KEEPINTVL": probe,
        "TCP_KEEPCNT": 3,
        "TCP_USER_TIMEOUT": max(1, int(timeout_s * 1000)),
    }
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in options.items():
        if (option := getattr(socket, name, None)) is not None:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)


class Channel:
    """Rank 0's end: the links to all other ranks."""

    def __init__(self, links: Mapping[int, Link]) -> None:
        """links: by rank."""
        self._links = dict(links)
        self._rank_of = {link.fileno(): rank for rank, link in self._links.items()}
        self._poll = select.poll()
        for fd in self._rank_of:
            self._poll.register(fd, select.POLLIN)

    @property
    def open(self) -> set[int]:
        """Ranks still connected; `broadcast`, `send` and `frames` drop those they find gone."""
        return set(self._rank_of.values())

    def broadcast(self, data: bytes) -> None:
        """Send one frame to every rank. A rank that is gone, or does not read, drops out of `open`."""
        for rank, link in self._links.items():
            try:
                link.send(data)
            except Disconnected:
                self._forget(rank)

    def send(self, rank: int, data: bytes) -> None:
        """Send one frame to one rank; see `broadcast`."""
        try:
            self._links[rank].send(data)
        except Disconnected:
            self._forget(rank)

    def frames(self, timeout_s: float) -> list[tuple[int, bytes | None]]:
        """Wait at most timeout_s for frames of any rank. Returns (rank, frame), or (rank, None) once a rank is gone."""
        found: list[tuple[int, bytes | None]] = []
        for fd, _ in self._poll.poll(timeout_s * 1000):
            rank = self._rank_of[fd]
            link = self._links[rank]
            try:
                found.append((rank, link.receive()))
                while link.pending:
                    found.append((rank, link.receive()))
            except Disconnected:
                self._forget(rank)
                found.append((rank, None))
        return found

    def close(self) -> None:
        for link in self._links.values():
            link.close()

    def _forget(self, rank: int) -> None:
        fd = self._links[rank].fileno()
        if self._rank_of.pop(fd, None) is not None:
            self._poll.unregister(fd)
