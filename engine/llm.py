"""Offline use: the whole engine in this process.

llm = LLM("path/to/model")
for completion in llm.generate(["Once upon a time", "The capital of France is"], SamplingParams(max_tokens=32)):
    print(completion.text)
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any, Self

import msgspec
from pydantic import ValidationError

from engine.config.deployment import ConfigError, EngineConfig, describe
from engine.core import Engine
from engine.messages import AddRequest, EngineStats, TokenLogprobs
from engine.oom import OutOfMemory
from engine.params import SamplingParams
from engine.scheduler.scheduler import QueueFull, RequestError
from engine.text import Delta, TextStream
from models.default import resolve_model
from models.llama import Llama
from models.tokenizer import Tokenizer

Prompt = str | Sequence[int]


@dataclass(slots=True)
class Completion:
    """One finished request."""

    prompt_token_ids: list[int]
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    """One per token, if asked for."""
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    """The stop string or stop token that ended it."""
    drafted: int = 0
    accepted: int = 0
    """Tokens that were proposed by the draft, and that the target agreed with."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What one round added to a streamed completion; `completion` is the whole so far."""

    text: str
    token_ids: list[int]
    completion: Completion


class LLM:
    """A model and an engine of one process. Not thread-safe."""

    def __init__(
        self,
        model: str | Path | EngineConfig = "default",
        *,
        loaded: Llama | None = None,
        progress: bool = False,
        **settings: Any,
    ) -> None:
        """model: a directory, `default`, or a complete config. settings: other fields of EngineConfig. loaded: the
        model's weights, if they are in memory already. progress: a bar on stderr while loading.

        Raises ValueError (ConfigError, ModelError, TokenizerError) for what cannot be served.
        """
        if isinstance(model, EngineConfig):
            if settings:
                raise ConfigError("settings stand in the config already given")
            config = model
        else:
            try:
                config = EngineConfig.model_validate({"model": str(model), **settings})
            except ValidationError as error:
                raise ConfigError(describe(error)) from None
        self.tokenizer = Tokenizer(resolve_model(config.model))
        self.engine = Engine(config, model=loaded, progress=progress)
        self._ids = itertools.count()
        self._streams: dict[str, _Stream] = {}  # what the engine has, by request id

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the model's memory back. Streams that are still open end in an error."""
        self.engine.close()

    @property
    def stats(self) -> EngineStats:
        return self.engine.stats()

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Complete all prompts together, in their order.

        prompts: a text, a list of token ids, or a list of either. params: for all, or one each.
        Raises ValueError, before anything runs, if one of them can never be served; OutOfMemory.
        """
        listed = _listed(prompts)
        each = list(params) if isinstance(params, Sequence) else [params] * len(listed)
        if len(each) != len(listed):
            raise RequestError(f"{len(listed)} prompts but {len(each)} sets of sampling parameters")
        streams = [self._prepare(prompt, wanted) for prompt, wanted in zip(listed, each, strict=True)]
        todo = deque(streams)
        try:
            while any(stream.completion.finish_reason is None for stream in streams):
                self._feed(todo)
                self._step()
                for stream in streams:
                    stream.check()
        finally:
            self._forget(streams)
        return [stream.completion for stream in streams]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Piece]:
        """Complete one prompt, a piece per round. Leaving the loop early aborts the request; streams can be open side
        by side, and beside `generate`. Raises ValueError if it can never be served, OutOfMemory."""
        stream = self._prepare(prompt, params)
        todo = deque([stream])
        try:
            while stream.pieces or stream.completion.finish_reason is None:
                while stream.pieces:
                    yield stream.pieces.popleft()
                stream.check()  # another one's round may have been its last
                if stream.completion.finish_reason is None:
                    self._feed(todo)
                    self._step()
        finally:
            self._forget([stream])

    def _prepare(self, prompt: Prompt, params: SamplingParams | None) -> _Stream:
        if params is not None and not isinstance(params, SamplingParams):
            raise RequestError(f"expected SamplingParams, not {type(params).__name__}")
        # Structs check their fields when they are decoded, not when they are made.
        params = msgspec.convert(msgspec.to_builtins(params or SamplingParams()), SamplingParams)
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
        request = AddRequest(str(next(self._ids)), ids, params)
        self.engine.check(request)
        return _Stream(request, TextStream(self.tokenizer, params, ids), Completion(ids), deque())

    def _feed(self, todo: deque[_Stream]) -> None:
        """Give the engine as many requests as it takes."""
        while todo:
            try:
                self.engine.add(todo[0].request)
            except QueueFull:
                return
            self._streams[todo[0].request.id] = todo[0]
            todo.popleft()

    def _step(self) -> None:
        """One round; its outputs go to whoever asked for them."""
        for output in self.engine.step():
            stream = self._streams[output.id]
            if output.error is not None:
                stream.errors.append(output.error)
                del self._streams[output.id]
                continue
            delta = stream.text.take(output)
            stream.add(delta)
            if delta.finish_reason is not None:
                del self._streams[output.id]
                if output.finish_reason is None:  # a stop string: the engine has not heard of it yet
                    self.engine.abort([output.id])

    def _forget(self, streams: Iterable[_Stream]) -> None:
        ids = [stream.request.id for stream in streams if stream.request.id in self._streams]
        for request_id in ids:
            del self._streams[request_id]
        self.engine.abort(ids)


@dataclass(frozen=True, slots=True)
class _Stream:
    request: AddRequest
    text: TextStream
    completion: Completion
    pieces: deque[Piece]
    errors: list[str] = field(default_factory=list)
    """Why the engine gave it up; at most one."""

    def check(self) -> None:
        """Raises OutOfMemory if the engine has given it up."""
        if self.errors:
            raise OutOfMemory(self.errors[0])

    def add(self, delta: Delta) -> None:
        completion = self.completion
        completion.text += delta.text
        completion.token_ids += delta.tokens
        if delta.logprobs is not None:
            completion.logprobs = (completion.logprobs or []) + delta.logprobs
        completion.drafted += delta.drafted
        completion.accepted += delta.accepted
        completion.finish_reason, completion.stop_reason = delta.finish_reason, delta.stop_reason
        self.pieces.append(Piece(delta.text, delta.tokens, completion))


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt is a list of one. Raises RequestError for token ids and texts side by side."""
    if isinstance(prompts, str):
        return [prompts]
    listed: list[Any] = list(prompts)
    numbers = [isinstance(prompt, Integral) for prompt in listed]
    if listed and all(numbers):
        return [listed]
    if any(numbers):
        raise RequestError("a list holds token ids or prompts, not both")
    return listed
