"""Forecast speculation on hardware that need not be present: speed, the best gamma and budget, memory.

Uses shapes, data sheets and the cost model; free of torch, and loads no weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from engine.config.deployment import SchedulerConfig
from engine.config.kv import AllConfig, KVState
from engine.config.speculation import SpeculationConfig
from engine.plan import DrafterName
from kernels.kv.kv_bits import KV_BITS
from kernels.weights.weight_bits import EXPERTS_ALONE
from models.shapes import find_shape, rank_matrix_bytes, rank_weight_bytes, window_pages_per_row
from planner.cost_model import Choosing, SpeculationCost
from planner.expected_acceptance import expected_alpha
from planner.hardware import find_device
from planner.placed_model import PUBLISHED, REFERENCE_ON_CPU, Efficiency, PlacedModel
from planner.policy_costs import POLICY_COSTS, PolicyCosts

BUDGETS = (512, 128, 256, 1024, 2048)
"""Budgets to try if none is given. Ties go to the first."""
USABLE_MEMORY = 0.9
"""Fraction of a device's memory for weights and KV; the rest is for activations, workspaces and the driver."""
ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
CHUNK = SchedulerConfig().max_batch_tokens
"""Tokens of a round whose KV sliding layers hold beside windows, while prompts are computed."""


class ForecastError(ValueError):
    """The deployment is impossible; the message names the reason."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Forecast of one (batch, context). Times in milliseconds, memory in bytes of one device.

    weights, draft_weights: formats of the matrices of the target and of drafts. kv_format: of the target's KV. shared:
    number of first tokens that are the same in every context. budget: as the policy counts it (a draft step of some
    reads a few tokens more); None: all KV. t_target_ms: a plain step. t_draft_ms: one draft step. t_verify_ms: the
    verify pass. t_choose_ms: choosing in a round what drafts read, which is in neither of these. draft_row_read_bytes:
    KV that a draft step reads of one row. draft_read_bytes: weights and KV that it reads in all. kv_bytes: the target's
    KV of the whole batch, with exact pages and the windows of sliding layers. draft_bytes: weights and KV that only the
    draft has. All bytes count shared tokens once. largest_batch: the largest that fits at this context.
    break_even_context: shortest context at which drafting is faster at this batch and budget; None: never.
    break_even_limit: the same for large batches, at this gamma and alpha; None: never.
    """

    model: str
    draft: str
    weights: str
    draft_weights: str
    kv_format: str
    gpu: str
    tensor_parallel: int
    policy: str
    batch: int
    context: int
    shared: int
    budget: int | None
    alpha: float
    gamma: int
    speedup: float
    fits: bool
    largest_batch: int
    break_even_context: int | None
    break_even_limit: int | None
    tokens_per_second: float
    plain_tokens_per_second: float
    t_target_ms: float
    t_draft_ms: float
    t_verify_ms: float
    t_choose_ms: float
    draft_row_read_bytes: float
    draft_read_bytes: float
    weight_bytes: float
    kv_bytes: float
    draft_bytes: float
    memory_bytes: float
    usable_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """A target, its drafter, and their devices.

    draft: `self`: the target drafts, with matrices of its own where `drafter.weights` is another format. policy: one of
    POLICY_COSTS. alpha: acceptance; None: estimated by `expected_alpha`, as if drafts multiplied by exact weights.
    Drafts that read pages of the target read its KV format; their caches, and a draft model's KV, are dense.
    """

    model: str
    draft: str
    target: PlacedModel
    drafter: PlacedModel
    policy: str
    alpha: float | None

    @property
    def costs(self) -> PolicyCosts:
        return POLICY_COSTS[self.policy].stored(self.target.kv_format)

    def expected_alpha(self, budget: int | None, context: int) -> float:
        if self.alpha is not None:
            return self.alpha
        kv_format = self._reading_drafter(budget).kv_format
        return expected_alpha(self.policy, budget, context, draft_model=self.has_draft_model, kv_format=kv_format)

    @property
    def has_draft_model(self) -> bool:
        return self.draft != "self"

    def forecast(
        self, batch: int, context: int, *, budgets: tuple[int | None, ...], gamma: int | None, shared: int = 0
    ) -> Forecast:
        """Forecast one (batch, context) with the best of `budgets`. gamma: None: the best. shared: see Forecast.

        Raises ForecastError for a context that the target does not support, or that is shorter than what is shared, for
        a budget or drafter that the policy does not allow, and for what sliding layers exclude.
        """
        self._check(budgets)
        if context > self.target.model.max_model_len:
            raise ForecastError(f"{self.model} is made for {self.target.model.max_model_len} tokens, not {context}")
        if shared > context:
            raise ForecastError(f"a context of {context} tokens cannot begin with {shared} shared ones")
        speed, budget, chosen = max(
            (self._speed(batch, context, budget, shared, gamma) for budget in budgets),
            key=lambda found: found[0],
        )
        speculation, kept = self._cost(budget, shared), self._keeping(budget)
        alpha = self.expected_alpha(budget, context)
        limit = speculation.break_even_limit(chosen, alpha)
        t_target = speculation.target_seconds(batch, context)
        weights, kv, draft_weights, draft_kv = kept._memory(context, budget, chosen)
        shared_kv, shared_draft_kv = kept._shared_bytes(budget, shared)
        kv, draft_kv = kv - shared_kv, draft_kv - shared_draft_kv  # of one row alone
        usable = USABLE_MEMORY * self.target.device.memory
        windows = kept._windows(context, chosen, shared)
        free = usable - weights - draft_weights - shared_kv - shared_draft_kv
        largest = max(0, *(int((free - fixed) // (kv + draft_kv + row)) for fixed, row in windows))
        kv_bytes, draft_bytes = shared_kv + batch * kv, draft_weights + shared_draft_kv + batch * draft_kv
        kv_bytes += min(fixed + batch * row for fixed, row in windows)
        return Forecast(
            model=self.model,
            draft=self.draft,
            weights=self.target.weights,
            draft_weights=self.drafter.weights,
            kv_format=self.target.kv_format,
            gpu=self.target.device.name,
            tensor_parallel=self.target.ranks,
            policy=self.policy,
            batch=batch,
            context=context,
            shared=shared,
            budget=budget,
            alpha=alpha,
            gamma=chosen,
            speedup=speed,
            fits=batch <= largest,
            largest_batch=largest,
            break_even_context=speculation.break_even(batch, lambda length: self.expected_alpha(budget, length), gamma),
            break_even_limit=None if math.isinf(limit) else math.ceil(limit),
            tokens_per_second=speed * batch / t_target,
            plain_tokens_per_second=batch / t_target,
            t_target_ms=1e3 * t_target,
            t_draft_ms=1e3 * speculation.draft_seconds(batch, context),
            t_verify_ms=1e3 * speculation.verify_seconds(batch, context, chosen),
            t_choose_ms=1e3 * speculation.choosing_seconds(batch, context, chosen),
            draft_row_read_bytes=speculation.draft_row_bytes(context),
            draft_read_bytes=speculation.draft_bytes(batch, context),
            weight_bytes=weights,
            kv_bytes=kv_bytes,
            draft_bytes=draft_bytes,
            memory_bytes=weights + kv_bytes + draft_bytes,
            usable_bytes=usable,
        )

    def _check(self, budgets: tuple[int | None, ...]) -> None:
        """Raise ForecastError for what a server refuses."""
        try:
            for each in budgets:
                self.costs.check(each, self._drafter_name)
        except ValueError as error:
            raise ForecastError(str(error)) from None
        drafting = self.drafter.model if self.has_draft_model else self.target.model
        if self.has_draft_model and drafting.mixes_layers:
            raise ForecastError(f"some layers of {self.draft} slide, which is not served in a draft model")
        if self.policy == "verified" and drafting.all_slide:
            name = self.draft if self.has_draft_model else self.model
            raise ForecastError(f"all layers of {name} slide, so that no pass sees all keys")

    def _keeping(self, budget: int | None) -> Deployment:
        """Return the deployment with the KV that is kept where all layers slide."""
        keeps = self._speculation(budget).needs_all_kv(self.target.kv_format)
        target = replace(self.target, model=replace(self.target.model, keeps_all_kv=keeps))
        drafts = replace(self.drafter.model, keeps_all_kv=keeps or self.has_draft_model)
        return replace(self, target=target, drafter=replace(self.drafter, model=drafts))

    @property
    def _drafter_name(self) -> DrafterName:
        return "model" if self.has_draft_model else "self"

    def _reading_drafter(self, budget: int | None) -> PlacedModel:
        """Return the drafter with the format of the KV that it reads."""
        kv_format = self.target.kv_format
        if self.has_draft_model:
            kv_format = "dense"
        elif budget is not None and not self.costs.is_view:
            kv_format = KV_BITS[kv_format].written  # a cache of copies
        return replace(self.drafter, drafts=True, kv_format=kv_format)

    def _cost(self, budget: int | None, shared: int) -> SpeculationCost:
        # A view of the target's KV reads the target's own pages, and a draft that reads everything has pages
        # beside them; all other drafts have a cache for each row. Where all layers slide, a pass takes as long whether
        # they keep all KV or not.
        target, draft = (
            replace(each, model=replace(each.model, keeps_all_kv=True))
            for each in (self.target, self._reading_drafter(budget))
        )
        return SpeculationCost(
            target=target,
            draft=draft,
            budget=None if budget is None else self.costs.tokens_read(budget),
            shared=shared,
            draft_shares=budget is None or (self.costs.is_view and not self.has_draft_model),
            narrows=self.costs.fits_windows and not self.has_draft_model,
            choosing=Choosing() if budget is None else self.costs.choosing(self.drafter),
        )

    def _speed(
        self, batch: int, context: int, budget: int | None, shared: int, gamma: int | None
    ) -> tuple[float, int | None, int]:
        """Predict the speed-up. Returns speed-up, budget and gamma."""
        speculation, alpha = self._cost(budget, shared), self.expected_alpha(budget, context)
        if gamma is not None:
            return speculation.speedup(batch, context, gamma, alpha), budget, gamma
        chosen, speed = speculation.best_gamma(batch, context, alpha)
        return speed, budget, chosen

    def _memory(self, context: int, budget: int | None, gamma: int) -> tuple[float, int, float, int]:
        """Compute bytes on the rank that holds the most: the target's weights, its KV per row without sliding layers,
        the draft's own weights (of the target as draft: matrices of another format), and the draft's own KV per row.

        A row owns gamma + 1 slots beyond its context. A draft model keeps KV of the whole context if it reads all of
        it, or chooses from it. What else a draft keeps of a row follows from the policy.
        """
        target, draft, tokens = self.target, self.drafter, context + gamma + 1
        weights = rank_weight_bytes(target.model, target.ranks, target.element_bytes, target.weights)
        draft_weights = 0.0
        if self.has_draft_model:
            draft_weights = rank_weight_bytes(draft.model, draft.ranks, draft.element_bytes, draft.weights)
        elif draft.weights != target.weights:
            draft_weights = rank_matrix_bytes(draft.model, draft.ranks, draft.element_bytes, draft.weights)
        kept = KVState() if budget is None else self.costs.state(budget, gamma, self._drafter_name)
        layers = len(draft.model.attention_groups[0])
        queries = kept.queries * layers * draft.model.head_dim * draft.element_bytes
        own = self._reading_drafter(budget).kv_bytes(kept.pages) + queries * -(-draft.model.num_heads // draft.ranks)
        kv = target.kv_bytes(tokens) + target.exact_page_bytes
        return weights, kv, draft_weights, own + self._draft_page_bytes(budget, tokens)

    def _speculation(self, budget: int | None) -> SpeculationConfig:
        """Return the settings of a server that drafts like this. budget: None: all KV."""
        kv = AllConfig(policy="all") if budget is None else self.costs.settings(budget)
        return SpeculationConfig(drafter=self._drafter_name, model=self.draft if self.has_draft_model else None, kv=kv)

    def _draft_page_bytes(self, budget: int | None, tokens: int) -> int:
        """Compute the bytes that drafts keep of a row's pages on the rank that holds the most: their KV, if the target
        does not have it, and their summaries."""
        dense = self.drafter.dense_kv_bytes(tokens)
        own = dense if self._speculation(budget).has_draft_pages else 0
        kept = KVState() if budget is None else self.costs.state(budget, 1, self._drafter_name)
        return own + -(-kept.summaries * dense // (2 * self.costs.page_size))  # a key is half of the KV

    def _windows(self, context: int, gamma: int, shared: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Compute bytes of the KV of sliding layers on the rank that holds the most: the lower of two sums, each of
        bytes for all rows together and bytes per row.

        No more is kept than of other layers; and of each row at most the pages of a window, beside the tokens that a
        round computes of prompts.
        """
        target, page = self.target, self.costs.page_size
        size = target.window_bytes(1)
        window = page * window_pages_per_row(target.window, gamma, page)
        return (size * shared, size * (context + gamma + 1 - shared)), (size * CHUNK, size * window)

    def _shared_bytes(self, budget: int | None, shared: int) -> tuple[int, int]:
        """Compute bytes of the shared tokens on the rank that holds the most: of the target, and of the draft."""
        return self.target.kv_bytes(shared), self._draft_page_bytes(budget, shared)


def default_efficiency(gpu: str) -> Efficiency:
    """Return the efficiency of a device in the absence of a better one."""
    return REFERENCE_ON_CPU if gpu == "cpu" else PUBLISHED


def deploy(
    *,
    model: str,
    draft: str,
    gpu: str,
    ranks: int,
    policy: str,
    dtype: str,
    alpha: float | None,
    weights: str = "dense",
    draft_weights: str | None = None,
    kv_format: str = "dense",
    efficiency: Efficiency | None = None,
) -> Deployment:
    """Describe a deployment by names.

    model, draft: names in models.shapes.SHAPES or directories; a draft may be `self`. gpu: one of hardware.NAMES.
    policy: one of POLICY_COSTS. A draft model is split over at most as many ranks as it has query heads. weights:
    format of the target's matrices. draft_weights: the same of drafts; None: the target's, or dense of a draft model.
    kv_format: of the target's KV, see kernels.kv.kv_bits. efficiency: None: `default_efficiency`.
    Raises ModelError, UnknownDevice, and ForecastError for more ranks than the target has query heads, and for a format
    of experts where there are none.
    """
    shape, device = find_shape(model), find_device(gpu, ranks)
    if not 1 <= ranks <= shape.num_heads:
        raise ForecastError(f"{model} has {shape.num_heads} query heads, which cannot be split over {ranks} ranks")
    if shape.experts is None and {weights, draft_weights} & EXPERTS_ALONE:
        raise ForecastError(f"{model} has no experts, whose format {', '.join(EXPERTS_ALONE)} is")
    if dtype == "float32" and gpu != "cpu":
        device = replace(device, flops=device.flops / 2, fp8_flops=None)  # TF32
    target = PlacedModel(
        model=shape,
        device=device,
        ranks=ranks,
        element_bytes=ELEMENT_BYTES[dtype],
        efficiency=efficiency or default_efficiency(gpu),
        weights=weights,
        kv_format=kv_format,
    )
    if draft == "self":
        drafter = replace(target, weights=draft_weights or weights)
    else:
        small = find_shape(draft)
        drafter = replace(target, model=small, ranks=min(ranks, small.num_heads), weights=draft_weights or "dense")
    return Deployment(model=model, draft=draft, target=target, drafter=drafter, policy=policy, alpha=alpha)
