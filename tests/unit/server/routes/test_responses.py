"""POST /v1/responses over scripted answers."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.service import Service
from tests.support.app import server
from tests.support.contract import RESPONSES, fault
from tests.support.fake_engine import FULL
from tests.support.responses import Body, ask_both_ways, parse_stream, prompts_of, run_scripted, without_ids
from tests.support.scripted import ScriptedClient
from tests.support.tiny import write_tokenizer

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2]}}\n</tool_call>'
ADD = {"type": "function", "name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
SEES_THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.reasoning_content %}{{ '<think>' + message.reasoning_content + '</think>' }}{% endif %}"
    "{{ message.content + '<|im_end|>\n' }}{% endfor %}{{ '<|im_start|>assistant\n' }}"
)
"""A template that writes thinking of earlier turns."""


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer whose template writes thinking."""
    directory = tmp_path_factory.mktemp("thinking")
    write_tokenizer(directory, chat_template=SEES_THINKING)
    return directory


def test_a_text(directory: Path) -> None:
    async def test(http: httpx.AsyncClient, client: ScriptedClient, service: Service) -> None:
        body = {"input": "hi", "instructions": "Be brief.", "metadata": {"a": "b"}, "temperature": 0.5, "user": "u"}
        response = await ask_both_ways(http, body)
        assert prompts_of(client, service)[0] == (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        )
        (message,) = response["output"]
        part = {"type": "output_text", "text": "Hello there.", "annotations": [], "logprobs": []}
        assert without_ids(message) == {
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "content": [part],
        }
        told = ("status", "error", "incomplete_details", "instructions", "metadata", "temperature", "user", "store")
        assert [response[name] for name in told] == [
            *("completed", None, None),
            *("Be brief.", {"a": "b"}, 0.5, "u", True),
        ]
        assert (response["tool_choice"], response["tools"], response["text"]) == (
            "auto",
            [],
            {"format": {"type": "text"}},
        )
        usage = response["usage"]
        assert usage["input_tokens"] == len(client.requests[0].prompt)
        assert usage["output_tokens"] == len(client.tokens) + 1
        assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
        assert usage["output_tokens_details"]["reasoning_tokens"] == 0

    run_scripted(directory, "Hello there.", test)


def test_an_answer_that_is_cut_is_incomplete(directory: Path) -> None:
    async def test(http: httpx.AsyncClient, client: ScriptedClient, service: Service) -> None:
        response = await ask_both_ways(http, {"input": "hi", "max_output_tokens": 4})
        assert client.requests[0].params.max_tokens == 4
        assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
        assert response["output"][0]["status"] == "incomplete"
        assert response["output"][0]["content"][0]["text"] == service.tokenizer.decode(client.tokens[:4])
        assert (await http.get(f"{RESPONSES}/{response['id']}")).json() == response

    run_scripted(directory, "Hello there.", test)


def test_thinking_is_an_item_that_later_turns_may_see(thinking: Path) -> None:
    async def test(http: httpx.AsyncClient, client: ScriptedClient, service: Service) -> None:
        first = await ask_both_ways(http, {"input": "hi"})
        reasoning, message = first["output"]
        assert (reasoning["type"], reasoning["summary"]) == ("reasoning", [])
        assert reasoning["content"] == [{"type": "reasoning_text", "text": "hmm"}]
        assert message["content"][0]["text"] == "Yes."
        count = len(service.tokenizer.encode("<think>\nhmm\n</think>", add_special_tokens=False))
        assert first["usage"]["output_tokens_details"]["reasoning_tokens"] == count
        await ask_both_ways(http, {"input": "so?", "previous_response_id": first["id"]})
        replayed = [{"role": "user", "content": "hi"}, *first["output"], {"role": "user", "content": "so?"}]
        await ask_both_ways(http, {"input": replayed})
        texts = prompts_of(client, service)
        assert "assistant\n<think>hmm</think>Yes.<|im_end|>\n<|im_start|>user\nso?<|im_end|>" in texts[2]
        assert texts[2] == texts[4]

    run_scripted(thinking, "<think>\nhmm\n</think>\n\nYes.", test)


def test_calls_are_items_that_outputs_answer(directory: Path) -> None:
    async def test(http: httpx.AsyncClient, client: ScriptedClient, service: Service) -> None:
        first = await ask_both_ways(http, {"input": "1 + 2?", "tools": [ADD]})
        assert first["status"] == "completed"
        message, call = first["output"]
        assert message["content"][0]["text"] == "Well."
        assert (call["type"], call["name"], call["status"]) == ("function_call", "add", "completed")
        assert json.loads(call["arguments"]) == {"a": 1, "b": [2]}
        assert first["tools"] == [ADD | {"description": None, "strict": False}]
        output = {"type": "function_call_output", "call_id": call["call_id"], "output": "3!"}
        await ask_both_ways(http, {"input": [output], "tools": [ADD], "previous_response_id": first["id"]})
        again = [{"role": "user", "content": "1 + 2?"}, *first["output"], output]
        await ask_both_ways(http, {"input": again, "tools": [ADD]})
        texts = prompts_of(client, service)
        assert texts[2] == texts[4]
        assert texts[2].index("Well.") < texts[2].index('"arguments": {"a": 1') < texts[2].index("3!")

    run_scripted(directory, f"Well.\n{CALL}", test)


def test_logprobs_are_those_of_the_text(thinking: Path) -> None:
    async def test(http: httpx.AsyncClient, client: ScriptedClient, service: Service) -> None:
        body = {"input": "hi", "tools": [ADD], "include": ["message.output_text.logprobs"], "top_logprobs": 0}
        response = await ask_both_ways(http, body)
        _, message, _ = response["output"]
        (part,) = message["content"]
        assert part["text"] == "Größer, n."
        assert b"".join(bytes(entry["bytes"]) for entry in part["logprobs"]).decode() == part["text"]
        assert {entry["logprob"] for entry in part["logprobs"]} == {-1.0}
        silent = await ask_both_ways(http, {"input": "hi"})
        assert [part["logprobs"] for item in silent["output"][1:] for part in item["content"]] == [[]]
        assert client.requests[-1].params.logprobs is None

    run_scripted(thinking, f"<think>\nn.\n</think>\n\nGrößer, n.{CALL}", test)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_logprobs_around_a_call(directory: Path, size: int) -> None:
    """Wherever rounds end."""

    async def test(http: httpx.AsyncClient, client: ScriptedClient, service: Service) -> None:
        client.size = size
        body = {"input": "hi", "tools": [ADD], "include": ["message.output_text.logprobs"]}
        response = await ask_both_ways(http, body)
        assert [item["type"] for item in response["output"]] == ["message", "function_call", "message"]
        for item in (response["output"][0], response["output"][2]):
            (part,) = item["content"]
            assert b"".join(bytes(entry["bytes"]) for entry in part["logprobs"]).decode() == part["text"]

    run_scripted(directory, f"First a sum.{CALL}add that", test)


def test_fields_reach_the_chat(directory: Path) -> None:
    async def test(http: httpx.AsyncClient, client: ScriptedClient, service: Service) -> None:
        body = {
            "input": "hi",
            "top_p": 0.5,
            "top_k": 7,
            "stop": ["x"],
            "logit_bias": {"5": 1},
            "cache_salt": "s",
            "priority": 3,
            "speculation": {"enabled": False},
            "max_output_tokens": None,
            "stream_options": {"include_obfuscation": False},
            "reasoning": {"summary": "auto", "effort": None},
            "include": ["reasoning.encrypted_content"],
            "truncation": "disabled",
            "service_tier": "flex",
            "text": {"verbosity": "low", "format": {"type": "json_object"}},
        }
        body["seed"] = 5
        answer = await http.post(RESPONSES, json=body | {"stream": True})
        assert answer.status_code == 200, answer.text
        (request,) = client.requests
        params = request.params
        assert (params.top_p, params.top_k, params.stop, params.seed) == (0.5, 7, ("x",), 5)
        assert (params.logit_bias, params.max_draft_tokens, params.grammar is None) == ({5: 1.0}, 0, False)
        assert (request.cache_salt, request.priority) == ("s", 3)
        last = parse_stream(answer.text)[-1]["response"]
        assert last["text"] == {"verbosity": "low", "format": {"type": "json_object"}}

    run_scripted(directory, "{}", test)


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"input": None}, "input", "invalid_value"),
        ({"input": []}, "input", "invalid_value"),
        ({"messages": []}, "messages", "unknown_field"),
        ({"background": True}, "background", "not_served"),
        ({"conversation": "c"}, "conversation", "not_served"),
        ({"prompt": {"id": "p"}}, "prompt", "not_served"),
        ({"truncation": "auto"}, "truncation", "not_served"),
        ({"include": ["file_search_call.results"]}, "include", "not_served"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary", "not_served"),
        ({"reasoning": {"effort": "low"}}, "reasoning.effort", "not_served"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "not_served"),
        ({"tools": [ADD, ADD]}, "tools", "invalid_value"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"tool_choice": {"type": "function", "name": "g"}, "tools": [ADD]}, "tool_choice", "invalid_value"),
        ({"tool_choice": {"type": "web_search"}, "tools": [ADD]}, "tool_choice", "invalid_value"),
        (
            {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [ADD]}, "tools": [ADD]},
            "tool_choice",
            "invalid_value",
        ),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format", "invalid_value"),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "nope"}}}},
            "text.format",
            "invalid_value",
        ),
        (
            {"text": {"format": {"type": "json_object"}}, "structured_outputs": {"regex": "a"}},
            "structured_outputs",
            "invalid_value",
        ),
        ({"response_format": {"type": "text"}}, "response_format", "not_served"),
        ({"max_output_tokens": 10**6}, "max_output_tokens", "context_length_exceeded"),
        ({"input": "x" * 9000}, "input", "context_length_exceeded"),
        ({"min_tokens": 9, "max_output_tokens": 4}, "min_tokens", "invalid_value"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"metadata": {"a": 1}}, "metadata", "invalid_value"),
        ({"n": 2}, "n", "not_served"),
        ({"previous_response_id": "resp_0"}, "previous_response_id", "previous_response_not_found"),
    ],
)
def test_refusals_name_the_clients_own_field(directory: Path, body: Body, param: str, code: str) -> None:
    async def test(http: httpx.AsyncClient, client: ScriptedClient, service: Service) -> None:
        for stream in (False, True):
            error = fault(await http.post(RESPONSES, json={"input": "hi", "stream": stream, **body}), 400, code)
            assert error["param"] == param
            assert "max_tokens" not in error["message"]
            assert "response_format" not in error["message"] or param == "response_format"
        assert client.requests == []

    run_scripted(directory, "Hello", test)


def test_choices_of_tools(directory: Path) -> None:
    async def test(http: httpx.AsyncClient, client: ScriptedClient, service: Service) -> None:
        response = await ask_both_ways(http, {"input": "hi", "tools": [ADD], "tool_choice": "none"})
        assert response["tool_choice"] == "none"
        assert CALL in response["output"][0]["content"][0]["text"]
        assert "add" not in prompts_of(client, service)[0]

    run_scripted(directory, CALL, test)


def test_a_refusal_comes_before_the_stream(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with server(directory) as (http, _, service):

            async def tokens(*_: Any) -> list[int]:
                return [FULL]

            monkeypatch.setattr(service, "encode_chat", tokens)
            fault(await http.post(RESPONSES, json={"input": "hi", "stream": True}), 503, "queue_full")

    asyncio.run(main())


def test_a_report_of_speculation(directory: Path) -> None:
    async def main() -> None:
        async with server(directory) as (http, _, _):
            body = {"input": "a", "max_output_tokens": 6, "speculation": {"report": True}}
            response = await ask_both_ways(http, body)
            assert response["speculation"]["rounds"] == 2
            assert response["usage"]["output_tokens_details"]["accepted_prediction_tokens"] == 4

    asyncio.run(main())
