"""Bodies of the Messages API become chats; errors name the client's own fields."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from server.bodies.chat_body import ChatRequest
from server.bodies.messages_body import NAMES, MessagesRequest
from server.errors import ApiError, from_validation
from server.text.tools.functions import Function

USER = {"role": "user", "content": "hi"}
TOOL: dict[str, Any] = {
    "name": "look_up",
    "description": "Look up.",
    "input_schema": {"type": "object", "properties": {"x": {}}},
}


CALLED = {"type": "tool_use", "id": "a", "name": "f", "input": {}}


def chat(*variables: str, thinks: bool = False, **fields: Any) -> ChatRequest:
    """Convert a body. variables: those that the chat template reads."""
    body = {"model": "m", "max_tokens": 5, "messages": [USER], **fields}
    parsed = MessagesRequest.model_validate_json(json.dumps(body))
    return parsed.chat(thinks=thinks, knows=lambda name: name in variables)


def messages(*given: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    return [message.for_template() for message in chat(messages=list(given), **fields).messages]


def test_strings_and_blocks_of_text() -> None:
    marked = {"cache_control": {"type": "ephemeral"}}
    system = [{"type": "text", "text": "Be terse.", **marked}, {"type": "text", "text": "Rhyme.", "citations": None}]
    assert messages({"role": "user", "content": [{"type": "text", "text": "hi", **marked}]}, system=system) == [
        {"role": "system", "content": "Be terse.\nRhyme."},
        {"role": "user", "content": "hi"},
    ]
    assert messages(USER, system="Be terse.")[0] == {"role": "system", "content": "Be terse."}


def test_turns_of_one_role_are_one_message() -> None:
    assert messages(USER, {"role": "user", "content": "there"}) == [{"role": "user", "content": "hi\nthere"}]


def test_calls_and_their_results() -> None:
    answer = [
        {"type": "thinking", "thinking": "Two things.", "signature": "abc"},
        {"type": "redacted_thinking", "data": "xyz"},
        {"type": "text", "text": "Looking."},
        {"type": "tool_use", "id": "a", "name": "look_up", "input": {"x": "ü"}, "caller": {"type": "direct"}},
        {"type": "tool_use", "id": "b", "name": "look_up", "input": {}},
    ]
    results = [
        {"type": "tool_result", "tool_use_id": "a", "content": "found"},
        {"type": "tool_result", "tool_use_id": "b", "content": [{"type": "text", "text": "no"}], "is_error": True},
        {"type": "tool_result", "tool_use_id": "c"},
        {"type": "text", "text": "Go on."},
    ]
    _, called, *rest = messages(USER, {"role": "assistant", "content": answer}, {"role": "user", "content": results})
    assert (called["content"], called["reasoning_content"]) == ("Looking.", "Two things.")
    assert [(call["id"], call["function"]["arguments"]) for call in called["tool_calls"]] == [
        ("a", '{"x": "ü"}'),
        ("b", "{}"),
    ]
    assert rest == [
        {"role": "tool", "tool_call_id": "a", "content": "found"},
        {"role": "tool", "tool_call_id": "b", "content": "Error: no"},
        {"role": "tool", "tool_call_id": "c", "content": ""},
        {"role": "user", "content": "Go on."},
    ]


def test_an_answer_of_calls_alone() -> None:
    call = {"type": "tool_use", "id": "a", "name": "f", "input": {}}
    assert messages(USER, {"role": "assistant", "content": [call]})[1]["content"] is None


def test_a_last_message_of_the_assistant_is_continued() -> None:
    assert chat(messages=[USER, {"role": "assistant", "content": "The"}]).continue_final_message
    assert not chat().continue_final_message


@pytest.mark.parametrize(
    ("choice", "mode", "parallel", "callable"),
    [
        (None, "auto", True, ["look_up", "g"]),
        ({"type": "auto", "disable_parallel_tool_use": True}, "auto", False, ["look_up", "g"]),
        ({"type": "any"}, "required", True, ["look_up", "g"]),
        ({"type": "tool", "name": "g", "disable_parallel_tool_use": True}, "required", False, ["g"]),
        ({"type": "none"}, "none", True, ["look_up", "g"]),
    ],
)
def test_tools(choice: Any, mode: str, parallel: bool, callable: list[str]) -> None:
    other = {"type": "custom", "name": "g", "input_schema": {"type": "object"}, "strict": True}
    use = chat(tools=[TOOL, other], tool_choice=choice).tool_use()
    assert (use.mode, use.parallel, [function.name for function in use.callable]) == (mode, parallel, callable)
    assert use.offered[0] == Function("look_up", TOOL["input_schema"], "Look up.", False)
    assert use.offered[1].strict


def test_sampling() -> None:
    made = chat(temperature=0.5, top_p=0.9, top_k=3, stop_sequences=["x", "y"], metadata={"user_id": "u"})
    assert (made.max_tokens, made.temperature, made.top_p, made.top_k) == (5, 0.5, 0.9, 3)
    assert made.stop == ["x", "y"]
    schema = {"type": "object"}
    made = chat(
        "reasoning_effort", output_config={"effort": "low", "format": {"type": "json_schema", "schema": schema}}
    )
    assert made.reasoning_effort == "low"
    assert made.response_format is not None
    assert made.response_format.json_schema is not None
    assert made.response_format.json_schema.content == schema


@pytest.mark.parametrize(
    ("setting", "enabled"),
    [(None, False), ("disabled", False), ("enabled", True), ("adaptive", True)],
)
def test_thinking_is_set_where_the_template_can(setting: str | None, enabled: bool) -> None:
    fields = {} if setting is None else {"thinking": {"type": setting}}
    assert chat("enable_thinking", thinks=True, **fields).chat_template_kwargs == {"enable_thinking": enabled}
    assert chat(thinks=True, **fields).chat_template_kwargs == {}


def test_a_model_that_cannot_think_may_decide_not_to() -> None:
    chat(thinking={"type": "adaptive"})
    with pytest.raises(ApiError, match="thinking: this model does not think"):
        chat(thinking={"type": "enabled", "budget_tokens": 1024})


def refusal(fields: dict[str, Any]) -> ApiError:
    try:
        chat(**fields).tool_use()
    except ValidationError as error:
        return from_validation(error)
    except ApiError as error:
        return error
    raise AssertionError("the body was accepted")


def content(*blocks: Any, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(blocks)}]}


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"max_tokens": None}, "invalid_value", "max_tokens"),
        (content({"type": "image", "source": {}}), "not_served", "messages.0.content.0"),
        (content({"type": "document", "source": {}}), "not_served", "messages.0.content.0"),
        (content(), "invalid_value", "messages.0.content"),
        (content({"type": "tool_use", "id": "a", "name": "f", "input": {}}), "invalid_value", "messages.0"),
        (content({"type": "tool_result", "tool_use_id": "a"}, role="assistant"), "invalid_value", "messages.0"),
        (
            content({"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image", "source": {}}]}),
            "not_served",
            "messages.0.content.0.tool_result.content.0",
        ),
        (
            content({"type": "tool_use", "id": "a", "name": "f"}, role="assistant"),
            "missing_field",
            "messages.0.content.0.tool_use.input",
        ),
        ({"system": [{"type": "image"}]}, "not_served", "system.0"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 1}]}, "not_served", "tools.0"),
        ({"tools": [{"name": "f"}]}, "missing_field", "tools.0.input_schema"),
        ({"tools": [TOOL | {"defer_loading": True}]}, "not_served", "tools.0.defer_loading"),
        ({"tool_choice": {"type": "tool"}}, "invalid_value", "tool_choice"),
        ({"tool_choice": {"type": "any"}}, "invalid_value", "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "f"}}, "invalid_value", "tool_choice"),
        ({"tools": [TOOL, TOOL]}, "invalid_value", "tools"),
        ({"stop_sequences": [""]}, "invalid_value", "stop_sequences"),
        (content(*[CALLED] * 129, role="assistant"), "invalid_value", "messages"),
        ({"thinking": {"type": "disabled", "display": "omitted"}}, "not_served", "thinking.display"),
        ({"mcp_servers": [{"url": "https://x"}]}, "not_served", "mcp_servers"),
        ({"container": "c"}, "not_served", "container"),
        ({"context_management": {}}, "not_served", "context_management"),
        ({"n": 2}, "unknown_field", "n"),
    ],
)
def test_refusals(fields: dict[str, Any], code: str, param: str) -> None:
    error = refusal(fields)
    assert (error.code, error.param) == (code, param)


@pytest.mark.parametrize(
    ("error", "message", "param"),
    [
        (ApiError("stop: too long", param="stop"), "stop_sequences: too long", "stop_sequences"),
        (ApiError("the prompt is too long", param="prompt"), "the prompt is too long", "messages"),
        (ApiError("top_p: too large", param="top_p"), "top_p: too large", "top_p"),
        (ApiError("it broke", status=503, code="x"), "it broke", None),
    ],
)
def test_errors_have_the_names_of_this_api(error: ApiError, message: str, param: str | None) -> None:
    named = error.renamed(NAMES)
    assert (named.message, named.param, named.status, named.code) == (message, param, error.status, error.code)
