"""The keys to which each query of a draft attends most: the upper bound of what a selection can reach."""

from __future__ import annotations

from engine.config.kv import TopKConfig
from engine.kv.policy import DraftSite, KVPolicy
from kernels.attention.topk_attention import TopKAttention


class TopKPolicy(KVPolicy):
    """A view of all KV, from which attention chooses per query and KV head."""

    captures = False

    def __init__(self, site: DraftSite, config: TopKConfig) -> None:
        super().__init__(site)
        self.attention = TopKAttention(site.page_size, config.budget)
