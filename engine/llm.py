"""Offline inference: the whole engine in this process.

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
from engine.messages import RETRY_MEMORY, AddRequest, EngineStats, PromptLogprobs, RequestOutput, TokenLogprobs
from engine.oom import OutOfMemory
from engine.params import SamplingParams
from engine.scheduler.validation import QueueFull, RequestError
from engine.text import Delta, TextStream
from models.decoder import DecoderModel
from models.default import resolve_model
from models.tokenizer import Tokenizer

Prompt = str | Sequence[int]


@dataclass(slots=True)
class Completion:
    """One finished request."""

    prompt_token_ids: list[int]
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    """One entry per token, if the request asks for them."""
    prompt_logprobs: list[PromptLogprobs] | None = None
    """One entry per prompt token except the first, if the request asks for them."""
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    """The stop string or stop token that ended the output."""
    num_cached_tokens: int = 0
    """Prompt tokens whose KV the prefix cache held."""
    drafted: int = 0
    accepted: int = 0
    """Tokens that the draft proposed (`drafted`), and those of them that the target accepted (`accepted`)."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a streamed completion that one round added. completion: the whole so far."""

    text: str
    token_ids: list[int]
    completion: Completion


class RequestFailed(RuntimeError):
    """The engine could not finish a request; the message says why. Other requests are not affected."""


class LLM:
    """A model and its engine in one process. Not thread-safe."""

    def __init__(
        self,
        model: str | Path | EngineConfig = "default",
        *,
        loaded: DecoderModel | None = None,
        progress: bool = False,
        **settings: Any,
    ) -> None:
        """model: a directory, a default model, or a complete config. settings: other fields of EngineConfig. loaded:
        the model's weights, if they are already in memory. progress: show a bar on stderr while loading.

        Raises ValueError (ConfigError, ModelError, TokenizerError) for settings or files that cannot be served.
        """
        if isinstance(model, EngineConfig):
            if settings:
                raise ConfigError("give either a config or settings, not both")
            config = model
        else:
            try:
                config = EngineConfig.model_validate({"model": str(model), **settings})
            except ValidationError as error:
                raise ConfigError(describe(error)) from None
        self.tokenizer = Tokenizer(resolve_model(config.model))
        self.engine = Engine(config, model=loaded, progress=progress)
        self._ids = itertools.count()
        self._closed = False
        self._streams: dict[str, _Stream] = {}  # streams of requests in the engine, by id

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model's memory. Streams that are still open end with RequestFailed."""
        self._closed = True
        self._fail_streams("the engine was closed")
        self.engine.close()

    @property
    def stats(self) -> EngineStats:
        return self.engine.stats()

    def reset_prefix_cache(self) -> None:
        """Forget all KV that later prompts could find."""
        self.engine.reset_prefix_cache()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        cache_salt: str = "",
    ) -> list[Completion]:
        """Complete all prompts together. Returns their completions in order.

        prompts: a text, a list of token ids, or a list of either. params: one for all prompts, or one per prompt; the
        model's generation_config.json does not change them. cache_salt: the prompts share the prefix cache only with
        requests of the same salt.
        Raises ValueError, before anything runs, if a prompt can never be served; RequestFailed, OutOfMemory.
        """
        listed = _as_prompt_list(prompts)
        each = list(params) if isinstance(params, Sequence) else [params] * len(listed)
        if len(each) != len(listed):
            raise RequestError(f"{len(listed)} prompts but {len(each)} sets of sampling parameters")
        streams = [self._prepare(prompt, wanted, cache_salt) for prompt, wanted in zip(listed, each, strict=True)]
        todo = deque(streams)
        try:
            while any(stream.completion.finish_reason is None for stream in streams):
                self._submit_queued(todo)
                self._step()
                for stream in streams:
                    stream.check()
        finally:
            self._drop_streams(streams)
        return [stream.completion for stream in streams]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, *, cache_salt: str = "") -> Iterator[Piece]:
        """Complete one prompt, one piece per round. cache_salt: see `generate`.

        Leaving the loop early aborts the request. Several streams can be open at once, also during `generate`.
        Raises ValueError if the prompt can never be served, RequestFailed, OutOfMemory.
        """
        stream = self._prepare(prompt, params, cache_salt)
        todo = deque([stream])
        try:
            while stream.pieces or stream.completion.finish_reason is None:
                while stream.pieces:
                    yield stream.pieces.popleft()
                stream.check()  # a round run for another stream may have ended this one
                if stream.completion.finish_reason is None:
                    self._submit_queued(todo)
                    self._step()
        finally:
            self._drop_streams([stream])

    def _prepare(self, prompt: Prompt, params: SamplingParams | None, cache_salt: str) -> _Stream:
        if params is not None and not isinstance(params, SamplingParams):
            raise RequestError(f"expected SamplingParams, not {type(params).__name__}")
        if not isinstance(cache_salt, str):
            raise RequestError(f"expected a string as cache_salt, not {type(cache_salt).__name__}")
        # msgspec checks a struct's fields when it decodes one, not when one is constructed.
        params = msgspec.convert(msgspec.to_builtins(params or SamplingParams()), SamplingParams)
        if self._closed:
            raise RequestFailed("the engine was closed")
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
        request = AddRequest(str(next(self._ids)), ids, params, cache_salt=cache_salt)
        self.engine.check(request)
        return _Stream(request, TextStream(self.tokenizer, params, ids), Completion(ids), deque())

    def _submit_queued(self, todo: deque[_Stream]) -> None:
        """Queue as many requests as the engine accepts."""
        while todo:
            request = todo[0].request
            self._streams[request.id] = todo[0]  # first, so that an interrupt leaves no request without its stream
            try:
                self.engine.add(request)
            except QueueFull:
                del self._streams[request.id]
                return
            todo.popleft()

    def _step(self) -> None:
        """Run one round and add its outputs to their streams. If that is cut short, by Ctrl-C for example, each open
        stream goes on with the same text or ends with an error."""
        try:
            for output in self.engine.step():
                self._deliver(output)
        except BaseException as error:
            if not self.engine.restarted:  # outputs are lost, or delivered in part
                self._fail_streams(f"a round was cut short by {type(error).__name__}")
                self.engine.reset()
            raise

    def _fail_streams(self, reason: str) -> None:
        for stream in self._streams.values():
            stream.errors.append(RequestFailed(reason))
        self._streams.clear()

    def _deliver(self, output: RequestOutput) -> None:
        stream = self._streams.get(output.id)
        if stream is None:
            return  # a stop string has ended it
        if output.error is not None:
            kind = OutOfMemory if output.retry == RETRY_MEMORY else RequestFailed
            stream.errors.append(kind(output.error))
            del self._streams[output.id]
            return
        delta = stream.text.take(output)
        stream.add(delta, output)
        if delta.finish_reason is not None:
            del self._streams[output.id]
            if output.finish_reason is None:  # a stop string, which the engine does not check
                self.engine.abort([output.id])

    def _drop_streams(self, streams: Iterable[_Stream]) -> None:
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
    errors: list[RuntimeError] = field(default_factory=list)
    """Reason why the request failed; at most one."""

    def check(self) -> None:
        """Raise the error of a request that has failed."""
        if self.errors:
            raise self.errors[0]

    def add(self, delta: Delta, output: RequestOutput) -> None:
        """Add a round's output. delta: its text and tokens up to a stop string."""
        completion = self.completion
        if output.prompt_logprobs is not None:
            completion.prompt_logprobs = output.prompt_logprobs
        completion.num_cached_tokens = completion.num_cached_tokens or output.cached_tokens
        completion.text += delta.text
        completion.token_ids += delta.tokens
        if delta.logprobs is not None:
            completion.logprobs = (completion.logprobs or []) + delta.logprobs
        completion.drafted += delta.drafted
        completion.accepted += delta.accepted
        completion.finish_reason, completion.stop_reason = delta.finish_reason, delta.stop_reason
        self.pieces.append(Piece(delta.text, delta.tokens, completion))


def _as_prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Return a list of prompts; a single prompt becomes a list of one. Raises RequestError for a list that mixes token
    ids and prompts."""
    if isinstance(prompts, str):
        return [prompts]
    listed: list[Any] = list(prompts)
    numbers = [isinstance(prompt, Integral) for prompt in listed]
    if listed and all(numbers):
        return [listed]
    if any(numbers):
        raise RequestError("a list holds token ids or prompts, not both")
    return listed
