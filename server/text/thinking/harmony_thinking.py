"""Thinking of gpt-oss, whose answers are messages in channels (OpenAI's harmony format).

    <|channel|>analysis<|message|>It asks for the sum.<|end|><|start|>assistant<|channel|>final<|message|>42

What is written to `analysis`, or to `commentary` for nobody in particular, is thinking; `final` is content. A message
to someone, such as `functions.now`, is a call: from there on the content is the text as it is, for a parser of calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from enum import Enum

from server.text.held_back import overlap
from server.text.thinking.thinking_format import Split, Stage, ThinkingSplitter, rules_of_thinking

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
RECIPIENT = re.compile(r"\bto=([^\s<]+)")

_CHANNEL_NAME = re.compile(re.escape(CHANNEL) + r"\s*(\w+)")
_ASSISTANT = re.compile(rf"\s*{re.escape(START)}\s*assistant\b")
_THINKING_ENDS, _CONTENT_ENDS = (END, RETURN, CALL, START, CHANNEL), (END, RETURN)
_HEADER_BEGINS = (START, CHANNEL, MESSAGE, "to=")
_MAX_HEADER = 256
_GAP = "\n\n"
"""Between messages of thinking."""


class HarmonyThinking:
    """Format of models whose template writes channels."""

    name = "harmony"
    marks = frozenset((START, CHANNEL, CONSTRAIN, MESSAGE, END, CALL, RETURN))
    content_header = f"{CHANNEL}final{MESSAGE}"

    def recognises(self, template: str) -> bool:
        return CHANNEL in template and MESSAGE in template

    def stage_of(self, prompt: str, prefill: str | None) -> Stage:
        if prefill is not None:
            return Stage.CONTENT  # the template has written its header
        header = prompt.rstrip().rpartition(START)[2]
        if not header.endswith(MESSAGE):
            return Stage.UNDECIDED
        return Stage.THINKING if _kind_of(header) is _Kind.THINKING else Stage.CONTENT

    def splitter(self, stage: Stage) -> ThinkingSplitter:
        return _Splitter(stage)

    def rules(self, stage: Stage, tokens: Mapping[str, int]) -> list[str]:
        def mark(name: str) -> str:
            return f"<[{tokens[name]}]>" if name in tokens else json.dumps(name)

        ended = f'thinking {mark(START)} "assistant"'
        first = ended if stage is Stage.THINKING else ""
        return [
            f"start: {first} message* @answer",
            f"message: {mark(CHANNEL)} NAME {mark(MESSAGE)} {ended}",
            "NAME: /analysis|commentary/",
            *rules_of_thinking(END, tokens),
        ]


class _Kind(Enum):
    """Kind of a message, by its header."""

    THINKING = 0
    CONTENT = 1
    AS_IS = 2  # content, with its header: a call, or a message that is not the assistant's


def _kind_of(header: str) -> _Kind:
    if RECIPIENT.search(header) or START in header:
        return _Kind.AS_IS
    channel = _CHANNEL_NAME.search(header)
    return _Kind.THINKING if channel and channel[1] in ("analysis", "commentary") else _Kind.CONTENT


def _may_begin_header(text: str) -> bool:
    written = text.lstrip()
    if len(written) > _MAX_HEADER or "\n" in written:
        return False
    return any(written.startswith(begin) or begin.startswith(written) for begin in _HEADER_BEGINS)


class _Splitter:
    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.thinking_end: int | None = None
        self.content_start: int | None = None
        self._kind: _Kind | None = None  # of the message that is being read; None: its header is
        self._held = ""
        self._taken = 0  # characters before those held back
        self._last_end = 0  # of thinking, its mark included
        self._thinking: list[str] = []
        self._content: list[str] = []
        self._thought = False  # whether there has been thinking
        self._begins = True  # whether the message has no text yet
        if stage is Stage.THINKING:
            self._kind = _Kind.THINKING
        elif stage is Stage.CONTENT:
            self._begin_content(_Kind.CONTENT)
            self._begins = False  # the prompt has its beginning

    def feed(self, text: str) -> Split:
        self._held += text
        while self._held and self._read():
            pass
        return self._give()

    def finish(self) -> Split:
        rest = self._take(len(self._held))
        if self._kind is _Kind.THINKING:
            self._add_thinking(rest.rstrip())
        elif self._kind is not None or not rest.lstrip().startswith(_HEADER_BEGINS):  # else a header that breaks off
            self._content.append(rest)
        return self._give()

    def _read(self) -> bool:
        """Read a header, or the text of a message as far as it is certain. Returns whether that has ended."""
        if self._kind is None:
            return self._read_header()
        if self._kind is _Kind.AS_IS:
            self._content.append(self._take(len(self._held)))
            return False
        thinks = self._kind is _Kind.THINKING
        ends = _THINKING_ENDS if thinks else _CONTENT_ENDS
        found = min((at for mark in ends if (at := self._held.find(mark)) >= 0), default=None)
        certain = len(self._held) - max(overlap(self._held, mark) for mark in ends) if found is None else found
        text = self._take(len(self._held[:certain].rstrip()) if thinks or found is None else certain)
        (self._add_thinking if thinks else self._add_content)(text)
        if found is None:
            return False
        self._held, spaces = self._held.lstrip(), len(self._held) - len(self._held.lstrip())
        self._taken += spaces
        self._take(next((len(mark) for mark in (END, RETURN, CALL) if self._held.startswith(mark)), 0))
        self._last_end, self._begins = self._taken, True
        self._kind = None if thinks else _Kind.AS_IS
        return True

    def _read_header(self) -> bool:
        header, mark, _ = self._held.partition(MESSAGE)
        fits = _may_begin_header(header + mark)
        if fits and not mark:
            return False
        role = _ASSISTANT.match(header)
        begin = role.end() if fits and role else 0
        kind = _kind_of(header[begin:]) if fits else _Kind.AS_IS
        self._take(begin if kind is _Kind.AS_IS else len(header + mark))
        if kind is _Kind.THINKING:
            self._kind, self.stage = kind, Stage.THINKING
        else:
            self._begin_content(kind)
        return True

    def _begin_content(self, kind: _Kind) -> None:
        self._kind, self.stage = kind, Stage.CONTENT
        self.thinking_end, self.content_start = self._last_end, self._taken

    def _add_thinking(self, text: str) -> None:
        text = text.lstrip() if self._begins else text
        if text:
            self._thinking.append(_GAP + text if self._begins and self._thought else text)
            self._begins, self._thought = False, True

    def _add_content(self, text: str) -> None:
        text = text.lstrip() if self._begins else text
        if text:
            self._content.append(text)
            self._begins = False

    def _give(self) -> Split:
        given = Split("".join(self._thinking), "".join(self._content))
        self._thinking, self._content = [], []
        return given

    def _take(self, count: int) -> str:
        taken, self._held = self._held[:count], self._held[count:]
        self._taken += count
        return taken
