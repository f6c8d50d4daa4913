"""Request bodies: the fields that clients may send."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PlainValidator
from pydantic_core import PydanticCustomError

from engine.params import MAX_LOGPROBS
from server.bodies.fields import CompletionFields, are_token_ids
from server.bodies.strict import Body, NotServed, only
from server.errors import ApiError
from server.limits import MAX_INT, MAX_MESSAGES, MAX_PROMPTS

Logprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
MaxTokens = Annotated[int, Field(ge=0, le=MAX_INT)]


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


class CompletionRequest(CompletionFields):
    """Complete one prompt or several."""

    prompt: Prompts
    max_tokens: MaxTokens | None = None
    logprobs: Logprobs | None = None
    echo: bool | None = None

    prompt_embeds: NotServed = None
    suffix: NotServed = None


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
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise PydanticCustomError("content", 'expected parts like {"type": "text", "text": "…"}')
        texts.append(part["text"])
    return "\n".join(texts)


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, PlainValidator(_content, json_schema_input_type=str | list[dict[str, str]])]
    name: str | None = None

    annotations: NotServed = None
    audio: NotServed = None
    function_call: NotServed = None
    reasoning: NotServed = None
    reasoning_content: NotServed = None
    refusal: NotServed = None
    tool_call_id: NotServed = None
    tool_calls: NotServed = None


def _no_template(value: Any) -> Any:
    if value is not None:
        raise PydanticCustomError("not_served", "templates in requests are refused; the model's own is used")
    return value


class ChatFields(Body):
    """Fields that form the prompt."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    add_generation_prompt: bool | None = None

    chat_template: Annotated[Any, AfterValidator(_no_template)] = None
    chat_template_kwargs: NotServed = None
    continue_final_message: Annotated[Any, AfterValidator(only(False))] = None


class ChatRequest(ChatFields, CompletionFields):
    """Answer a conversation."""

    max_tokens: Annotated[MaxTokens, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[MaxTokens, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None

    echo: Annotated[Any, AfterValidator(only(False))] = None
    modalities: Annotated[Any, AfterValidator(only(["text"]))] = None
    service_tier: Annotated[Any, AfterValidator(only("auto", "default"))] = None
    store: Annotated[Any, AfterValidator(only(False))] = None
    tool_choice: Annotated[Any, AfterValidator(only("none"))] = None
    include_reasoning: Annotated[Any, AfterValidator(only(False))] = None
    audio: NotServed = None
    documents: NotServed = None
    function_call: NotServed = None
    functions: NotServed = None
    mm_processor_kwargs: NotServed = None
    parallel_tool_calls: NotServed = None
    prediction: NotServed = None
    prompt_cache_key: NotServed = None
    prompt_cache_retention: NotServed = None
    reasoning_effort: NotServed = None
    safety_identifier: NotServed = None
    tools: NotServed = None
    verbosity: NotServed = None
    web_search_options: NotServed = None

    def check(self) -> None:
        super().check()
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ApiError("max_tokens: give either this or max_completion_tokens", param="max_tokens")
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
    chat_template_kwargs: NotServed = None
    continue_final_message: Annotated[Any, AfterValidator(only(False))] = None
    tools: NotServed = None

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
