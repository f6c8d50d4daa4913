"""The HTTP application over an engine that answers every request with one text, for tests of the Messages API."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import cast

import httpx

from engine.messages import AddRequest, RequestOutput
from engine.processes.client import EngineDead
from engine.processes.supervisor import Supervisor
from models.tokenizer import Tokenizer
from server.service import Service
from tests.support.app import server
from tests.support.scripted import ScriptedClient

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
"""A template with thinking, and calls as Hermes models write them."""


class MortalClient(ScriptedClient):
    """Stand-in for a Supervisor whose engine dies after some rounds; None: never."""

    def __init__(self, tokenizer: Tokenizer, text: str, fails_after: int | None) -> None:
        super().__init__(tokenizer, text)
        self._fails_after = fails_after

    async def generate(self, request: AddRequest) -> AsyncGenerator[RequestOutput, None]:
        rounds = -1  # the first output is none of a round
        async with aclosing(super().generate(request)) as outputs:
            async for output in outputs:
                if rounds == self._fails_after:
                    raise EngineDead("it broke")
                rounds += 1
                yield output


@asynccontextmanager
async def scripted(
    directory: Path, text: str, fails_after: int | None = None
) -> AsyncIterator[tuple[httpx.AsyncClient, ScriptedClient, Service]]:
    """Run a server whose every answer is `text`. fails_after: see MortalClient."""
    async with server(directory, tool_format="hermes") as (http, _, service):
        client = MortalClient(service.tokenizer, text, fails_after)
        service.client = cast(Supervisor, client)
        yield http, client, service
