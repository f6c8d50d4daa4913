"""Request bodies: the fields that clients may send."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator
from pydantic_core import PydanticCustomError

from server.bodies.chat_body import Logprobs, Message, PromptFields
from server.bodies.fields import CompletionFields, are_token_ids
from server.bodies.strict import WHOLE, Body, NotServed
from server.errors import ApiError
from server.limits import MAX_INT, MAX_MESSAGES, MAX_PATH_CHARS, MAX_PROMPTS

MaxTokens = Annotated[int, Field(ge=0, le=MAX_INT), WHOLE]


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
    suffix: str | None = None
    """Text behind the one that is completed; for models whose tokenizer has tokens for that. Empty: none."""

    prompt_embeds: NotServed = None

    def check(self) -> None:
        super().check()
        if self.suffix and self.echo:
            raise ApiError("suffix: not with echo", param="suffix")


class TokenizeRequest(PromptFields):
    """Tokenize `prompt`, or `messages` as on the chat route."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    def check(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise ApiError("prompt: give either this or messages", param="prompt")
        of_chats = (name for name in PromptFields.model_fields if getattr(self, name) is not None)
        if self.prompt is not None and (name := next(of_chats, None)):
            raise ApiError(f"{name}: only with messages", param=name)


def _tokens(value: Any) -> list[int]:
    if not are_token_ids(value) or (value and (min(value) < 0 or max(value) > MAX_INT)):
        raise PydanticCustomError("token_ids", "expected a list of token ids")
    return value


class DetokenizeRequest(Body):
    """Convert token ids to text."""

    model: str | None = None
    tokens: Annotated[list[int], PlainValidator(_tokens, json_schema_input_type=list[int])]


class PauseRequest(Body):
    """Pause: begin no round until `resume`. keep: requests wait; abort: all of them end."""

    mode: Literal["keep", "abort"] = "keep"


def _path(value: str) -> str:
    if not value.startswith("/") or "\0" in value:
        raise PydanticCustomError("path", "expected an absolute path")
    return value


class UpdateWeightsRequest(Body):
    """Replace the weights by those of a model directory on the server's disk, with the config of the model in use."""

    path: Annotated[str, Field(max_length=MAX_PATH_CHARS), AfterValidator(_path)]
