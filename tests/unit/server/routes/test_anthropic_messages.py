"""POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from engine.messages import FINISH_ABORT, AddRequest, RequestOutput
from server.routes.openapi import document
from tests.support.app import server
from tests.support.messages_app import CHATML, scripted
from tests.support.tiny import write_tokenizer

MESSAGES = "/v1/messages"
BODY: dict[str, Any] = {"model": "tiny", "max_tokens": 400, "messages": [{"role": "user", "content": "a"}]}
TOOLS = [{"name": "look_up", "input_schema": {"type": "object", "properties": {"x": {"type": "integer"}}}}]
CALL = '<tool_call>\n{"name": "look_up", "arguments": {"x": 1, "y": "größer"}}\n</tool_call>'
ENABLED = {"thinking": {"type": "enabled", "budget_tokens": 1024}}


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with a tokenizer whose template has thinking and calls."""
    directory = tmp_path_factory.mktemp("thinking")
    write_tokenizer(directory, chat_template=CHATML)
    return directory


def events(text: str) -> list[dict[str, Any]]:
    """Parse a stream; each event has the name that its data say."""
    found = []
    for event in text.split("\n\n")[:-1]:
        name, data = event.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def folded(stream: list[dict[str, Any]]) -> dict[str, Any]:
    """Join the events of a message as clients do."""
    assert [event["type"] for event in stream[:2]] == ["message_start", "ping"]
    assert stream[-1] == {"type": "message_stop"}
    message: dict[str, Any] = stream[0]["message"]
    inputs: dict[int, str] = {}
    open = -1
    assert (message["content"], message["stop_reason"]) == ([], None)
    for event in stream[2:-1]:
        match event["type"]:
            case "content_block_start":
                assert open == -1
                open = event["index"]
                assert open == len(message["content"])
                message["content"].append(event["content_block"])
            case "content_block_delta":
                assert event["index"] == open
                block, delta = message["content"][open], event["delta"]
                match delta["type"]:
                    case "text_delta":
                        block["text"] += delta["text"]
                    case "thinking_delta":
                        block["thinking"] += delta["thinking"]
                    case "signature_delta":
                        block["signature"] = delta["signature"]
                    case "input_json_delta":
                        inputs[open] = inputs.get(open, "") + delta["partial_json"]
            case "content_block_stop":
                assert event["index"] == open
                open = -1
            case "message_delta":
                assert open == -1
                message |= event["delta"]
                message["usage"] |= event["usage"]
    for index, text in inputs.items():
        message["content"][index]["input"] = json.loads(text)
    return message


async def both(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    """Return the message, which is the same streamed and in one piece but for ids."""
    answer = await http.post(MESSAGES, json=BODY | fields)
    assert answer.status_code == 200, answer.text
    whole: dict[str, Any] = answer.json()
    streamed = await http.post(MESSAGES, json=BODY | fields | {"stream": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    joined = folded(events(streamed.text))
    for message in (whole, joined):
        assert message["id"].startswith("msg_")
        for block in message["content"]:
            for name in ("id", "signature"):
                if name in block:
                    assert block[name]
                    block[name] = name
    assert joined | {"id": ""} == whole | {"id": ""}
    return whole


def test_a_text(directory: Path) -> None:
    async def main() -> None:
        async with scripted(directory, "Hello there. ") as (http, client, _):
            message = await both(http, system="Be terse.", temperature=0.5, top_k=3)
            assert {name: message[name] for name in ("type", "role", "model")} == {
                "type": "message",
                "role": "assistant",
                "model": "tiny",
            }
            assert message["content"] == [{"type": "text", "text": "Hello there. "}]
            assert (message["stop_reason"], message["stop_sequence"]) == ("end_turn", None)
            request = client.requests[0]
            assert message["usage"] == {
                "input_tokens": len(request.prompt),
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 0,
                "output_tokens": len(client.tokens) + 1,
                "output_tokens_details": {"thinking_tokens": 0},
            }
            assert (request.params.temperature, request.params.top_k, request.params.max_tokens) == (0.5, 3, 400)

    asyncio.run(main())


def test_why_it_ends(directory: Path) -> None:
    async def main() -> None:
        async with scripted(directory, "One, two, three") as (http, _, _):
            message = await both(http, stop_sequences=["four", ", th"])
            assert message["content"] == [{"type": "text", "text": "One, two"}]
            assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", ", th")
            message = await both(http, max_tokens=4)
            assert (message["stop_reason"], message["stop_sequence"]) == ("max_tokens", None)
            assert message["usage"]["output_tokens"] == 4

    asyncio.run(main())


def test_cached_tokens_are_no_input_tokens(directory: Path) -> None:
    async def main() -> None:
        async with server(directory) as (http, client, _):
            body = BODY | {"max_tokens": 2, "messages": [{"role": "user", "content": "the quick brown fox"}]}
            for cached in (0, 16):
                usage = (await http.post(MESSAGES, json=body)).json()["usage"]
                assert usage["cache_read_input_tokens"] == cached
                assert usage["input_tokens"] == len(client.requests[0].prompt) - cached

    asyncio.run(main())


def test_calls(thinking: Path) -> None:
    async def main() -> None:
        text = f"<think>\nHm.\n</think>\n\nLooking it up.\n{CALL}\n{CALL}"
        call = {
            "type": "tool_use",
            "id": "id",
            "name": "look_up",
            "input": {"x": 1, "y": "größer"},
        }
        said = {"type": "text", "text": "Looking it up."}
        async with scripted(thinking, text) as (http, _, _):
            message = await both(http, tools=TOOLS, **ENABLED)
            assert message["content"] == [
                {"type": "thinking", "thinking": "Hm.", "signature": "signature"},
                said,
                call,
                call,
            ]
            assert message["stop_reason"] == "tool_use"
            assert 0 < message["usage"]["output_tokens_details"]["thinking_tokens"] < 30
            message = await both(http, tools=TOOLS, tool_choice={"type": "none"}, **ENABLED)
            assert [block["type"] for block in message["content"]] == ["thinking", "text"]
            assert message["stop_reason"] == "end_turn"

    asyncio.run(main())


def test_text_between_calls_stays_there(thinking: Path) -> None:
    async def main() -> None:
        async with scripted(thinking, f"{CALL}\nAgain:\n{CALL}") as (http, _, _):
            message = await both(http, tools=TOOLS)
            assert [block["type"] for block in message["content"]] == ["tool_use", "text", "tool_use"]

    asyncio.run(main())


def test_a_call_that_is_cut_short_has_no_input(thinking: Path) -> None:
    async def main() -> None:
        async with scripted(thinking, CALL) as (http, client, _):
            cut = len(client.tokens) - 20
            answer = (await http.post(MESSAGES, json=BODY | {"tools": TOOLS, "max_tokens": cut})).json()
            assert answer["stop_reason"] == "max_tokens"
            (block,) = answer["content"]
            assert (block["name"], block["input"]) == ("look_up", {})

    asyncio.run(main())


def test_a_tool_that_must_be_called_is_held_by_a_grammar(thinking: Path) -> None:
    async def main() -> None:
        async with scripted(thinking, CALL) as (http, client, _):
            await http.post(MESSAGES, json=BODY | {"tools": TOOLS})
            await http.post(MESSAGES, json=BODY | {"tools": TOOLS, "tool_choice": {"type": "any"}})
            assert [bool(request.params.grammar) for request in client.requests] == [False, True]

    asyncio.run(main())


def test_the_prompt(thinking: Path) -> None:
    """With its tools, thinking and calls; a last message of the assistant is continued."""

    async def main() -> None:
        async with scripted(thinking, "x") as (http, client, service):
            used = {"type": "tool_use", "id": "a", "name": "look_up", "input": {"x": 1}}
            turns = [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm.", "signature": "s"}, used]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "7"}]},
                {"role": "assistant", "content": "It is"},
            ]
            await http.post(MESSAGES, json=BODY | {"messages": turns, "system": "s", "tools": TOOLS})
            prompt = service.tokenizer.decode(client.requests[0].prompt, skip_special_tokens=False)
            assert prompt.startswith("<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n")
            assert "<|im_start|>assistant\n<think>Hm.</think><tool_call>" in prompt
            assert '"arguments": {"x": 1}' in prompt
            assert "<|im_start|>tool\n7<|im_end|>\n" in prompt
            assert prompt.endswith("<|im_start|>assistant\nIt is")

    asyncio.run(main())


@pytest.mark.parametrize("fields", [{}, {"thinking": {"type": "disabled"}}, ENABLED])
def test_thinking_has_to_be_asked_for(thinking: Path, fields: dict[str, Any]) -> None:
    async def main() -> None:
        async with scripted(thinking, "x") as (http, client, service):
            await http.post(MESSAGES, json=BODY | fields)
            prompt = service.tokenizer.decode(client.requests[0].prompt, skip_special_tokens=False)
            assert prompt.endswith("</think>\n\n") == (fields != ENABLED)

    asyncio.run(main())


def test_thinking_that_was_not_asked_for_is_left_out(tmp_path: Path) -> None:
    """Where the template cannot switch it off."""
    write_tokenizer(tmp_path, chat_template=CHATML.replace("enable_thinking is false", "false"))

    async def main() -> None:
        async with scripted(tmp_path, "<think>Hm.</think>Yes.") as (http, _, _):
            assert [block["type"] for block in (await both(http, **ENABLED))["content"]] == ["thinking", "text"]
            message = await both(http)
            assert message["content"] == [{"type": "text", "text": "Yes."}]
            assert message["usage"]["output_tokens_details"]["thinking_tokens"] > 0

    asyncio.run(main())


def test_count_tokens(thinking: Path) -> None:
    async def main() -> None:
        async with scripted(thinking, "x") as (http, client, _):
            for fields in ({}, {"tools": TOOLS, "system": "s"}, {"tools": TOOLS, "tool_choice": {"type": "none"}}):
                asked = {name: value for name, value in BODY.items() if name != "max_tokens"} | fields
                counted = await http.post(f"{MESSAGES}/count_tokens", json=asked)
                used = (await http.post(MESSAGES, json=BODY | fields)).json()["usage"]["input_tokens"]
                assert counted.json() == {"input_tokens": used}
            plain, told, untold = (request.prompt for request in client.requests)
            assert plain == untold
            assert len(plain) < len(told)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("fields", "status", "kind", "code", "message"),
    [
        ({"max_tokens": None}, 400, "invalid_request_error", "invalid_value", "max_tokens: "),
        ({"model": "other"}, 404, "not_found_error", "model_not_found", "model: "),
        ({"top_p": 7}, 400, "invalid_request_error", "invalid_value", "top_p: "),
        ({"stop_sequences": ["x" * 2000]}, 400, "invalid_request_error", "invalid_value", "stop_sequences: "),
        ({"max_tokens": 5000}, 400, "invalid_request_error", "context_length_exceeded", "the model takes "),
        ({"thread": {"type": "create"}}, 400, "invalid_request_error", "thread_unsupported_request", "thread: "),
        ({"output_config": {"effort": "low"}}, 400, "invalid_request_error", "not_served", "output_config.effort: "),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {"uniqueItems": True}}}},
            400,
            "invalid_request_error",
            "invalid_value",
            "output_config.format: ",
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]}
                ]
            },
            400,
            "invalid_request_error",
            "invalid_value",
            "messages: the last message must be a text",
        ),
    ],
)
def test_errors(directory: Path, fields: dict[str, Any], status: int, kind: str, code: str, message: str) -> None:
    async def main() -> None:
        async with scripted(directory, "x") as (http, _, _):
            answer = await http.post(MESSAGES, json=BODY | fields)
            assert answer.status_code == status
            assert set(answer.json()) == {"type", "error"}
            assert answer.json()["type"] == "error"
            error = answer.json()["error"]
            assert (error["type"], error["details"]) == (kind, {"error_code": code})
            assert error["message"].startswith(message)

    asyncio.run(main())


def test_errors_of_the_server(directory: Path) -> None:
    async def main() -> None:
        async with server(directory) as (http, client, service):
            answer = await http.get(MESSAGES)
            assert (answer.status_code, answer.json()["error"]["type"]) == (405, "invalid_request_error")
            answer = await http.post(f"{MESSAGES}/batches", json={})
            assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found_error")
            assert "type" not in (await http.post("/v1/message", json={})).json()
            service.draining.set()
            answer = await http.post(MESSAGES, json=BODY)
            assert (answer.status_code, answer.json()["error"]["type"]) == (503, "overloaded_error")
            assert answer.headers["retry-after"]
            service.draining.clear()
            client.dead = "it broke"
            answer = await http.post(MESSAGES, json=BODY)
            assert (answer.status_code, answer.json()["error"]["type"]) == (503, "api_error")

    asyncio.run(main())


def test_an_error_in_the_middle_is_an_event(directory: Path) -> None:
    async def main() -> None:
        async with scripted(directory, "Hello there, you", fails_after=1) as (http, _, _):
            found = events((await http.post(MESSAGES, json=BODY | {"stream": True})).text)
            assert [event["type"] for event in found] == [
                "message_start",
                "ping",
                "content_block_start",
                "content_block_delta",
                "error",
            ]
            assert found[-1]["error"] == {
                "type": "api_error",
                "message": "the engine is gone: it broke",
                "details": {"error_code": "engine_dead"},
            }
            answer = await http.post(MESSAGES, json=BODY)
            assert (answer.status_code, answer.json()) == (503, found[-1])

    asyncio.run(main())


def test_an_answer_that_the_server_breaks_off_is_an_error(directory: Path) -> None:
    async def broken_off(request: AddRequest) -> AsyncGenerator[RequestOutput, None]:
        yield RequestOutput(id=request.id, queued=True)
        yield RequestOutput(id=request.id, finish_reason=FINISH_ABORT)

    async def main() -> None:
        async with scripted(directory, "x") as (http, client, _):
            client.generate = broken_off  # type: ignore[method-assign]
            answer = await http.post(MESSAGES, json=BODY)
            error = answer.json()["error"]
            assert (answer.status_code, error["type"]) == (503, "overloaded_error")
            assert error["details"] == {"error_code": "aborted"}
            found = events((await http.post(MESSAGES, json=BODY | {"stream": True})).text)
            assert [event["type"] for event in found] == ["message_start", "ping", "error"]

    asyncio.run(main())


def test_openapi(directory: Path) -> None:
    described = document("1")

    def check(name: str, value: Any) -> None:
        jsonschema.validate(value, {"$ref": f"#/components/schemas/{name}", **described})

    async def main() -> None:
        async with scripted(directory, "x") as (http, _, _):
            block = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}
            body = BODY | {"messages": [{"role": "user", "content": [block]}], "tools": TOOLS, "system": "s"}
            check("MessagesRequest", body)
            check("MessageAnswer", (await http.post(MESSAGES, json=body)).json())
            with pytest.raises(jsonschema.ValidationError):
                check("MessagesRequest", body | {"system": 1})
            check("MessageError", (await http.post(MESSAGES, json=body | {"system": 1})).json())
            answers = described["paths"][MESSAGES]["post"]["responses"]
            assert answers["400"]["content"]["application/json"]["schema"]["$ref"].endswith("/MessageError")

    asyncio.run(main())
