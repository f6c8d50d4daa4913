"""Requests for responses, and their conversion to chat requests."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator
from pydantic_core import PydanticCustomError

from server.bodies.chat_body import (
    ChatRequest,
    FunctionBody,
    FunctionName,
    Logprobs,
    Message,
    SomeTokens,
    Tool,
    ToolChoice,
)
from server.bodies.fields import CompletionFields
from server.bodies.response_items import parse_items, to_messages
from server.bodies.strict import Body, NotServed, only
from server.errors import ApiError
from server.limits import MAX_MESSAGES, MAX_METADATA, MAX_TOOLS
from server.text.structured import JsonSchema, ResponseFormat

LOGPROBS = "message.output_text.logprobs"
_INCLUDABLE = (LOGPROBS, "reasoning.encrypted_content")
"""Values of `include`. Thinking is in each answer as text, so there is nothing encrypted to add."""

NAMES = {
    "response_format": "text.format",
    "max_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "messages": "input",
    "prompt": "input",
}
"""Fields of a chat request that clients of this route know by another name."""


def _input(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": value}]}]
    if not isinstance(value, list) or not value:
        raise PydanticCustomError("input", "expected a string or a list of items")
    if len(value) > MAX_MESSAGES:
        raise PydanticCustomError("input", f"expected at most {MAX_MESSAGES} items")
    parse_items(value)
    return value


def _include(value: Any) -> list[str] | None:
    if value is None:
        return None
    if not isinstance(value, list):
        raise PydanticCustomError("include", "expected a list of strings")
    if any(each not in _INCLUDABLE for each in value):
        raise PydanticCustomError("not_served", f"only {' and '.join(_INCLUDABLE)} are served")
    return value


def _metadata(value: dict[str, Any] | None) -> dict[str, Any] | None:
    if value and (len(value) > MAX_METADATA or not all(isinstance(each, str) for each in value.values())):
        raise PydanticCustomError("metadata", f"expected at most {MAX_METADATA} names with strings as values")
    return value


def _tool_choice(value: Any) -> ToolChoice | None:
    if value is None:
        return None
    match value:
        case "none" | "auto" | "required" as mode:
            return ToolChoice(mode)
        case {"type": "function", "name": str(name), **rest} if not rest:
            return ToolChoice("required", (name,), once=True)
        case {"type": "allowed_tools", "mode": "auto" | "required" as mode, "tools": list(tools), **rest} if not rest:
            names = [tool["name"] for tool in tools if _is_function(tool)]
            if names and len(names) == len(tools):
                return ToolChoice(mode, tuple(names))
    reason = 'expected "none", "auto", "required", {"type": "function", "name": …} or allowed_tools with functions'
    raise PydanticCustomError("tool_choice", reason)


def _is_function(tool: Any) -> bool:
    match tool:
        case {"type": "function", "name": str(), **rest} if not rest:
            return True
    return False


class FunctionTool(Body):
    type: Annotated[str, AfterValidator(only("function"))]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: Annotated[Any, AfterValidator(only(False))] = None
    allowed_callers: Annotated[Any, AfterValidator(only(["direct"]))] = None
    output_schema: NotServed = None
    async_: Annotated[Any, AfterValidator(only(False)), Field(alias="async")] = None

    def shown(self) -> dict[str, Any]:
        """Return the tool as responses have it."""
        return {
            "type": "function",
            "name": self.name,
            "description": self.description,
            "parameters": self.parameters,
            "strict": bool(self.strict),
        }


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    content: Annotated[dict[str, Any] | None, Field(alias="schema")] = None

    def for_chat(self) -> ResponseFormat:
        """Return the format in the form of chats. Raises ApiError."""
        if (self.type == "json_schema") != (self.content is not None):
            raise ApiError("text.format: schema goes with the type json_schema", param="text.format")
        schema = None if self.content is None else JsonSchema.model_construct(name=self.name, content=self.content)
        return ResponseFormat(type=self.type, json_schema=schema)


class TextOptions(Body):
    format: TextFormat | None = None
    verbosity: str | None = None  # of which any value is right to have no effect


class Reasoning(Body):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Annotated[Any, AfterValidator(only("auto"))] = None
    """auto: as much as there is. Thinking is in the answer as it is; there is no summary of it."""
    generate_summary: Annotated[Any, AfterValidator(only("auto"))] = None
    context: Annotated[Any, AfterValidator(only("auto"))] = None
    mode: Annotated[Any, AfterValidator(only("standard"))] = None


class ResponsesRequest(CompletionFields):
    """Answer a conversation, whose earlier turns the server may have kept."""

    input: Annotated[list[dict[str, Any]], PlainValidator(_input, json_schema_input_type=str | list[dict[str, Any]])]
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: SomeTokens | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Annotated[
        ToolChoice | None, PlainValidator(_tool_choice, json_schema_input_type=str | dict[str, Any] | None)
    ] = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    include: Annotated[list[str] | None, PlainValidator(_include, json_schema_input_type=list[str] | None)] = None
    top_logprobs: Logprobs | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    metadata: Annotated[dict[str, Any] | None, AfterValidator(_metadata)] = None
    max_tool_calls: SomeTokens | None = None
    """For tools that run in the server, of which there are none: any value is right to have no effect."""

    # Known fields, served only with values that change nothing.
    n: Annotated[Any, AfterValidator(only(1))] = None
    best_of: Annotated[Any, AfterValidator(only(1))] = None
    background: Annotated[Any, AfterValidator(only(False))] = None
    return_token_ids: Annotated[Any, AfterValidator(only(False))] = None
    truncation: Annotated[Any, AfterValidator(only("disabled"))] = None
    stream_options: Annotated[Any, AfterValidator(only({}, {"include_obfuscation": False}))] = None
    context_management: Annotated[Any, AfterValidator(only([]))] = None
    access_programs: NotServed = None
    background_options: NotServed = None
    conversation: NotServed = None
    image: NotServed = None
    moderation: NotServed = None
    prompt: NotServed = None
    prompt_cache_options: NotServed = None
    prompt_cache_retention: NotServed = None
    prompt_logprobs: NotServed = None
    request_id: NotServed = None
    response_format: NotServed = None
    verbosity: NotServed = None

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())

    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.wants_logprobs:
            raise ApiError(f"top_logprobs: only with {LOGPROBS} in include", param="top_logprobs")

    def for_chat(self, history: Sequence[dict[str, Any]]) -> ChatRequest:
        """Return the same request for a chat. history: items of the conversation before `input`. Raises ApiError."""
        messages = to_messages(parse_items([*history, *self.input]))
        if self.instructions is not None:
            messages.insert(0, Message(role="system", content=self.instructions))
        # All values have been validated, in their own fields.
        shared: dict[str, Any] = {
            **{name: getattr(self, name) for name in CompletionFields.model_fields},
            "messages": messages,
            "tools": self.tools and [_for_chat(tool) for tool in self.tools],
            "tool_choice": self.tool_choice,
            "parallel_tool_calls": self.parallel_tool_calls,
            "max_completion_tokens": self.max_output_tokens,
            "logprobs": self.wants_logprobs,
            "top_logprobs": self.top_logprobs,
            "reasoning_effort": self.reasoning.effort if self.reasoning else None,
            "response_format": self.text.format.for_chat() if self.text and self.text.format else None,
            "chat_template_kwargs": self.chat_template_kwargs,
            "stream_options": None,
        }
        return ChatRequest.model_construct(**shared)


def _for_chat(tool: FunctionTool) -> Tool:
    function = FunctionBody(
        name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict
    )
    return Tool(type="function", function=function)


def _number(value: Any) -> Any:
    return int(value) if isinstance(value, str) and re.fullmatch("[0-9]{1,9}", value) else value


class RetrievalQuery(Body):
    """Query of one response."""

    stream: Literal["false"] | None = None
    include: NotServed = None
    include_obfuscation: NotServed = None
    starting_after: NotServed = None


class ItemsQuery(Body):
    """Query of a list of items."""

    limit: Annotated[int, BeforeValidator(_number), Field(ge=1, le=100)] = 20
    order: Literal["asc", "desc"] = "desc"
    after: str | None = None
    include: NotServed = None
