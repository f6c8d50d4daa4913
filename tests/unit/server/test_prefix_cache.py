"""The prefix cache in requests and answers: salts, cached tokens, and its reset."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import msgspec
import pytest

from engine.messages import AddRequest, RequestOutput
from server.app import create_app
from server.bodies.fields import choice_seed
from server.generation import Usage
from server.routes.openapi import document
from tests.support.app import server
from tests.support.contract import CHAT, COMPLETIONS, USER
from tests.support.fake_engine import PAGE_SIZE

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


LONG = [
    (COMPLETIONS, {"prompt": list(range(10, 50))}),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 30}]}),
]
"""Prompts of some pages."""


@pytest.mark.parametrize(("path", "body"), LONG)
def test_usage_has_the_cached_tokens(directory: Path, path: str, body: Any) -> None:
    async def main() -> None:
        async with server(directory) as (http, _, _):
            answers = []
            for fields in ({}, {}, {"cache_salt": "other"}, {"cache_salt": "other"}):
                answers.append((await http.post(path, json={**body, **fields, "seed": 1, "max_tokens": 4})).json())
            usages = [answer["usage"] for answer in answers]
            found = (usages[0]["prompt_tokens"] - 1) // PAGE_SIZE * PAGE_SIZE
            assert found > 0
            cached = [usage.pop("prompt_tokens_details") for usage in usages]
            assert cached == [{"cached_tokens": count} for count in (0, found, 0, found)]
            assert all(usage == usages[0] for usage in usages)
            assert all(answer["choices"] == answers[0]["choices"] for answer in answers)

    asyncio.run(main())


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize(("path", "body"), LONG)
def test_streamed_usage_has_the_cached_tokens(directory: Path, path: str, body: Any, continuous: bool) -> None:
    async def main() -> None:
        async with server(directory) as (http, _, _):
            asked = {**body, "seed": 1, "max_tokens": 8}
            await http.post(path, json=asked)
            whole = (await http.post(path, json=asked)).json()["usage"]
            options = {"include_usage": True, "continuous_usage_stats": continuous}
            answer = await http.post(path, json={**asked, "stream": True, "stream_options": options})
            *content, last = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
            assert last["usage"] == whole
            assert whole["prompt_tokens_details"]["cached_tokens"] > 0
            told = [chunk["usage"]["prompt_tokens_details"] for chunk in content if chunk["usage"]]
            # The number is known from the first token on; a chat's stream begins before it, with the role.
            silent = [{"cached_tokens": 0}] if continuous and path == CHAT else []
            count = len(content) - len(silent) if continuous else 0
            assert told == silent + [whole["prompt_tokens_details"]] * count

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_counts_once_however_many_choices_it_has(directory: Path, stream: bool) -> None:
    """The first choice finds 16 or 32 tokens in the cache, the others all that the first has computed."""

    async def main() -> None:
        async with server(directory) as (http, client, _):
            original = client.generate

            async def shared(request: AddRequest) -> AsyncGenerator[RequestOutput, None]:
                before = [each.prompt for each in client.requests]
                found = request.prompt[0] if request.prompt not in before else 48
                async for output in original(request):
                    output.cached_tokens = 0 if output.queued else found  # in every output, or in the first: no matter
                    yield output

            client.generate = shared  # type: ignore[method-assign]
            prompts = [[16, *range(60, 109)], [32, *range(60, 109)]]
            body = {"prompt": prompts, "n": 3, "max_tokens": 5, "stream": stream}
            if stream:
                body["stream_options"] = {"include_usage": True}
            answer = await http.post(COMPLETIONS, json=body)
            usage = json.loads(answer.text.split("\n\n")[-3][6:])["usage"] if stream else answer.json()["usage"]
            assert usage["prompt_tokens"] == 100
            assert usage["prompt_tokens_details"] == {"cached_tokens": 48}

    asyncio.run(main())


def test_the_access_log_has_the_cached_tokens(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with server(directory) as (http, _, _):
            for _ in range(2):
                await http.post(COMPLETIONS, json={"prompt": list(range(10, 50)), "max_tokens": 2})

    caplog.set_level("INFO", "server.observe.access_log")
    asyncio.run(main())
    facts = [record.__dict__["facts"] for record in caplog.records]
    assert [(fact["prompt_tokens"], fact["cached_tokens"]) for fact in facts] == [(40, 0), (40, 32)]


def test_openapi_has_salts_and_cached_tokens() -> None:
    schemas = document("1")["components"]["schemas"]
    for name in ("CompletionRequest", "ChatRequest"):
        salt, null = schemas[name]["properties"]["cache_salt"]["anyOf"]
        assert (salt, null) == ({"type": "string", "minLength": 1, "maxLength": 1024}, {"type": "null"})
    validator = jsonschema.Draft202012Validator(schemas["Usage"])
    usage = Usage(3, cached_tokens=2).as_dict()
    assert validator.is_valid(usage)
    del usage["prompt_tokens_details"]
    assert not validator.is_valid(usage)


RESET = "/reset_prefix_cache"


def test_a_reset(directory: Path) -> None:
    async def main() -> None:
        async with server(directory) as (http, _, _):

            async def cached() -> int:
                answer = await http.post(COMPLETIONS, json={"prompt": list(range(10, 50)), "max_tokens": 2})
                found: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
                return found

            assert [await cached(), await cached()] == [0, 32]
            answer = await http.post(RESET)
            assert (answer.status_code, answer.content) == (200, b"")
            assert [await cached(), await cached()] == [0, 32]
            assert (await http.get(RESET)).status_code == 405

    asyncio.run(main())


def test_a_reset_without_an_engine(directory: Path) -> None:
    async def main() -> None:
        async with server(directory) as (http, client, service):
            client.down = "rank 1 was killed"
            for code in ("engine_restarting", "engine_dead", "loading"):
                answer = await http.post(RESET)
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, code)
                client.dead = "it broke"
                if code == "engine_dead":
                    service.client = None

    asyncio.run(main())


def test_a_reset_needs_a_key(directory: Path) -> None:
    async def main() -> None:
        async with server(directory) as (_, client, service):
            transport = httpx.ASGITransport(create_app(service, frozenset({"key"})))
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
                client.engine.prefix_cache.pages.add(("", (1,)))
                assert (await http.post(RESET)).status_code == 401
                assert client.engine.prefix_cache.pages
                assert (await http.post(RESET, headers={"Authorization": "Bearer key"})).status_code == 200
                assert not client.engine.prefix_cache.pages

    asyncio.run(main())
