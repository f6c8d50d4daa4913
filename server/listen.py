"""The socket that the server listens on."""

from __future__ import annotations

import socket

from engine.config.deployment import ConfigError


def listen(host: str, port: int) -> socket.socket:
    """Create a bound TCP socket; port 0 picks a free port. Raises ConfigError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(f"server: cannot listen on {host}:{port}: {error.strerror or error}") from None
