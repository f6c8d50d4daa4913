"""Settings of speculation: who drafts, how many tokens, and which KV a draft reads. Free of torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from engine.config.settings import Positive, Settings

_RESELECT = 32
"""New tokens after which SnapKV chooses again, where that is left to us: what a request generates would else leave the
draft's sight. One look at all keys in so many steps costs little."""


def policy_of(value: Any) -> Any:
    """Which kind of KV policy a setting is about; the default one need not be named."""
    return value.get("policy", "window") if isinstance(value, dict) else getattr(value, "policy", None)


class WindowConfig(Settings):
    """Sink + window (StreamingLLM, arXiv 2309.17453): the first and the most recent tokens."""

    policy: Literal["window"] = "window"
    budget: Positive = 512
    """KV tokens one draft step may read per row; a multiple of page_size."""
    sink: Positive = 16
    """First tokens always read; rounded up to whole pages."""
    positions: Literal["absolute", "relative"] = "absolute"
    """relative: the draft sees the tokens it reads at positions 0 … budget - 1, as if there were no others."""


class SnapKVConfig(Settings):
    """The tokens that the prompt's last queries attended to most, per KV head (SnapKV, arXiv 2404.14469), and the
    most recent ones; in a cache of the draft's own."""

    policy: Literal["snapkv"]
    budget: Positive = 512
    """KV tokens one draft step may read per row; a multiple of page_size."""
    recent: Positive = 64
    """How many of them are the most recent ones; a multiple of page_size. What a request has generated can be read no
    further back, unless `reselect` chooses from it."""
    queries: Positive = 32
    """The prompt's last queries, which choose."""
    kernel: Positive = 5
    """Odd: scores are averaged over so many neighbouring tokens."""
    reselect: Annotated[int, Field(ge=0)] | None = None
    """Choose again every so many new tokens; 0: never; None: every 32, where the target drafts for itself."""


class TopKConfig(Settings):
    """The tokens that carry most of each query's attention, per KV head. It reads all keys to find them: a measure of
    what selection could reach at best, not a way to save time."""

    policy: Literal["topk"]
    budget: Positive = 512
    """KV tokens attended to per row."""


class AllConfig(Settings):
    """Everything: ordinary speculative decoding, for a draft model that is small by itself."""

    policy: Literal["all"]

    @model_validator(mode="before")
    @classmethod
    def _unlimited(cls, data: Any) -> Any:
        if isinstance(data, dict) and "budget" in data:
            raise ValueError("policy all reads everything and has no budget")
        return data

    @property
    def budget(self) -> None:
        """There is none."""


KVConfig = Annotated[
    Annotated[WindowConfig, Tag("window")]
    | Annotated[SnapKVConfig, Tag("snapkv")]
    | Annotated[TopKConfig, Tag("topk")]
    | Annotated[AllConfig, Tag("all")],
    Discriminator(
        policy_of,
        custom_error_type="policy",
        custom_error_message="expected settings of a policy: window, snapkv, topk or all",
    ),
]


class SpeculationConfig(Settings):
    gamma: Annotated[int, Field(ge=0, le=16)] | Literal["auto"] = "auto"
    """Tokens drafted per round; 0 is plain decoding. auto: what promises most, for each round and row."""
    gamma_max: Annotated[int, Field(ge=1, le=16)] = 6
    """auto never drafts more."""
    drafter: Literal["self", "model"] = "self"
    """Who drafts: the target itself, with sparse KV, or a smaller model with the same vocabulary."""
    model: str | None = None
    """The directory of the draft model, if there is one."""
    tensor_parallel_size: Positive | None = None
    """Ranks that the draft model is split over, the first ones; None: all."""
    verification: Literal["coupled", "rejection"] = "coupled"
    """How sampled tokens are verified. coupled: draft and target draw with the same noise, and text does not depend on
    what was drafted. rejection: speculative sampling (arXiv 2302.01318), from the same distribution."""
    weights: Literal["auto", "same", "int8"] = "auto"
    """Of whoever drafts. int8: see engine.weights, kept beside the target's; auto: int8 where that is faster."""
    kv: KVConfig = WindowConfig()
    """Which KV the draft reads."""

    @property
    def draft_model(self) -> str | None:
        """The draft model that is to be loaded, if any."""
        return self.model if self.max_draft_tokens and self.drafter == "model" else None

    def draft_ranks(self, ranks: int) -> int:
        """How many of the target's ranks share the draft model; 0: there is none."""
        return 0 if self.draft_model is None else self.tensor_parallel_size or ranks

    @property
    def max_draft_tokens(self) -> int:
        """Per row and round."""
        return self.gamma_max if self.gamma == "auto" else self.gamma

    @property
    def resolved_kv(self) -> KVConfig:
        """`kv` with nothing left open."""
        if self.kv.policy != "snapkv" or self.kv.reselect is not None:
            return self.kv
        return self.kv.model_copy(update={"reselect": _RESELECT if self.drafter == "self" else 0})

    @property
    def own_tokens(self) -> int:
        """At the end of its prompt, a row's own to compute: the last, which decides what follows; SnapKV's queries."""
        return max(1, self.kv.queries) if self.max_draft_tokens and self.kv.policy == "snapkv" else 1

    def check(self, page_size: int, ranks: int) -> None:
        """Raises ValueError for what cannot be in an engine with such pages and so many ranks."""
        if self.max_draft_tokens == 0:
            return
        self._check_drafter(ranks)
        self._check_policy(page_size)

    def _check_drafter(self, ranks: int) -> None:
        if (self.drafter == "model") != (self.model is not None):
            raise ValueError("speculation.drafter: model needs speculation.model, and nothing else does")
        mine = self.tensor_parallel_size
        if mine not in (None, ranks) and self.verification == "rejection":
            raise ValueError("speculation.verification: rejection needs the draft model on all ranks")
        if mine is not None and self.drafter != "model":
            raise ValueError("speculation.tensor_parallel_size is that of a draft model, and there is none")
        if mine is not None and mine > ranks:
            raise ValueError(f"speculation.tensor_parallel_size: {mine} of {ranks} ranks")

    def _check_policy(self, page: int) -> None:
        kv = self.kv
        if kv.policy == "window":
            kept = -(-kv.sink // page) * page
            if kv.budget % page:
                raise ValueError(f"speculation.kv.budget ({kv.budget}) must be a multiple of cache.page_size ({page})")
            if kv.budget < kept + page:
                raise ValueError(
                    f"speculation.kv.budget ({kv.budget}) leaves no page for recent tokens beside a sink of {kv.sink}"
                )
        if kv.policy == "snapkv":
            for name, tokens in (("budget", kv.budget), ("recent", kv.recent)):
                if tokens % page:
                    raise ValueError(f"speculation.kv.{name} ({tokens}) must be a multiple of cache.page_size ({page})")
            if kv.budget <= kv.recent:
                raise ValueError(
                    f"speculation.kv.budget ({kv.budget}) leaves nothing to choose beside {kv.recent} recent tokens"
                )
            if kv.reselect and self.drafter == "model":
                raise ValueError("speculation.kv.reselect: a draft model keeps no KV to choose from again")
            if kv.kernel % 2 == 0:
                raise ValueError(f"speculation.kv.kernel ({kv.kernel}) must be odd")
