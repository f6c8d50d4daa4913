"""The prefix cache in requests and answers: salts, cached tokens, and its reset."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from server.bodies.fields import choice_seed
from tests.support.app import server
from tests.support.contract import CHAT, COMPLETIONS, USER

ROUTES = [(COMPLETIONS, {"prompt": [10, 11]}), (CHAT, {"messages": USER})]


@pytest.mark.parametrize(("path", "body"), ROUTES)
@pytest.mark.parametrize(
    ("fields", "salt"), [({"cache_salt": "tenant"}, "tenant"), ({"cache_salt": None}, ""), ({}, "")]
)
def test_salts_reach_the_engine(directory: Path, path: str, body: Any, fields: Any, salt: str) -> None:
    async def main() -> None:
        async with server(directory) as (http, client, _):
            assert (await http.post(path, json={**body, **fields, "n": 2, "max_tokens": 2})).status_code == 200
            assert [request.cache_salt for request in client.requests] == [salt, salt]

    asyncio.run(main())


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_an_empty_salt_is_refused(directory: Path, path: str, body: Any) -> None:
    """As vLLM does: an empty salt is probably a variable that was never set."""

    async def main() -> None:
        async with server(directory) as (http, client, _):
            for salt in ("", "x" * 1025):
                answer = await http.post(path, json={**body, "cache_salt": salt})
                assert (answer.status_code, answer.json()["error"]["param"]) == (400, "cache_salt")
            assert client.requests == []

    asyncio.run(main())


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_a_cache_key_has_no_effect(directory: Path, path: str, body: Any) -> None:
    async def main() -> None:
        async with server(directory) as (http, client, _):
            answer = await http.post(path, json={**body, "prompt_cache_key": "user-1", "max_tokens": 2})
            assert answer.status_code == 200
            assert client.requests[0].cache_salt == ""

    asyncio.run(main())


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_choices_are_queued_in_order(directory: Path, path: str, body: Any) -> None:
    """The first choice computes the prompt, so it must be first in the engine's queue; nothing else ties them."""

    async def main() -> None:
        async with server(directory) as (http, client, _):
            assert (await http.post(path, json={**body, "n": 5, "seed": 3, "max_tokens": 2})).status_code == 200
            assert [request.params.seed for request in client.requests] == [choice_seed(3, i) for i in range(5)]
            assert all("share_prompt_with" not in msgspec.to_builtins(request) for request in client.requests)

    asyncio.run(main())
