"""Rules of thumb for acceptance that was not measured. For planning only."""

from __future__ import annotations

import math
from bisect import bisect_right

from kernels.kv.kv_bits import KV_BITS
from planner.policy_costs import POLICY_COSTS

_CONTEXTS = (4000, 8000, 16000, 32000, 64000, 100000)
_ALPHAS = (0.84, 0.83, 0.82, 0.81, 0.79, 0.79)
"""Acceptance by context of sink + window with a budget of 512 and the target's own weights: Llama-3.1-8B on PG-19, as
published by MagicDec (arXiv 2408.11049)."""
_BUDGET = 512
_BUDGET_EXPONENT = 0.5
"""Rejections fall with this power of the budget. docs/benchmarks.md has 0.8 for the default model, but on repetitive
text; this value is lower to allow for that."""
DRAFT_MODEL = 0.75
"""Upper bound of the acceptance of a small draft model, whatever KV it reads. Fitted to the published speed-ups of
TinyLlama-1.1B for Llama-2-7B (bench/paper/published.py); other pairs can differ widely."""
DRAFT_CODES = 0.9
"""Upper bound of the acceptance of drafts that read fewer bits of the KV than the target. QuantSpec (arXiv
2502.10424, abstract) published "> 90 %" for drafts that read all KV in 4 bits, and weights of 4 bits."""


def expected_alpha(
    policy: str,
    budget: int | None,
    context: int,
    *,
    draft_model: bool,
    ceiling: float = DRAFT_MODEL,
    kv_format: str = "dense",
) -> float:
    """Estimate the probability that the target accepts a drafted token, given that it accepted those before.

    policy: one of POLICY_COSTS. budget: KV tokens that the policy may choose; None or at least `context`: the draft
    reads what the target reads. draft_model: whether the draft has weights of its own. The estimate is then the lower
    of two: `ceiling`, the acceptance of a draft model that reads everything, and that of the target's weights at this
    budget. kv_format: of the KV that drafts read. If they read fewer bits of it, the estimate is at most DRAFT_CODES.
    """
    codes = 1.0 if KV_BITS[kv_format].draft_bits is None else DRAFT_CODES
    upper = min(ceiling if draft_model else 1.0, codes)
    if budget is None or budget >= context:
        return upper
    rejections = (1 - _published(context)) * math.pow(_BUDGET / budget, _BUDGET_EXPONENT)
    rejections *= POLICY_COSTS[policy].rejections
    return min(upper, max(0.0, 1 - rejections))


def _published(context: int) -> float:
    """Interpolate _ALPHAS at `context`, linearly in its logarithm. Beyond the ends, the end values apply."""
    if context <= _CONTEXTS[0]:
        return _ALPHAS[0]
    if context >= _CONTEXTS[-1]:
        return _ALPHAS[-1]
    i = bisect_right(_CONTEXTS, context)
    low, high = _CONTEXTS[i - 1], _CONTEXTS[i]
    along = math.log(context / low) / math.log(high / low)
    return _ALPHAS[i - 1] + along * (_ALPHAS[i] - _ALPHAS[i - 1])
