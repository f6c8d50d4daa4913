"""The KV policies, by their settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine.config.kv import AllConfig, KVSettings, QuestConfig, SnapKVConfig, TopKConfig, VerifiedConfig, WindowConfig
from engine.kv.policy import DraftSite, KVPolicy
from engine.kv.quest import QuestPolicy
from engine.kv.snapkv import SnapKVPolicy
from engine.kv.topk import TopKPolicy
from engine.kv.verified import VerifiedPolicy
from engine.kv.window import WindowPolicy

_POLICIES: dict[type[KVSettings], Callable[[DraftSite, Any], KVPolicy]] = {
    WindowConfig: WindowPolicy,
    VerifiedConfig: VerifiedPolicy,
    QuestConfig: QuestPolicy,
    SnapKVConfig: SnapKVPolicy,
    TopKConfig: TopKPolicy,
    AllConfig: lambda site, config: KVPolicy(site),
}


def make_policy(site: DraftSite) -> KVPolicy:
    """Make the policy that `speculation.kv` describes."""
    config = site.settings.resolved_kv
    return _POLICIES[type(config)](site, config)
