"""What travels over a connection: when an answer begins, what keeps it open, and what ends it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.contract import CHAT, COMPLETIONS, USER
from tests.support.servers import PATIENCE_S, Server, start

KEY = "the-key"
HEADERS = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def transport(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Server]:
    """Server with one row, a key, and pings that come soon."""
    engine = {"threads": 1, "cache": {"num_pages": 300}, "scheduler": {"max_rows": 1}, "speculation": {"gamma": 0}}
    config = {"engine": engine, "server": {"api_keys": [KEY], "ping_s": 0.05}}
    running = start(tmp_path_factory.mktemp("transport"), tiny_model, config=config)
    yield running
    running.stop()


def test_a_stream_begins_and_pings_while_the_request_waits(transport: Server) -> None:
    """The only row is taken, so there is no token, but there are headers, the role and pings."""
    long = {"prompt": "x", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    short = {"messages": USER, "max_tokens": 3, "ignore_eos": True, "stream": True}
    with (
        httpx.Client(base_url=transport.url, headers=HEADERS, timeout=PATIENCE_S) as client,
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
