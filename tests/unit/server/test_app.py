"""The HTTP application over a FakeEngine in the same process."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import AsyncGenerator
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import pytest

from engine.logs import LineFormatter
from engine.messages import RETRY_MEMORY, AddRequest, RequestOutput
from engine.params import SamplingParams
from engine.processes.supervisor import EngineDown, Supervisor
from server.app import create_app
from tests.support.app import server
from tests.support.fake_engine import CRASH, FULL, MAX_LEN, REFUSE, expected


def events(text: str) -> list[Any]:
    lines = [line for line in text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_usage_counts_tokens_and_drafts(directory: Path) -> None:
    async def main() -> None:
        async with server(directory) as (http, _, _):
            body = {"prompt": [[10, 11], [12]], "max_tokens": 5, "n": 2, "seed": 3}
            answer = (await http.post("/v1/completions", json=body)).json()
            assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
            # Each choice: three tokens (two of them drafted), then two (one drafted); three drafted each time.
            drafted = ("accepted_prediction_tokens", "rejected_prediction_tokens")
            assert answer["usage"] == {
                "prompt_tokens": 3,
                "completion_tokens": 20,
                "total_tokens": 23,
                "prompt_tokens_details": {"cached_tokens": 0},
                "completion_tokens_details": dict.fromkeys(drafted, 12) | {"reasoning_tokens": 0},
            }

    asyncio.run(main())


def test_stop_string_aborts_and_counts_the_tokens_used(directory: Path) -> None:
    async def main() -> None:
        async with server(directory) as (http, client, service):
            tokens = expected(AddRequest("", [10], SamplingParams(max_tokens=30, seed=1)))
            whole = service.tokenizer.decode(tokens[:7])
            stop = whole[-2:]
            body = {"prompt": [10], "max_tokens": 30, "seed": 1, "stop": stop}
            answer = (await http.post("/v1/completions", json=body)).json()
            (choice,) = answer["choices"]
            assert choice["text"] == whole[: whole.index(stop)]
            assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
            used = answer["usage"]["completion_tokens"]
            assert used <= 7
            # Every round drafts three and accepts two. Accepted tokens that the stop string cut off do not count as
            # rejected.
            assert answer["usage"]["completion_tokens_details"]["rejected_prediction_tokens"] == -(-used // 3)
            assert client.aborted == [client.requests[0].id]

    asyncio.run(main())


def test_streamed_text_is_the_text(directory: Path) -> None:
    async def main() -> None:
        async with server(directory) as (http, _, _):
            body = {"prompt": [10, 20], "max_tokens": 40, "n": 3, "seed": 5, "logprobs": 2}
            whole = (await http.post("/v1/completions", json=body)).json()
            options = {"include_usage": True, "continuous_usage_stats": True}
            streamed = await http.post("/v1/completions", json={**body, "stream": True, "stream_options": options})
            chunks = events(streamed.text)
            assert chunks[-1]["choices"] == []
            assert chunks[-1]["usage"] == whole["usage"]
            for choice in whole["choices"]:
                mine = [c["choices"][0] for c in chunks[:-1] if c["choices"][0]["index"] == choice["index"]]
                assert "".join(chunk["text"] for chunk in mine) == choice["text"]
                for key, values in choice["logprobs"].items():
                    assert [value for chunk in mine for value in chunk["logprobs"][key]] == values
                assert [chunk["finish_reason"] for chunk in mine[-2:]] == [None, "length"]
            counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
            sent = [len(chunk["choices"][0]["logprobs"]["tokens"]) for chunk in chunks[:-1]]
            assert counts == [*accumulate(sent), 120]

    asyncio.run(main())


def test_chat_streams_role_then_content(directory: Path) -> None:
    async def main() -> None:
        async with server(directory) as (http, client, service):
            messages = [{"role": "user", "content": "a"}]
            body = {"messages": messages, "max_tokens": 20, "seed": 5, "logprobs": True, "top_logprobs": 1}
            whole = (await http.post("/v1/chat/completions", json=body)).json()["choices"][0]
            chunks = events((await http.post("/v1/chat/completions", json={**body, "stream": True})).text)
            deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
            assert deltas[0] == {"role": "assistant", "content": ""}
            assert "".join(delta.get("content", "") for delta in deltas) == whole["message"]["content"]
            got = [e for chunk in chunks[1:] for e in chunk["choices"][0]["logprobs"]["content"]]
            assert got == whole["logprobs"]["content"]
            tokens = expected(client.requests[0])
            assert [bytes(entry["bytes"]) for entry in got] == [service.tokenizer.token_bytes(t) for t in tokens]
            rendered = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
            assert client.requests[0].prompt == service.tokenizer.encode(rendered)
            assert client.requests[0].prompt[0] == 1

    asyncio.run(main())


def test_chat_takes_all_the_room_there_is(directory: Path) -> None:
    async def main() -> None:
        async with server(directory) as (http, client, _):
            await http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}]})
            (request,) = client.requests
            assert request.params.max_tokens == MAX_LEN - len(request.prompt)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("path", "fields", "kept"),
    [
        ("completions", {}, MAX_LEN - 16),
        ("completions", {"max_tokens": 5}, MAX_LEN - 5),
        ("completions", {"max_tokens": MAX_LEN - 1}, 1),
        ("chat/completions", {}, MAX_LEN - 1),
        ("chat/completions", {"max_completion_tokens": 5}, MAX_LEN - 5),
    ],
)
def test_prompts_truncated_to_what_fits(directory: Path, path: str, fields: dict[str, Any], kept: int) -> None:
    async def main() -> None:
        async with server(directory) as (http, client, _):
            prompt = {"prompt": list(range(10, 110)), "messages": [{"role": "user", "content": "a" * 100}]}
            del prompt["messages" if path == "completions" else "prompt"]
            body = {**prompt, **fields, "truncate_prompt_tokens": -1}
            assert (await http.post(f"/v1/{path}", json=body)).status_code == 200
            (request,) = client.requests
            assert len(request.prompt) == kept
            assert request.prompt[-1] == 109 or path != "completions"

    asyncio.run(main())


def test_text_offsets_index_into_the_text(directory: Path) -> None:
    async def main() -> None:
        async with server(directory) as (http, _, service):
            bias = {str(service.tokenizer.encode("größer")[0]): 100}
            body = {"prompt": "ab", "max_tokens": 12, "seed": 5, "logprobs": 0, "echo": False}
            for extra in ({}, {"logit_bias": bias}):
                choice = (await http.post("/v1/completions", json={**body, **extra})).json()["choices"][0]
                logprobs = choice["logprobs"]
                assert logprobs["text_offset"][0] == 0
                ends = [*logprobs["text_offset"][1:], len(choice["text"])]
                for token, begin, end in zip(logprobs["tokens"], logprobs["text_offset"], ends, strict=True):
                    if not token.startswith("bytes:"):
                        assert choice["text"][begin:end].endswith(token)

    asyncio.run(main())


def test_prompts_of_a_list_get_what_they_get_alone(directory: Path) -> None:
    async def main() -> None:
        async with server(directory) as (http, _, _):
            body = {"max_tokens": 9, "n": 2, "seed": 7}
            both = (await http.post("/v1/completions", json={**body, "prompt": [[10], [11]]})).json()["choices"]
            alone = []
            for prompt in ([10], [11]):
                alone += (await http.post("/v1/completions", json={**body, "prompt": prompt})).json()["choices"]
            assert [choice["text"] for choice in both] == [choice["text"] for choice in alone]
            assert both[0]["text"] != both[1]["text"]

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("first", "status", "code"),
    [(REFUSE, 400, "cannot_serve"), (FULL, 503, "queue_full"), (CRASH, 503, "engine_dead")],
)
def test_what_the_engine_refuses(directory: Path, first: int, status: int, code: str, stream: bool) -> None:
    """An engine that dies has accepted the request before, so a stream has begun."""

    async def main() -> None:
        async with server(directory) as (http, _, _):
            answer = await http.post("/v1/completions", json={"prompt": [first], "stream": stream})
            begun = stream and first == CRASH
            assert answer.status_code == (200 if begun else status)
            assert (events(answer.text)[-1] if begun else answer.json())["error"]["code"] == code
            assert ("retry-after" in answer.headers) == (code == "queue_full")
            assert (await http.get("/health")).status_code == (503 if first == CRASH else 200)

    asyncio.run(main())


def test_an_engine_that_dies_during_a_stream(directory: Path) -> None:
    async def main() -> None:
        async with server(directory) as (http, client, _):
            body = {"prompt": [[10], [CRASH]], "max_tokens": 50, "stream": True}
            original = client.generate

            async def late(request: AddRequest) -> AsyncGenerator[RequestOutput, None]:
                if request.prompt == [CRASH]:
                    await asyncio.sleep(0.05)
                async for output in original(request):
                    await asyncio.sleep(0.01)
                    yield output

            client.generate = late  # type: ignore[method-assign]
            answer = await http.post("/v1/completions", json=body)
            assert answer.status_code == 200
            chunks = events(answer.text)
            assert chunks[0]["choices"][0]["text"]
            assert chunks[-1]["error"]["code"] == "engine_dead"
            health = await http.get("/health")
            assert (health.status_code, health.json()["error"]["message"]) == (503, "the engine is gone: it broke")
            assert (await http.post("/v1/completions", json=body)).status_code == 503

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_is_started_again(directory: Path, stream: bool) -> None:
    """During the restart, every request gets the reason and may be retried; running requests end."""

    async def main() -> None:
        async with server(directory) as (http, client, _):
            body = {"prompt": [10], "max_tokens": 50, "stream": stream}
            original = client.generate

            async def cut(request: AddRequest) -> AsyncGenerator[RequestOutput, None]:
                async for output in original(request):
                    yield output
                    client.down = "rank 1 was killed"
                    raise EngineDown(client.down)

            client.generate = cut  # type: ignore[method-assign]
            answer = await http.post("/v1/completions", json=body)
            error = events(answer.text)[-1]["error"] if stream else answer.json()["error"]
            assert (answer.status_code, error["code"]) == (200 if stream else 503, "engine_restarting")
            assert error["message"].endswith("rank 1 was killed")
            for refused in (
                await http.get("/health"),
                await http.get("/ready"),
                await http.get("/load"),
                await http.post("/v1/completions", json=body),
            ):
                assert (refused.status_code, refused.json()["error"]) == (503, error)
                assert "retry-after" in refused.headers
            assert (await http.get("/metrics")).status_code == 200
            client.down = None
            client.generate = original  # type: ignore[method-assign]
            assert (await http.post("/v1/completions", json=body)).status_code == 200
            assert (await http.get("/health")).status_code == 200

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_out_of_memory(directory: Path, stream: bool) -> None:
    """An error is returned, also after tokens that were already sent; afterwards the server works as before."""

    async def main() -> None:
        async with server(directory) as (http, client, _):

            async def starved(request: AddRequest) -> AsyncGenerator[RequestOutput, None]:
                yield RequestOutput(id=request.id, tokens=[70, 71])
                yield RequestOutput(id=request.id, finish_reason="abort", error="too little", retry=RETRY_MEMORY)

            client.generate = starved  # type: ignore[method-assign]
            answer = await http.post("/v1/completions", json={"prompt": [10], "stream": stream})
            error = events(answer.text)[-1]["error"] if stream else answer.json()["error"]
            assert (answer.status_code, error["code"]) == (200 if stream else 503, "out_of_memory")
            assert (await http.get("/ready")).status_code == 200

    asyncio.run(main())


def test_a_full_queue(directory: Path) -> None:
    async def main() -> None:
        async with server(directory) as (http, _, service):
            with service.admit(6, 6):
                two = {"prompt": [10], "n": 2}
                assert (await http.post("/v1/completions", json=two)).status_code == 200
                answer = await http.post("/v1/completions", json={"prompt": [10], "n": 3})
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, "queue_full")
                assert answer.headers["retry-after"] == "1"
                chat = {"messages": [{"role": "user", "content": "x"}], "n": 9}
                many = {"prompt": ["x"] * 9}
                for path, never, param in (("completions", many, "prompt"), ("chat/completions", chat, "n")):
                    answer = await http.post(f"/v1/{path}", json=never)
                    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
            assert (await http.post("/v1/completions", json={"prompt": [10], "n": 8})).status_code == 200

    asyncio.run(main())


def test_loading_and_draining(directory: Path) -> None:
    async def main() -> None:
        async with server(directory) as (http, client, service):
            for code in ("loading", "draining"):
                service.client = None if code == "loading" else cast(Supervisor, client)
                if code == "draining":
                    service.draining.set()
                for answer in (await http.get("/ready"), await http.post("/v1/completions", json={"prompt": "x"})):
                    assert (answer.status_code, answer.json()["error"]["code"]) == (503, code)
                    assert "retry-after" in answer.headers
                assert (await http.get("/health")).status_code == 200
                assert (await http.get("/metrics")).status_code == 200
                for path in ("/load", "/v1/models"):
                    assert (await http.get(path)).status_code == (200 if service.client else 503)

    asyncio.run(main())


def test_an_unexpected_error_shows_nothing(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with server(directory) as (http, client, _):

            def broken(request: AddRequest) -> AsyncGenerator[RequestOutput, None]:
                raise OSError("/secret/path")

            client.generate = broken  # type: ignore[method-assign]
            for stream in (False, True):
                answer = await http.post("/v1/completions", json={"prompt": "x", "stream": stream})
                assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
                assert "secret" not in answer.text
            assert caplog.text.count("Traceback") == 2  # one per request

    asyncio.run(main())


@pytest.mark.parametrize("cancelled", [False, True])
def test_draining_ends_an_upload(directory: Path, cancelled: bool) -> None:
    async def main() -> None:
        async with server(directory) as (_, _, service):
            app = create_app(service)
            sent: list[Any] = []

            async def send(message: Any) -> None:
                sent.append(message)

            async def receive() -> Any:
                await asyncio.sleep(60)

            scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
            upload = asyncio.create_task(app(scope, receive, send))
            await asyncio.sleep(0.01)
            assert not sent
            if cancelled:
                upload.cancel()
            else:
                service.draining.set()
            await upload
            assert sent[0]["status"] == 503
            assert json.loads(sent[1]["body"])["error"]["code"] == "draining"

    asyncio.run(main())


def test_the_queue_is_free_after_every_kind_of_end(directory: Path) -> None:
    async def main() -> None:
        async with server(directory) as (http, _, service):
            for body in ({"prompt": "x"}, {"prompt": "x", "stream": True}, {"prompt": [REFUSE]}, {"prompt": [CRASH]}):
                await http.post("/v1/completions", json=body)
            await service.wait_idle()
            assert service._admitted == 0

    asyncio.run(main())


# Units that a whole server cannot cover.


def test_no_address_but_its_own(directory: Path) -> None:
    async def main() -> None:
        async with server(directory) as (http, _, _):
            for path in ("/v1/models/", "/health/"):
                assert (await http.get(path)).status_code == 404

    asyncio.run(main())


@pytest.mark.parametrize("message", ["a\n2030-01-01 INFO forged", "a\r\x1b[2Jb\u2028c"])
def test_nothing_passes_for_a_line_of_the_log(message: str) -> None:
    try:
        raise ValueError(message)
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "told: %s", (message,), sys.exc_info())
    event, *trace = LineFormatter("%(message)s").format(record).split("\n")
    assert event.startswith("told: a\\x")
    assert "ValueError" in "".join(trace)
    for line in trace:
        assert line.startswith("    | ")
        assert line.isprintable()
