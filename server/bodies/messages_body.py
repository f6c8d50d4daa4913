"""Bodies of Anthropic's Messages API, and their conversion to chats."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, groupby
from operator import attrgetter
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from server.bodies.chat_body import ChatRequest, FunctionName, SomeTokens
from server.bodies.fields import Stops
from server.bodies.strict import WHOLE, Body, NotServed, only
from server.errors import ApiError, from_validation
from server.limits import MAX_CALLS, MAX_MESSAGES, MAX_TOOLS

NAMES = {
    "continue_final_message": "messages",
    "prompt": "messages",
    "reasoning_effort": "output_config.effort",
    "response_format": "output_config.format",
    "stop": "stop_sequences",
}
"""Fields of chats whose names differ here."""

CacheControl = Any
"""Marks what to cache; that changes no answer."""


class _Served:
    """Validator of a block that has one of these types."""

    def __init__(self, *types: str) -> None:
        self._types = types

    def __call__(self, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("type"), str) and value["type"] not in self._types:
            raise PydanticCustomError("not_served", f"only blocks of type {', '.join(self._types)} are served")
        return value


class TextBlock(Body):
    type: Literal["text"]
    text: str
    cache_control: CacheControl = None
    citations: Annotated[Any, AfterValidator(only([]))] = None


def _texts(value: Any) -> Any:
    """Return blocks; a string is short for one of text."""
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


Texts = Annotated[
    list[Annotated[TextBlock, BeforeValidator(_Served("text"))]],
    Field(max_length=MAX_MESSAGES),
    BeforeValidator(_texts, json_schema_input_type=str | list[TextBlock]),
]


class ToolUseBlock(Body):
    """A call in an earlier answer."""

    type: Literal["tool_use"]
    id: str
    name: FunctionName
    input: dict[str, Any]
    cache_control: CacheControl = None
    caller: Annotated[Any, AfterValidator(only({"type": "direct"}))] = None
    toolset_name: NotServed = None


class ToolResultBlock(Body):
    type: Literal["tool_result"]
    tool_use_id: str
    content: Texts | None = None
    is_error: bool | None = None
    cache_control: CacheControl = None
    toolset_name: NotServed = None

    @property
    def text(self) -> str:
        """What the model reads; no chat template knows of errors."""
        text = _join(self.content or ())
        return f"Error: {text}" if self.is_error else text


class ThinkingBlock(Body):
    """Thinking of an earlier answer, which the model's template may write or leave out."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class RedactedThinkingBlock(Body):
    """Thinking of another server, which nobody else can read: it is left out."""

    type: Literal["redacted_thinking"]
    data: str


_BY_ROLE = {
    "user": ("text", "tool_result"),
    "assistant": ("text", "tool_use", "thinking", "redacted_thinking"),
    "system": ("text",),
}

Block = Annotated[
    TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock | RedactedThinkingBlock,
    Field(discriminator="type"),
    BeforeValidator(_Served(*dict.fromkeys(chain(*_BY_ROLE.values())))),
]


class MessageTurn(Body):
    """A message, or part of one: turns of one role that follow each other are one message."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[
        list[Block],
        Field(min_length=1, max_length=MAX_MESSAGES),
        BeforeValidator(_texts, json_schema_input_type=str | list[Block]),
    ]

    @model_validator(mode="after")
    def _check(self) -> Self:
        allowed = _BY_ROLE[self.role]
        if not {block.type for block in self.content} <= set(allowed):
            served = " or ".join(allowed)
            raise PydanticCustomError("content", f"with the role {self.role}, expected blocks of type {served}")
        return self


class ClientTool(Body):
    """A function that the client runs."""

    type: Literal["custom"] | None = None
    name: FunctionName
    description: str | None = None
    input_schema: dict[str, Any]
    cache_control: CacheControl = None
    strict: bool | None = None
    eager_input_streaming: bool | None = None
    """Without effect: input is always streamed as it comes."""

    allowed_callers: Annotated[Any, AfterValidator(only(["direct"]))] = None
    defer_loading: Annotated[Any, AfterValidator(only(False))] = None
    input_examples: Annotated[Any, AfterValidator(only([]))] = None

    @model_validator(mode="before")
    @classmethod
    def _is_custom(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("type") not in (None, "custom"):
            raise PydanticCustomError("not_served", "type: only custom tools are served")
        return value


class ToolSelection(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.type == "tool") != (self.name is not None):
            raise PydanticCustomError("tool_choice", "name: goes with the type tool")
        return self

    def for_chat(self) -> Any:
        if self.type == "tool":
            return {"type": "function", "function": {"name": self.name}}
        return "required" if self.type == "any" else self.type


class ThinkingSetting(Body):
    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: SomeTokens | None = None
    """Without effect: max_tokens bounds thinking and text together."""
    display: Annotated[Any, AfterValidator(only("summarized"))] = None
    """Thinking is returned as it is, which is all that a summary may tell."""


class OutputFormat(Body):
    type: Literal["json_schema"]
    content: Annotated[dict[str, Any], Field(alias="schema")]


class OutputSetting(Body):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None
    task_budget: NotServed = None


class CountTokensRequest(Body):
    """Count the tokens of a prompt."""

    model: str | None = None
    messages: Annotated[list[MessageTurn], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: Texts | None = None
    tools: Annotated[list[ClientTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolSelection | None = None
    thinking: ThinkingSetting | None = None
    output_config: OutputSetting | None = None
    cache_control: CacheControl = None

    context_management: NotServed = None
    mcp_servers: Annotated[Any, AfterValidator(only([]))] = None
    output_format: NotServed = None
    speed: Annotated[Any, AfterValidator(only("standard"))] = None
    thread: Any = None
    """State that a server holds. It is refused with a code by which clients know that they may do without."""
    user_profile_id: NotServed = None
    workspace_id: NotServed = None

    @property
    def shows_thinking(self) -> bool:
        """Whether the answer contains the model's thinking. As in Anthropic's API, one has to ask for it."""
        return self.thinking is not None and self.thinking.type != "disabled"

    def chat(self, *, thinks: bool, knows: Callable[[str], bool]) -> ChatRequest:
        """Convert to a chat. thinks: whether the model does. knows: whether its chat template reads a variable.

        Raises ApiError.
        """
        if self.thread is not None:
            reason = "thread: not served, send the whole conversation"
            raise ApiError(reason, code="thread_unsupported_request", param="thread")
        if self.thinking is not None and self.thinking.type == "enabled" and not thinks:
            raise ApiError("thinking: this model does not think", code="not_served", param="thinking")
        try:
            return ChatRequest.model_validate(self._fields(knows))
        except ValidationError as error:
            raise from_validation(error) from None

    def _fields(self, knows: Callable[[str], bool]) -> dict[str, Any]:
        choice, output = self.tool_choice, self.output_config or OutputSetting()
        schema = output.format and {"type": "json_schema", "json_schema": {"schema": output.format.content}}
        return {
            "messages": [*_system(self.system or ()), *_messages(self.messages)],
            "continue_final_message": self.messages[-1].role == "assistant",
            "tools": [_tool(tool) for tool in self.tools or ()],
            "tool_choice": choice and choice.for_chat(),
            "parallel_tool_calls": not (choice and choice.disable_parallel_tool_use),
            "response_format": schema,
            "reasoning_effort": output.effort,
            "chat_template_kwargs": {"enable_thinking": self.shows_thinking} if knows("enable_thinking") else {},
        }


class MessagesRequest(CountTokensRequest):
    """Answer a conversation, in Anthropic's format."""

    max_tokens: SomeTokens
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, Field(ge=0), WHOLE] | None = None
    stop_sequences: Stops = None
    stream: bool | None = None

    # Fields of which any value is right to have no effect.
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None

    container: NotServed = None
    diagnostics: NotServed = None
    inference_geo: NotServed = None

    def _fields(self, knows: Callable[[str], bool]) -> dict[str, Any]:
        sampling = {name: getattr(self, name) for name in ("max_tokens", "temperature", "top_p", "top_k")}
        return super()._fields(knows) | sampling | {"stop": self.stop_sequences}


def _join(blocks: Iterable[TextBlock]) -> str:
    """Join texts, as chats do."""
    return "\n".join(block.text for block in blocks)


def _system(blocks: Iterable[TextBlock]) -> list[dict[str, Any]]:
    text = _join(blocks)
    return [{"role": "system", "content": text}] if text else []


def _messages(turns: Iterable[MessageTurn]) -> Iterator[dict[str, Any]]:
    """Yield a chat's messages."""
    for role, group in groupby(turns, attrgetter("role")):
        blocks = [block for turn in group for block in turn.content]
        if role == "assistant":
            yield _answer(blocks)
            continue
        for is_text, some in groupby(blocks, lambda block: isinstance(block, TextBlock)):
            if is_text:
                yield {"role": role, "content": _join(block for block in some if isinstance(block, TextBlock))}
                continue
            for block in some:
                if isinstance(block, ToolResultBlock):
                    yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": block.text}


def _answer(blocks: list[Block]) -> dict[str, Any]:
    """Return an earlier answer as a chat's message. Raises ApiError."""
    texts = [block for block in blocks if isinstance(block, TextBlock)]
    thinking = [block.thinking for block in blocks if isinstance(block, ThinkingBlock) and block.thinking]
    calls = [_call(block) for block in blocks if isinstance(block, ToolUseBlock)]
    if len(calls) > MAX_CALLS:
        raise ApiError(f"messages: an answer has more than {MAX_CALLS} calls", param="messages")
    message: dict[str, Any] = {"role": "assistant", "content": _join(texts) if texts or not calls else None}
    if thinking:
        message["reasoning_content"] = "\n".join(thinking)
    if calls:
        message["tool_calls"] = calls
    return message


def _call(block: ToolUseBlock) -> Mapping[str, Any]:
    arguments = json.dumps(block.input, ensure_ascii=False)
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": arguments}}


def _tool(tool: ClientTool) -> dict[str, Any]:
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.input_schema,
        "strict": tool.strict,
    }
    return {"type": "function", "function": function}
