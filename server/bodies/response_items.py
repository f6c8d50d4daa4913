"""Items of the Responses API: what a client sends as `input`, and what an answer consists of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, PlainValidator, ValidationError
from pydantic_core import PydanticCustomError

from server.bodies.chat_body import CalledFunction, FunctionName, Message, MessageCall
from server.bodies.strict import Body, NotServed, only
from server.errors import ApiError, from_validation
from server.limits import MAX_CALLS, MAX_MESSAGES

_PART_EXTRAS = frozenset({"annotations", "logprobs", "prompt_cache_breakpoint"})
"""Fields of a text part that are no part of the prompt."""


def _texts(*types: str) -> Callable[[Any], str]:
    """Create a validator that takes a string, or a list of parts of these types, and returns the text. Parts are joined
    with line breaks."""

    def read(value: Any) -> str:
        if isinstance(value, str):
            return value
        if not isinstance(value, list):
            raise PydanticCustomError("content", "expected a string or a list of parts")
        if len(value) > MAX_MESSAGES:
            raise PydanticCustomError("content", f"expected at most {MAX_MESSAGES} parts")
        return "\n".join(map(part, value))

    def part(value: Any) -> str:
        if not isinstance(value, dict) or value.get("type") not in types:
            raise PydanticCustomError("not_served", f"only parts of type {' or '.join(types)} are served")
        if value.keys() - _PART_EXTRAS != {"type", "text"} or not isinstance(value["text"], str):
            raise PydanticCustomError("content", f'expected parts like {{"type": "{types[0]}", "text": "…"}}')
        text: str = value["text"]
        return text

    return read


def _or_none(read: Callable[[Any], str]) -> Callable[[Any], str | None]:
    return lambda value: None if value is None else read(value)


class _Item(Body):
    """Fields of all items. Those of answers come back in later requests; none is part of the prompt."""

    id: str | None = None
    status: Any = None


class MessageItem(_Item):
    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, PlainValidator(_texts("input_text", "output_text"))]
    phase: Any = None


class CallItem(_Item):
    """A call of a function in an earlier answer."""

    type: Literal["function_call"]
    call_id: str
    name: FunctionName
    arguments: str
    namespace: NotServed = None
    caller: Annotated[Any, AfterValidator(only({"type": "direct"}))] = None


class CallOutputItem(_Item):
    """What a function returned."""

    type: Literal["function_call_output"]
    call_id: str
    output: Annotated[str, PlainValidator(_texts("input_text"))]
    name: Any = None
    namespace: NotServed = None
    caller: Annotated[Any, AfterValidator(only({"type": "direct"}))] = None


class ReasoningItem(_Item):
    """Thinking of an earlier answer. Its summary counts where there is no text."""

    type: Literal["reasoning"]
    summary: Annotated[str | None, PlainValidator(_or_none(_texts("summary_text")))] = None
    content: Annotated[str | None, PlainValidator(_or_none(_texts("reasoning_text")))] = None
    encrypted_content: NotServed = None


Item = MessageItem | CallItem | CallOutputItem | ReasoningItem

_MODELS: Mapping[str, type[Item]] = {
    "message": MessageItem,
    "function_call": CallItem,
    "function_call_output": CallOutputItem,
    "reasoning": ReasoningItem,
}


def parse_items(items: Iterable[Any]) -> list[Item]:
    """Parse `input`. Raises ApiError."""
    return [_parse(number, item) for number, item in enumerate(items)]


def _parse(number: int, item: Any) -> Item:
    where = f"input.{number}"
    if not isinstance(item, dict):
        raise ApiError(f"{where}: expected an item, like a message", param=where)
    kind = item.get("type") or ("message" if "role" in item else None)
    model = _MODELS.get(kind) if isinstance(kind, str) else None
    if model is None:
        reason = f"{where}.type: only items of type {', '.join(_MODELS)} are served"
        raise ApiError(reason, code="not_served", param=f"{where}.type")
    try:
        return model.model_validate(item)
    except ValidationError as error:
        fault = from_validation(error)
        param = f"{where}.{fault.param}" if fault.param else where
        message = f"{where}.{fault.message}" if fault.param else f"{where}: {fault.message}"
        raise ApiError(message, code=fault.code, param=param) from None


def to_messages(items: Iterable[Item]) -> list[Message]:
    """Return the messages of a chat. Thinking, text and calls of one answer are one message. Raises ApiError."""
    messages: list[Message] = []
    answer = _AnswerItems()
    for item in items:
        if isinstance(item, CallOutputItem) or (isinstance(item, MessageItem) and item.role != "assistant"):
            messages += [*answer.messages(), _message(item)]
            answer = _AnswerItems()
            continue
        if not answer.fits(item):
            messages += answer.messages()
            answer = _AnswerItems()
        answer.add(item)
    return messages + answer.messages()


def _message(item: MessageItem | CallOutputItem) -> Message:
    if isinstance(item, MessageItem):
        return Message(role=item.role, content=item.content)
    return Message(role="tool", content=item.output, tool_call_id=item.call_id)


class _AnswerItems:
    """Items of one answer, in the order in which models write them: thinking, text, calls."""

    def __init__(self) -> None:
        self._thinking: str | None = None
        self._content: str | None = None
        self._calls: list[MessageCall] = []

    def fits(self, item: Item) -> bool:
        """Whether `item` may follow in the same message."""
        if isinstance(item, CallItem):
            return True
        later = self._content is not None or bool(self._calls)
        return not later and (isinstance(item, MessageItem) or self._thinking is None)

    def add(self, item: Item) -> None:
        if isinstance(item, CallItem):
            if len(self._calls) == MAX_CALLS:
                raise ApiError(f"input: an answer has more than {MAX_CALLS} calls", param="input")
            function = CalledFunction(name=item.name, arguments=item.arguments)
            self._calls.append(MessageCall(id=item.call_id, type="function", function=function))
        elif isinstance(item, MessageItem):
            self._content = item.content
        elif isinstance(item, ReasoningItem):
            self._thinking = item.content or item.summary

    def messages(self) -> list[Message]:
        """Return the message; none if there is nothing in it."""
        content, calls, thinking = self._content, self._calls or None, self._thinking or None
        if content is None and calls is None and thinking is None:
            return []
        text = "" if content is None and calls is None else content
        return [Message(role="assistant", content=text, tool_calls=calls, reasoning_content=thinking)]


def listed(item: Mapping[str, Any], new_id: Callable[[str], str]) -> dict[str, Any]:
    """Return an item of `input` as the API lists it: with type and id, and its text in parts."""
    kind: str = item.get("type") or "message"
    shown = {**item, "type": kind, "id": item.get("id") or new_id(kind)}
    if isinstance(item.get("content"), str):
        types = {"reasoning": "reasoning_text", "message": "output_text" if item.get("role") == "assistant" else ""}
        shown["content"] = [{"type": types[kind] or "input_text", "text": item["content"]}]
    return shown
