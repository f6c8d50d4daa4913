"""Request bodies: the fields that clients may send."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator
from pydantic_core import PydanticCustomError

from engine.params import MAX_LOGPROBS
from server.bodies.fields import CompletionFields, are_token_ids
from server.bodies.strict import WHOLE, Body, NotServed, only
from server.errors import ApiError
from server.limits import MAX_INT, MAX_MESSAGES, MAX_PROMPTS

Logprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS), WHOLE]
MaxTokens = Annotated[int, Field(ge=0, le=MAX_INT), WHOLE]
SomeTokens = Annotated[int, Field(ge=1, le=MAX_INT), WHOLE]


def _prompts(value: Any) -> list[str | list[int]]:
    """Convert one prompt or several, each text or token ids, to a list."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if are_token_ids(value):
            return [value]
        if len(value) > MAX_PROMPTS:
            raise PydanticCustomError("prompt", f"expected at most {MAX_PROMPTS} prompts")
        if all(isinstance(prompt, str) for prompt in value) or all(map(are_token_ids, value)):
            return value
    raise PydanticCustomError(
        "prompt", "expected a string, a list of strings, a list of token ids, or a list of lists of token ids"
    )


Prompts = Annotated[
    list[str | list[int]],
    PlainValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]


def _false_is_absent(value: Any) -> Any:
    """Take false for null: clients share this field with the chat route, where it is a boolean."""
    return None if value is False else value


class CompletionRequest(CompletionFields):
    """Complete one prompt or several."""

    prompt: Prompts
    max_tokens: MaxTokens | None = None
    logprobs: Annotated[Logprobs | None, BeforeValidator(_false_is_absent)] = None
    echo: bool | None = None

    prompt_embeds: NotServed = None
    suffix: Annotated[Any, AfterValidator(only(""))] = None


def _content(value: Any) -> str:
    """Return the text; text parts of a list are joined with line breaks."""
    if isinstance(value, str):
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


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, PlainValidator(_content, json_schema_input_type=str | list[dict[str, str]])]
    name: str | None = None

    # Fields of answers that clients send back. None of them is part of the prompt.
    annotations: list[Any] | None = None
    id: Any = None
    refusal: str | None = None
    timestamp: Any = None

    audio: NotServed = None
    function_call: NotServed = None
    reasoning: NotServed = None
    reasoning_content: NotServed = None
    tool_call_id: NotServed = None
    tool_calls: Annotated[Any, AfterValidator(only([]))] = None


def _no_template(value: Any) -> Any:
    if value is not None:
        raise PydanticCustomError("not_served", "templates in requests are refused; the model's own is used")
    return value


class ChatFields(Body):
    """Fields that form the prompt."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    add_generation_prompt: bool | None = None

    chat_template: Annotated[Any, AfterValidator(_no_template)] = None
    chat_template_kwargs: Annotated[Any, AfterValidator(only({}))] = None
    continue_final_message: Annotated[Any, AfterValidator(only(False))] = None


class ChatRequest(ChatFields, CompletionFields):
    """Answer a conversation."""

    max_tokens: SomeTokens | None = None
    """Former name of max_completion_tokens, which wins if both are given."""
    max_completion_tokens: SomeTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None

    echo: Annotated[Any, AfterValidator(only(False))] = None
    modalities: Annotated[Any, AfterValidator(only(["text"]))] = None
    include_reasoning: Annotated[Any, AfterValidator(only(False))] = None
    # Without tools, "auto" chooses none, and there are no calls to be parallel.
    tools: Annotated[Any, AfterValidator(only([]))] = None
    tool_choice: Annotated[Any, AfterValidator(only("none", "auto"))] = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[Any, AfterValidator(only([]))] = None
    function_call: Annotated[Any, AfterValidator(only("none", "auto"))] = None
    documents: Annotated[Any, AfterValidator(only([]))] = None
    mm_processor_kwargs: Annotated[Any, AfterValidator(only({}))] = None
    audio: NotServed = None
    prediction: NotServed = None
    prompt_cache_retention: NotServed = None
    reasoning_effort: NotServed = None
    web_search_options: NotServed = None

    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise ApiError("top_logprobs: only with logprobs", param="top_logprobs")


class TokenizeRequest(Body):
    """Tokenize `prompt`, or `messages` as on the chat route."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None

    chat_template: Annotated[Any, AfterValidator(_no_template)] = None
    chat_template_kwargs: Annotated[Any, AfterValidator(only({}))] = None
    continue_final_message: Annotated[Any, AfterValidator(only(False))] = None
    tools: Annotated[Any, AfterValidator(only([]))] = None

    def check(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise ApiError("prompt: give either this or messages", param="prompt")
        if self.prompt is not None and self.add_generation_prompt is not None:
            raise ApiError("add_generation_prompt: only with messages", param="add_generation_prompt")


def _tokens(value: Any) -> list[int]:
    if not are_token_ids(value) or (value and (min(value) < 0 or max(value) > MAX_INT)):
        raise PydanticCustomError("token_ids", "expected a list of token ids")
    return value


class DetokenizeRequest(Body):
    """Convert token ids to text."""

    model: str | None = None
    tokens: Annotated[list[int], PlainValidator(_tokens, json_schema_input_type=list[int])]
