"""MagicDec's cost model (arXiv 2408.11049, section 3): the time of a round and its expected tokens. Free of torch.

The first half takes times, measured or predicted, and computes expected tokens, speed-up and best gamma. The second
half predicts the time of one forward from shapes and data sheets:

    T(rows, Σcontext, n) = T_lin + T_att + T_comm + T_0
    T_lin  = max(2·P·rows·n / (N·F·u_f), W / (N·M·u_m))
    T_att  = max(4·L·h·d_h·Σcontext·n / (N·F·u_f), k·unique / (N'·M·u_kv)), times v where n > 1
    T_comm = 2·L·(t_ar + 2(N−1)/N·rows·n·d·bytes / link), none for N = 1
    T_0    = L·t_layer

n: query tokens per row. N: ranks, each of F FLOP/s and M bytes/s. P: parameters active for a token. W: their bytes,
which follow from the weights' format. F is the rate of 16 bits for weights of fewer, which kernels widen while they
multiply (MARLIN, arXiv 2408.11743), except for T_lin of fp8 weights where a device multiplies these (Device.fp8_flops).
L: layers, of h query heads, head dimension d_h and hidden size d. k: KV bytes per token, in the format that is read, of
which the rank with the most KV heads reads 1/N'; where pages are sealed, a row's latest tokens have those of dense KV
(PlacedModel.exact_tokens). v: Efficiency.verify_attention. t_ar: Device.all_reduce_s. unique: the tokens of Σcontext,
those that rows share counted once. One read of them serves all rows (Bifurcated attention, arXiv 2403.08845), but the
queries of every row compute with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from kernels.kv.kv_bits import KV_BITS
from models.config import ModelConfig
from models.shapes import active_parameters, matrix_bytes, rank_kv_token_bytes
from planner.hardware import Device

GAMMA_MAX = 16
"""Largest number of tokens a round drafts per row; engine.config allows no larger gamma."""
EXACT_PAGES = 2
"""Pages per row that tokens are written to where pages are sealed (engine.batch.tail_pages). Those that prompts are
written to, some MB for all rows together, are not counted."""


def expected_tokens(gamma: int, alpha: float) -> float:
    """Compute Ω(γ, α) = 1 + α + … + α^γ, the expected tokens of a row per round (Leviathan et al., arXiv 2211.17192).

    alpha: probability that a draft is accepted, given that those before it are.
    """
    return math.fsum(alpha**i for i in range(gamma + 1))


def acceptance_for(gamma: int, tokens: float) -> float:
    """Compute the acceptance α at which Ω(γ, α) is `tokens`, by bisection: the reverse of `expected_tokens`.

    Raises ValueError for tokens that no acceptance gives: they are from 1 to gamma + 1.
    """
    if not 1 <= tokens <= gamma + 1:
        raise ValueError(f"{tokens:g} tokens per round: rounds of {gamma} drafts give 1 to {gamma + 1}")
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_tokens(gamma, middle) < tokens else (low, middle)
    return high


def speedup(gamma: int, alpha: float, t_target: float, t_draft: float, t_verify: float) -> float:
    """Compute the speed-up over plain decoding, Ω·T_T / (γ·T_D + T_V). It is exactly 1 for gamma = 0.

    t_target, t_draft, t_verify: seconds of a plain step, of one draft step, and of the verify pass over gamma + 1
    tokens per row.
    """
    if gamma == 0:
        return 1.0
    return expected_tokens(gamma, alpha) * t_target / (gamma * t_draft + t_verify)


def best_gamma(
    alpha: float, t_target: float, t_draft: float, t_verify: Callable[[int], float], gamma_max: int = GAMMA_MAX
) -> tuple[int, float]:
    """Find the gamma from 0 to gamma_max with the largest speed-up. Returns both. Ties go to the smallest gamma.

    t_verify: from gamma to the seconds of a verify pass.
    """
    speeds = [speedup(gamma, alpha, t_target, t_draft, t_verify(gamma)) for gamma in range(gamma_max + 1)]
    best = max(range(gamma_max + 1), key=speeds.__getitem__)
    return best, speeds[best]


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """Fractions of a device's peak rates that a forward reaches, and fixed overheads.

    The defaults are for GPUs. Only `layer_s` is fitted (bench/paper/published.py). The others are typical values, kept
    fixed because the published ratios hardly separate them from `layer_s`.
    """

    flops: float = 0.6
    """u_f: fraction of peak FLOP/s that matrix products and attention reach."""
    weights: float = 0.8
    """u_m: fraction of peak memory bandwidth that weight reads reach."""
    kv: float = 0.8
    """u_kv: fraction of peak memory bandwidth that KV reads reach."""
    verify_attention: float = 1.4
    """v: time of attention for several queries per row, relative to one query, over the same KV."""
    layer_s: float = 0.135e-3
    """t_layer: seconds per layer that do not depend on its work: launches, waiting for other ranks, pauses."""


PUBLISHED = Efficiency()
"""Efficiency of MagicDec's published runs. Its layer_s was fitted to speed-ups on eight GPUs, where it covers what
all-reduces take beyond Device.all_reduce_s, and ranks that wait for each other. Their code compiles forwards to CUDA
graphs (torch.compile, max-autotune), so it is not the time that the host needs to launch kernels one by one."""
CAPTURED = Efficiency(layer_s=0.02e-3)
"""Efficiency assumed for forwards replayed from CUDA graphs on one GPU, where nothing of the above applies: a layer is
about ten kernels, each of which takes some 2 µs to begin and to end beside its bytes. Neither fitted nor measured."""
REFERENCE_ON_CPU = Efficiency(flops=1.0, weights=0.8, kv=0.04, verify_attention=1.1, layer_s=1e-3)
"""Efficiency of the reference attention, derived from the batches of 1 and 8 on two cores in docs/benchmarks.md. flops
is relative to float32."""


def product_seconds(tokens: float, weights: float, nbytes: float, *, flops: float, bandwidth: float) -> float:
    """Predict T_lin, the seconds of products of `tokens` inputs with so many weights, which take `nbytes`."""
    return max(2 * weights * tokens / flops, nbytes / bandwidth)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedModel:
    """One model on `ranks` devices.

    element_bytes: bytes of an element of dense weights, KV and activations. weights: format of its matrices, a key of
    kernels.weights.weight_bits.WEIGHT_BITS. kv_format: format of the KV that it reads, see kernels.kv.kv_bits. drafts:
    whether it drafts, and so reads the fewer bits that some formats have for drafts.
    """

    model: ModelConfig
    device: Device
    ranks: int
    element_bytes: int = 2
    efficiency: Efficiency = PUBLISHED
    weights: str = "dense"
    kv_format: str = "dense"
    drafts: bool = False

    def forward_seconds(self, rows: int, context_tokens: float, queries: int = 1, shared_tokens: float = 0) -> float:
        """Predict T, the seconds of a forward of `queries` tokens in each of `rows` rows.

        context_tokens: KV tokens read, summed over rows. A token counts once, however many queries read it.
        shared_tokens: those of them that need no reading, because another row has the same ones.
        """
        model, reached = self.model, self.efficiency
        linear = product_seconds(
            rows * queries,
            active_parameters(model),
            self._matrix_bytes,
            flops=self._linear_flops,
            bandwidth=self.ranks * self.device.bandwidth * reached.weights,
        )
        products = 4 * model.num_layers * model.num_heads * model.head_dim * context_tokens * queries
        reading = self.kv_seconds(self.kv_read_bytes(rows, context_tokens - shared_tokens))
        attention = max(products / self._flops, reading)
        if queries > 1:
            attention *= reached.verify_attention
        return linear + attention + self._communication(rows * queries) + model.num_layers * reached.layer_s

    def read_bytes(self, rows: int, context_tokens: float) -> float:
        """Return the bytes of weights and KV that a forward reads, on the rank with the largest share of KV. See
        kv_read_bytes."""
        return self._matrix_bytes / self.ranks + self.kv_read_bytes(rows, context_tokens)

    def kv_read_bytes(self, rows: int, context_tokens: float) -> float:
        """Return the bytes of KV that a forward reads, on the rank with the largest share.

        context_tokens: KV tokens read, summed over rows, those that rows share counted once.
        """
        exact = min(context_tokens, rows * self.exact_tokens)
        return exact * self.dense_kv_bytes(1) + (context_tokens - exact) * self._kv_token_bytes

    @property
    def exact_tokens(self) -> int:
        """Number of a row's latest tokens that are read before they are sealed, on average: half of a group, and those
        of a group more in drafts (engine.batch.tail_pages)."""
        group = KV_BITS[self.kv_format].group
        return group // 2 + group * self.drafts

    @property
    def _kv_token_bytes(self) -> int:
        """Bytes that are read of the KV of a token, unless it is exact."""
        return rank_kv_token_bytes(self.model, self.ranks, self.element_bytes, self.kv_format, drafts=self.drafts)

    def kv_bytes(self, tokens: int) -> int:
        """Return the bytes that the KV of so many tokens takes, on the rank with the largest share, without exact
        pages."""
        return tokens * rank_kv_token_bytes(self.model, self.ranks, self.element_bytes, self.kv_format)

    def dense_kv_bytes(self, tokens: int) -> int:
        """Return the bytes of dense KV of so many tokens, on the rank with the largest share."""
        return tokens * rank_kv_token_bytes(self.model, self.ranks, self.element_bytes)

    @property
    def exact_page_bytes(self) -> int:
        """Bytes of the pages that a row's tokens are written to before they are sealed, on the rank with the largest
        share."""
        return self.dense_kv_bytes(EXACT_PAGES * KV_BITS[self.kv_format].group)

    @property
    def _matrix_bytes(self) -> float:
        """Bytes of the weights that a forward reads, on all ranks together."""
        return matrix_bytes(self.model, self.element_bytes, self.weights)

    @property
    def _flops(self) -> float:
        """Effective FLOP/s of all ranks together."""
        return self.ranks * self.device.flops * self.efficiency.flops

    @property
    def _linear_flops(self) -> float:
        """The same of products with weights."""
        peak = (self.device.fp8_flops if self.weights == "fp8" else None) or self.device.flops
        return self.ranks * peak * self.efficiency.flops

    @property
    def kv_token_seconds(self) -> float:
        """Seconds to read one token's KV, unless it is exact, on the rank with the largest share of it."""
        return self.kv_seconds(self._kv_token_bytes)

    @property
    def exact_seconds(self) -> float:
        """Seconds to read a row's exact tokens, beyond those of as many others, on the rank with the largest share."""
        tokens = self.exact_tokens
        return self.kv_seconds(self.kv_read_bytes(1, tokens)) - tokens * self.kv_token_seconds

    def kv_seconds(self, nbytes: float) -> float:
        """Predict the seconds to read so many bytes of KV on one rank, or what is kept beside it."""
        return nbytes / (self.device.bandwidth * self.efficiency.kv)

    @property
    def token_seconds(self) -> float:
        """Seconds that one more token adds to a forward whose matrix products are compute-bound."""
        return 2 * active_parameters(self.model) / self._linear_flops

    def _communication(self, tokens: int) -> float:
        """Predict the seconds of two all-reduces per layer, each of one hidden state per token."""
        if self.ranks == 1:
            return 0.0
        moved = 2 * (self.ranks - 1) / self.ranks * tokens * self.model.hidden_size * self.element_bytes
        return 2 * self.model.num_layers * (self.device.all_reduce_s + moved / self.device.link)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choosing:
    """Bytes that choosing what drafts read moves, for each token of each row's context, on one rank. Kernel launches
    and sorting are not in it.

    verify_bytes: in a verify pass. draft_bytes: for each choice while drafting. interval: draft steps that read the
    same choice; the first step of a round chooses.
    """

    verify_bytes: float = 0.0
    draft_bytes: float = 0.0
    interval: int = 1

    def round_bytes(self, gamma: int) -> float:
        """Return the bytes of a round. A plain round chooses nothing."""
        return 0.0 if gamma == 0 else self.verify_bytes + -(-gamma // self.interval) * self.draft_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationCost:
    """Cost of speculation for one pair of target and draft.

    draft: the target itself, or a separate model. budget: KV tokens per row that a draft step reads;
    None: all. shared: number of first tokens of every context that are the same. draft_shares: whether a draft that
    reads whole contexts reads these once, as the target does; drafts with a cache of their own do not. A budget below
    the context leaves drafts little that they could share: the sink. choosing: see there.
    """

    target: PlacedModel
    draft: PlacedModel
    budget: int | None
    shared: int = 0
    draft_shares: bool = True
    choosing: Choosing = Choosing()

    def draft_context(self, context: int) -> int:
        """Return the number of KV tokens of a row that a draft step reads."""
        return context if self.budget is None else min(context, self.budget)

    def shared_tokens(self, rows: int, context: int) -> int:
        """Return the tokens of the contexts that need no reading, because another row has the same ones."""
        return (rows - 1) * min(self.shared, context)

    def target_seconds(self, rows: int, context: int) -> float:
        """Predict T_T, the seconds of a plain step over rows of `context` tokens each."""
        return self.verify_seconds(rows, context, 0)

    def draft_seconds(self, rows: int, context: int) -> float:
        """Predict T_D, the seconds of one draft step over rows of `context` tokens each, without choosing."""
        shared = self._draft_shared(rows, context)
        return self.draft.forward_seconds(rows, rows * self.draft_context(context), shared_tokens=shared)

    def draft_bytes(self, rows: int, context: int) -> float:
        """Return the bytes of weights and KV that one draft step reads, on the rank with the largest share of KV."""
        return self.draft.read_bytes(rows, rows * self.draft_context(context) - self._draft_shared(rows, context))

    def verify_seconds(self, rows: int, context: int, gamma: int) -> float:
        """Predict T_V, the seconds of a verify pass, without choosing. With gamma = 0 it is a plain step."""
        return self.target.forward_seconds(rows, rows * context, gamma + 1, self.shared_tokens(rows, context))

    def choosing_seconds(self, rows: int, context: int, gamma: int) -> float:
        """Predict the seconds of a round in which what drafts read is chosen. Rows share none of it."""
        return self.draft.kv_seconds(rows * context * self.choosing.round_bytes(gamma))

    def speedup(self, rows: int, context: int, gamma: int, alpha: float) -> float:
        """Predict the speed-up for rows of `context` tokens each."""
        t_target, t_draft = self.target_seconds(rows, context), self.draft_seconds(rows, context)
        return speedup(gamma, alpha, t_target, t_draft, self._beside_drafts(rows, context, gamma))

    def best_gamma(self, rows: int, context: int, alpha: float) -> tuple[int, float]:
        """Find the best gamma and its predicted speed-up."""
        t_target, t_draft = self.target_seconds(rows, context), self.draft_seconds(rows, context)
        return best_gamma(alpha, t_target, t_draft, lambda gamma: self._beside_drafts(rows, context, gamma))

    def break_even(self, rows: int, alpha: Callable[[int], float], gamma: int | None = None) -> int | None:
        """Find the shortest context at which drafting is faster, by bisection; None: at no supported context.

        alpha: from a context to its acceptance. gamma: None: the best gamma of each context.
        """

        def pays(context: int) -> bool:
            if gamma is None:
                return self.best_gamma(rows, context, alpha(context))[1] > 1
            return self.speedup(rows, context, gamma, alpha(context)) > 1

        low, high = 0, self.target.model.max_model_len
        if not pays(high):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if pays(middle) else (middle, high)
        return high

    def break_even_limit(self, gamma: int, alpha: float) -> float:
        """Compute the break-even context in tokens for large batches, where costs shared by a batch are negligible:

            S* = C + [γ·(a_D + e_D + b_D·K) + (γ + 1 − Ω)·a − e·(Ω − v) + c·C] / [b·(Ω − v) − c]

        a, b: seconds of one token's matrix products, and of reading its KV. e: seconds that a row's exact tokens take
        to read beyond those of others. a_D, b_D, e_D: the same for the draft. K: the budget. v: relative time of
        attention in a verify pass. c: seconds of choosing, for a token of a context. C: shared tokens of a context,
        whose one read is one of the costs shared by a batch. For self-speculation, v = 1, e = 0, c = 0 and C = 0 this
        is [(2γ + 1 − Ω)·a/b + γ·K] / (Ω − 1). Infinite if no context is long enough.
        """
        target, draft = self.target, self.draft
        tokens, choosing = expected_tokens(gamma, alpha), self.choosing_seconds(1, 1, gamma)
        passes = tokens - target.efficiency.verify_attention
        saved = target.kv_token_seconds * passes - choosing
        if self.budget is None or saved <= 0:
            return math.inf
        drafting = gamma * (draft.token_seconds + draft.exact_seconds + draft.kv_token_seconds * self.budget)
        verifying = (gamma + 1 - tokens) * target.token_seconds
        return self.shared + (drafting + verifying - target.exact_seconds * passes + choosing * self.shared) / saved

    def _draft_shared(self, rows: int, context: int) -> int:
        """Return the tokens that a draft step need not read, because it reads them of another row."""
        whole = self.draft_context(context) == context
        return self.shared_tokens(rows, context) if self.draft_shares and whole else 0

    def _beside_drafts(self, rows: int, context: int, gamma: int) -> float:
        """Predict the seconds of a round that are not those of draft steps."""
        return self.verify_seconds(rows, context, gamma) + self.choosing_seconds(rows, context, gamma)
