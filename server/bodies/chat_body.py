"""Bodies of chats: messages, tools, and what forms the prompt."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import AfterValidator, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from engine.params import MAX_LOGPROBS
from server.bodies.fields import CompletionFields
from server.bodies.strict import WHOLE, Body, NotServed, only
from server.errors import ApiError, printable
from server.limits import MAX_CALLS, MAX_FUNCTION_NAME, MAX_INT, MAX_MESSAGES, MAX_TOOLS
from server.text.tools.functions import Function, ToolUse

Logprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS), WHOLE]
SomeTokens = Annotated[int, Field(ge=1, le=MAX_INT), WHOLE]
FunctionName = Annotated[str, Field(min_length=1, max_length=MAX_FUNCTION_NAME, pattern=r"^[a-zA-Z0-9_.\-]+$")]


def _content(value: Any) -> str | None:
    """Return the text; text parts of a list are joined with line breaks."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise PydanticCustomError("content", "expected a string or a list of parts")
    if len(value) > MAX_MESSAGES:
        raise PydanticCustomError("content", f"expected at most {MAX_MESSAGES} parts")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise PydanticCustomError("not_served", "only parts of type text are served")
        # cache_control marks what to cache; that changes no answer.
        if part.keys() - {"cache_control"} != {"type", "text"} or not isinstance(part["text"], str):
            raise PydanticCustomError("content", 'expected parts like {"type": "text", "text": "…"}')
        texts.append(part["text"])
    return "\n".join(texts)


class CalledFunction(Body):
    name: FunctionName
    arguments: str


class MessageCall(Body):
    """A call of a function in an earlier answer."""

    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction
    index: Any = None


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        str | None, PlainValidator(_content, json_schema_input_type=str | list[dict[str, str]] | None)
    ] = None
    name: str | None = None
    tool_calls: Annotated[list[MessageCall], Field(max_length=MAX_CALLS)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    """Thinking of an earlier answer, which the model's template may write or leave out."""
    reasoning: str | None = None
    """Another name of reasoning_content, which wins if both are given."""

    # Fields of answers that clients send back. None of them is part of the prompt.
    annotations: list[Any] | None = None
    id: Any = None
    provider_specific_fields: Any = None
    refusal: str | None = None
    timestamp: Any = None

    audio: NotServed = None
    function_call: NotServed = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.content is None and not (self.role == "assistant" and (self.tool_calls or self.thinking)):
            raise PydanticCustomError("content", "content: expected a string or a list of parts")
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("tool_calls", "tool_calls: only messages of the assistant have calls")
        if self.tool_call_id is not None and self.role != "tool":
            raise PydanticCustomError("tool_call_id", "tool_call_id: only messages with the role tool answer a call")
        return self

    @property
    def thinking(self) -> str | None:
        return self.reasoning_content if self.reasoning_content is not None else self.reasoning

    def for_template(self) -> dict[str, Any]:
        """Return what chat templates know of the message."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    **({} if call.id is None else {"id": call.id}),
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": call.function.arguments},
                }
                for call in self.tool_calls
            ]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.role == "assistant" and self.thinking is not None:
            message["reasoning_content"] = self.thinking
        return message


class FunctionBody(Body):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Annotated[str, AfterValidator(only("function"))]
    function: FunctionBody
    cache_control: Any = None  # marks what to cache; that changes no answer


class ToolChoice(NamedTuple):
    """names: the only functions to call; None: all. once: whether the answer is one call of the only function."""

    mode: Literal["none", "auto", "required"]
    names: tuple[str, ...] | None = None
    once: bool = False


def _tool_choice(value: Any) -> ToolChoice | None:
    if value is None:
        return None
    match value:
        case "none" | "auto" | "required" as mode:
            return ToolChoice(mode)
        case {"type": "function", "function": {"name": str(name), **other}, **rest} if not other and not rest:
            return ToolChoice("required", (name,), once=True)
        case {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "auto" | "required" as mode, "tools": list(tools), **other},
            **rest,
        } if not other and not rest:
            names = [_allowed(tool) for tool in tools]
            if names and None not in names:
                return ToolChoice(mode, tuple(filter(None, names)))
    raise PydanticCustomError(
        "tool_choice",
        'expected "none", "auto", "required", {"type": "function", "function": {"name": …}} or allowed_tools',
    )


def _allowed(tool: Any) -> str | None:
    match tool:
        case {"type": "function", "function": {"name": str(name), **other}, **rest} if not other and not rest:
            return name
    return None


def _no_template(value: Any) -> Any:
    if value is not None:
        raise PydanticCustomError("not_served", "templates in requests are refused; the model's own is used")
    return value


class PromptFields(Body):
    """Fields that form the prompt, but for the messages."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None

    chat_template: Annotated[Any, AfterValidator(_no_template)] = None

    def offered(self) -> list[Function]:
        """Return the functions of `tools`. Raises ApiError."""
        found = [
            Function(
                tool.function.name,
                tool.function.parameters or {"type": "object", "properties": {}},
                tool.function.description or "",
                bool(tool.function.strict),
            )
            for tool in self.tools or ()
        ]
        names = [function.name for function in found]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ApiError(f"tools: two functions have the name {printable(twice, 64)}", param="tools")
        return found


class ChatFields(PromptFields):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]


class ChatRequest(ChatFields, CompletionFields):
    """Answer a conversation."""

    max_tokens: SomeTokens | None = None
    """Former name of max_completion_tokens, which wins if both are given."""
    max_completion_tokens: SomeTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    tool_choice: Annotated[
        ToolChoice | None, PlainValidator(_tool_choice, json_schema_input_type=str | dict[str, Any] | None)
    ] = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    """Whether the answer contains the model's thinking."""
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    """For templates that know it, or `enable_thinking`."""

    echo: Annotated[Any, AfterValidator(only(False))] = None
    modalities: Annotated[Any, AfterValidator(only(["text"]))] = None
    functions: Annotated[Any, AfterValidator(only([]))] = None
    function_call: Annotated[Any, AfterValidator(only("none", "auto"))] = None
    documents: Annotated[Any, AfterValidator(only([]))] = None
    mm_processor_kwargs: Annotated[Any, AfterValidator(only({}))] = None
    audio: NotServed = None
    prediction: NotServed = None
    prompt_cache_retention: NotServed = None
    web_search_options: NotServed = None

    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise ApiError("top_logprobs: only with logprobs", param="top_logprobs")

    def tool_use(self) -> ToolUse:
        """Return the functions, and how the answer uses them. Raises ApiError."""
        offered = self.offered()
        choice = self.tool_choice or ToolChoice("auto" if offered else "none")
        if not offered:
            if choice.mode == "required":
                raise ApiError("tool_choice: only with tools", param="tool_choice")
            return ToolUse()
        unknown = set(choice.names or ()) - {function.name for function in offered}
        if unknown:
            name = printable(min(unknown), 64)
            raise ApiError(f"tool_choice: tools has no function {name}", param="tool_choice")
        callable = [function for function in offered if choice.names is None or function.name in choice.names]
        return ToolUse(offered, callable, choice.mode, self.parallel_tool_calls is not False and not choice.once)
