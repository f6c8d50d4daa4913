"""API keys, in either of two headers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from server.app import create_app
from tests.support.app import server

MESSAGES = "/v1/messages"
BODY = {"max_tokens": 2, "messages": [{"role": "user", "content": "a"}]}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"x-api-key": "key-a"}, 200),
        ({"x-api-key": "key-a", "authorization": "Bearer other"}, 200),
        ({"authorization": "Bearer key-b", "anthropic-version": "2023-06-01"}, 200),
        ({"x-api-key": "key"}, 401),
        ({"x-api-key": ""}, 401),
        ({"authorization": "Basic key-a"}, 401),
        ({}, 401),
    ],
)
def test_keys(directory: Path, headers: dict[str, str], status: int) -> None:
    async def main() -> None:
        async with server(directory) as (_, _, service):
            transport = httpx.ASGITransport(create_app(service, frozenset({"key-a", "key-b"})))
            async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as http:
                answer = await http.post(MESSAGES, json=BODY)
                assert answer.status_code == status
                if status == 401:
                    assert answer.json()["error"]["type"] == "authentication_error"
                    answer = await http.get("/v1/models")
                    assert answer.json()["error"]["code"] == "invalid_api_key"

    asyncio.run(main())
