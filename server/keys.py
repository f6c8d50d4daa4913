"""API keys, and the routes that need none."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from engine.config.deployment import ConfigError
from server.errors import ApiError

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/metrics"})
"""Routes without a key, for monitoring; GET / is a page without data."""


def read_keys(given: Iterable[str], file: str | None) -> frozenset[str]:
    """Return the keys in `given` and in `file`: one per line, # starts a comment line. Raises ConfigError."""
    keys = list(given)
    if file is not None:
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"server.api_keys_file: cannot read {file}: {error}") from None
        keys += [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not keys:
            raise ConfigError(f"server.api_keys_file: {file} has no keys")
    for key in keys:
        if not key.isascii() or not key.isprintable() or " " in key or not key:
            raise ConfigError("server.api_keys: keys are printable ASCII without spaces")
    return frozenset(keys)


class ApiKeys:
    """ASGI middleware that passes requests with a valid key, and all to OPEN_PATHS; it answers others with 401."""

    def __init__(self, app: ASGIApp, keys: frozenset[str]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        preflight = scope["type"] == "http" and scope["method"] == "OPTIONS"  # CORS preflights carry no key
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or preflight or self._known(scope):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            "a valid API key is needed: Authorization: Bearer …",
            status=401,
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await error.response()(scope, receive, send)

    def _known(self, scope: Scope) -> bool:
        """Check the key in a time that reveals nothing about the keys: compare the digests of all of them."""
        found = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, given = (found[0] if len(found) == 1 else b"").partition(b" ")
        digest = _digest(given.strip())
        matches = [hmac.compare_digest(digest, each) for each in self._digests]
        return any(matches) and scheme.lower() == b"bearer"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
