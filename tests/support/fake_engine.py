"""An engine without a model: deterministic tokens, and faults on demand."""

from __future__ import annotations

import math
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from engine.config.deployment import EngineConfig
from engine.messages import (
    FINISH_ABORT,
    FINISH_LENGTH,
    FINISH_STOP,
    AddRequest,
    EngineState,
    EngineStats,
    PromptLogprobs,
    Ready,
    RequestOutput,
    TokenLogprobs,
)
from engine.params import SamplingParams
from engine.ranks.resident_weights import WeightsRefused
from tests.support.paths import ROOT

COMMAND = (
    sys.executable,
    "-c",
    f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    "from engine.processes.engine_server import main\n"
    "from tests.support.fake_engine import FakeEngine\nsys.exit(main(FakeEngine))",
)
"""Command that starts an engine process with a FakeEngine."""

VOCAB, MAX_LEN, EOS = 320, 64, 2
PAGES = 1000
PAGE_SIZE = 16
BAD_WEIGHTS, FATAL_WEIGHTS, LOST_WEIGHTS, SLOW_WEIGHTS, HANGING_WEIGHTS = "/bad", "/fatal", "/lost", "/slow", "/hang"
"""Paths with which `update_weights` is refused, ends the engine, makes `wake_up` fail, takes some seconds, or a
minute."""
COMPILE_S = 4.0
"""Time for which the model "compiles" does so."""
REFUSE, FULL, CRASH, HANG, EXIT, SLOW = 300, 301, 302, 303, 304, 305
"""First prompt tokens that trigger a behaviour. REFUSE: raise RequestError. FULL: raise QueueFull. CRASH: raise in
`step`. HANG: sleep for a minute in `step`. EXIT: end the process with status 7. SLOW: one token every 10 ms."""


def expected(request: AddRequest) -> list[int]:
    """Return the tokens that a request gets. logit_bias {t: 100} makes all of them t."""
    forced = [token for token, bias in request.params.logit_bias.items() if bias == 100]
    tokens = []
    for position in range(request.params.max_tokens):
        token = 10 + (sum(request.prompt) * 7 + request.params.seed + position * 13) % 280
        tokens.append(forced[0] if forced else token)
        if tokens[-1] == EOS and not request.params.ignore_eos:
            break
    return tokens


def request(prompt: list[int], **params: Any) -> AddRequest:
    return AddRequest(uuid.uuid4().hex, prompt, SamplingParams(**params))


class FakePrefixCache:
    """Prompts' whole pages, by salt, whose KV an engine would hold."""

    def __init__(self) -> None:
        self.pages: set[tuple[str, tuple[int, ...]]] = set()
        self.queries = self.hits = 0

    def look_up(self, request: AddRequest) -> int:
        """Return the number of prompt tokens found; the last token is never one of them."""
        found = 0
        while found + PAGE_SIZE < len(request.prompt) and _page(request, found) in self.pages:
            found += PAGE_SIZE
        self.queries += len(request.prompt)
        self.hits += found
        return found

    def add(self, request: AddRequest) -> None:
        self.pages |= {_page(request, at) for at in range(0, len(request.prompt) - PAGE_SIZE + 1, PAGE_SIZE)}


def _page(request: AddRequest, at: int) -> tuple[str, tuple[int, ...]]:
    """Key of the prompt's page at token `at`: a page holds the KV of its tokens after all those before it."""
    return request.cache_salt, tuple(request.prompt[: at + PAGE_SIZE])


class FakeEngine:
    """Engine that emits three tokens per request and round (one fewer is accepted) until `expected` is used up."""

    def __init__(
        self,
        config: EngineConfig,
        compiling: Callable[[], AbstractContextManager[None]] = nullcontext,
        prefix_cache: FakePrefixCache | None = None,
    ) -> None:
        """prefix_cache: one that several engines share."""
        if config.model == "no-such-model":
            raise ValueError("there is no such model")
        if config.model == "bug":
            raise RuntimeError("cannot load")
        if config.model == "slow":
            time.sleep(60)
        if config.model == "compiles":
            with compiling():
                time.sleep(COMPILE_S)
        self._live: dict[str, tuple[AddRequest, list[int]]] = {}
        self._done = 0
        self.paused = self.asleep = False
        self.weights: list[str] = []
        self.prefix_cache = prefix_cache or FakePrefixCache()
        self.ready = Ready(
            model=config.model, max_model_len=MAX_LEN, vocab_size=VOCAB, eos_token_ids=[EOS], stats=self.stats()
        )

    overlaps = False

    def add(self, request: AddRequest) -> None:
        from engine.scheduler.validation import QueueFull, RequestError

        if request.prompt[0] == REFUSE:
            raise RequestError("not this one")
        if request.prompt[0] == FULL:
            raise QueueFull("too many are waiting")
        self._live[request.id] = (request, expected(request))

    def abort(self, ids: Iterable[str]) -> None:
        for id in ids:
            self._live.pop(id, None)

    def reset_prefix_cache(self) -> None:
        self.prefix_cache.pages.clear()

    def has_work(self) -> bool:
        return self.state is EngineState.RUNNING and bool(self._live)

    @property
    def state(self) -> EngineState:
        return EngineState.ASLEEP if self.asleep else EngineState.PAUSED if self.paused else EngineState.RUNNING

    def pause(self, abort: bool = False) -> list[RequestOutput]:
        self.paused = True
        ids = list(self._live) if abort else []
        self.abort(ids)
        return [RequestOutput(id, finish_reason=FINISH_ABORT) for id in ids]

    def resume(self) -> None:
        self.paused = False

    def update_weights(self, path: str) -> None:
        if path == BAD_WEIGHTS:
            raise WeightsRefused(f"{path}: not these")
        if path == FATAL_WEIGHTS:
            raise RuntimeError("the former weights cannot be loaded back")
        if path in (SLOW_WEIGHTS, HANGING_WEIGHTS):
            time.sleep(3 if path == SLOW_WEIGHTS else 60)
        self.weights.append(path)

    def sleep(self) -> None:
        self.asleep = True

    def wake_up(self) -> None:
        if self.weights[-1:] == [LOST_WEIGHTS]:
            raise WeightsRefused(f"{LOST_WEIGHTS}: no such model directory")
        self.asleep = False

    def step(self, meanwhile: Callable[[], None] = lambda: None) -> list[RequestOutput]:
        meanwhile()
        outputs = []
        for id, (request, tokens) in list(self._live.items()):
            kind = request.prompt[0]
            if kind == CRASH:
                raise RuntimeError("it broke")
            if kind == EXIT:
                sys.stderr.flush()
                import os

                os._exit(7)
            if kind == HANG:
                time.sleep(60)
            if kind == SLOW:
                time.sleep(0.01)
            count = 1 if kind == SLOW else 3
            new, rest = tokens[:count], tokens[count:]
            self._live[id] = (request, rest)
            self._done += len(new)
            output = RequestOutput(
                id=id, tokens=new, drafted=3, accepted=max(0, len(new) - 1), scheduled=time.monotonic()
            )
            first = len(tokens) == len(expected(request))
            if first:
                output.cached_tokens = self.prefix_cache.look_up(request)
                self.prefix_cache.add(request)
            if request.params.logprobs is not None:
                top = list(range(request.params.logprobs))
                output.logprobs = [TokenLogprobs(-1.5, top, [-1.0 - token for token in top]) for _ in new]
            if (asked := request.params.prompt_logprobs) is not None and first:
                ids, values = list(range(40, 40 + asked)), [-2.0 - place for place in range(asked)]
                output.prompt_logprobs = [PromptLogprobs(token, -1.5, 1, ids, values) for token in request.prompt[1:]]
            if not rest:
                del self._live[id]
                ended = new[-1] == EOS and not request.params.ignore_eos
                output.finish_reason = FINISH_STOP if ended else FINISH_LENGTH
            outputs.append(output)
        return outputs

    def check_ranks(self) -> float:
        """Return infinity: there are no ranks to check."""
        return math.inf

    def stats(self) -> EngineStats:
        return EngineStats(
            state=self.state,
            running=len(self._live),
            pages_total=PAGES,
            pages_free=PAGES - len(self._live) - len(self.prefix_cache.pages),
            pages_cached=len(self.prefix_cache.pages),
            prefix_queries=self.prefix_cache.queries,
            prefix_hits=self.prefix_cache.hits,
            page_size=PAGE_SIZE,
            generated_tokens=self._done,
            accepted_per_position=[3, 2],
            gamma_chosen=[1, 0, 4],
        )

    def close(self) -> None:
        pass
