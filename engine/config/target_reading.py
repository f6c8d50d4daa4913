"""Settings of a target that reads part of its KV, and what follows from them alone. Free of torch."""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

from engine.config.kv import KVState, QuestConfig
from engine.config.settings import Positive
from engine.plan import DrafterName


class TargetQuestConfig(QuestConfig):
    """Quest for the target itself. It is lossy: positions after a prompt read part of their KV, and the text is another
    one than the dense model's."""

    budget: Positive = 1024
    window: Positive = 256
    """KV tokens before a choice that streaming heads read; a multiple of page_size."""
    heads: str | None = None
    """File of `magicdec profile heads`, whose lower half of KV heads stream: they read the sink and the window only."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: Any) -> Any:
        if isinstance(data, dict) and "policy" not in data:
            raise ValueError("its settings need a policy beside them: policy: quest, or the flag --target-kv quest")
        return data

    def check_target(self, page_size: int) -> None:
        """Raise ValueError for settings that do not fit this page size."""
        for name in ("budget", "window"):
            if getattr(self, name) % page_size:
                raise ValueError(
                    f"target_kv.{name} ({getattr(self, name)}) must be a multiple of cache.page_size ({page_size})"
                )

    def state(self, page_size: int, max_gamma: int, drafter: DrafterName) -> KVState:
        choices = self.ring(max_gamma + 1) * (self.budget // page_size)
        return KVState(summaries=2, choices=choices, per_head=True)

    def ring(self, max_queries: int) -> int:
        """Return the number of a row's latest choices that are kept: of those positions that a forward may begin again
        after rejected drafts, and the one before. max_queries: largest number of queries of a decoding row in a
        forward."""
        return -(-max_queries // self.interval) + 2

    @property
    def summary(self) -> dict[str, str | int]:
        """The settings that clients are told. streaming_window: the window of streaming heads; 0: none streams."""
        told: dict[str, str | int] = {"policy": self.policy, "budget": self.budget, "sink": self.sink}
        return told | {"interval": self.interval, "streaming_window": self.window if self.heads else 0}

    def most_read(self, page_size: int) -> int:
        """Return the largest number of KV tokens that a position after a prompt reads in a KV head."""
        most = self.budget if self.heads is None else max(self.budget, self.window)
        newer = page_size - 1 + self.interval  # since the page of the choice, the position itself included
        return -(-self.sink // page_size) * page_size + most + newer

    def tokens_read_by_pass(
        self, num_prompt: int, first: int, queries: int, page_size: int, streaming: float = 0.0
    ) -> int:
        """Return the number of KV tokens that a pass over `queries` positions of a row reads, from position `first` on,
        after a prompt. Positions that share a choice read its KV once. streaming: share of the KV heads that stream.

        Bounds of pages, which choosing reads, are not KV tokens and not counted.
        """
        read, position, end = 0.0, first, first + queries
        while position < end:
            anchor = position - (position - num_prompt) % self.interval
            last = min(anchor + self.interval, end) - 1
            candidates = max(0, anchor // page_size - -(-self.sink // page_size))
            for tokens, share in ((self.budget, 1 - streaming), (self.window, streaming)):
                read += share * (last + 1 - max(0, candidates - tokens // page_size) * page_size)
            position = last + 1
        return round(read)
