"""Settings of speculation: drafter, number of drafts, and the KV that drafts read. Free of torch."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from engine.config.kv import KVConfig, KVState, WindowConfig
from engine.config.settings import Positive, Settings
from engine.plan import DrafterName

Source = Literal["self", "model", "ngram", "together"]
Drafter = Literal["auto", Source]
DRAFTERS: tuple[str, ...] = get_args(Drafter)

_CAPTURED_EACH, _CAPTURED_STEP = 8, 4


class SpeculationConfig(Settings):
    gamma: Annotated[int, Field(ge=0, le=16)] | Literal["auto"] = "auto"
    """Number of drafts per row and round; 0 is plain decoding. auto: the number with the highest predicted throughput,
    for each round and row."""
    gamma_max: Annotated[int, Field(ge=1, le=16)] = 8
    """Largest number of drafts that auto chooses for a row if a model makes some of them."""
    drafter: Drafter = "auto"
    """Where drafts come from. self: the target itself, with sparse KV. model: a smaller model with the same vocabulary.
    ngram: the text, prompt and output of the request and `store`: what followed the same tokens there. together: all
    of them that there are. Each row drafts from the text and from a model as it gains most, and each round has the
    model that it gains most from, the target or the draft model; a fixed `gamma` leaves that choice to the draft model,
    if there is one. auto: see `source`."""
    model: str | None = None
    """Directory of the draft model, if there is one."""
    ngram_gamma_max: Annotated[int, Field(ge=1, le=16)] = 16
    """Largest number of drafts from the text that auto chooses for a row. They cost no more than their verification."""
    store: str | None = None
    """Text store that is searched in addition to the request's own text (magicdec store build)."""
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
    self_kv: KVConfig | None = None
    """KV policy of the target's own drafts where it drafts beside a draft model, whose policy is `kv`. None: a window,
    the same one, or of about the same budget."""

    @property
    def source(self) -> Source:
        """Where drafts come from, with `drafter: auto` resolved: together, if the number of drafts of a row can be
        chosen, or `store` is set; of a fixed number the text would fail too often, so that a model makes them."""
        if self.drafter != "auto":
            return self.drafter
        if self.gamma == "auto" or self.store is not None:
            return "together"
        return "self" if self.model is None else "model"

    def kv_setting(self, drafter: DrafterName) -> str:
        """Return the name of the setting with the KV policy of a drafter's drafts."""
        return "speculation.kv" if drafter == self.drafting_model else "speculation.self_kv"

    @property
    def draft_model(self) -> str | None:
        """Draft model to load, if any."""
        return self.model if self.max_model_drafts and self.drafting_model == "model" else None

    @property
    def drafting_model(self) -> DrafterName:
        """Model that drafts, if one does (`max_model_drafts`): the target itself, or a smaller one. Of two, the
        smaller."""
        return "model" if self.source == "model" or self.model is not None else "self"

    def by_drafter(self, page_size: int = 1) -> dict[DrafterName, SpeculationConfig]:
        """Return the settings of each model that drafts; of two, the target's are those that it would have alone, and
        each round has one of them."""
        if not self.max_model_drafts:
            return {}
        mine = {self.drafting_model: self}
        if self.source == "together" and self.model is not None and self.gamma == "auto":
            alone = {"model": None, "tensor_parallel_size": None, "kv": self.self_kv or self._own_window(page_size)}
            mine["self"] = self.model_copy(update=alone)
        return mine

    @property
    def searches_text(self) -> bool:
        """Whether drafts come from the text, perhaps beside those of a model."""
        return self.gamma != 0 and self.source in ("ngram", "together")

    def draft_ranks(self, ranks: int) -> int:
        """Return the number of the target's ranks that share the draft model; 0: there is none."""
        return 0 if self.draft_model is None else self.tensor_parallel_size or ranks

    def _own_window(self, page_size: int) -> WindowConfig:
        if isinstance(self.kv, WindowConfig):
            return self.kv
        window = WindowConfig()
        pages = max(-(-(self.kv.budget or window.budget) // page_size), -(-window.sink // page_size) + 1)
        return WindowConfig(budget=pages * page_size)

    @property
    def max_model_drafts(self) -> int:
        """Largest number of drafts per row and round if a model makes some of them; 0: none does."""
        if self.source == "ngram":
            return 0
        return self.gamma_max if self.gamma == "auto" else self.gamma

    @property
    def max_text_drafts(self) -> int:
        """Largest number of drafts per row and round that come from the text alone."""
        if not self.searches_text:
            return 0
        return self.ngram_gamma_max if self.gamma == "auto" else self.gamma

    @property
    def max_draft_tokens(self) -> int:
        """Largest number of drafts per row and round."""
        return max(self.max_model_drafts, self.max_text_drafts)

    @property
    def captured_gammas(self) -> list[int]:
        """Numbers of drafts per row for which verify passes are captured; others are padded. Each that a model makes,
        and few of those beyond, which only text reaches: every graph takes time and memory at the start."""
        most = self.max_draft_tokens
        each = min(most, max(self.max_model_drafts, _CAPTURED_EACH))
        return [*range(each + 1), *range(each + _CAPTURED_STEP, most, _CAPTURED_STEP), *([most] if most > each else [])]

    @property
    def resolved_kv(self) -> KVConfig:
        """`kv` with every default resolved."""
        return self.kv.resolve(self.drafting_model)

    @property
    def num_uncached_tokens(self) -> int:
        """Number of tokens at its end that a new row must compute itself."""
        return max((each.kv.num_uncached_tokens for each in self.by_drafter().values()), default=1)

    def kv_state(self, page_size: int) -> KVState:
        """Return the KV that drafts keep beside the pages of requests."""
        if not self.max_model_drafts:
            return KVState()
        return self.resolved_kv.state(page_size, self.max_draft_tokens, self.drafting_model)

    def kv_budgets(self, page_size: int) -> list[int]:
        """Return the budgets among which each round chooses, the largest first; empty: drafts read as configured."""
        return self.kv.budgets(page_size) if self.gamma == "auto" and self.max_model_drafts else []

    @property
    def has_draft_pages(self) -> bool:
        """Whether a draft model keeps the KV of all tokens, in pages beside the target's."""
        return self.draft_model is not None and self.kv.reads_all_pages(self.drafting_model)

    def needs_all_kv(self, kv_format: str) -> bool:
        """Whether something reads more than the window of a target whose layers all slide: pages that are sealed or
        have few bits are in one pool with all KV, drafts choose from it, and a draft model has pages beside it.
        kv_format: of the target's KV."""
        own = self.by_drafter().get("self")
        return kv_format != "dense" or self.has_draft_pages or (own is not None and not own.kv.fits_windows)

    @property
    def drafts_share(self) -> bool:
        """See KVSettings.shares_pages."""
        return self.kv.shares_pages(self.drafting_model)

    def check(self, page_size: int, ranks: int) -> None:
        """Raise ValueError for settings that do not fit this page size or number of ranks."""
        if self.max_draft_tokens == 0:
            return
        self._check_drafter(ranks)
        for name, each in self.by_drafter(page_size).items():
            try:
                each.kv.check(page_size, name)
            except ValueError as error:
                raise ValueError(str(error).replace("speculation.kv", self.kv_setting(name))) from error

    def _check_drafter(self, ranks: int) -> None:
        if self.model is None and self.source == "model":
            raise ValueError("speculation.model is required with drafter: model (--draft DIR)")
        if self.model is not None and self.source not in ("model", "together"):
            raise ValueError("speculation.model is not for drafter: self or ngram (--draft self: none)")
        if self.store is not None and not self.searches_text:
            raise ValueError("speculation.store is not for drafter: self or model")
        mine = self.tensor_parallel_size
        if mine is not None and self.draft_model is None:
            raise ValueError("speculation.tensor_parallel_size is that of a draft model, and there is none")
        if mine not in (None, ranks) and self.verification == "rejection":
            raise ValueError("speculation.verification: rejection needs the draft model on all ranks")
        if mine is not None and mine > ranks:
            raise ValueError(f"speculation.tensor_parallel_size: {mine} of {ranks} ranks")
