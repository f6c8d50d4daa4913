"""Responses are kept for later requests of those who made them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.messages import FINISH_ABORT, AddRequest, RequestOutput
from engine.processes.client import EngineDead
from server.app import create_app
from server.service import Service
from tests.support.app import server
from tests.support.contract import RESPONSES, fault
from tests.support.responses import parse_stream, prompts_of, run_scripted
from tests.support.scripted import ScriptedClient


def test_kept_responses_are_read_listed_and_deleted(directory: Path) -> None:
    async def test(http: httpx.AsyncClient, client: ScriptedClient, service: Service) -> None:
        first = (await http.post(RESPONSES, json={"input": "one"})).json()
        body = {"input": [{"role": "user", "content": "two"}], "previous_response_id": first["id"]}
        second = (await http.post(RESPONSES, json=body)).json()
        assert second["previous_response_id"] == first["id"]
        where = f"{RESPONSES}/{second['id']}"
        assert (await http.get(where)).json() == second
        fault(await http.get(f"{where}?stream=true"), 400)
        fault(await http.get(f"{where}?starting_after=1"), 400, "not_served")
        items = (await http.get(f"{where}/input_items?order=asc")).json()
        texts = [item["content"][0]["text"] for item in items["data"]]
        assert texts == ["one", first["output"][0]["content"][0]["text"], "two"]
        ids = [item["id"] for item in items["data"]]
        assert (items["first_id"], items["last_id"], items["has_more"]) == (ids[0], ids[2], False)
        page = (await http.get(f"{where}/input_items?limit=1&after={ids[2]}")).json()
        assert ([item["id"] for item in page["data"]], page["has_more"]) == ([ids[1]], True)
        fault(await http.get(f"{where}/input_items?limit=0"), 400)
        for limit in ("x", "9" * 5000):
            assert "valid integer" in fault(await http.get(f"{where}/input_items?limit={limit}"), 400)["message"]
        fault(await http.get(f"{where}/input_items?after=x"), 400)
        gone = await http.delete(f"{RESPONSES}/{first['id']}")
        assert gone.json() == {"id": first["id"], "object": "response", "deleted": True}
        fault(await http.get(f"{RESPONSES}/{first['id']}"), 404, "response_not_found")
        fault(await http.delete(f"{RESPONSES}/{first['id']}"), 404, "response_not_found")
        fault(await http.get(f"{RESPONSES}/{first['id']}/input_items"), 404, "response_not_found")
        third = await http.post(RESPONSES, json={"input": "three", "previous_response_id": second["id"]})
        assert third.status_code == 200
        last = prompts_of(client, service)[-1]
        assert [last.index(text) for text in ("one", "two", "three")] == sorted(
            last.index(text) for text in ("one", "two", "three")
        )

    run_scripted(directory, "Fine.", test)


def test_pages_end_where_items_have_the_same_id(directory: Path) -> None:
    async def test(http: httpx.AsyncClient, client: ScriptedClient, service: Service) -> None:
        items = [{"id": "a", "role": "user", "content": "one"}] * 2 + [{"id": "b", "role": "user", "content": "two"}]
        made = (await http.post(RESPONSES, json={"input": items})).json()
        where = f"{RESPONSES}/{made['id']}/input_items?order=asc&limit=1"
        page = (await http.get(f"{where}&after=a")).json()
        assert ([item["id"] for item in page["data"]], page["has_more"]) == (["b"], False)

    run_scripted(directory, "Fine.", test)


def test_what_the_client_does_not_want_kept_is_not(directory: Path) -> None:
    async def test(http: httpx.AsyncClient, client: ScriptedClient, service: Service) -> None:
        response = (await http.post(RESPONSES, json={"input": "one", "store": False})).json()
        assert response["store"] is False
        fault(await http.get(f"{RESPONSES}/{response['id']}"), 404)
        body = {"input": "two", "previous_response_id": response["id"]}
        fault(await http.post(RESPONSES, json=body), 400, "previous_response_not_found")

    run_scripted(directory, "Fine.", test)


def test_a_server_that_keeps_nothing_says_so(directory: Path) -> None:
    async def main() -> None:
        async with server(directory, stored_responses=0) as (http, _, _):
            body = {"input": "a", "max_output_tokens": 3}
            response = (await http.post(RESPONSES, json=body)).json()
            assert response["store"] is False
            fault(await http.get(f"{RESPONSES}/{response['id']}"), 404)
            error = fault(await http.post(RESPONSES, json=body | {"store": True}), 400, "not_served")
            assert error["param"] == "store"

    asyncio.run(main())


def test_responses_belong_to_the_key_that_made_them(directory: Path) -> None:
    async def main() -> None:
        async with server(directory) as (_, _, service):
            transport = httpx.ASGITransport(create_app(service, frozenset({"one", "two"})))
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
                one, two = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
                body = {"input": "a", "max_output_tokens": 3}
                id = (await http.post(RESPONSES, json=body, headers=one)).json()["id"]
                fault(await http.get(f"{RESPONSES}/{id}"), 401)
                fault(await http.get(f"{RESPONSES}/{id}", headers=two), 404)
                fault(await http.delete(f"{RESPONSES}/{id}", headers=two), 404)
                follow = body | {"previous_response_id": id}
                fault(await http.post(RESPONSES, json=follow, headers=two), 400, "previous_response_not_found")
                assert (await http.post(RESPONSES, json=follow, headers=one)).status_code == 200
                assert (await http.get(f"{RESPONSES}/{id}", headers=one)).status_code == 200

    asyncio.run(main())


@pytest.mark.parametrize("fails", ["dead", "aborted"])
def test_a_response_that_fails_is_not_kept(directory: Path, fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(http: httpx.AsyncClient, client: ScriptedClient, service: Service) -> None:
        original = client.generate

        async def generate(request: AddRequest) -> AsyncGenerator[RequestOutput, None]:
            outputs = original(request)
            yield await anext(outputs)
            yield await anext(outputs)
            if fails == "dead":
                raise EngineDead("it broke")
            yield RequestOutput(id=request.id, finish_reason=FINISH_ABORT)

        monkeypatch.setattr(client, "generate", generate)
        fault(await http.post(RESPONSES, json={"input": "hi"}), 503)
        events = parse_stream((await http.post(RESPONSES, json={"input": "hi", "stream": True})).text)
        assert events[-1]["type"] == "response.failed"
        response = events[-1]["response"]
        assert (response["status"], response["error"]["code"]) == ("failed", "server_error")
        assert ("it broke" in response["error"]["message"]) is (fails == "dead")
        fault(await http.get(f"{RESPONSES}/{response['id']}"), 404)

    run_scripted(directory, "Hello there.", test)


def test_a_response_whose_client_left_is_not_kept(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(http: httpx.AsyncClient, client: ScriptedClient, service: Service) -> None:
        original, left, ended = client.generate, asyncio.Event(), asyncio.Event()

        async def generate(request: AddRequest) -> AsyncGenerator[RequestOutput, None]:
            async for output in original(request):
                yield output
                if output.tokens:
                    left.set()
                    try:
                        await asyncio.Event().wait()
                    finally:
                        ended.set()

        monkeypatch.setattr(client, "generate", generate)
        sent: list[bytes] = []
        messages: list[Any] = [{"type": "http.request", "body": json.dumps({"input": "hi", "stream": True}).encode()}]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message.get("body", b""))

        scope = {"type": "http", "method": "POST", "path": RESPONSES, "headers": [], "query_string": b""}
        async with asyncio.timeout(10):
            await create_app(service)(scope, receive, send)
        assert ended.is_set()
        created = json.loads(b"".join(sent).decode().split("\n")[1].removeprefix("data: "))
        fault(await http.get(f"{RESPONSES}/{created['response']['id']}"), 404)

    run_scripted(directory, "Hello there.", test)
