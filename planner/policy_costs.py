"""Costs and acceptance of each KV policy: KV that drafts read, cost of choosing it, share of drafts that are accepted.

Whatever follows from settings alone comes from engine.config.kv, at the page size of a deployment that sets none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from engine.config.deployment import CacheConfig
from engine.config.kv import KVConfig, KVState, QuestConfig
from engine.config.speculation import SpeculationConfig
from engine.plan import DrafterName
from kernels.kv.kv_bits import KV_BITS
from models.shapes import kv_heads_per_rank
from planner.cost_model import Choosing, acceptance_for
from planner.placed_model import PlacedModel

PAGE_SIZE = CacheConfig().page_size
PUBLISHED_GAMMA = 6
PUBLISHED_TOKENS = {"window": 4.92, "verified": 6.24, "quest": 5.43}
"""Mean tokens of a row per round of PUBLISHED_GAMMA drafts, accepted ones and one more, as Vegas (arXiv 2602.07223)
published them for Qwen3-8B."""
_ENDLESS = 1 << 40
"""A context longer than any, in whole pages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyCosts:
    """Costs and acceptance of one KV policy.

    rejections: relative to sink + window at the same budget. choice: cost of choosing what drafts read, from the model
    that drafts and the page size. page_size: tokens per page.
    """

    name: str
    rejections: float = 1.0
    choice: Callable[[PlacedModel, int], Choosing] = lambda placed, page_size: Choosing()
    page_size: int = PAGE_SIZE

    def stored(self, kv_format: str) -> PolicyCosts:
        """Return the costs at the page size of a KV format."""
        return replace(self, page_size=KV_BITS[kv_format].page_size(PAGE_SIZE))

    def choosing(self, placed: PlacedModel) -> Choosing:
        """Compute what choosing costs. placed: the model that drafts."""
        return self.choice(placed, self.page_size)

    def check(self, budget: int | None, drafter: DrafterName) -> None:
        """Raise ValueError for a budget or drafter that the policy does not allow. budget: None: all KV."""
        self.settings(budget).check(self.page_size, drafter)

    @property
    def is_view(self) -> bool:
        """Whether drafts of the target itself read its own pages, and keep no KV of theirs."""
        return self.state(None, 1, "self").pages == 0

    def tokens_read(self, budget: int) -> int:
        """Return the KV tokens that a draft step reads of a row which has more."""
        return self.settings(budget).tokens_read(_ENDLESS, self.page_size)

    def state(self, budget: int | None, gamma: int, drafter: DrafterName) -> KVState:
        """Return the KV that the policy keeps of each row, in pages of one token. budget: None: the policy's default.
        gamma: largest number of drafts."""
        settings = SpeculationConfig(drafter=drafter, gamma=max(1, gamma), kv=self.settings(budget))
        return settings.kv_state(1)

    @property
    def fits_windows(self) -> bool:
        """Whether drafts of the target itself need no KV that its sliding layers read no more, and read no more of
        these than their budget."""
        return self.settings(None).fits_windows

    def settings(self, budget: int | None) -> KVConfig:
        """Return the policy's settings. budget: None: its default."""
        kv: dict[str, Any] = {"policy": self.name} | ({} if budget is None else {"budget": budget})
        return SpeculationConfig.model_validate({"kv": kv}).kv


def _published_rejections(name: str) -> float:
    """Compute rejections relative to sink + window, from what was published.

    Predictions by it are optimistic for small models: with a model of 135M parameters, 4K of context and temperature 1,
    this server's `verified` had about 0.8 of the window's rejections at budgets of 128 and 512, and `quest` about 0.9.
    """
    ours, window = (1 - acceptance_for(PUBLISHED_GAMMA, PUBLISHED_TOKENS[each]) for each in (name, "window"))
    return ours / window


def _count_votes(placed: PlacedModel, page_size: int) -> Choosing:
    """Compute what votes in a verify pass cost, where attention counts them while it reads keys (kernels/gpu/votes.py).

    Of each page it writes and reads a float32 for each of two voters and query heads. The votes for each KV head are
    written, summed and ranked. Attention that reads keys once more for it takes longer: FlashInfer's, and that of rows
    that share pages.
    """
    sums = 2 * 2 * -(-placed.model.num_heads // placed.ranks)
    votes = 3 * kv_heads_per_rank(placed.model, placed.ranks)
    return Choosing(verify_bytes=4 * len(placed.model.attention_groups[0]) * (sums + votes) / page_size)


def _compare_pages(placed: PlacedModel, page_size: int) -> Choosing:
    """Compute what choosing by the bounds of each page's keys costs: a choice reads all of them. They are dense."""
    settings = QuestConfig(policy="quest")
    vectors = settings.state(page_size, 1, "self").summaries / page_size
    return Choosing(draft_bytes=vectors * placed.dense_kv_bytes(1) / 2, interval=settings.interval)


POLICY_COSTS = {
    costs.name: costs
    for costs in (
        PolicyCosts(name="window"),
        PolicyCosts(name="snapkv", rejections=0.75),  # assumed, not measured
        PolicyCosts(name="verified", rejections=_published_rejections("verified"), choice=_count_votes),
        PolicyCosts(name="quest", rejections=_published_rejections("quest"), choice=_compare_pages),
    )
}
"""Policies that forecasts know, by name. `topk` saves no time; `all` is a budget of None."""
