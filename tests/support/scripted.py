"""An engine that answers every request with a given text, for tests of what the server makes of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import msgspec

from engine.messages import FINISH_LENGTH, FINISH_STOP, AddRequest, RequestOutput, TokenLogprobs
from models.tokenizer import Tokenizer
from tests.support.app import FakeClient


class ScriptedClient(FakeClient):
    """Stand-in for a Supervisor.

    tokens: of the answer, with special tokens where `text` has their names. size: number of tokens of a round.
    """

    def __init__(self, tokenizer: Tokenizer, text: str, size: int = 3) -> None:
        super().__init__()
        self.ready = msgspec.structs.replace(self.ready, max_model_len=4096, vocab_size=tokenizer.vocab_size)
        self.tokens, self.size = tokenizer.encode(text, add_special_tokens=False), size
        assert tokenizer.eos_token_id is not None
        self.end = tokenizer.eos_token_id

    async def generate(self, request: AddRequest) -> AsyncGenerator[RequestOutput, None]:
        self.requests.append(request)
        yield RequestOutput(id=request.id, queued=True)
        tokens = [*self.tokens, self.end][: request.params.max_tokens]
        for first in range(0, len(tokens), self.size):
            await asyncio.sleep(0)
            some = tokens[first : first + self.size]
            reason = None
            if first + self.size >= len(tokens):
                reason = FINISH_STOP if tokens[-1] == self.end else FINISH_LENGTH
            logprobs = None if request.params.logprobs is None else [TokenLogprobs(-1.0, [], []) for _ in some]
            yield RequestOutput(id=request.id, tokens=some, logprobs=logprobs, finish_reason=reason)
