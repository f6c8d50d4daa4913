"""Forecast speculation on hardware that need not be present: speed, the best gamma and budget, memory.

Uses shapes, data sheets and the cost model; free of torch, and loads no weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from engine.config.kv import DrafterName, KVState, SnapKVConfig, WindowConfig
from engine.config.speculation import SpeculationConfig
from models.shapes import find_shape, rank_kv_token_bytes, rank_weight_bytes
from planner.cost_model import PUBLISHED, REFERENCE_ON_CPU, Efficiency, PlacedModel, SpeculationCost
from planner.expected_acceptance import Policy, expected_alpha
from planner.hardware import find_device

BUDGETS = (512, 128, 256, 1024, 2048)
"""Budgets to try if none is given. Ties go to the first."""
USABLE_MEMORY = 0.9
"""Fraction of a device's memory for weights and KV; the rest is for activations, workspaces and the driver."""
ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


class ForecastError(ValueError):
    """The deployment is impossible; the message names the reason."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Forecast of one (batch, context). Times in milliseconds, memory in bytes of one device.

    shared: number of first tokens that are the same in every context. budget: KV tokens that a draft step reads; None:
    all. t_target_ms: a plain step. t_draft_ms: one draft step. t_verify_ms: the verify pass. kv_bytes: the target's KV
    of the whole batch. draft_bytes: weights and KV that only the draft has. All bytes count shared tokens once.
    largest_batch: the largest that fits at this context. break_even_context: shortest context at which drafting is
    faster at this batch and budget; None: never. break_even_limit: the same for large batches, at this gamma and alpha;
    None: never.
    """

    model: str
    draft: str
    gpu: str
    tensor_parallel: int
    policy: Policy
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
    weight_bytes: float
    kv_bytes: float
    draft_bytes: float
    memory_bytes: float
    usable_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """A target, its drafter, and their devices. alpha: acceptance; None: estimated by `expected_alpha`."""

    model: str
    draft: str
    target: PlacedModel
    drafter: PlacedModel
    policy: Policy
    alpha: float | None

    def expected_alpha(self, budget: int | None, context: int) -> float:
        if self.alpha is not None:
            return self.alpha
        return expected_alpha(self.policy, budget, context, draft_model=self.has_own_weights)

    @property
    def has_own_weights(self) -> bool:
        return self.drafter is not self.target

    def forecast(
        self, batch: int, context: int, *, budgets: tuple[int | None, ...], gamma: int | None, shared: int = 0
    ) -> Forecast:
        """Forecast one (batch, context) with the best of `budgets`. gamma: None: the best. shared: see Forecast.

        Raises ForecastError for a context that the target does not support, or that is shorter than what is shared.
        """
        if context > self.target.model.max_model_len:
            raise ForecastError(f"{self.model} is made for {self.target.model.max_model_len} tokens, not {context}")
        if shared > context:
            raise ForecastError(f"a context of {context} tokens cannot begin with {shared} shared ones")
        speed, budget, chosen = max(
            (self._speed(batch, context, self._cost(budget, shared), gamma) for budget in budgets),
            key=lambda found: found[0],
        )
        speculation = self._cost(budget, shared)
        alpha = self.expected_alpha(budget, context)
        limit = speculation.break_even_limit(chosen, alpha)
        t_target = speculation.target_seconds(batch, context)
        weights, kv, draft_weights, draft_kv = self._memory(context, budget, chosen)
        shared_kv, shared_draft_kv = self._shared_bytes(budget, shared)
        kv, draft_kv = kv - shared_kv, draft_kv - shared_draft_kv  # of one row alone
        usable = USABLE_MEMORY * self.target.device.memory
        free = usable - weights - draft_weights - shared_kv - shared_draft_kv
        largest = max(0, int(free // (kv + draft_kv)))
        kv_bytes, draft_bytes = shared_kv + batch * kv, draft_weights + shared_draft_kv + batch * draft_kv
        return Forecast(
            model=self.model,
            draft=self.draft,
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
            weight_bytes=weights,
            kv_bytes=kv_bytes,
            draft_bytes=draft_bytes,
            memory_bytes=weights + kv_bytes + draft_bytes,
            usable_bytes=usable,
        )

    def _cost(self, budget: int | None, shared: int) -> SpeculationCost:
        # Sink + window with the target's weights reads the target's own pages, and a draft that reads everything has
        # pages beside them; all other drafts have a cache for each row.
        shares = budget is None or (self.policy == "window" and not self.has_own_weights)
        return SpeculationCost(
            target=self.target, draft=self.drafter, budget=budget, shared=shared, draft_shares=shares
        )

    def _speed(
        self, batch: int, context: int, speculation: SpeculationCost, gamma: int | None
    ) -> tuple[float, int | None, int]:
        """Predict the speed-up. Returns speed-up, budget and gamma."""
        budget = speculation.budget
        alpha = self.expected_alpha(budget, context)
        if gamma is not None:
            return speculation.speedup(batch, context, gamma, alpha), budget, gamma
        chosen, speed = speculation.best_gamma(batch, context, alpha)
        return speed, budget, chosen

    def _memory(self, context: int, budget: int | None, gamma: int) -> tuple[float, int, float, int]:
        """Compute bytes on the rank that holds the most: the target's weights, its KV per row, the draft's own weights,
        and the draft's own KV per row.

        A row owns gamma + 1 slots beyond its context. Sink + window with the target's weights reads the target's KV. A
        draft model keeps KV of the whole context if it reads all of it, or selects from it (SnapKV). `_footprint`
        covers the remaining cases.
        """
        target, draft, slots = self.target, self.drafter, gamma + 1
        weights = rank_weight_bytes(target.model, target.ranks, target.element_bytes)
        kv = (context + slots) * rank_kv_token_bytes(target.model, target.ranks, target.element_bytes)
        if not self.has_own_weights and self.policy == "window":
            return weights, kv, 0.0, 0
        draft_weights = (
            rank_weight_bytes(draft.model, draft.ranks, draft.element_bytes) if self.has_own_weights else 0.0
        )
        kept = KVState() if budget is None else self._footprint(budget, gamma)
        tokens = kept.pages
        if self._keeps_context(budget):
            tokens += context + slots
        queries = kept.queries * draft.model.num_layers * draft.model.head_dim * draft.element_bytes
        own = tokens * rank_kv_token_bytes(draft.model, draft.ranks, draft.element_bytes)
        return weights, kv, draft_weights, own + queries * -(-draft.model.num_heads // draft.ranks)

    def _keeps_context(self, budget: int | None) -> bool:
        """Whether the draft keeps KV of its own for the whole context, in pages beside the target's."""
        return self.has_own_weights and (budget is None or self.policy == "snapkv")

    def _shared_bytes(self, budget: int | None, shared: int) -> tuple[int, int]:
        """Compute bytes of the shared tokens on the rank that holds the most: of the target, and of the draft."""
        target, draft = self.target, self.drafter
        kept = shared * rank_kv_token_bytes(target.model, target.ranks, target.element_bytes)
        if not self._keeps_context(budget):
            return kept, 0
        return kept, shared * rank_kv_token_bytes(draft.model, draft.ranks, draft.element_bytes)

    def _footprint(self, budget: int, gamma: int) -> KVState:
        """Compute the draft's own KV per row, in pages of one token."""
        kv = WindowConfig(budget=budget) if self.policy == "window" else SnapKVConfig(policy="snapkv", budget=budget)
        drafter: DrafterName = "model" if self.has_own_weights else "self"
        return SpeculationConfig(drafter=drafter, gamma=max(1, gamma), kv=kv).kv_state(1)


def default_efficiency(gpu: str) -> Efficiency:
    """Return the efficiency of a device in the absence of a better one."""
    return REFERENCE_ON_CPU if gpu == "cpu" else PUBLISHED


def deploy(
    *,
    model: str,
    draft: str,
    gpu: str,
    ranks: int,
    policy: Policy,
    dtype: str,
    alpha: float | None,
    efficiency: Efficiency | None = None,
) -> Deployment:
    """Describe a deployment by names.

    model, draft: names in models.shapes.SHAPES or directories; a draft may be `self`. gpu: one of hardware.NAMES. A
    draft model is split over at most as many ranks as it has query heads. efficiency: None: `default_efficiency`.
    Raises ModelError, UnknownDevice, and ForecastError for more ranks than the target has query heads.
    """
    shape, device = find_shape(model), find_device(gpu, ranks)
    if not 1 <= ranks <= shape.num_heads:
        raise ForecastError(f"{model} has {shape.num_heads} query heads, which cannot be split over {ranks} ranks")
    if dtype == "float32" and gpu != "cpu":
        device = replace(device, flops=device.flops / 2)  # TF32
    target = PlacedModel(
        model=shape,
        device=device,
        ranks=ranks,
        element_bytes=ELEMENT_BYTES[dtype],
        efficiency=efficiency or default_efficiency(gpu),
    )
    drafter = target
    if draft != "self":
        small = find_shape(draft)
        drafter = replace(target, model=small, ranks=min(ranks, small.num_heads))
    return Deployment(model=model, draft=draft, target=target, drafter=drafter, policy=policy, alpha=alpha)
