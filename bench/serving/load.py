"""Generate a load: arrival times, lengths and texts of requests."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from bench.corpus import BenchError

Arrivals = Literal["poisson", "constant"]


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of numbers of tokens. spec: see `parse`. draw: sample a number. most: the largest possible one."""

    spec: str
    draw: Callable[[random.Random], int]
    longest: int

    @classmethod
    def parse(cls, spec: str) -> Lengths:
        """Parse a distribution. Raises BenchError.

        `500`: constant. `uniform:100:900`: uniform, bounds included. `lognormal:500:0.8:4000`: log-normal, by median,
        sigma and maximum.
        """
        kind, *numbers = spec.split(":")
        try:
            if kind.isdecimal() and not numbers and int(kind) > 0:
                only = int(kind)
                return cls(spec, lambda rng: only, only)
            if kind == "uniform" and len(numbers) == 2:
                shortest, longest = map(int, numbers)
                if 0 < shortest <= longest:
                    return cls(spec, lambda rng: rng.randint(shortest, longest), longest)
            if kind == "lognormal" and len(numbers) == 3:
                middle, sigma, longest = float(numbers[0]), float(numbers[1]), int(numbers[2])
                if middle >= 1 and sigma > 0 and longest >= 1:
                    mu = math.log(middle)
                    return cls(spec, lambda rng: min(longest, max(1, round(rng.lognormvariate(mu, sigma)))), longest)
        except ValueError:
            pass
        raise BenchError(f"{spec!r} is not a length: give N, uniform:MIN:MAX or lognormal:MEDIAN:SIGMA:MAX")


_MARK = 4


@dataclass(frozen=True, slots=True)
class UserCall:
    """One HTTP request. path: of the route. body: fields of its own. turn: its number in its conversation, from 1.
    pause_s: time between the end of the answer before it and its sending."""

    path: str
    body: dict[str, Any]
    turn: int = 1
    pause_s: float = 0.0


class Job(Protocol):
    """What one user asks of the server."""

    def calls(self) -> Generator[UserCall, str, None]:
        """Yield calls one after the other; the text of each answer is sent back."""

    def marked(self, mark: Sequence[int]) -> Job:
        """Return the same job with another beginning: the server's prefix cache then knows nothing of it, whatever
        was sent before. Jobs of one mark share what they shared. mark: token ids, see draw_mark."""


@dataclass(frozen=True, slots=True)
class Item:
    """A single request. prompt: token ids. output: number of tokens to generate."""

    prompt: list[int]
    output: int

    def calls(self) -> Generator[UserCall, str, None]:
        yield UserCall("/v1/completions", {"prompt": self.prompt, "max_tokens": self.output})

    def marked(self, mark: Sequence[int]) -> Item:
        """Return this request with the mark in place of its first tokens."""
        own = list(mark[: len(self.prompt)])
        return replace(self, prompt=own + self.prompt[len(own) :])


def draw_mark(tokens: Sequence[int]) -> list[int]:
    """Draw a mark from the token ids of a text, another one at every call."""
    return random.SystemRandom().choices(tokens, k=_MARK)


def passage(tokens: Sequence[int], length: int, rng: random.Random) -> list[int]:
    """Cut a random passage from a text. Raises BenchError if the text is shorter."""
    if len(tokens) < length:
        raise BenchError(f"the text has {len(tokens)} tokens, fewer than the {length} of one passage")
    first = rng.randint(0, len(tokens) - length)
    return list(tokens[first : first + length])


def items(
    tokens: Sequence[int],
    count: int,
    prompt: Lengths,
    output: Lengths,
    *,
    shared: int = 0,
    groups: int = 1,
    seed: int = 0,
) -> list[Item]:
    """Draw requests over passages of a text, the same for the same seed.

    tokens: token ids of the text. shared: length of the prefix that all prompts of a group share; part of the drawn
    prompt length. groups: number of groups, to which requests are assigned in turn. Raises BenchError if the text is
    too short.
    """
    if len(tokens) < prompt.longest:
        raise BenchError(f"the text has {len(tokens)} tokens, fewer than the {prompt.longest} of the longest prompt")
    rng = random.Random(seed)
    prefixes = [passage(tokens, min(shared, prompt.longest), rng) for _ in range(groups)]
    found = []
    for i in range(count):
        length = prompt.draw(rng)
        begins = prefixes[i % groups][:length]
        found.append(Item(begins + passage(tokens, length - len(begins), rng), output.draw(rng)))
    return found


def questions(
    tokens: Sequence[int],
    documents: int,
    each: int,
    document: Lengths,
    question: Lengths,
    output: Lengths,
    *,
    seed: int = 0,
) -> list[Item]:
    """Draw questions about documents, in random order: each prompt is a document and a question after it.

    tokens: token ids of the text. each: number of questions per document. Raises BenchError if the text is too short.
    """
    rng = random.Random(seed)
    texts = [passage(tokens, document.draw(rng), rng) for _ in range(documents)]
    found = [
        Item(text + passage(tokens, question.draw(rng), rng), output.draw(rng)) for text in texts for _ in range(each)
    ]
    rng.shuffle(found)
    return found


def arrival_times(arrivals: Arrivals, rate: float, seed: int) -> Iterator[float]:
    """Yield arrival times in seconds, endlessly: the first is 0; gaps are exponential (poisson) or constant."""
    rng = random.Random(seed)
    at = 0.0
    while True:
        yield at
        at += rng.expovariate(rate) if arrivals == "poisson" else 1 / rate
