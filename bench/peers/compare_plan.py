"""Measurements that bench.peers.compare makes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.corpus import BenchError
from models.config import ModelConfig

CHECK_PROMPTS = 4
"""Number of short prompts that are completed before the points."""
_SEED = 0
_PREFILL_CHUNK = 512
"""Smallest number of tokens that a contender prefills per round while prefilled rows decode. One that drafts meanwhile
gets further ahead per round, but has longer rounds: vLLM prefills 4096 tokens in each."""


def parse_temperatures(text: str) -> list[float]:
    """Parse `TEMPERATURE,…`, without repetitions. Raises BenchError."""
    try:
        temperatures = [float(part) for part in text.split(",")]
        if all(0 <= temperature < math.inf for temperature in temperatures):
            return list(dict.fromkeys(temperatures))
    except ValueError:
        pass
    raise BenchError(f"--temperatures {text!r}: expected numbers of at least 0, comma-separated")


def parse_points(text: str) -> list[tuple[int, int]]:
    """Parse `BATCHxCONTEXT,…`. Raises BenchError."""
    try:
        points = [tuple(int(part) for part in point.split("x")) for point in text.split(",")]
        if all(len(point) == 2 and min(point) > 0 for point in points):
            return [(batch, context) for batch, context in points]
    except ValueError:
        pass
    raise BenchError(f"--points {text!r}: expected BATCHxCONTEXT, comma-separated")


@dataclass(frozen=True, slots=True)
class ChatShape:
    """A chat whose prompt, the history included, grows from `start` to `end` tokens in `turns` turns."""

    start: int
    end: int
    turns: int

    @classmethod
    def parse(cls, text: str) -> ChatShape:
        """Parse `START:END:TURNS`. Raises BenchError."""
        try:
            start, end, turns = map(int, text.split(":"))
            if 0 < start < end and turns > 1:
                return cls(start, end, turns)
        except ValueError:
            pass
        raise BenchError(f"--chat {text!r}: expected START:END:TURNS, prompt tokens of the first and last of the turns")

    @property
    def prompts(self) -> list[int]:
        """Tokens of each turn's prompt."""
        return [self.start + (self.end - self.start) * turn // (self.turns - 1) for turn in range(self.turns)]

    def added(self, new_tokens: int) -> list[int]:
        """Return the tokens of text that each turn adds to the history, which has answers of `new_tokens` tokens.
        Raises BenchError if a turn would add none."""
        before = [0] + [prompt + new_tokens for prompt in self.prompts[:-1]]
        added = [prompt - history for prompt, history in zip(self.prompts, before, strict=True)]
        if min(added) < 1:
            raise BenchError(f"--chat: answers of {new_tokens} tokens leave no room for new text in a turn")
        return added


@dataclass(frozen=True, slots=True)
class Plan:
    """The measurements to make."""

    points: Sequence[tuple[int, int]]
    first: int
    """Length of the prompt whose time to first token is measured; 0: none."""
    warm_up: int
    """Tokens per row decoded before the turns."""
    new_tokens: int
    rounds: int
    totals: int
    """Number of times that whole requests are timed."""
    separately: bool = False
    """Whether contenders run one after the other at each point, so that memory holds one batch at a time."""
    temperatures: Sequence[float] = (0.0,)
    """Temperatures of sampling at each point. First tokens and chats are measured at the first one."""
    busy: int = 0
    """Number of processes that compute beside the contenders."""
    quota: float | None = None
    """CPU quota of each contender, in CPUs."""
    shared: int = 0
    """Number of tokens that all prompts of a point begin with."""
    chat: ChatShape | None = None
    task: str = "free"
    """Kind of prompts (bench.tasks)."""
    keep_prompts: bool = False
    """Whether contenders keep the KV of a point's prompts from one temperature to the next."""
    turns: int = 1
    """Largest number of contenders that take turns on the same rows, which are prefilled once (share_rows); 1: each has
    rows of its own."""
    anew: bool = False
    """Whether each turn begins the rows anew, after their prompts, so that all turns decode the same text."""

    def row_tokens(self, batch: int, context: int, longest: int) -> int:
        """Return the largest number of tokens of a row. longest: the model's maximum length. Raises BenchError if a row
        needs more than that."""
        # Prefilled rows decode while others are prefilled. With accepted drafts some rows get ahead of others.
        ahead = batch * context // (_PREFILL_CHUNK - batch) + 1
        new = self.warm_up + self.new_tokens * (1 if self.anew else self.rounds * self.turns)
        wanted = context + ahead + new
        if wanted > longest:
            raise BenchError(f"{batch}x{context} takes {wanted} tokens per row, but the model has {longest}")
        return min(longest, wanted + new + 64)

    def settings(self, model: Path, shape: ModelConfig, threads: int) -> dict[str, Any]:
        """Build the settings of every contender; see bench/peers/programs/driver.py. Raises BenchError."""
        longest = shape.max_model_len
        for batch, context in self.points:
            if self.shared >= context:
                raise BenchError(f"{batch}x{context}: {self.shared} shared tokens leave none to each row")
        if self.chat is not None:
            self.chat.added(self.new_tokens)
            if self.chat.end + self.new_tokens > longest:
                raise BenchError(f"--chat: {self.chat.end + self.new_tokens} tokens, but the model has {longest}")
        sizes = [batch * self.row_tokens(batch, context, longest) for batch, context in self.points]
        bytes_per_token = 2 * 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim  # keys and values of 2 bytes
        return {
            "model": str(model),
            "threads": threads,
            "rows": max([CHECK_PROMPTS, *(batch for batch, _ in self.points)]),
            "row_tokens": longest,
            "kv_bytes": max([longest, *sizes]) * bytes_per_token,
            "seed": _SEED,
            "keep_prompts": self.keep_prompts,
        }
