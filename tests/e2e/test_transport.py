"""What travels over a connection: when an answer begins, what keeps it open, and what ends it."""

from __future__ import annotations

import http.client
import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.contract import CHAT, COMPLETIONS, USER
from tests.support.servers import PATIENCE_S, PLAIN, Server, start

KEY = "the-key"
HEADERS = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def transport(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Server]:
    """Server with one row, a key, and pings that come soon."""
    engine = {"threads": 1, "cache": {"num_pages": 300}, "scheduler": {"max_rows": 1}, "speculation": {"gamma": 0}}
    config = {"engine": engine, "server": {"api_keys": [KEY], "ping_s": 0.05, "keep_alive_s": 0.5}}
    running = start(tmp_path_factory.mktemp("transport"), tiny_model, config=config)
    yield running
    running.stop()


def test_a_stream_begins_and_pings_while_the_request_waits(transport: Server) -> None:
    """The only row is taken, so there is no token, but there are headers, the role and pings."""
    long = {"prompt": "x", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    short = {"messages": USER, "max_tokens": 3, "ignore_eos": True, "stream": True}
    with (
        httpx.Client(base_url=transport.url, headers=HEADERS, **PLAIN) as client,
        client.stream("POST", COMPLETIONS, json=long) as running,
    ):
        others = running.iter_lines()
        next(others)
        with client.stream("POST", CHAT, json=short) as waiting:
            assert waiting.status_code == 200
            lines = waiting.iter_lines()
            assert '"role":"assistant"' in next(lines)
            assert [next(lines) for _ in range(5)] == ["", ": ping", "", ": ping", ""]
            running.close()
            rest = list(lines)
        assert rest[-2:] == ["data: [DONE]", ""]
        assert sum('"finish_reason":"length"' in line for line in rest) == 1


SIZE = 40 * 2**20
"""Bytes of a body that is refused while it is sent."""


def chunks() -> Iterator[bytes]:
    for _ in range(SIZE // 2**16):
        yield bytes(2**16)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(
    ("path", "key", "status", "code"),
    [
        (COMPLETIONS, KEY, 413, "body_too_large"),
        (CHAT, KEY, 413, "body_too_large"),
        (COMPLETIONS, "other", 401, "invalid_api_key"),
        ("/nowhere", KEY, 404, "not_found"),
        ("/version", KEY, 405, "method_not_allowed"),
    ],
)
def test_a_large_body_is_refused_with_an_answer(
    transport: Server, path: str, key: str, status: int, code: str, chunked: bool
) -> None:
    """Clients of the standard library send the whole body before they read the answer."""
    headers = {"Authorization": f"Bearer {key}"} | ({} if chunked else {"Content-Length": str(SIZE)})
    # urllib asks to close the connection, http.client to keep it.
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(transport.url + path, chunks(), headers), timeout=PATIENCE_S)
    connection = http.client.HTTPConnection(transport.url.removeprefix("http://"), timeout=PATIENCE_S)
    connection.request("POST", path, chunks(), headers, encode_chunked=chunked)
    for answer in (caught.value, connection.getresponse()):
        assert answer.status == status
        assert answer.headers["Connection"] == "close"
        assert json.loads(answer.read())["error"]["code"] == code
    connection.close()


def test_head_is_get_without_a_body(transport: Server) -> None:
    for path in ("/health", "/v1/models", "/metrics", "/"):
        answer = httpx.head(transport.url + path, headers=HEADERS, **PLAIN)
        assert (answer.status_code, answer.content) == (200, b"")
        assert int(answer.headers["content-length"]) > 0
    refused = httpx.head(transport.url + COMPLETIONS, headers=HEADERS, **PLAIN)
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")


def test_http_1_0_clients_get_plain_streams(transport: Server) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 3, "ignore_eos": True, "stream": True}).encode()
    head = f"POST {COMPLETIONS} HTTP/1.0\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(transport.address, timeout=PATIENCE_S) as connection:
        connection.sendall(head.encode() + body)
        answer = connection.makefile("rb").read()
    headers, _, text = answer.partition(b"\r\n\r\n")
    assert b"chunked" not in headers
    assert text.startswith(b"data: {")
    assert text.endswith(b"\n\ndata: [DONE]\n\n")


def test_an_idle_connection_is_closed_after_its_time(transport: Server) -> None:
    """Not after 5 s, uvicorn's own limit."""
    with socket.create_connection(transport.address, timeout=PATIENCE_S) as connection:
        began = time.monotonic()
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = connection.makefile("rb").read()
        assert 0.5 <= time.monotonic() - began < 5
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert b"connection: close" not in answer


def test_a_refusal_of_the_connection_returns_the_id_too(transport: Server) -> None:
    """Also one that the application never sees, and one without a key."""
    large = {"X-Request-Id": "my-id", "X-Long": "x" * 70_000}
    for headers, status in ((large, 431), ({"X-Request-Id": "my-id"}, 401)):
        answer = httpx.get(f"{transport.url}/version", headers=headers, **PLAIN)
        assert (answer.status_code, answer.headers["x-request-id"]) == (status, "my-id")
