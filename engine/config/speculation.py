"""Settings of speculation: drafter, number of drafts, and the KV that drafts read. Free of torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from engine.config.settings import Positive, Settings

_RESELECT = 32
"""Default of `SnapKVConfig.reselect` for self-speculation. Without reselection, a draft could no longer read generated
tokens once they are not recent. Scoring all keys once in so many steps costs little."""


def policy_of(value: Any) -> Any:
    """Return the name of the KV policy that a setting describes; window is the default."""
    return value.get("policy", "window") if isinstance(value, dict) else getattr(value, "policy", None)


class WindowConfig(Settings):
    """Sink + window (StreamingLLM, arXiv 2309.17453): the first and the most recent tokens."""

    policy: Literal["window"] = "window"
    budget: Positive = 512
    """KV tokens one draft step may read per row; a multiple of page_size."""
    sink: Positive = 16
    """Number of first tokens that are always read; rounded up to whole pages."""
    positions: Literal["absolute", "relative"] = "absolute"
    """Positions at which the draft reads tokens. relative: 0 … budget - 1, as if there were no other tokens."""


class SnapKVConfig(Settings):
    """SnapKV (arXiv 2404.14469): the tokens that the prompt's last queries attend to most, per KV head, and the most
    recent tokens, in a cache of the draft's own."""

    policy: Literal["snapkv"]
    budget: Positive = 512
    """KV tokens one draft step may read per row; a multiple of page_size."""
    recent: Positive = 64
    """Part of the budget for the most recent tokens; a multiple of page_size. Generated tokens before them cannot be
    read, unless `reselect` chooses from them."""
    queries: Positive = 32
    """Number of the prompt's last queries, whose attention chooses the tokens."""
    kernel: Positive = 5
    """Number of neighbouring tokens over which scores are averaged; odd."""
    reselect: Annotated[int, Field(ge=0)] | None = None
    """Number of new tokens after which tokens are chosen again; 0: never; None: 32 if the target drafts for itself,
    else never."""


class TopKConfig(Settings):
    """The tokens with the largest part of each query's attention, per KV head. Finding them reads all keys: a measure
    of the best that selection can reach, not a way to save time."""

    policy: Literal["topk"]
    budget: Positive = 512
    """KV tokens attended to per row."""


class AllConfig(Settings):
    """All tokens: ordinary speculative decoding, for a draft model that is small by itself."""

    policy: Literal["all"]

    @model_validator(mode="before")
    @classmethod
    def _unlimited(cls, data: Any) -> Any:
        if isinstance(data, dict) and "budget" in data:
            raise ValueError("policy all reads all tokens and takes no budget")
        return data

    @property
    def budget(self) -> None:
        """None: the policy has no budget."""


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
    """Number of drafts per row and round; 0 is plain decoding. auto: the number with the highest predicted throughput,
    for each round and row."""
    gamma_max: Annotated[int, Field(ge=1, le=16)] = 6
    """Largest number of drafts that auto chooses."""
    drafter: Literal["self", "model"] = "self"
    """Model that drafts. self: the target itself, with sparse KV. model: a smaller model with the same vocabulary."""
    model: str | None = None
    """Directory of the draft model, if there is one."""
    tensor_parallel_size: Positive | None = None
    """Number of ranks, the first ones, that the draft model is split over; None: all."""
    verification: Literal["coupled", "rejection"] = "coupled"
    """Verification of sampled tokens. coupled: draft and target sample with the same noise, and the text does not
    depend on the drafts. rejection: speculative sampling (arXiv 2302.01318), from the same distribution."""
    weights: Literal["auto", "same", "int8"] = "auto"
    """Weights of the drafting model. int8: see engine.weights, kept in addition to the target's; auto: int8 where that
    is faster, which is with compiled kernels on CPUs."""
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
        if self.kv.policy != "snapkv" or self.kv.reselect is not None:
            return self.kv
        return self.kv.model_copy(update={"reselect": _RESELECT if self.drafter == "self" else 0})

    @property
    def num_uncached_tokens(self) -> int:
        """Number of tokens at its end that a new row must compute itself: the last one, for its logits; with SnapKV,
        those whose queries choose."""
        return max(1, self.kv.queries) if self.max_draft_tokens and self.kv.policy == "snapkv" else 1

    def check(self, page_size: int, ranks: int) -> None:
        """Raise ValueError for settings that do not fit this page size or number of ranks."""
        if self.max_draft_tokens == 0:
            return
        self._check_drafter(ranks)
        self._check_policy(page_size)

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
