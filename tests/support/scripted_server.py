"""A program: the server in front of an engine that answers with texts from a script. Clients run against it.

`POST /script` with a JSON list of texts writes the script, one text for each request that follows; `GET /script`
returns what requests since then have sent to the engine.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any, cast

import msgspec
import uvicorn
from fastapi import Request

from engine.config.deployment import Config, EngineConfig, ServerConfig
from engine.messages import AddRequest, RequestOutput
from engine.processes.supervisor import Supervisor
from models.tokenizer import Tokenizer
from server.app import create_app
from server.http_protocol import protocol
from server.listen import listen
from server.service import Service
from tests.support.scripted import ScriptedClient
from tests.support.tiny import write_tokenizer

NAME = "scripted"
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n<tools>{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n</tools>"
    "<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.reasoning_content %}<think>\n{{ message.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}\n<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A template like those of Qwen3, with calls in the format `hermes` and thinking."""


class ScriptOfTexts(ScriptedClient):
    """Stand-in for a Supervisor whose engine answers each request with the script's next text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer, "")
        self.ready = msgspec.structs.replace(self.ready, max_model_len=2**17)
        self.texts: deque[str] = deque()
        self._tokenizer = tokenizer

    async def generate(self, request: AddRequest) -> AsyncGenerator[RequestOutput, None]:
        if not self.texts:
            yield RequestOutput(id=request.id, finish_reason="abort", error="the script has no text for this request")
            return
        self.tokens = self._tokenizer.encode(self.texts.popleft(), add_special_tokens=False)
        async with aclosing(super().generate(request)) as outputs:
            async for output in outputs:
                yield output

    def report(self) -> dict[str, Any]:
        """Describe the requests so far: their prompts, and the grammars of their answers."""
        return {
            "prompts": [self._tokenizer.decode(each.prompt, skip_special_tokens=False) for each in self.requests],
            "grammars": [each.params.grammar for each in self.requests],
            "left": len(self.texts),
        }


def main(directory: Path) -> None:
    """Serve on a free port. directory: where the tokenizer is written."""
    write_tokenizer(directory, chat_template=TEMPLATE)
    tokenizer = Tokenizer(directory)
    client = ScriptOfTexts(tokenizer)
    settings = ServerConfig(served_model_name=[NAME])
    service = Service(Config(engine=EngineConfig(model=str(directory)), server=settings), tokenizer)
    service.client = cast(Supervisor, client)
    app = create_app(service)

    async def write_script(request: Request) -> None:
        client.texts = deque(await request.json())
        client.requests.clear()

    app.add_api_route("/script", write_script, methods=["POST"])
    app.add_api_route("/script", client.report, methods=["GET"])
    listener = listen("127.0.0.1", 0)
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    http = protocol(settings.head_timeout_s)
    config = uvicorn.Config(app, http=http, lifespan="off", log_level="warning")  # type: ignore[arg-type]
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
