"""Measurements that bench.peers.compare makes."""

from __future__ import annotations

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
    temperature: float = 0.0
    busy: int = 0
    """Number of processes that compute beside the contenders."""
    quota: float | None = None
    """CPU quota of each contender, in CPUs."""

    def row_tokens(self, batch: int, context: int, longest: int) -> int:
        """Return the largest number of tokens of a row. longest: the model's maximum length. Raises BenchError if a row
        needs more than that."""
        # Prefilled rows decode while others are prefilled. With accepted drafts some rows get ahead of others.
        ahead = batch * context // (_PREFILL_CHUNK - batch) + 1
        new = self.warm_up + self.rounds * self.new_tokens
        wanted = context + ahead + new
        if wanted > longest:
            raise BenchError(f"{batch}x{context} takes {wanted} tokens per row, but the model has {longest}")
        return min(longest, wanted + new + 64)

    def settings(self, model: Path, shape: ModelConfig, threads: int) -> dict[str, Any]:
        """Build the settings of every contender; see bench/peers/programs/driver.py. Raises BenchError."""
        longest = shape.max_model_len
        sizes = [batch * self.row_tokens(batch, context, longest) for batch, context in self.points]
        bytes_per_token = 2 * 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim  # keys and values of 2 bytes
        return {
            "model": str(model),
            "threads": threads,
            "rows": max(CHECK_PROMPTS, *(batch for batch, _ in self.points)),
            "row_tokens": longest,
            "kv_bytes": max(longest, *sizes) * bytes_per_token,
            "temperature": self.temperature,
            "seed": _SEED,
        }
