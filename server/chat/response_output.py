"""Output of a response in the Responses API: its items, and the events that tell of them while they grow."""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from server.chat.answer_parser import AnswerDelta, CallDelta
from server.chat.chat_run import ChatPiece

Event = dict[str, Any]
Status = Literal["completed", "incomplete"]

_MESSAGE, _REASONING, _CALL = "message", "reasoning", "function_call"
_PREFIXES = {_MESSAGE: "msg", _REASONING: "rs", _CALL: "fc", "function_call_output": "fco"}
_EVENTS = {
    _MESSAGE: "response.output_text",
    _REASONING: "response.reasoning_text",
    _CALL: "response.function_call_arguments",
}


def new_item_id(type: str) -> str:
    return f"{_PREFIXES[type]}_{uuid.uuid4().hex}"


class ResponseOutput:
    """Items of one answer. Text of another kind, and each call, begins another item; only the last item grows.

    items: those that have ended.
    """

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._head: dict[str, Any] | None = None  # of the item that grows
        self._texts: list[str] = []  # its text or arguments
        self._logprobs: list[dict[str, Any]] = []

    @property
    def in_message(self) -> bool:
        """Whether the item that grows is a message."""
        return self._head is not None and self._head["type"] == _MESSAGE

    def add(self, delta: AnswerDelta, logprobs: Iterable[Sequence[dict[str, Any]]] = ()) -> Iterator[Event]:
        """Add to the answer. logprobs: of the tokens of each text in `delta.parts`; empty: not asked for."""
        of_texts = iter(logprobs)
        if delta.thinking:
            yield from self._grow(_REASONING, delta.thinking)
        for part in delta.parts:
            if isinstance(part, CallDelta):
                yield from self._call(part)
            else:
                yield from self._grow(_MESSAGE, part, next(of_texts, ()))

    def finish(self, status: Status) -> Iterator[Event]:
        """End the answer. An answer without anything is an empty message."""
        if not self.items and self._head is None:
            yield from self._begin(_MESSAGE, {"role": "assistant"})
        yield from self._end(status)

    def _grow(self, type: str, text: str, logprobs: Sequence[dict[str, Any]] = ()) -> Iterator[Event]:
        if self._head is None or self._head["type"] != type:
            yield from self._end("completed")
            yield from self._begin(type, {"role": "assistant"} if type == _MESSAGE else {"summary": []})
        self._texts.append(text)
        self._logprobs += logprobs
        of_text = {"logprobs": list(logprobs)} if type == _MESSAGE else {}
        yield self._event(f"{_EVENTS[type]}.delta", content_index=0, delta=text, **of_text)

    def _call(self, call: CallDelta) -> Iterator[Event]:
        if call.name is not None:
            yield from self._end("completed")
            yield from self._begin(_CALL, {"call_id": call.id, "name": call.name})
        if call.arguments:
            self._texts.append(call.arguments)
            yield self._event(f"{_EVENTS[_CALL]}.delta", delta=call.arguments)

    def _begin(self, type: str, fields: dict[str, Any]) -> Iterator[Event]:
        self._head = {"id": new_item_id(type), "type": type, **fields}
        self._texts, self._logprobs = [], []
        empty: dict[str, Any] = {"arguments": ""} if type == _CALL else {"content": []}
        item = {**self._head, **empty, "status": "in_progress"}
        yield {"type": "response.output_item.added", "output_index": len(self.items), "item": item}
        if type != _CALL:
            yield self._event("response.content_part.added", content_index=0, part=self._part(""))

    def _end(self, status: Status) -> Iterator[Event]:
        """End the item that grows, if there is one."""
        if self._head is None:
            return
        type, text = self._head["type"], "".join(self._texts)
        if type == _CALL:
            yield self._event(f"{_EVENTS[type]}.done", name=self._head["name"], arguments=text)
        else:
            of_text = {"logprobs": self._logprobs} if type == _MESSAGE else {}
            yield self._event(f"{_EVENTS[type]}.done", content_index=0, text=text, **of_text)
            yield self._event("response.content_part.done", content_index=0, part=self._part(text))
        whole: dict[str, Any] = {"arguments": text} if type == _CALL else {"content": [self._part(text)]}
        item = {**self._head, **whole, "status": status}
        yield {"type": "response.output_item.done", "output_index": len(self.items), "item": item}
        self.items.append(item)
        self._head = None

    def _part(self, text: str) -> dict[str, Any]:
        if not self.in_message:
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self._logprobs}

    def _event(self, type: str, **fields: Any) -> Event:
        """Create an event about the item that grows."""
        assert self._head is not None
        return {"type": type, "item_id": self._head["id"], "output_index": len(self.items), **fields}


class ContentTokens:
    """Finds the tokens of an answer that are content: the others are thinking, calls, and marks around them."""

    def __init__(self) -> None:
        self._text = ""
        self._waiting: deque[tuple[int, dict[str, Any]]] = deque()  # tokens, by offset in the text
        self._end = 0  # of the content so far

    def take(self, piece: ChatPiece, tokens: Sequence[dict[str, Any]], *, begins: bool) -> list[list[dict[str, Any]]]:
        """Return the tokens of each text in the parts of `piece`. tokens: descriptions of those of the piece. begins:
        whether a text that comes first begins a message."""
        self._text += piece.raw.delta.text
        self._waiting += zip(piece.raw.delta.offsets, tokens, strict=True)
        found, places = [], iter(piece.delta.places)
        for part in piece.delta.parts:
            if isinstance(part, str):
                place = next(places, None)
                if place is None:
                    start = self._start(piece, part) if begins else self._end
                    place = start, start + len(part)
                found.append(self._take(*place))
            begins = not isinstance(part, str)
        return found

    def _take(self, start: int, end: int) -> list[dict[str, Any]]:
        """Return the tokens that have a part in the text from `start` to `end`, and forget those before it."""
        self._end = end
        before = [self._waiting.popleft() for _ in range(self._count(self._end))]
        ends = [*(offset for offset, _ in before[1:]), end]
        return [token for (offset, token), until in zip(before, ends, strict=False) if offset >= start or until > start]

    def _count(self, end: int) -> int:
        return sum(offset < end for offset, _ in self._waiting)

    def _start(self, piece: ChatPiece, text: str) -> int:
        """Return the offset of text that begins a message."""
        if self._end:  # after calls: near the end of all that has arrived
            return self._text.rfind(text, self._end)
        behind = piece.content_start or 0
        return behind + (len(self._text[behind:]) - len(self._text[behind:].lstrip()) if behind else 0)
