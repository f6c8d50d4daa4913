"""X-Request-Id: which are taken over, and into what."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.bodies.schemas import CompletionRequest
from server.request_ids import find_request_id
from tests.support.app import server
from tests.support.contract import CHAT, COMPLETIONS, USER
from tests.support.fake_engine import FULL, REFUSE

GIVEN = "Trace:1.a-b_C"
UNSAFE = ["", "a b", "a" * 129, "é", "a\tb", "x;y", "<script>"]
BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": [10], "max_tokens": 2},
    CHAT: {"messages": USER, "max_tokens": 2},
}


@given(st.text(st.characters(max_codepoint=255), max_size=140))
def test_the_header_allows_what_the_body_allows(text: str) -> None:
    try:
        CompletionRequest.model_validate({"prompt": "x", "request_id": text})
        allowed = True
    except ValueError:
        allowed = False
    assert find_request_id([(b"x-request-id", text.encode("latin-1"))]) == (text if allowed else None)


def test_of_two_ids_none_is_taken() -> None:
    assert find_request_id([(b"x-request-id", b"a"), (b"host", b"b"), (b"x-request-id", b"a")]) is None
    assert find_request_id([(b"host", b"b")]) is None


@pytest.mark.parametrize(("path", "prefix"), [(COMPLETIONS, "cmpl-"), (CHAT, "chatcmpl-")])
@pytest.mark.parametrize("stream", [False, True])
def test_ids_of_answers(directory: Path, path: str, prefix: str, stream: bool) -> None:
    """The body's field makes the answer's id, else the header does; the header comes back as it was sent."""

    async def main() -> None:
        async with server(directory) as (http, _, _):

            async def ask(header: str | None, field: str | None) -> tuple[str, str]:
                body = BODIES[path] | {"stream": stream, "request_id": field}
                headers = {} if header is None else {b"X-Request-Id": header.encode("latin-1")}
                answer = await http.post(path, json=body, headers=headers)
                assert answer.headers.get_list("x-request-id") == [answer.headers["x-request-id"]]
                return answer.headers["x-request-id"], answer.text

            for header, field, told, made in (
                (GIVEN, None, GIVEN, prefix + GIVEN),
                (GIVEN, "mine", GIVEN, f"{prefix}mine"),
                (None, "mine", f"{prefix}mine", f"{prefix}mine"),
                ("not safe", "mine", f"{prefix}mine", f"{prefix}mine"),
            ):
                returned, text = await ask(header, field)
                assert returned == told
                assert f'"id":"{made}"' in text
            for header in (None, *UNSAFE):
                returned, text = await ask(header, None)
                assert returned.startswith(prefix)
                assert len(returned) == len(prefix) + 32
                assert f'"id":"{returned}"' in text

    asyncio.run(main())


def test_every_answer_returns_the_id(directory: Path) -> None:
    async def main() -> None:
        async with server(directory, max_body_mb=0.01) as (http, _, service):
            headers = {"X-Request-Id": GIVEN}
            statuses = {}
            for path in ("/", "/health", "/ready", "/metrics", "/v1/models", "/nowhere", COMPLETIONS):
                statuses[path] = await http.get(path, headers=headers)
            for name, body in {
                "invalid": {"prompt": 5},
                "large": {"prompt": "x" * 20_000},
                "unknown": {"prompt": "x", "model": "other"},
                "refused": {"prompt": [REFUSE], "stream": True},
                "full": {"prompt": [FULL]},
            }.items():
                statuses[name] = await http.post(COMPLETIONS, json=body, headers=headers)
            service.draining.set()
            statuses["draining"] = await http.post(COMPLETIONS, json={"prompt": "x"}, headers=headers)
            assert {answer.status_code for answer in statuses.values()} == {200, 400, 404, 405, 413, 503}
            assert {answer.headers.get("x-request-id") for answer in statuses.values()} == {GIVEN}
            assert "x-request-id" not in (await http.get("/health")).headers
            assert "x-request-id" not in (await http.get("/health", headers={"X-Request-Id": "a b"})).headers

    asyncio.run(main())
