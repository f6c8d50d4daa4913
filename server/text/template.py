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

from jinja2 import Template, TemplateError, nodes
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


@dataclass(frozen=True, slots=True)
class _Compiled:
    """A template, the variables that it reads, and the marker of client text for it."""

    template: Template
    variables: frozenset[str]
    marker: NameMarker


class ChatTemplate:
    """The model's own template, or two: one for chats with tools. A broken one is logged and disables only its chats.

    available: whether there is a working template. sources: text of all.
    """

    def __init__(self, tokenizer: Tokenizer, special_tokens_in_content: bool = False) -> None:
        """special_tokens_in_content: whether messages may contain special tokens by name."""
        extensions = ["jinja2.ext.loopcontrols", _Generation]
        self._environment = environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._threads = ThreadPoolExecutor(2, "chat-template")
        self._missing = "this model has no chat template"
        marked = None if special_tokens_in_content else tokenizer
        self._plain = self._with_tools = self._compile(tokenizer.chat_template, marked)
        if tokenizer.tool_template is not None:
            self._with_tools = self._compile(tokenizer.tool_template, marked)
        self.sources = "\n".join(filter(None, (tokenizer.chat_template, tokenizer.tool_template)))
        self._special = {"bos_token": "", "eos_token": "", **tokenizer.special_tokens}

    def _compile(self, source: str | None, marked: Tokenizer | None) -> _Compiled | None:
        """marked: the tokenizer whose special tokens' names are marked in client text; None: none are."""
        if source is None:
            return None
        try:
            template, tree = self._environment.compiled(source), self._environment.parse(source)
            marker = NameMarker((), ())
            if marked is not None:
                marker = NameMarker(marked.special_names, _literals(tree), marked.normalize)
            return _Compiled(template, frozenset(find_undeclared_variables(tree)), marker)
        except Exception as error:  # Python's own compiler can raise too
            self._missing = "this model's chat template is broken"
            logger.warning("%s, so chat is refused: %s", self._missing, error)
            return None

    @property
    def available(self) -> bool:
        return self._plain is not None

    async def render_async(self, conversation: ChatPrompt) -> Rendered:
        """Run `render` in threads of its own: a slow template delays only chats."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self.render, conversation)

    def render(self, conversation: ChatPrompt) -> Rendered:
        """Render a conversation. May take seconds. Raises ApiError."""
        compiled = self._plain if conversation.tools is None else self._with_tools
        if compiled is None:
            raise ApiError(self._missing, code="not_served", param="messages")
        variables = conversation.variables()
        fixed = {"messages", "tools", "add_generation_prompt", *self._special, *self._environment.globals}
        if taken := sorted(fixed & conversation.options.keys()):
            reason = f"chat_template_kwargs: {printable(taken[0], 64)} cannot be set"
            raise ApiError(reason, param="chat_template_kwargs")
        text, marker = self._render(compiled, conversation, variables), compiled.marker
        rendered, refusal = Rendered(text), None
        for version, marks in marker.mark(variables):
            try:
                marked = MarkedText(self._render(compiled, conversation, version), marks)
            except ApiError as error:
                refusal = error
                continue
            if marked.plain == text:
                return Rendered(text, marked)
            rendered = Rendered(text, marked, False, marker.has_names(variables))
        if refusal is not None and rendered.marked is None:
            raise refusal
        return rendered

    def mentions(self, text: str) -> bool:
        """Whether a template's source contains `text`."""
        return text in self.sources

    def knows(self, variable: str) -> bool:
        """Whether a template reads this variable."""
        found = (self._plain, self._with_tools)
        return any(variable in compiled.variables for compiled in found if compiled is not None)

    def _render(self, compiled: _Compiled, conversation: ChatPrompt, variables: dict[str, Any]) -> str:
        try:
            chars = sum(map(len, texts_of(variables)))
            text = render(compiled.template, self._special | variables, chars)
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
