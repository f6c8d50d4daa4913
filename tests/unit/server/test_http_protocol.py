"""Connections over sockets: answers to unfinished and invalid requests, and framing."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import uvicorn
from starlette.types import Message, Receive, Scope, Send

from server import http_protocol
from server.http_protocol import MAX_HEAD_BYTES, protocol

Connect = Callable[[], Any]
POST = b"POST / HTTP/1.1\r\nHost: x\r\n"


ended: list[str] = []
"""How the requests ended that the client left."""


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """/early answers before the body has arrived. /read reads it. /chunks sends two chunks, the second one when the
    body has arrived. /endless sends until the client is gone, and /waits answers nothing until then."""
    headers = []
    if scope["path"] != "/early":
        while (message := await receive())["type"] == "http.request" and message["more_body"]:
            pass
        if message["type"] == "http.disconnect":
            return
    if scope["path"] in ("/endless", "/waits"):
        gone: asyncio.Future[Message] = asyncio.ensure_future(receive())
        if scope["path"] == "/endless":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            while not gone.done():
                await send({"type": "http.response.body", "body": bytes(2**16), "more_body": True})
                await asyncio.sleep(0)
        ended.append((await gone)["type"])
        return
    if scope["path"] != "/chunks":
        headers.append((b"content-length", b"4"))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"ab", "more_body": True})
    if scope["path"] == "/slow":
        await asyncio.sleep(0.1)
    await send({"type": "http.response.body", "body": b"cd"})


@contextlib.asynccontextmanager
async def serving(head_s: float = 5.0, idle_s: int = 60) -> AsyncIterator[Connect]:
    listener = socket.create_server(("127.0.0.1", 0))
    http: Any = protocol(head_s)
    config = uvicorn.Config(app, http=http, ws="none", lifespan="off", log_config=None, timeout_keep_alive=idle_s)
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[assignment, method-assign]
    task = asyncio.create_task(server.serve(sockets=[listener]))
    port = listener.getsockname()[1]
    try:
        yield lambda: asyncio.open_connection("127.0.0.1", port)
    finally:
        server.should_exit = True
        await task


def exchange(*parts: bytes, end: bool = False) -> bytes:
    """Send `parts` over one connection. Returns what the server sends until it ends its side; reading begins after all
    has been sent, and a reset fails. end: end this side too, at once."""

    async def main() -> bytes:
        async with asyncio.timeout(30), serving() as connect:
            reader, writer = await connect()
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0)
            if end:
                writer.write_eof()
            received: bytes = await reader.read()
            writer.close()
            return received

    return asyncio.run(main())


BIG = 2**25


@pytest.mark.parametrize("chunked", [False, True])
def test_an_early_answer_arrives_at_a_client_that_goes_on_sending(chunked: bool) -> None:
    head = POST.replace(b"/ ", b"/early ")
    if chunked:
        body = b"%x\r\n" % BIG + bytes(BIG) + b"\r\n0\r\n\r\n"
        head += b"Transfer-Encoding: chunked\r\n\r\n"
    else:
        body, head = bytes(BIG), head + b"Content-Length: %d\r\n\r\n" % BIG
    answer = exchange(head, body)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"connection: close" in answer
    assert answer.endswith(b"abcd")


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"nonsense\r\n\r\n", b"400"),
        (POST + b"X-Long: " + bytes(MAX_HEAD_BYTES).replace(b"\0", b"x"), b"431"),
        (POST + b"X-Long: " + bytes(MAX_HEAD_BYTES).replace(b"\0", b"x") + b"\r\n\r\n", b"431"),
        (POST + b"Transfer-Encoding: chunked\r\n\r\nnonsense", b"400"),
    ],
)
def test_a_refusal_arrives_at_a_client_that_goes_on_sending(head: bytes, status: bytes) -> None:
    answer = exchange(head, bytes(BIG))
    assert answer.startswith(b"HTTP/1.1 " + status)
    assert answer.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize(("name", "limit"), [("LINGER_BYTES", 2**20), ("LINGER_S", 0.05)])
def test_a_client_that_never_stops_is_cut_off(monkeypatch: pytest.MonkeyPatch, name: str, limit: float) -> None:
    monkeypatch.setattr(http_protocol, name, limit)

    async def main() -> None:
        async with asyncio.timeout(30), serving() as connect:
            _, writer = await connect()
            writer.write(POST.replace(b"/ ", b"/early ") + b"Content-Length: 9999999999\r\n\r\n")

            async def send_for_ever() -> None:
                while True:
                    writer.write(bytes(2**16))
                    await writer.drain()
                    await asyncio.sleep(0.001)

            with pytest.raises(ConnectionError):
                await send_for_ever()

    asyncio.run(main())


def test_a_finished_request_keeps_its_connection() -> None:
    first = POST + b"Content-Length: 2\r\n\r\nxx"
    last = POST + b"Connection: close\r\nContent-Length: 2\r\n\r\nxx"
    answer = exchange(first, first.replace(b"/ ", b"/early "), last)
    assert answer.count(b"HTTP/1.1 200 OK") == 3
    assert answer.count(b"connection: close") == 1


@pytest.mark.parametrize("path", [b"/slow", b"/chunks"])
@pytest.mark.parametrize(
    "second", [b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nX-Long: " + b"x" * MAX_HEAD_BYTES + b"\r\n\r\n"]
)
def test_an_invalid_request_does_not_disturb_the_answer_before_it(path: bytes, second: bytes) -> None:
    """The answer is completed, then the connection is closed."""
    first = b"GET " + path + b" HTTP/1.1\r\nHost: x\r\n\r\n"
    answer = exchange(first + second + first)
    assert answer.count(b"HTTP/1.1") == 1
    assert answer.endswith(b"abcd" if path == b"/slow" else b"2\r\nab\r\n2\r\ncd\r\n0\r\n\r\n")


def test_http_1_0_has_no_chunks() -> None:
    answer = exchange(b"GET /chunks HTTP/1.0\r\n\r\n")
    assert b"chunked" not in answer
    assert answer.endswith(b"\r\n\r\nabcd")


def test_an_offer_of_http_2_is_ignored() -> None:
    """The connection is closed after the answer, since the parser stops at such a request."""
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAA\r\n"
    answer = exchange(POST + offer + b"Content-Length: 2\r\n\r\nxx")
    assert answer.count(b"HTTP/1.1 200 OK") == 1
    assert b"connection: close" in answer
    assert answer.endswith(b"abcd")


def test_a_client_that_ends_its_side_counts_as_gone() -> None:
    """The server cannot tell it from a client that is gone, whose request must end."""
    assert b"cd" not in exchange(b"GET /slow HTTP/1.1\r\nConnection: close\r\n\r\n", end=True)


def test_pipelined_requests_are_answered_in_order() -> None:
    first, last = b"GET /slow HTTP/1.1\r\n\r\n", b"GET /chunks HTTP/1.1\r\nConnection: close\r\n\r\n"
    answer = exchange(first + first + last)
    assert [part.partition(b"\r\n\r\n")[2] for part in answer.split(b"HTTP/1.1 200 OK")[1:]] == [
        b"abcd",
        b"abcd",
        b"2\r\nab\r\n2\r\ncd\r\n0\r\n\r\n",
    ]


GET = b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n"


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("body", [b"", b"Content-Length: 9\r\n\r\n"])
def test_a_client_that_leaves_with_a_request_in_the_queue(body: bytes) -> None:
    """Both end, the one that is being answered and the one that waits."""

    async def main() -> None:
        async with asyncio.timeout(30), serving() as connect:
            ended.clear()
            _, writer = await connect()
            writer.write(GET % b"/waits")
            await asyncio.sleep(0.05)
            writer.write(POST + body if body else GET % b"/read")
            await asyncio.sleep(0.05)
            assert not ended
            writer.close()
            await until(lambda: ended == ["http.disconnect"])

    asyncio.run(main())


def test_a_client_that_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "WRITE_S", 0.2)

    async def main() -> None:
        async with asyncio.timeout(30), serving() as connect:
            ended.clear()
            _, writer = await connect()
            reads, reads_writer = await connect()
            for each in (writer, reads_writer):
                each.write(GET % b"/endless")
            began = asyncio.get_running_loop().time()
            while asyncio.get_running_loop().time() - began < 0.6:
                assert await reads.read(2**20)
            await until(lambda: ended == ["http.disconnect"])  # of the other one
            reads_writer.close()
            writer.close()
            await until(lambda: len(ended) == 2)

    asyncio.run(main())


def test_a_head_that_begins_beside_an_answer() -> None:
    """The answer is completed. On an idle connection, a head that does not end is answered."""

    async def main() -> None:
        async with asyncio.timeout(30), serving(head_s=0.05) as connect:
            reader, writer = await connect()
            writer.write(GET % b"/slow" + b"P")
            assert (await reader.read()).endswith(b"abcd")
            reader, writer = await connect()
            writer.write(GET % b"/read")
            await reader.readuntil(b"abcd")
            writer.write(b"P")
            assert (await reader.read()).startswith(b"HTTP/1.1 408")

    asyncio.run(main())


def test_empty_lines_keep_no_connection() -> None:
    async def main() -> None:
        async with asyncio.timeout(30), serving(idle_s=1) as connect:
            reader, writer = await connect()
            writer.write(GET % b"/read")
            await reader.readuntil(b"abcd")
            writer.write(b"\r\n")
            assert await reader.read() == b""

    asyncio.run(main())


def test_a_head_whose_end_comes_with_a_large_body() -> None:
    size = 2 * MAX_HEAD_BYTES
    head = b"POST /read HTTP/1.1\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % size

    async def main() -> None:
        async with asyncio.timeout(30), serving() as connect:
            reader, writer = await connect()
            writer.write(head[:-1])
            await asyncio.sleep(0.1)
            writer.write(head[-1:] + bytes(size))
            assert (await reader.read()).endswith(b"abcd")

    asyncio.run(main())


@pytest.mark.parametrize(("path", "continues"), [(b"/read", True), (b"/early", False)])
def test_expect_100_continue(path: bytes, continues: bool) -> None:
    """A client that asks first is told to go on only if the body is wanted."""

    async def main() -> None:
        async with asyncio.timeout(30), serving() as connect:
            reader, writer = await connect()
            writer.write(b"POST " + path + b" HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
            line = await reader.readline()
            assert line == (b"HTTP/1.1 100 Continue\r\n" if continues else b"HTTP/1.1 200 OK\r\n")
            if continues:
                writer.write(b"xx")
            assert (await reader.readuntil(b"abcd")).count(b"HTTP/1.1 200 OK") == continues
            writer.close()

    asyncio.run(main())
