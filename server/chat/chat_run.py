"""One chat request, in whatever API it came: from the conversation to parsed pieces of its answers.

Routes convert their own bodies to `ChatRequest`, and these pieces to their own events.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec

from engine.messages import FINISH_STOP
from server.bodies.chat_body import ChatRequest, Message, PromptFields
from server.bodies.fields import choice_seed
from server.chat.answer_parser import AnswerDelta, AnswerParser
from server.chat.content_scope import ContentScope
from server.errors import ApiError
from server.generation import Choice, ChoiceDelta, Generation, Usage
from server.service import Service
from server.text.structured import Grammar, check_grammar
from server.text.template import ChatPrompt, Rendered
from server.text.thinking.thinking_format import Mark, Stage, behind_thinking
from server.text.tools.functions import Function, ToolUse
from server.text.tools.tool_grammar import checked_grammar_of_tools

FINISH_CALLS = "tool_calls"


async def render(
    service: Service,
    body: PromptFields,
    messages: Sequence[Message],
    functions: Sequence[Function] = (),
    effort: str | None = None,
) -> Rendered:
    """Render a conversation in the model's own template. Raises ApiError.

    functions: those that the model is told of. effort: reasoning_effort.
    """
    continues = bool(body.continue_final_message)
    if continues:
        _check_continued(body, messages[-1])
    known = [message.for_template() for message in messages]
    for message in known:
        if message["role"] == "developer" and not service.template.mentions("developer"):
            message["role"] = "system"
    prepared, tools = service.tool_format.prepare(known, functions)
    generate = True if body.add_generation_prompt is None else body.add_generation_prompt
    options = _options(service, body.chat_template_kwargs or {}, effort)
    return await service.template.render_async(ChatPrompt(prepared, tools, options, generate, continues))


def _check_continued(body: PromptFields, last: Message) -> None:
    if body.add_generation_prompt:
        raise ApiError("continue_final_message: not with add_generation_prompt", param="continue_final_message")
    if last.role != "assistant" or last.tool_calls or last.content is None:
        reason = "continue_final_message: the last message must be a text of the assistant"
        raise ApiError(reason, param="continue_final_message")


def _options(service: Service, given: Mapping[str, Any], effort: str | None) -> Mapping[str, Any]:
    """Return the template's options. Raises ApiError: it does not know the effort."""
    if effort is None:
        return given
    known = {"reasoning_effort": effort, "enable_thinking": effort != "none"}
    told = {name: value for name, value in known.items() if service.template.knows(name)}
    if not told:
        reason = "reasoning_effort: the model's chat template does not know it"
        raise ApiError(reason, code="not_served", param="reasoning_effort")
    return {**told, **given}


@dataclass(frozen=True, slots=True)
class ChatPiece:
    """What one round added to one answer.

    raw: tokens and text as they are, and their log-probabilities. finish_reason: that of the engine, or tool_calls.
    content_start: offset in the answer's text at which the content begins; None: the thinking has not ended yet.
    """

    raw: ChoiceDelta
    delta: AnswerDelta
    finish_reason: str | None
    content_start: int | None

    @property
    def index(self) -> int:
        return self.raw.index


class ChatRun:
    """Answers to one chat request."""

    def __init__(self, service: Service, generation: Generation, stage: Stage, use: ToolUse) -> None:
        self.service, self.generation = service, generation
        self._parsers = [
            AnswerParser(
                service.thinking.splitter(stage),
                (lambda: service.tool_format.parser(use.callable)) if use.mode != "none" else None,
                service.tool_format.new_id,
                only_calls=use.mode == "required",
            )
            for _ in generation.choices
        ]

    @classmethod
    async def prepare(cls, service: Service, body: ChatRequest) -> ChatRun:
        """Render, tokenize and check. Raises ApiError."""
        arrival = time.monotonic()
        service.check_count(1, body.choices)
        use = body.tool_use()
        told = use.offered if use.mode != "none" else ()
        rendered = await render(service, body, body.messages, told, body.reasoning_effort)
        prefill = (body.messages[-1].content or "") if body.continue_final_message else None
        stage = service.thinking.stage_of(rendered.text, prefill)
        tokens = await service.encode_chat(rendered, bool(body.add_special_tokens))
        asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        tokens = service.truncate(tokens, body.truncate_prompt_tokens, asked, 1)
        constraints = await body.constraints(
            service, lambda content: _whole_grammar(service, content, use, stage), is_bound=use.is_bound
        )
        params = body.sampling(
            service.engine().ready,
            max_tokens=service.fit(tokens, asked, None),
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            defaults=service.generation_defaults,
            constraints=constraints,
        )
        shown = frozenset(service.marks_of_thinking) | (service.marks_of_calls if use.mode != "none" else frozenset())

        def new_scope() -> ContentScope:
            splitter = service.thinking.splitter(stage)
            return ContentScope(splitter, service.marks_of_thinking, has_calls=use.mode != "none")

        choices = [
            Choice(
                number,
                tokens,
                msgspec.structs.replace(params, seed=choice_seed(params.seed, number)),
                body.priority or 0,
                body.cache_salt or "",
                body.wants_report,
                first=number == 0,
                continues=False,
                shown=shown,
                new_scope=new_scope if service.thinking.thinks else None,
            )
            for number in range(body.choices)
        ]
        return cls(service, Generation(service, choices, Usage(len(tokens)), arrival), stage, use)

    async def pieces(self) -> AsyncGenerator[ChatPiece, None]:
        """Yield parsed pieces of all answers as they arrive. See Generation.pieces."""
        async with aclosing(self.generation.pieces()) as pieces:
            async for piece in pieces:
                parser, raw = self._parsers[piece.index], piece.delta
                reason = raw.finish_reason
                names = self.service.marks_of_thinking
                tokens = zip(raw.tokens, raw.offsets, strict=True)
                marks = [Mark(offset, names[token]) for token, offset in tokens if token in names]
                delta = parser.feed(raw.text, raw.offsets, marks, ends=reason is not None)
                is_cut = raw.stop_reason is not None and parser.breaks_off  # by the client's own stop string or token
                if parser.has_calls and reason == FINISH_STOP and not is_cut:
                    reason = FINISH_CALLS
                self.generation.usage.reasoning_tokens = sum(each.thinking_tokens for each in self._parsers)
                yield ChatPiece(piece, delta, reason, parser.content_start)


def _whole_grammar(service: Service, content: Grammar | None, use: ToolUse, stage: Stage) -> Grammar | None:
    """Return the grammar of whole outputs, validated, from that of their content. Takes up to some 100 ms.

    None: unconstrained. Raises ApiError.
    """
    tokens, special_names = service.tokenizer.names_in_grammars, service.tokenizer.special_names
    if content is not None:
        check_grammar(content)
    thinking = service.thinking
    whole = checked_grammar_of_tools(
        use, service.tool_format, tokens, special_names, content, lambda write: thinking.headers(stage, write)
    )
    return None if whole is None else behind_thinking(whole, thinking, stage, tokens)
