"""Generate a load: arrival times, lengths and texts of requests."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

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


@dataclass(frozen=True, slots=True)
class Item:
    """One request. prompt: token ids. output: number of tokens to generate."""

    prompt: list[int]
    output: int


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

    def stretch(length: int) -> list[int]:
        first = rng.randint(0, len(tokens) - length)
        return list(tokens[first : first + length])

    prefixes = [stretch(min(shared, prompt.longest)) for _ in range(groups)]
    found = []
    for i in range(count):
        length = prompt.draw(rng)
        begins = prefixes[i % groups][:length]
        found.append(Item(begins + stretch(length - len(begins)), output.draw(rng)))
    return found


def arrival_times(arrivals: Arrivals, rate: float, seed: int) -> Iterator[float]:
    """Yield arrival times in seconds, endlessly: the first is 0; gaps are exponential (poisson) or constant."""
    rng = random.Random(seed)
    at = 0.0
    while True:
        yield at
        at += rng.expovariate(rate) if arrivals == "poisson" else 1 / rate
