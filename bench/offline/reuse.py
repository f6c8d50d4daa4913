"""Replay conversations with and without speculation and prefix cache: the hits, token for token, and the texts.

    python -m bench.offline.reuse --requests 240 --speculation off,3,auto

Conversations of real text share system prompts. A request goes on with one (the whole history, the engine's own answer
in it, and new text), branches off from an earlier turn, edits an earlier prompt, or sends one again. Requests come in
waves: those of a wave run together, and the next wave begins when all have ended, so that what the cache holds does not
depend on the time that anything takes. Every way to draft runs once with the cache, and the first one also without it.
Hits and texts of each request are compared with the first run's; the exit status is 1 where any differ. `possible`
counts prompt tokens in whole pages that an earlier request had computed, or one of the same wave before it.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.corpus import BenchError, read_text
from bench.format_flags import add_format_flags, exits_on_error, read_format_flags
from engine.config.deployment import CacheConfig, EngineConfig, SchedulerConfig
from engine.config.speculation import SpeculationConfig
from engine.core import Engine
from engine.messages import AddRequest
from engine.params import SamplingParams
from engine.worker.loading import load_target
from models.decoder import DecoderModel
from models.default import resolve_model
from models.tokenizer import Tokenizer

_SYSTEMS = (160, 300)
"""Tokens of the system prompts."""
_SHARE_NEXT, _SHARE_BRANCH, _SHARE_EDIT = 0.6, 0.8, 0.92
"""Cumulative shares of the kinds of requests, once a conversation has begun; the rest sends a prompt again."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One request.

    parent: number of the request whose tokens its prompt begins with; None: it begins a conversation. kept: number of
    tokens of the parent's prompt that it keeps; None: the whole prompt and its answer. new: tokens after those. answer:
    tokens to generate.
    """

    wave: int
    parent: int | None
    kept: int | None
    new: list[int]
    answer: int


def compose(tokens: Sequence[int], count: int, *, rows: int, longest: int, seed: int) -> list[Turn]:
    """Compose `count` requests in waves of `rows`, the same for the same seed.

    tokens: token ids of the text. longest: largest number of tokens of prompt and answer. Raises BenchError if a system
    prompt and a turn do not fit into that, or the text is shorter.
    """
    if min(longest, len(tokens)) < max(_SYSTEMS) + 256:
        raise BenchError(f"conversations take {max(_SYSTEMS) + 256} tokens, of the text and of the model's length")
    rng = random.Random(seed)
    turns: list[Turn] = []
    lengths: list[int] = []
    last: list[int] = []  # newest turn of each conversation

    def text(least: int, most: int) -> list[int]:
        length = rng.randint(least, most)
        first = rng.randrange(len(tokens) - length)
        return list(tokens[first : first + length])

    def add(parent: int | None, kept: int | None, new: list[int], wave: int) -> bool:
        answer = rng.randint(8, 48)
        begins = 0 if parent is None else lengths[parent] + turns[parent].answer if kept is None else kept
        if begins + len(new) + answer > longest:
            return False
        turns.append(Turn(wave, parent, kept, new, answer))
        lengths.append(begins + len(new))
        return True

    for number in range(count):
        wave, kind = number // rows, rng.random()
        earlier = [i for i, turn in enumerate(turns) if turn.wave < wave]
        waiting = [i for i in range(len(last)) if turns[last[i]].wave < wave]
        added = False
        if earlier and kind < _SHARE_NEXT and waiting and len(last) >= rows:
            conversation = rng.choice(waiting)
            added = add(last[conversation], None, text(10, 150), wave)
            if added:
                last[conversation] = number
        elif earlier and kind >= _SHARE_NEXT:
            parent = rng.choice(earlier)
            if kind < _SHARE_BRANCH:
                added = add(parent, None, text(10, 150), wave)
            elif kind < _SHARE_EDIT:
                added = add(parent, rng.randrange(lengths[parent]), text(10, 150), wave)
            else:
                added = add(parent, lengths[parent], [], wave)
        if not added:
            place = rng.randrange(len(_SYSTEMS))
            system = list(tokens[1000 * place : 1000 * place + _SYSTEMS[place]]) or list(tokens[: _SYSTEMS[place]])
            add(None, None, system + text(20, 200), wave)
            last.append(number)
    return turns


@dataclass(slots=True)
class Replay:
    """One run over all requests.

    prefix: whether it used the cache. prompts, texts: token ids by request. cached: prompt tokens found in the cache,
    by request. queries, hits, evictions: see EngineStats.
    """

    name: str
    prefix: bool = True
    prompts: list[list[int]] = field(default_factory=list)
    texts: list[list[int]] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)
    queries: int = 0
    hits: int = 0
    evictions: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        return self.hits / self.queries if self.queries else 0.0


def run(name: str, config: EngineConfig, model: DecoderModel, load: Sequence[Turn]) -> Replay:
    """Run all requests, wave by wave. Raises BenchError if one fails."""
    engine, replay = Engine(config, model=model, progress=False), Replay(name, config.cache.prefix)
    prompts, texts = replay.prompts, replay.texts
    try:
        began = time.perf_counter()
        for wave in _waves(load):
            for number in wave:
                turn = load[number]
                begins: list[int] = []
                if turn.parent is not None:
                    whole = prompts[turn.parent] + texts[turn.parent]
                    begins = whole if turn.kept is None else whole[: turn.kept]
                prompts.append(begins + turn.new)
                texts.append([])
                replay.cached.append(0)
                params = SamplingParams(
                    max_tokens=turn.answer, temperature=float(number % 2), seed=number, ignore_eos=True
                )
                engine.add(AddRequest(str(number), prompts[number], params))
            while engine.has_work():
                for output in engine.step():
                    if output.error is not None:
                        raise BenchError(output.error)
                    number = int(output.id)
                    texts[number] += output.tokens
                    replay.cached[number] = max(replay.cached[number], output.cached_tokens)
        replay.seconds = time.perf_counter() - began
        stats = engine.stats()
        replay.queries, replay.hits = stats.prefix_queries, stats.prefix_hits
        replay.evictions = stats.prefix_evictions
    finally:
        engine.close()
    return replay


def _waves(load: Sequence[Turn]) -> Iterator[list[int]]:
    """Yield the numbers of the requests of each wave."""
    for wave in range(load[-1].wave + 1):
        yield [number for number, turn in enumerate(load) if turn.wave == wave]


def possible_hits(load: Sequence[Turn], replay: Replay, page: int) -> int:
    """Count the prompt tokens in whole pages that earlier requests had computed. The last token of a prompt is never
    among them, since its request computes it."""
    known: set[int] = set()

    def pages(tokens: Sequence[int]) -> Iterator[int]:
        """Yield a hash of each whole page and all tokens before it."""
        before = 0
        for first in range(0, len(tokens) - page + 1, page):
            before = hash((before, tuple(tokens[first : first + page])))
            yield before

    found = 0
    for wave in _waves(load):
        for number in wave:
            prompt = replay.prompts[number]
            for each in pages(prompt[:-1]):
                if each not in known:
                    break
                found += page
            known.update(pages(prompt))
        for number in wave:
            known.update(pages(replay.prompts[number] + replay.texts[number][:-1]))
    return found


def differences(replays: Sequence[Replay]) -> list[str]:
    """Describe where runs differ from the first: their texts, and, of those with the cache, the hits of any request."""
    first, lines = replays[0], []
    for other in replays[1:]:
        texts = sum(a != b for a, b in zip(first.texts, other.texts, strict=True))
        if texts:
            lines.append(f"{other.name}: {texts} texts differ from those of {first.name}")
        cached = sum(a != b for a, b in zip(first.cached, other.cached, strict=True))
        if other.prefix and (cached or (first.queries, first.hits) != (other.queries, other.hits)):
            lines.append(
                f"{other.name}: {cached} requests have other hits than with {first.name}, {other.hits} tokens of "
                f"{other.queries} and not {first.hits} of {first.queries}"
            )
    return lines


def report(replays: Sequence[Replay], possible: int) -> str:
    """Format a line per run, and the verdict."""
    first = replays[0]
    prompt = sum(map(len, first.prompts))
    lines = [
        f"{len(first.prompts)} requests, {prompt} prompt tokens, {sum(map(len, first.texts))} new ones; "
        f"{possible} prompt tokens ({possible / prompt:.1%}) possible as hits"
    ]
    width = max(len(replay.name) for replay in replays)
    for replay in replays:
        lines.append(
            f"{replay.name:<{width}}: {replay.queries} queries, {replay.hits} hits ({replay.rate:.2%}), "
            f"{replay.evictions} pages evicted, {replay.seconds:.1f} s"
        )
    found = differences(replays)
    return "\n".join([*lines, *(found or ["hits are the same in every run with the cache, and texts in all runs"])])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--speculation", default="off,3,auto")
    parser.add_argument("--requests", type=int, default=240)
    parser.add_argument("--rows", type=int, default=8, help="requests of a wave")
    parser.add_argument("--longest", type=int, default=1500, help="tokens of the longest prompt and answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=Path)
    add_format_flags(parser)
    given = parser.parse_args(arguments)
    flags = read_format_flags(given)
    if min(given.requests, given.rows) < 1:
        parser.error("--requests and --rows must be at least 1")
    with exits_on_error():
        modes = [value.strip() for value in given.speculation.split(",")]
        gammas = [0 if mode == "off" else mode if mode == "auto" else int(mode) for mode in modes]
        runs = [(gamma, True) for gamma in gammas] + [(gammas[0], False)]
        configs = [
            flags.apply(
                EngineConfig(
                    model=given.model,
                    dtype=given.dtype,
                    cache=CacheConfig(prefix=prefix),
                    scheduler=SchedulerConfig(max_rows=given.rows, max_waiting=given.rows),
                    speculation=SpeculationConfig.model_validate({"gamma": gamma}),
                )
            )
            for gamma, prefix in runs
        ]
        text = Tokenizer(resolve_model(given.model)).encode(read_text(given.text), add_special_tokens=False)
        load = compose(text, given.requests, rows=given.rows, longest=given.longest, seed=given.seed)
        drafts_most = max(configs, key=lambda config: config.speculation.max_draft_tokens)
        model = load_target(drafts_most, progress=False)  # with the matrices of drafts
        replays = []
        for config in configs:
            name = f"speculation {config.speculation.gamma or 'off'}" + ("" if config.cache.prefix else ", no cache")
            print(f"{name} …", file=sys.stderr)
            replays.append(run(name, config, model, load))
    print(report(replays, possible_hits(load, replays[0], configs[0].cache.page_size)))
    if differences(replays):
        sys.exit(1)


if __name__ == "__main__":
    main()
