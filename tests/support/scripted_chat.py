"""A server of the page whose answers to chats are written in the test."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from server import page
from tests.support.servers import PATIENCE_S, eventually

PAUSE: dict[str, Any] = {}
"""In place of a delta: what follows waits for `ScriptedChat.go_on`."""


def error(message: str) -> dict[str, Any]:
    return {"error": {"message": message}}


class ScriptedChat:
    """Answers, one per request, in order; url: of the page.

    An answer is a list of deltas, each of which stands for three tokens, with the finish reason as its last item, or
    an `error` in its place. A number and a text: a refusal with this status and message. bodies: of the requests
    so far.
    """

    def __init__(self, *answers: list[Any] | tuple[int, str]) -> None:
        self.url = ""
        self.bodies: list[dict[str, Any]] = []
        self._answers = list(answers)
        self._paused = threading.Semaphore(0)

    def go_on(self) -> None:
        """End one PAUSE."""
        self._paused.release()

    def app(self) -> FastAPI:
        app = FastAPI()
        app.include_router(page.router)
        app.add_api_route("/ready", lambda: Response())
        app.add_api_route("/metrics", lambda: Response())
        app.add_api_route("/v1/models", lambda: {"data": [{"id": "scripted", "max_model_len": 4096}]})
        app.add_api_route("/favicon.ico", lambda: Response(status_code=204))
        app.add_api_route("/v1/chat/completions", self._answer, methods=["POST"])
        return app

    async def _answer(self, request: Request) -> Response:
        self.bodies.append(await request.json())
        answer = self._answers.pop(0)
        if isinstance(answer, tuple):
            status, message = answer
            return JSONResponse(error(message), status)
        return StreamingResponse(self._events(answer, len(self.bodies)), media_type="text/event-stream")

    def _events(self, answer: list[Any], number: int) -> Iterator[str]:
        *deltas, finish = answer
        tokens = 0
        yield self._chunk(number, tokens, {"role": "assistant", "content": ""})
        for delta in deltas:
            if delta is PAUSE:
                self._paused.acquire(timeout=PATIENCE_S)
                continue
            tokens += 3
            yield self._chunk(number, tokens, delta)
        yield f"data: {json.dumps(finish)}\n\n" if isinstance(finish, dict) else self._chunk(number, tokens, {}, finish)
        yield "data: [DONE]\n\n"

    def _chunk(self, number: int, tokens: int, delta: dict[str, Any], finish: str | None = None) -> str:
        """Write a chunk. The prompt of request `number` has 100 tokens times it, 64 of which are cached from the second
        request on; per three tokens, four are drafted and two accepted."""
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        usage = {
            "prompt_tokens": 100 * number,
            "completion_tokens": tokens,
            "prompt_tokens_details": {"cached_tokens": 64 if number > 1 else 0},
            "completion_tokens_details": {
                "accepted_prediction_tokens": tokens // 3 * 2,
                "rejected_prediction_tokens": tokens // 3 * 2,
            },
        }
        return f"data: {json.dumps({'choices': [choice], 'usage': usage})}\n\n"


@contextmanager
def serving(chat: ScriptedChat) -> Iterator[ScriptedChat]:
    """Serve the page and these answers on a free port."""
    server = uvicorn.Server(uvicorn.Config(chat.app(), port=0, lifespan="off", log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        eventually(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        chat.url = f"http://127.0.0.1:{port}"
        yield chat
    finally:
        chat.go_on()
        server.should_exit = server.force_exit = True
        thread.join(PATIENCE_S)
