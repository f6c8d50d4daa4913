"""Settings of speculation: drafter, number of drafts, and the KV that drafts read. Free of torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from engine.config.kv import DrafterName, KVConfig, KVState, WindowConfig
from engine.config.settings import Positive, Settings


class SpeculationConfig(Settings):
    gamma: Annotated[int, Field(ge=0, le=16)] | Literal["auto"] = "auto"
    """Number of drafts per row and round; 0 is plain decoding. auto: the number with the highest predicted throughput,
    for each round and row."""
    gamma_max: Annotated[int, Field(ge=1, le=16)] = 8
    """Largest number of drafts that auto chooses."""
    drafter: DrafterName = "self"
    """Model that drafts. self: the target itself, with sparse KV. model: a smaller model with the same vocabulary."""
    model: str | None = None
    """Directory of the draft model, if there is one."""
    tensor_parallel_size: Positive | None = None
    """Number of ranks, the first ones, that the draft model is split over; None: all."""
    verification: Literal["coupled", "rejection"] = "coupled"
    """Verification of sampled tokens. coupled: draft and target sample with the same noise, and the text does not
    depend on the drafts. rejection: speculative sampling (arXiv 2302.01318), from the same distribution."""
    weights: Literal["auto", "same", "int8", "int4", "fp8"] = "auto"
    """Weights of the drafting model. same: those of the target, or as the draft model's checkpoint stores them. int8,
    int4, fp8: see engine.weights; kept in addition to the target's. auto: the format that is measured to be the fastest
    at the rows that drafts have; same if that is dense, and on plain torch."""
    kv: KVConfig = WindowConfig()
    """KV policy of drafts: the KV that they read."""

    @property
    def draft_model(self) -> str | None:
        """Draft model to load, if any."""
        return self.model if self.max_draft_tokens and self.drafter == "model" else None

    def draft_ranks(self, ranks: int) -> int:
        """Return the number of the target's ranks that share the draft model; 0: there is none."""
        return 0 if self.draft_model is None else self.tensor_parallel_size or ranks

    @property
    def max_draft_tokens(self) -> int:
        """Largest number of drafts per row and round."""
        return self.gamma_max if self.gamma == "auto" else self.gamma

    @property
    def resolved_kv(self) -> KVConfig:
        """`kv` with every default resolved."""
        return self.kv.resolve(self.drafter)

    @property
    def num_uncached_tokens(self) -> int:
        """Number of tokens at its end that a new row must compute itself."""
        return self.kv.num_uncached_tokens if self.max_draft_tokens else 1

    def kv_state(self, page_size: int) -> KVState:
        """Return the KV that drafts keep beside the pages of requests."""
        if not self.max_draft_tokens:
            return KVState()
        return self.resolved_kv.state(page_size, self.max_draft_tokens, self.drafter)

    def kv_budgets(self, page_size: int) -> list[int]:
        """Return the budgets among which each round chooses, the largest first; empty: drafts read as configured."""
        return self.kv.budgets(page_size) if self.gamma == "auto" else []

    @property
    def has_draft_pages(self) -> bool:
        """Whether a draft model keeps the KV of all tokens, in pages beside the target's."""
        return self.draft_model is not None and self.kv.reads_all_pages(self.drafter)

    @property
    def drafts_share(self) -> bool:
        """See KVSettings.shares_pages."""
        return self.kv.shares_pages(self.drafter)

    def check(self, page_size: int, ranks: int) -> None:
        """Raise ValueError for settings that do not fit this page size or number of ranks."""
        if self.max_draft_tokens == 0:
            return
        self._check_drafter(ranks)
        self.kv.check(page_size, self.drafter)

    def _check_drafter(self, ranks: int) -> None:
        if (self.drafter == "model") != (self.model is not None):
            raise ValueError("speculation.model is required with drafter: model, and allowed only with it")
        mine = self.tensor_parallel_size
        if mine not in (None, ranks) and self.verification == "rejection":
            raise ValueError("speculation.verification: rejection needs the draft model on all ranks")
        if mine is not None and self.drafter != "model":
            raise ValueError("speculation.tensor_parallel_size is that of a draft model, and there is none")
        if mine is not None and mine > ranks:
            raise ValueError(f"speculation.tensor_parallel_size: {mine} of {ranks} ranks")
