"""Answers of chats are parsed into thinking, content and calls, whole and streamed."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from models.tokenizer import Tokenizer
from server.bodies.chat_body import ChatRequest
from tests.support.app import server
from tests.support.scripted import ScriptedClient

USER = [{"role": "user", "content": "What is the weather?"}]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
    }
]
ALLOWED: dict[str, Any] = {
    "type": "allowed_tools",
    "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "weather"}}]},
}
MORE_ALLOWED = {**ALLOWED["allowed_tools"], "x": 1}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm <x>"}}\n</tool_call>'
ANSWER = f"<think>\nIt asks\n</think>\n\nLooking.\n{CALL}\n{CALL}"


async def ask(directory: Path, text: str, size: int = 3, settings: Any = None, **fields: Any) -> tuple[Any, list[Any]]:
    """Return the answer in one piece, and the chunks of a streamed one."""
    client = ScriptedClient(Tokenizer(directory), text, size)
    async with server(directory, client, thinking="think", **(settings or {})) as (http, _, _):
        body = {"messages": USER, **fields}
        whole = await http.post("/v1/chat/completions", json=body)
        streamed = await http.post("/v1/chat/completions", json={**body, "stream": True})
    assert whole.status_code == streamed.status_code == 200, whole.text
    lines = [line[6:] for line in streamed.text.splitlines() if line.startswith("data: {")]
    return whole.json(), [json.loads(line) for line in lines]


def joined(chunks: list[Any]) -> dict[str, Any]:
    """Join the deltas of one choice to a message."""
    message: dict[str, Any] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            delta = choice["delta"]
            for key in ("content", "reasoning_content"):
                if delta.get(key):
                    message[key] = message.get(key, "") + delta[key]
            for call in delta.get("tool_calls", ()):
                calls = message.setdefault("tool_calls", [])
                if call["index"] == len(calls):
                    calls.append({"type": call["type"], "name": call["function"]["name"], "arguments": ""})
                    assert call["id"]
                calls[call["index"]]["arguments"] += call["function"]["arguments"]
    return message


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_thinking_content_and_calls_are_apart(directory: Path, size: int) -> None:
    whole, chunks = asyncio.run(ask(directory, ANSWER, size, tools=TOOLS))
    (choice,) = whole["choices"]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert (message["reasoning_content"], message["reasoning"], message["content"]) == (
        "It asks",
        "It asks",
        "Looking.",
    )
    assert [call["function"] for call in message["tool_calls"]] == [
        {"name": "weather", "arguments": '{"city": "Ulm <x>"}'}
    ] * 2
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    assert joined(chunks) == {
        "reasoning_content": "It asks",
        "content": "Looking.",
        "tool_calls": [{"type": "function", "name": "weather", "arguments": '{"city": "Ulm <x>"}'}] * 2,
    }
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("choice", [None, "none"])
def test_without_tools_whatever_looks_like_a_call_is_text(directory: Path, choice: str | None) -> None:
    fields: dict[str, Any] = {} if choice is None else {"tools": TOOLS, "tool_choice": choice}
    whole, chunks = asyncio.run(ask(directory, CALL, **fields))
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": CALL, "refusal": None}
    assert whole["choices"][0]["finish_reason"] == "stop"
    assert joined(chunks) == {"content": CALL}


def test_an_answer_of_calls_only_has_no_content(directory: Path) -> None:
    whole, _ = asyncio.run(ask(directory, CALL, tools=TOOLS))
    assert whole["choices"][0]["message"]["content"] is None


def test_a_call_that_is_cut_short_stays_a_part(directory: Path) -> None:
    most = len(Tokenizer(directory).encode(CALL[:65], add_special_tokens=False))
    whole, chunks = asyncio.run(ask(directory, CALL, 2, tools=TOOLS, max_tokens=most))
    (choice,) = whole["choices"]
    assert choice["finish_reason"] == "length"
    (call,) = choice["message"]["tool_calls"]
    assert CALL.partition('"arguments": ')[2].startswith(call["function"]["arguments"])
    assert joined(chunks)["tool_calls"][0]["arguments"] == call["function"]["arguments"]


@pytest.mark.parametrize(
    ("stop", "reason", "arguments"),
    [("Ulm", "stop", '{"city": "'), ("</tool_call>", "tool_calls", '{"city": "Ulm <x>"}')],
)
def test_a_stop_string_in_a_call_is_the_reason(directory: Path, stop: str, reason: str, arguments: str) -> None:
    whole, chunks = asyncio.run(ask(directory, CALL, tools=TOOLS, stop=stop))
    (choice,) = whole["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == (reason, stop)
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == arguments
    assert [each["finish_reason"] for chunk in chunks for each in chunk["choices"]][-1] == reason


@pytest.mark.parametrize("size", [1, 4, 100])
@pytest.mark.parametrize(
    ("stop", "content"),
    [("asks", None), ("think", None), ("</think>", None), ("\n", "Looking."), ("k", "Loo"), ("Looking", "")],
)
def test_stop_strings_do_not_match_thinking(directory: Path, stop: str, content: str | None, size: int) -> None:
    """None: the stop string matches nothing."""
    whole, chunks = asyncio.run(ask(directory, "<think>\nIt asks\n</think>\n\nLooking.\nDone", size, stop=stop))
    (choice,) = whole["choices"]
    assert choice["stop_reason"] == (None if content is None else stop)
    message = choice["message"]
    assert (message["reasoning_content"], message["content"]) == (
        "It asks",
        "Looking.\nDone" if content is None else content,
    )
    assert joined(chunks).get("content", "") == message["content"]


@pytest.mark.parametrize(("choice", "is_text"), [("required", False), ("auto", True)])
def test_the_beginning_of_a_call_is_no_text_where_nothing_else_is_allowed(
    directory: Path, choice: str, is_text: bool
) -> None:
    most = len(Tokenizer(directory).encode(CALL[:16], add_special_tokens=False))
    fields: dict[str, Any] = {"tools": TOOLS, "tool_choice": choice, "max_tokens": most}
    whole, chunks = asyncio.run(ask(directory, CALL, **fields))
    assert whole["choices"][0]["finish_reason"] == "length"
    content = whole["choices"][0]["message"]["content"]
    assert CALL.startswith(content)
    assert bool(content) == is_text
    assert joined(chunks).get("content", "") == content


def test_tokens_of_the_thinking_are_counted(directory: Path) -> None:
    tokenizer = Tokenizer(directory)
    thinking = "<think>\nIt asks\n</think>"
    for text, expected in ((ANSWER, thinking), ("Looking.", ""), (thinking, thinking), ("<think>\nIt", "<think>\nIt ")):
        whole, _ = asyncio.run(ask(directory, text, tools=TOOLS))
        counted = whole["usage"]["completion_tokens_details"]["reasoning_tokens"]
        assert counted == len(tokenizer.encode(expected, add_special_tokens=False)), text


def test_logprobs_are_of_all_tokens(directory: Path) -> None:
    whole, chunks = asyncio.run(ask(directory, ANSWER, tools=TOOLS, logprobs=True, return_token_ids=True))
    told = whole["choices"][0]["logprobs"]["content"]
    assert len(told) == whole["usage"]["completion_tokens"] == len(whole["choices"][0]["token_ids"])
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]] == told
    ids = [id for choice in choices for id in choice.get("token_ids", ())]
    assert ids == whole["choices"][0]["token_ids"]
    assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert len(whole["prompt_token_ids"]) == whole["usage"]["prompt_tokens"]


def test_thinking_can_be_left_out(directory: Path) -> None:
    whole, chunks = asyncio.run(ask(directory, ANSWER, include_reasoning=False))
    assert "reasoning_content" not in whole["choices"][0]["message"]
    assert "reasoning_content" not in joined(chunks)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": TOOLS * 2}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"bos_token": "x"}}, "chat_template_kwargs"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_json"),
        ({"guided_json": {"type": "x"}}, "guided_json"),
        ({"guided_choice": [""]}, "guided_choice"),
        ({"tools": TOOLS, "tool_choice": ALLOWED | {"x": 1}}, "tool_choice"),
        (
            {"tools": TOOLS, "tool_choice": ALLOWED | {"allowed_tools": {**ALLOWED["allowed_tools"], "x": 1}}},
            "tool_choice",
        ),
        ({"messages": [{"role": "user", "content": "a" * 9999}]}, "messages"),
        ({"max_tokens": 9999}, "max_tokens"),
        ({"max_completion_tokens": 9999}, "max_completion_tokens"),
        ({"max_completion_tokens": 5, "min_tokens": 6}, "min_tokens"),
    ],
)
def test_what_is_refused(directory: Path, fields: dict[str, Any], param: str) -> None:
    async def main() -> None:
        async with server(directory) as (http, _, _):
            answer = await http.post("/v1/chat/completions", json={"messages": USER, **fields})
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["param"] == param

    asyncio.run(main())


@pytest.mark.parametrize("arguments", ['{"a": "\\ud800"}', '{"a": "\\\\\\uDFFF", "b": 1}', '"\\ud800"', '{"\\udc00'])
def test_halves_of_characters_in_arguments_are_answered(directory: Path, arguments: str) -> None:
    call = {"id": "c", "function": {"name": "weather", "arguments": arguments}}
    history = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c", "content": "1"}]
    for form in ("hermes", "qwen_xml", "generic_json"):
        settings = {"tool_format": form}
        asyncio.run(ask(directory, "a", settings=settings, messages=[*USER, *history], tools=TOOLS))


@pytest.mark.parametrize(
    ("choice", "mode", "parallel"),
    [
        ("auto", "auto", True),
        ("required", "required", True),
        ({"type": "function", "function": {"name": "weather"}}, "required", False),
        (ALLOWED, "auto", True),
        ({**ALLOWED, "allowed_tools": {**ALLOWED["allowed_tools"], "mode": "required"}}, "required", True),
    ],
)
def test_a_function_that_is_named_is_called_once(choice: Any, mode: str, parallel: bool) -> None:
    use = ChatRequest.model_validate({"messages": USER, "tools": TOOLS, "tool_choice": choice}).tool_use()
    assert (use.mode, use.parallel, [function.name for function in use.callable]) == (mode, parallel, ["weather"])


def test_max_tokens_beyond_the_room_are_clamped_by_a_setting(directory: Path) -> None:
    whole, chunks = asyncio.run(ask(directory, "a", settings={"clamp_max_tokens": True}, max_tokens=100000))
    room = 4096 - whole["usage"]["prompt_tokens"]
    assert whole["clamped_max_tokens"] == room
    assert all(chunk["clamped_max_tokens"] == room for chunk in chunks)
    whole, _ = asyncio.run(ask(directory, "a", settings={"clamp_max_tokens": True}, max_tokens=100))
    assert "clamped_max_tokens" not in whole
