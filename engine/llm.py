"""Offline use: the whole engine in this process.

llm = LLM("path/to/model")
for completion in llm.generate(["Once upon a time", "The capital of France is"], SamplingParams(max_tokens=32)):
    print(completion.text)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError

from engine.config import ConfigError, EngineConfig, describe
from engine.core import Engine
from engine.messages import AddRequest, EngineStats, RequestOutput, TokenLogprobs
from engine.params import SamplingParams
from engine.text import TextStream
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self.engine.close()

    @property
    def stats(self) -> EngineStats:
        return self.engine.stats()

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Complete all prompts together, in their order.

        prompts: a text, a list of token ids, or a list of either. params: for all, or one each.
        Raises RequestError, before anything runs, if one of them can never be served.
        """
        listed = _listed(prompts)
        each = [params or SamplingParams()] * len(listed) if not isinstance(params, Sequence) else list(params)
        if len(each) != len(listed):
            raise ValueError(f"{len(listed)} prompts but {len(each)} sets of sampling parameters")
        streams: dict[str, _Stream] = {}
        try:
            for prompt, wanted in zip(listed, each, strict=True):
                stream = self._add(prompt, wanted)
                streams[stream.id] = stream
            while self.engine.has_work():
                for output in self.engine.step():
                    self._take(streams[output.id], output)
        except BaseException:
            self.engine.abort(streams)
            raise
        return [stream.completion for stream in streams.values()]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Piece]:
        """Complete one prompt, a piece per round. Leaving the loop early aborts the request."""
        stream = self._add(prompt, params or SamplingParams())
        try:
            while stream.completion.finish_reason is None:
                for output in self.engine.step():
                    if output.id == stream.id:
                        yield self._take(stream, output)
        finally:
            self.engine.abort([stream.id])

    def _add(self, prompt: Prompt, params: SamplingParams) -> _Stream:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        stream = _Stream(str(next(self._ids)), TextStream(self.tokenizer, params, ids), Completion(ids))
        self.engine.add(AddRequest(stream.id, ids, params))
        return stream

    def _take(self, stream: _Stream, output: RequestOutput) -> Piece:
        """Account for a round's tokens, cutting at a stop string."""
        completion = stream.completion
        if completion.finish_reason is not None:
            return Piece("", [], completion)  # cut by a stop string before the engine heard of it
        delta = stream.text.take(output)
        completion.text += delta.text
        completion.token_ids += delta.tokens
        if delta.logprobs is not None:
            completion.logprobs = (completion.logprobs or []) + delta.logprobs
        completion.drafted += delta.drafted
        completion.accepted += delta.accepted
        completion.finish_reason, completion.stop_reason = delta.finish_reason, delta.stop_reason
        if delta.finish_reason is not None and output.finish_reason is None:
            self.engine.abort([stream.id])
        return Piece(delta.text, delta.tokens, completion)


@dataclass(frozen=True, slots=True)
class _Stream:
    id: str
    text: TextStream
    completion: Completion


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [[token for token in prompts if isinstance(token, int)]]
    return [prompt for prompt in prompts if not isinstance(prompt, int)]
