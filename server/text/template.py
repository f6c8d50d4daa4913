"""Convert chat messages to prompt text with the model's own template, in a sandbox."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser

from models.marked_text import MarkedText
from models.tokenizer import Tokenizer
from server.errors import ApiError, printable
from server.text.marks import NameMarker, texts_of
from server.text.sandbox import Sandbox, render

logger = logging.getLogger(__name__)


_END = "\U0010fffe"
"""A character that no text has, behind the message that the answer continues: the prompt ends there."""


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """What a template renders.

    messages: role, content, and other keys that templates know. tools: as templates take them; None: none. options:
    further variables of the template. add_generation_prompt: whether an answer begins behind the messages. continues:
    whether the answer continues the last message."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continues: bool = False

    def variables(self) -> dict[str, Any]:
        """Return the variables of the template."""
        messages = [dict(message) for message in self.messages]
        if self.continues:
            messages[-1]["content"] += _END
        return {
            **self.options,
            "messages": messages,
            "add_generation_prompt": self.add_generation_prompt and not self.continues,
            "tools": self.tools,
        }


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as one text.

    marked: rendered with marks in client text (server.text.marks); None where none are needed. is_faithful: whether it
    is the same text but for them; a template may react to marks. has_names: whether messages contain the name of a
    special token, where it is not.
    """

    text: str
    marked: MarkedText | None = None
    is_faithful: bool = True
    has_names: bool = False

    def encode(self, tokenizer: Tokenizer, add_special_tokens: bool) -> list[int]:
        """Encode the text with the template's special tokens, and no others."""
        if self.marked is None:
            return tokenizer.encode(self.text, add_special_tokens)
        if self.has_names and not self.is_faithful:
            return tokenizer.encode_marked(self.marked, add_special_tokens)
        return tokenizer.encode_guarded(self.text, self.marked, self.is_faithful, add_special_tokens)


class ChatTemplate:
    """The model's own template. A broken one is logged and disables only chat.

    available: whether there is a working template.
    """

    def __init__(self, tokenizer: Tokenizer, special_tokens_in_content: bool = False) -> None:
        """special_tokens_in_content: whether messages may contain special tokens by name."""
        extensions = ["jinja2.ext.loopcontrols", _Generation]
        environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._threads = ThreadPoolExecutor(2, "chat-template")
        self._missing = "this model has no chat template"
        self._template = None
        self._source = tokenizer.chat_template or ""
        self._variables: frozenset[str] = frozenset()
        self._marker = NameMarker((), ())
        if tokenizer.chat_template is not None:
            try:
                self._template = environment.compiled(tokenizer.chat_template)
                self._variables = frozenset(find_undeclared_variables(environment.parse(tokenizer.chat_template)))
                if not special_tokens_in_content:
                    literals = _literals(environment.parse(tokenizer.chat_template))
                    self._marker = NameMarker(tokenizer.special_names, literals, tokenizer.normalize)
            except Exception as error:  # Python's own compiler can raise too
                self._missing = "this model's chat template is broken"
                logger.warning("%s, so chat is refused: %s", self._missing, error)
        self._special = {"bos_token": "", "eos_token": "", **tokenizer.special_tokens}

    @property
    def available(self) -> bool:
        return self._template is not None

    async def render_async(self, conversation: ChatPrompt) -> Rendered:
        """Run `render` in threads of its own: a slow template delays only chats."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self.render, conversation)

    def render(self, conversation: ChatPrompt) -> Rendered:
        """Render a conversation. May take seconds. Raises ApiError."""
        if self._template is None:
            raise ApiError(self._missing, code="not_served", param="messages")
        variables = conversation.variables()
        fixed = {"messages", "tools", "add_generation_prompt", *self._special, *self._template.environment.globals}
        if taken := sorted(fixed & conversation.options.keys()):
            reason = f"chat_template_kwargs: {printable(taken[0], 64)} cannot be set"
            raise ApiError(reason, param="chat_template_kwargs")
        text = self._render(conversation, variables)
        rendered, refusal = Rendered(text), None
        for version, marks in self._marker.mark(variables):
            try:
                marked = MarkedText(self._render(conversation, version), marks)
            except ApiError as error:
                refusal = error
                continue
            if marked.plain == text:
                return Rendered(text, marked)
            rendered = Rendered(text, marked, False, self._marker.has_names(variables))
        if refusal is not None and rendered.marked is None:
            raise refusal
        return rendered

    def mentions(self, text: str) -> bool:
        """Whether the template's source contains `text`."""
        return text in self._source

    def knows(self, variable: str) -> bool:
        """Whether the template reads this variable."""
        return variable in self._variables

    def _render(self, conversation: ChatPrompt, variables: dict[str, Any]) -> str:
        assert self._template is not None
        try:
            chars = sum(map(len, texts_of(variables)))
            text = render(self._template, self._special | variables, chars)
        except Exception as error:  # a template is a program, and may fail in any way
            raise ApiError(f"messages: the model's chat template refuses them: {error}", param="messages") from None
        if not conversation.continues:
            return text
        begin, end, rest = text.partition(_END)
        if not end or _END in rest:
            reason = "continue_final_message: the model's chat template does not write the last message as it is"
            raise ApiError(reason, code="not_served", param="continue_final_message")
        return begin


class _Generation(Extension):
    """The tag {% generation %}, which marks the assistant's text for training; ignored here."""

    tags = {"generation"}  # noqa: RUF012  (the library's interface)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _literals(tree: nodes.Template) -> list[str]:
    """Return the strings in a template's expressions."""
    return [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
