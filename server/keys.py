"""API keys, and the routes that need none."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from engine.config.deployment import ConfigError, ServerConfig
from server.errors import ApiError

_OWNER = "magicdec.owner"

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


def check_weight_updates(settings: ServerConfig, keys: frozenset[str]) -> None:
    """Raise ConfigError if anyone could change the weights."""
    if settings.weight_updates and not keys:
        raise ConfigError(
            "server.weight_updates: whoever reaches the port could change the weights; set server.api_keys_file or "
            "server.api_keys (--api-keys-file, --api-key)"
        )


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
            "a valid API key is needed: Authorization: Bearer … or x-api-key: …",
            status=401,
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await error.response(scope["path"])(scope, receive, send)

    def _known(self, scope: Scope) -> bool:
        """Check the key in a time that reveals nothing about the keys: compare the digests of all of them."""
        scheme, _, token = _only(scope, b"authorization").partition(b" ")
        given = [token if scheme.lower() == b"bearer" else b"", _only(scope, b"x-api-key")]
        digests = [_digest(key.strip()) for key in given]
        known = [digest for digest in digests for each in self._digests if hmac.compare_digest(digest, each)]
        scope[_OWNER] = known[0] if known else b""
        return bool(known)


def _only(scope: Scope, header: bytes) -> bytes:
    """Return the value of a header; empty if there is none, or if there are several."""
    found: list[bytes] = [value for name, value in scope["headers"] if name == header]
    return found[0] if len(found) == 1 else b""


def owner_of(scope: Scope) -> bytes:
    """Return what stands for the key of a request that ApiKeys has let pass; empty: no key is needed."""
    found: bytes = scope.get(_OWNER, b"")
    return found


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
