"""API keys, origins, certificates, slow and oversized requests, and their log entries, over real sockets."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.servers import PATIENCE_S, PLAIN, TINY_SETTINGS, Server, eventually, start

COMPLETIONS = "/v1/completions"
BODY = {"prompt": "the secret word is swordfish", "max_tokens": 3}
KEYS = ("first-key", "second-key")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Server]:
    """Server with API keys, a CORS origin, short time-outs and a JSON log."""
    directory = tmp_path_factory.mktemp("guarded")
    keys = directory / "keys"
    keys.write_text(f"# for tests\n{KEYS[1]}\n\n", encoding="utf-8")
    settings = {
        "api_keys_file": str(keys),
        "log_format": "json",
        "cors_origins": ["https://page.example"],
        "head_timeout_s": 1.0,
        "body_timeout_s": 1.0,
        "max_queued_tokens": 300,
    }
    server = start(directory, tiny_model, "--api-key", KEYS[0], config={**TINY_SETTINGS, "server": settings})
    yield server
    server.stop()


def ask(server: Server, path: str = COMPLETIONS, *, key: str | None = KEYS[0], **options: Any) -> httpx.Response:
    headers: dict[Any, Any] = {} if key is None else {b"Authorization": f"Bearer {key}".encode()}
    method = "POST" if path == COMPLETIONS else "GET"
    body = BODY if method == "POST" else None
    headers |= options.pop("headers", {})
    return httpx.request(method, server.url + path, json=body, headers=headers, **PLAIN, **options)


@pytest.mark.parametrize("key", KEYS)
def test_keys_open_every_route(guarded: Server, key: str) -> None:
    assert ask(guarded, key=key).status_code == 200
    for path in ("/v1/models", "/version", "/load"):
        assert ask(guarded, path, key=key).status_code == 200


@pytest.mark.parametrize("key", [None, "third-key", KEYS[0][:-1], KEYS[0] + "x", "ключ"])
def test_others_open_none_but_the_watched(guarded: Server, key: str | None) -> None:
    for path in (
        COMPLETIONS,
        "/v1/models",
        "/version",
        "/load",
        "/reset_prefix_cache",
        "/pause",
        "/update_weights",
        "/nowhere",
    ):
        answer = ask(guarded, path, key=key)
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert answer.json()["error"]["code"] == "invalid_api_key"
    for path in ("/health", "/ready", "/metrics"):
        assert ask(guarded, path, key=key).status_code == 200


def test_other_schemes_and_two_keys_are_refused(guarded: Server) -> None:
    assert ask(guarded, key=None, headers={"Authorization": f"Basic {KEYS[0]}"}).status_code == 401
    two = [("Authorization", f"Bearer {KEYS[0]}"), ("Authorization", f"Bearer {KEYS[1]}")]
    answer = httpx.get(f"{guarded.url}/v1/models", headers=two, **PLAIN)
    assert answer.status_code == 401


def test_pages_of_an_origin_may_ask(guarded: Server) -> None:
    preflight = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    answer = httpx.options(guarded.url + COMPLETIONS, headers=preflight, **PLAIN)
    assert answer.headers["access-control-allow-origin"] == "https://page.example"
    seen = ask(guarded, headers={"Origin": "https://page.example"}).headers
    assert seen["access-control-allow-origin"] == "https://page.example"
    assert seen["access-control-expose-headers"] == "X-Request-Id, Retry-After"
    other = ask(guarded, headers={"Origin": "https://other.example"})
    assert "access-control-allow-origin" not in other.headers


# -- slow and large ----------------------------------------------------------------------------------------------------


def connect(server: Server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    made = socket.create_connection((host, int(port)), timeout=PATIENCE_S)
    made.settimeout(PATIENCE_S)
    return made


def everything(connection: socket.socket) -> bytes:
    """Receive until the server closes the connection."""
    found = b""
    try:
        while more := connection.recv(65536):
            found += more
    except ConnectionResetError:
        pass
    return found


HEAD = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEYS[0]}\r\n".encode()


def test_headers_that_trickle(guarded: Server) -> None:
    with connect(guarded) as connection:
        for byte in HEAD[:5]:
            connection.send(bytes([byte]))
            time.sleep(0.1)
        said = everything(connection)
    assert b"408 Request Timeout" in said
    assert b"request_timeout" in said


def test_a_connection_that_says_nothing(guarded: Server) -> None:
    with connect(guarded) as connection:
        assert everything(connection) == b""


def test_a_body_that_trickles(guarded: Server) -> None:
    with connect(guarded) as connection:
        connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\n{")
        said = everything(connection)
    assert b" 408 " in said.split(b"\r\n")[0]
    assert b"the body did not arrive within 1 s" in said


def test_a_later_request_has_as_long(guarded: Server) -> None:
    """Time-outs are per request, not per connection."""
    with httpx.Client(base_url=guarded.url, headers={"Authorization": f"Bearer {KEYS[0]}"}, verify=False) as client:
        for _ in range(3):
            assert client.get("/version", timeout=PATIENCE_S).status_code == 200
            time.sleep(0.7)


@pytest.mark.parametrize("end", [b"", b"\r\n\r\n"])
def test_headers_that_are_too_large(guarded: Server, end: bytes) -> None:
    with connect(guarded) as connection:
        connection.sendall(HEAD + b"X-Long: " + b"x" * 100_000 + end)
        said = everything(connection)
    assert b" 431 " in said.split(b"\r\n")[0]


def test_without_a_length(guarded: Server) -> None:
    """Chunked bodies are read to their end. A body with neither a length nor chunks is not read."""
    body = json.dumps(BODY).encode()
    with connect(guarded) as connection:
        chunks = f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"
        connection.sendall(HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks)
        assert b" 200 " in everything(connection).split(b"\r\n")[0]
    with connect(guarded) as connection:
        connection.sendall(HEAD + b"Connection: close\r\n\r\n" + body)
        assert b" 400 " in everything(connection).split(b"\r\n")[0]


def test_a_queue_of_tokens(guarded: Server) -> None:
    """An idle server accepts a prompt that is longer than the queue; requests after it are refused."""
    headers = {"Authorization": f"Bearer {KEYS[0]}"}
    long = {"prompt": [5] * 350, "max_tokens": 1500, "ignore_eos": True, "stream": True}
    with (
        httpx.Client(base_url=guarded.url, headers=headers, **PLAIN) as client,
        client.stream("POST", COMPLETIONS, json=long) as running,
    ):
        lines = running.iter_lines()
        next(lines)
        refused = client.post(COMPLETIONS, json=BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
    eventually(lambda: ask(guarded).status_code == 200)


# -- the log -----------------------------------------------------------------------------------------------------------


def test_the_log_says_what_was_asked_and_no_more(guarded: Server) -> None:
    answer = ask(guarded, headers={"X-Request-Id": "from-the-client"})
    ask(guarded, key="wrong-key")
    ask(guarded, "/v1/models/a%0Ab%1b[2J")
    eventually(lambda: "[2J" in guarded.log.read_text())
    lines = [json.loads(line) for line in guarded.log.read_text().splitlines()]
    (mine,) = [line for line in lines if line.get("id") == answer.json()["id"]]
    assert (mine["status"], mine["path"], mine["completion_tokens"]) == (200, COMPLETIONS, 3)
    assert (mine["request_id"], mine["id"]) == ("from-the-client", "cmpl-from-the-client")
    assert mine["prompt_tokens"] == answer.json()["usage"]["prompt_tokens"]
    assert 0 < mine["first_token_seconds"] <= mine["seconds"]
    assert {line["status"] for line in lines if "status" in line} >= {200, 401, 404, 408, 503}
    text = guarded.log.read_text()
    for secret in ("swordfish", "wrong-key", *KEYS):
        assert secret not in text
    assert "\x1b" not in text


# -- certificates, and settings that are wrong -------------------------------------------------------------------------


def test_https(tmp_path: Path, tiny_model: Path) -> None:
    made = ("-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "cert"), "-days", "2", "-subj", "/CN=localhost")
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        *made,
        "-addext",
        "subjectAltName=IP:127.0.0.1",
    ]
    subprocess.run(command, check=True, capture_output=True)
    (tmp_path / "s").mkdir()
    flags = ("--tls-cert", str(tmp_path / "cert"), "--tls-key", str(tmp_path / "key"))
    server = start(tmp_path / "s", tiny_model, *flags)
    try:
        context = ssl.create_default_context(cafile=str(tmp_path / "cert"))
        answer = httpx.post(server.url + COMPLETIONS, json=BODY, verify=context, timeout=PATIENCE_S)
        assert answer.status_code == 200
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health", timeout=PATIENCE_S)  # signed by an unknown authority
    finally:
        server.stop()
