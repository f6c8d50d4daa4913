"""Settings of KV policies: which KV a draft reads. What follows from settings alone is here too. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from engine.config.settings import Positive, Settings
from engine.plan import DrafterName

_RESELECT = 32
"""Default of `SnapKVConfig.reselect` for self-speculation. Without reselection, a draft could no longer read generated
tokens once they are not recent. Scoring all keys once in so many steps costs little."""


@dataclass(frozen=True, slots=True)
class KVState:
    """KV that a policy keeps beside the pages of requests, of each row slot, whatever the length of its context.

    first, ring: number of pages that stay in place, and of pages that wrap around (see engine.kv.policy.ring_table).
    queries: number of positions whose queries are kept, in every layer and query head. block: largest number of tokens
    of one row that a forward may compute through the ring; None: no limit. summaries: number of vectors, as large as a
    key, that are kept for each page of the pool, in every layer and KV head. choices: number of indices of chosen pages
    that are kept, in every layer, and with `per_head` in every KV head.
    """

    first: int = 0
    ring: int = 0
    queries: int = 0
    block: int | None = None
    summaries: int = 0
    choices: int = 0
    per_head: bool = False

    @property
    def pages(self) -> int:
        return self.first + self.ring


class KVSettings(Settings):
    """Base of the settings of all policies. A subclass states what differs from a view of all KV."""

    policy: str
    budget: int | None
    counts_votes: ClassVar[bool] = False
    """Whether drafts read what the target's verify passes vote for, which must read all KV."""
    per_layer: ClassVar[bool] = False
    """Whether drafts have page lists for each layer."""

    @property
    def num_uncached_tokens(self) -> int:
        """Number of tokens at its end that a new row must compute itself: at least the last one, for its logits."""
        return 1

    def check(self, page_size: int, drafter: DrafterName) -> None:
        """Raise ValueError for settings that do not fit this page size or drafter."""

    @property
    def fits_windows(self) -> bool:
        """Whether drafts can do without KV that the target's layers read no more, where all of these slide."""
        return False

    @property
    def reads_latest(self) -> bool:
        """Whether a controller may let rows read the latest pages in place of chosen ones (RowWork.latest)."""
        return False

    def resolve(self, drafter: DrafterName) -> Self:
        """Return the settings with every default resolved."""
        return self

    def budgets(self, page_size: int) -> list[int]:
        """Return the budgets among which each round can choose, the largest first; empty: there is one budget."""
        return []

    def with_budget(self, budget: int) -> Self:
        return self.model_copy(update={"budget": budget})

    def state(self, page_size: int, max_gamma: int, drafter: DrafterName) -> KVState:
        """Return the KV that the policy keeps. max_gamma: largest number of drafts of a row and round."""
        return KVState()

    def reads_all_pages(self, drafter: DrafterName) -> bool:
        """Whether a draft model keeps the KV of all tokens, in pages beside the target's."""
        return drafter == "model"

    def shares_pages(self, drafter: DrafterName) -> bool:
        """Whether drafts that read whole contexts read what rows share once, as the target does. Page lists of each
        layer, and pages that a row slot owns, are read for every row."""
        return True

    def tokens_read(self, context: int, page_size: int) -> int:
        """Return the number of KV tokens that a draft step reads of a row with `context` tokens."""
        return context

    def max_pages(self, page_size: int, max_gamma: int, row_pages: int) -> int:
        """Return the largest number of pages in a draft's list. row_pages: of a row's table."""
        return row_pages

    def _check_pages(self, page_size: int, *names: str) -> None:
        for name in names:
            tokens = getattr(self, name)
            if tokens % page_size:
                raise ValueError(
                    f"speculation.kv.{name} ({tokens}) must be a multiple of cache.page_size ({page_size})"
                )


class WindowConfig(KVSettings):
    """Sink + window (StreamingLLM, arXiv 2309.17453): the first and the most recent tokens."""

    policy: Literal["window"] = "window"
    budget: Positive = 512
    """KV tokens one draft step may read per row; a multiple of page_size."""
    sink: Positive = 16
    """Number of first tokens that are always read; rounded up to whole pages."""
    positions: Literal["absolute", "relative"] = "absolute"
    """Positions at which the draft reads tokens. relative: 0 … budget - 1, as if there were no other tokens."""

    def check(self, page_size: int, drafter: DrafterName) -> None:
        self._check_pages(page_size, "budget")
        if self.budget < (self._sink_pages(page_size) + 1) * page_size:
            raise ValueError(
                f"speculation.kv.budget ({self.budget}) leaves no page for recent tokens beside a sink of {self.sink}"
            )

    def budgets(self, page_size: int) -> list[int]:
        """Return the configured budget, half of it and a quarter, as far as pages and sink allow: a window is a page
        list into a pool that holds more, so narrowing it costs nothing."""
        smallest = (self._sink_pages(page_size) + 1) * page_size
        return [budget for budget in _halves(self.budget, page_size) if budget >= smallest]

    def state(self, page_size: int, max_gamma: int, drafter: DrafterName) -> KVState:
        if drafter == "self":
            return KVState()
        # The window, and room for the tokens that are written ahead of it. Prompts pass through it in blocks of a
        # quarter of the budget, so that the first query of a block still has most of a window before it.
        block = max(page_size, self.budget // 4 // page_size * page_size)
        first = self._sink_pages(page_size)
        ring = self.budget // page_size - first + -(-max(max_gamma, block) // page_size)
        return KVState(first=first, ring=ring, block=block)

    @property
    def fits_windows(self) -> bool:
        return self.positions == "absolute"

    def reads_all_pages(self, drafter: DrafterName) -> bool:
        return False

    def shares_pages(self, drafter: DrafterName) -> bool:
        return drafter == "self"

    def tokens_read(self, context: int, page_size: int) -> int:
        return _read_by_window(context, self.budget, page_size)

    def max_pages(self, page_size: int, max_gamma: int, row_pages: int) -> int:
        return _window_pages(self.budget, page_size, row_pages)

    def _sink_pages(self, page_size: int) -> int:
        return -(-self.sink // page_size)


class SnapKVConfig(KVSettings):
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

    @property
    def num_uncached_tokens(self) -> int:
        """See KVSettings: the tokens whose queries choose."""
        return self.queries

    def check(self, page_size: int, drafter: DrafterName) -> None:
        self._check_pages(page_size, "budget", "recent")
        if self.budget <= self.recent:
            raise ValueError(
                f"speculation.kv.budget ({self.budget}) leaves nothing to choose beside {self.recent} recent tokens"
            )
        if self.reselect and drafter == "model":
            raise ValueError("speculation.kv.reselect: a draft model keeps no KV to choose from again")
        if self.kernel % 2 == 0:
            raise ValueError(f"speculation.kv.kernel ({self.kernel}) must be odd")

    def resolve(self, drafter: DrafterName) -> Self:
        if self.reselect is not None:
            return self
        return self.model_copy(update={"reselect": _RESELECT if drafter == "self" else 0})

    def state(self, page_size: int, max_gamma: int, drafter: DrafterName) -> KVState:
        """See KVSettings.state. Rejected drafts overwrite the previous turn of the ring, which has room so that recent
        pages survive them; so do the queries that are kept."""
        return KVState(
            first=(self.budget - self.recent) // page_size,
            ring=self.recent // page_size + -(-max_gamma // page_size),
            queries=self.queries + (max_gamma if self.resolve(drafter).reselect else 0),
        )

    def shares_pages(self, drafter: DrafterName) -> bool:
        return False

    def tokens_read(self, context: int, page_size: int) -> int:
        return _read_by_window(context, self.budget, page_size)

    def max_pages(self, page_size: int, max_gamma: int, row_pages: int) -> int:
        return _window_pages(self.budget, page_size, row_pages)


class ChoiceConfig(KVSettings):
    """Base of policies that choose pages of a view of all KV, and read the first pages and everything newer in addition
    to the chosen ones."""

    per_layer: ClassVar[bool] = True
    budget: Positive = 256
    """KV tokens that are chosen per row; a multiple of page_size. A draft step reads the sink and the tokens after the
    choice in addition."""
    sink: Positive = 16
    """Number of first tokens that are always read; rounded up to whole pages."""

    def check(self, page_size: int, drafter: DrafterName) -> None:
        self._check_pages(page_size, "budget")

    def budgets(self, page_size: int) -> list[int]:
        """Return the configured budget, half of it and a quarter: the best pages of those chosen."""
        return [budget for budget in _halves(self.budget, page_size) if budget]

    def shares_pages(self, drafter: DrafterName) -> bool:
        return False

    def tokens_read(self, context: int, page_size: int) -> int:
        """See KVSettings.tokens_read. Half a page and the pending token are newer than the choice, on average."""
        return min(context, self._sink_pages(page_size) * page_size + self.budget + page_size // 2 + 1)

    def max_pages(self, page_size: int, max_gamma: int, row_pages: int) -> int:
        newer = page_size - 1 + self.max_newer_tokens(max_gamma) + 1
        return min(row_pages, self._sink_pages(page_size) + self.budget // page_size + -(-newer // page_size))

    def max_newer_tokens(self, max_gamma: int) -> int:
        """Return the largest number of tokens between those that were committed at the choice and the last draft's
        query."""
        return max_gamma

    def _sink_pages(self, page_size: int) -> int:
        return -(-self.sink // page_size)


class VerifiedConfig(ChoiceConfig):
    """The KV to which the queries of the latest verify pass gave most weight, per layer, everything newer, and the
    first tokens (Vegas, arXiv 2602.07223): a view, chosen anew after every verify pass."""

    counts_votes: ClassVar[bool] = True
    policy: Literal["verified"]
    latest: Literal["auto", "never"] = "never"
    """auto: with `gamma: auto`, drafts of a row read the latest pages in place of the chosen ones while more of them
    are accepted then."""

    @property
    def reads_latest(self) -> bool:
        return self.latest == "auto"

    def check(self, page_size: int, drafter: DrafterName) -> None:
        super().check(page_size, drafter)
        if drafter == "model":
            raise ValueError(
                "speculation.kv: verified chooses from the target's KV, which a draft model does not read; set another "
                "policy, such as quest, and this one for the target's own drafts (speculation.self_kv), or drafter: "
                "self without that model (--draft self)"
            )

    def max_newer_tokens(self, max_gamma: int) -> int:
        """See ChoiceConfig: accepted drafts of the pass that chose, plain rounds since, and new drafts."""
        return MAX_PLAIN_TOKENS + 2 * max_gamma

    def state(self, page_size: int, max_gamma: int, drafter: DrafterName) -> KVState:
        return KVState(choices=self.budget // page_size)


MAX_PLAIN_TOKENS = 16
"""Number of plain rounds after which rows vote although nothing was drafted, so that `verified` never has to read many
tokens that are newer than its choice. Counting votes then costs less than 1 % of such rounds."""


class QuestConfig(ChoiceConfig):
    """The pages whose keys may have the largest products with a draft's query, by bounds of each page's keys, per KV
    head; everything newer; and the first tokens (Quest, arXiv 2406.10774): a view of all KV."""

    policy: Literal["quest"]
    interval: Positive = 4
    """Number of draft steps that read the same choice. The first step of a round chooses anew."""

    def state(self, page_size: int, max_gamma: int, drafter: DrafterName) -> KVState:
        return KVState(summaries=2, choices=self.budget // page_size, per_head=True)


class TopKConfig(KVSettings):
    """The tokens with the largest part of each query's attention, per KV head. Finding them reads all keys: a measure
    of the best that selection can reach, not a way to save time."""

    policy: Literal["topk"]
    budget: Positive = 512
    """KV tokens attended to per row."""

    def shares_pages(self, drafter: DrafterName) -> bool:
        return False


class AllConfig(KVSettings):
    """All tokens: ordinary speculative decoding, for a draft model that is small by itself."""

    policy: Literal["all"]
    budget: None = None
    """The policy has no budget."""

    @property
    def fits_windows(self) -> bool:
        return True

    @model_validator(mode="before")
    @classmethod
    def _unlimited(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("budget") is not None:  # other processes get all fields
            raise ValueError("policy all reads all tokens and takes no budget")
        return data


def policy_of(value: Any) -> Any:
    """Return the name of the KV policy that a setting describes; window is the default."""
    return value.get("policy", "window") if isinstance(value, dict) else getattr(value, "policy", None)


POLICIES = ("window", "verified", "quest", "snapkv", "topk", "all")

KVConfig = Annotated[
    Annotated[WindowConfig, Tag("window")]
    | Annotated[VerifiedConfig, Tag("verified")]
    | Annotated[QuestConfig, Tag("quest")]
    | Annotated[SnapKVConfig, Tag("snapkv")]
    | Annotated[TopKConfig, Tag("topk")]
    | Annotated[AllConfig, Tag("all")],
    Discriminator(
        policy_of,
        custom_error_type="policy",
        custom_error_message=f"expected settings of a policy: {', '.join(POLICIES[:-1])} or {POLICIES[-1]}",
    ),
]


def _halves(budget: int, page_size: int) -> list[int]:
    """Return the budget, half of it and a quarter, in whole pages."""
    return [budget // share // page_size * page_size for share in (1, 2, 4)]


def _read_by_window(context: int, budget: int, page_size: int) -> int:
    """Return the KV tokens that a window reads, whose last page counts as full."""
    return context - max(0, -(-context // page_size) - budget // page_size) * page_size


def _window_pages(budget: int, page_size: int, row_pages: int) -> int:
    """Return the largest number of pages that a window lists. Two tokens can follow its last page."""
    return min(row_pages, budget // page_size + 1)
