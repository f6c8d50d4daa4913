"""Thinking of gpt-oss, whose answers are messages in channels (OpenAI's harmony format).

    <|channel|>analysis<|message|>It asks for the sum.<|end|><|start|>assistant<|channel|>final<|message|>42

What is written to `analysis`, or to `commentary` for nobody in particular, is thinking; `final` is content. A message
to a function, such as `functions.now`, is a call: its header and text go to a parser of calls. A message to anyone else
is content with its header. Marks are special tokens alone: a model may write about their names.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping, Sequence

from server.text.thinking.thinking_format import (
    Kind,
    Mark,
    Part,
    Span,
    Stage,
    ThinkingSplitter,
    rules_of_thinking,
    write_mark,
)
from server.text.tools.tool_format import GrammarWriter, Headers

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
RECIPIENT = re.compile(r"\bto=([^\s<]+)")
MAX_HEADER = 256
"""Characters of a header."""

_CHANNEL_NAME = re.compile(re.escape(CHANNEL) + r"\s*(\w+)")
_BARE_RECIPIENT = re.compile(r"to=\S*(\s+\w*)?\s*")
_ASSISTANT = "assistant"
_ROLE = re.compile(rf"^\s*{re.escape(START)}\s*{_ASSISTANT}")
FUNCTIONS = "functions."
"""Recipients of calls begin with this."""
_ANYBODY = ("all", "assistant", "user")
"""Recipients of messages that are nothing special."""
_GAP = "\n\n"
"""Between messages of one kind."""


class HarmonyThinking:
    """Format of models whose template writes channels."""

    name = "harmony"
    marks = frozenset((START, CHANNEL, CONSTRAIN, MESSAGE, END, CALL, RETURN))
    thinks = True

    def recognises(self, template: str) -> bool:
        return CHANNEL in template and MESSAGE in template

    def stage_of(self, prompt: str, prefill: str | None) -> Stage:
        if prefill is not None:
            return Stage.CONTENT  # the template has written its header
        header, message, text = prompt.rpartition(START)[2].rpartition(MESSAGE)
        if not message or text.strip():
            return Stage.UNDECIDED
        return Stage.THINKING if _kind_of(header) is Kind.THINKING else Stage.CONTENT

    def splitter(self, stage: Stage) -> ThinkingSplitter:
        return _Splitter(stage)

    def headers(self, stage: Stage, write: GrammarWriter) -> Headers:
        if stage is Stage.CONTENT:  # of a message that has begun, and has to end before a call
            return Headers(calls=write.text(END + START + _ASSISTANT))
        return Headers(text=f"{write.text(CHANNEL + 'final')} {write_type(write)} {write.text(MESSAGE)}")

    def rules(self, stage: Stage, tokens: Mapping[str, int]) -> list[str]:
        start, channel, message = (write_mark(name, tokens) for name in (START, CHANNEL, MESSAGE))
        ended = f'thinking {start} "assistant"'
        first = ended if stage is Stage.THINKING else ""
        return [
            f"start: {first} message* @answer",
            f"message: {channel} NAME {message} {ended}",
            "NAME: /analysis|commentary/",
            *rules_of_thinking(END, tokens),
        ]


def write_type(write: GrammarWriter) -> str:
    """Write what a header may say of the type of its message."""
    return f'(" "? {write.text(CONSTRAIN)} "json" | " json")?'


def _kind_of(header: str) -> Kind:
    recipient = _special_recipient(header)
    if recipient is not None:
        return Kind.CALL if recipient.startswith(FUNCTIONS) else Kind.PLAIN
    channel = _CHANNEL_NAME.search(header)
    return Kind.THINKING if channel and channel[1] in ("analysis", "commentary") else Kind.PLAIN


def _special_recipient(header: str) -> str | None:
    recipient = RECIPIENT.search(header)
    return None if recipient is None or recipient[1] in _ANYBODY else recipient[1]


class _Splitter:
    def __init__(self, stage: Stage) -> None:
        self.thinking = [Span(0)] if stage is Stage.THINKING else []
        self.content_start = 0 if stage is Stage.CONTENT else None
        of_stage = {Stage.THINKING: Kind.THINKING, Stage.CONTENT: Kind.PLAIN}
        self._kind = of_stage.get(stage)  # of the message that is being read; None: its header is
        self._marks: deque[Mark] = deque()  # those to come
        self._held, self._at = "", 0  # text that has not been read, and its offset
        self._header, self._header_at = "", 0
        self._header_marks: set[str] = set()
        self._begins = stage is not Stage.CONTENT  # whether the message has no text yet
        self._spaces: list[str] = []  # at the end of thinking so far
        self._last: Kind | None = None  # of what has been given
        self._thought = False
        self._parts: list[Part] = []

    @property
    def decided(self) -> int:
        return self._header_at if self._kind is None else self._at

    def feed(self, text: str, marks: Sequence[Mark] = ()) -> list[Part]:
        self._marks += marks
        self._held += text
        while self._marks:
            at, name = self._marks[0]
            if self._at + len(self._held) < at + len(name):
                break
            self._marks.popleft()
            self._read_text(self._take(at - self._at))
            self._take(len(name))
            self._read_mark(name, at)
        self._read_text(self._take(self._marks[0].offset - self._at if self._marks else len(self._held)))
        return self._give()

    def finish(self) -> list[Part]:
        if self._kind is None and self._header and not self._header_marks:
            self._begin(Kind.PLAIN, self._header)
        return self._give()

    def _read_text(self, text: str) -> None:
        if self._kind is not None:
            self._add(self._kind, text)
            return
        self._header += text
        if not self._is_header():
            self._begin(Kind.PLAIN, self._header)

    def _read_mark(self, name: str, at: int) -> None:
        if self._kind is None and name == MESSAGE:
            shows = _special_recipient(self._header) is not None
            self._begin(_kind_of(self._header), _ROLE.sub("", self._header) + name if shows else "")
        elif self._kind is None and name in (CHANNEL, CONSTRAIN):
            self._header += name
            self._header_marks.add(name)
        elif self._kind is not None and name in (MESSAGE, CONSTRAIN):
            self._add(self._kind, name)
        else:  # a message ends, or another begins
            begins = name in (START, CHANNEL)
            self._header, self._header_at = (name, at) if begins else ("", self._at)
            self._header_marks = {name} if begins else set()
            if self._kind is Kind.THINKING:
                self.thinking[-1] = Span(self.thinking[-1].begin, self._header_at)
            self._kind = None

    def _is_header(self) -> bool:
        """Whether the header may still be one: it has a channel, or the assistant's role and a recipient at most."""
        if len(self._header) > MAX_HEADER:
            return False
        if self._header_marks - {START}:
            return True
        rest = self._header.lstrip()
        if START in self._header_marks:
            rest = rest.removeprefix(START).lstrip()
            if _ASSISTANT.startswith(rest):
                return True
            if not rest.startswith(_ASSISTANT):
                return False
            rest = rest.removeprefix(_ASSISTANT).lstrip()
        return "to=".startswith(rest) or _BARE_RECIPIENT.fullmatch(rest) is not None

    def _begin(self, kind: Kind, text: str) -> None:
        """Begin a message. text: of its header, as far as that is shown."""
        self._kind, self._begins, self._header = kind, not text, ""
        self._spaces.clear()
        if kind is Kind.THINKING:
            self.thinking.append(Span(self._header_at))
        elif self.content_start is None:
            self.content_start = self._header_at if text else self._at
        if text:
            self._parts.append(Part(kind, text, begins=True, place=(self._at - len(text), self._at)))
            self._last = kind

    def _add(self, kind: Kind, text: str) -> None:
        begins = self._begins
        if begins:
            text = text.lstrip()
        if not text:
            return
        if begins and (self._thought if kind is Kind.THINKING else self._last is kind):
            self._parts.append(Part(kind, _GAP, begins, (self._at - len(text),) * 2))
            begins = False
        place = self._at - len(text), self._at
        self._begins, self._last = False, kind
        if kind is Kind.THINKING:
            self._thought = True
            visible = text.rstrip()
            if visible:
                visible, spaces = "".join((*self._spaces, visible)), text[len(visible) :]
                self._spaces = [spaces]
            else:
                self._spaces.append(text)
            text = visible
        self._parts.append(Part(kind, text, begins, place))

    def _take(self, count: int) -> str:
        taken, self._held = self._held[:count], self._held[count:]
        self._at += len(taken)
        return taken

    def _give(self) -> list[Part]:
        given, self._parts = self._parts, []
        return given
