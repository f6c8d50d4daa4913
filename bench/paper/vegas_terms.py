"""Terms on which Vegas (arXiv 2602.07223) compared ways to speculate, and its numbers beside ours.

Published: Qwen3 and gpt-oss-20b on one H100 with 94 GB, about 10,000 tokens of context, at most 128 rows, temperature
0.6, γ = 6 (`vegas`); and with about 100,000 tokens, one GPU for prefill and one for decoding (`vegas-long`).
`python -m bench.gpu --terms vegas` measures on the first terms, with the dense models of Qwen3, `magicdec plan --terms`
predicts. Ours differ:

- Published runs are closed loops inside vLLM: requests of different lengths that grow, end, and give way to others,
  whose prefill takes time too. Ours are rounds of equal rows at one context, without scheduling and prefill.
- Acceptance there comes from AIME25. Here drafts are accepted at random, with the published mean of tokens per round,
  since weights are random. That mean is of Qwen3-8B, and is taken for all models and both contexts.
- As many rows run as fit at the full context; rows that are still short make room for more.
- The budgets of sink + window and of Quest are not stated; ours are that of Vegas, 7 % of the context and at least 256.
  The policies that choose, `verified` and `quest`, read the first page and the newest tokens in addition.
- Choosing took 5.9 % of a published round of Vegas. Rounds that are measured here have all of it, predictions only what
  the bytes take that it moves (planner.policy_costs).
- Published Quest chooses in every draft step; ours in the first of a round and again every four steps.
- gpt-oss-20b has experts of 4 bits as published (mxfp4), all else is of 16 bits. Served, they have codes of 8.
- 100,000 tokens are more than Qwen3 states in its files; the published runs must have stretched its positions.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from planner.cost_model import acceptance_for
from planner.forecast import Deployment, deploy
from planner.placed_model import CAPTURED, PUBLISHED, Efficiency
from planner.policy_costs import PAGE_SIZE, PUBLISHED_GAMMA, PUBLISHED_TOKENS

_FILE = Path(__file__).parent / "published_vegas.csv"
_COLUMNS = {"window": "magicdec_window", "verified": "vegas", "quest": "quest"}
"""Column of the published table by KV policy."""
_SHORT = "AIME25"
_FORECASTS = {"qwen3-8b": "dense", "qwen3-4b": "dense", "qwen3-30b-a3b": "dense", "gpt-oss-20b": "mxfp4"}
_NOTES = {
    "quest": "quest: its engine replays no forward from CUDA graphs, plain ones neither; predictions do not know that"
}
"""What the numbers of a KV policy do not tell."""


@dataclass(frozen=True, slots=True)
class Terms:
    """setting: name of the terms in the published table. shapes: those that can be measured. forecasts: weight formats
    of those that are predicted. tokens: mean tokens of a row per round, accepted ones and one more, by KV policy."""

    setting: str
    shapes: tuple[str, ...]
    forecasts: Mapping[str, str]
    context: int
    max_rows: int
    gamma: int
    temperature: float
    tokens: Mapping[str, float]


TERMS = {
    "vegas": Terms(
        setting=_SHORT,
        shapes=("qwen3-8b", "qwen3-4b"),
        forecasts=_FORECASTS,
        context=10_000,
        max_rows=128,
        gamma=PUBLISHED_GAMMA,
        temperature=0.6,
        tokens=PUBLISHED_TOKENS,
    ),
    "vegas-long": Terms(
        setting="long",
        shapes=(),
        forecasts=_FORECASTS,
        context=100_000,
        max_rows=128,
        gamma=PUBLISHED_GAMMA,
        temperature=0.6,
        tokens={policy: tokens for policy, tokens in PUBLISHED_TOKENS.items() if policy != "quest"},
    ),
}


EFFICIENCIES = {
    "as fitted to published runs on eight GPUs": PUBLISHED,
    "forwards replayed from graphs (assumed: 0.02 ms per layer)": CAPTURED,
    "the same, and attention of a verify pass as fast as a plain step's (assumed: not 1.4 times its time)": replace(
        CAPTURED, verify_attention=1.0
    ),
}
"""Assumptions of predictions, by description. None was measured on one GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TermsLine:
    """One way to draft, measured or predicted. Times in milliseconds.

    t_choose_ms: choosing in a round what drafts read; None: the other times include it.
    """

    shape: str
    rows: int
    context: int
    policy: str
    tokens_per_round: float
    plain_tokens_per_second: float
    tokens_per_second: float
    t_target_ms: float
    t_draft_ms: float
    t_verify_ms: float
    t_choose_ms: float | None

    @property
    def speedup(self) -> float:
        return self.tokens_per_second / self.plain_tokens_per_second


def terms_budget(context: int) -> int:
    """Return the KV tokens that a draft step reads, in whole pages."""
    return PAGE_SIZE * math.ceil(max(256, 0.07 * context) / PAGE_SIZE)


def read_published(setting: str = _SHORT) -> dict[str, dict[str, float]]:
    """Read the published tokens/s, by model and column."""
    lines = _FILE.read_text(encoding="utf-8").splitlines()
    rows = csv.DictReader(line for line in lines if not line.startswith("#"))
    return {
        row["model"]: {name: float(row[name]) for name in ("vllm", *_COLUMNS.values()) if row[name]}
        for row in rows
        if row["setting"] == setting
    }


def predict(terms: Terms, gpu: str, efficiency: Efficiency, rows: int | None = None) -> list[TermsLine]:
    """Predict all lines for one GPU. rows: even if they do not fit; None: as many as fit. Raises UnknownDevice."""
    lines = []
    budgets = (terms_budget(terms.context),)
    for shape, weights in terms.forecasts.items():
        for policy, tokens in terms.tokens.items():
            alpha = acceptance_for(terms.gamma, tokens)
            deployment = _stretch(
                deploy(
                    model=shape,
                    draft="self",
                    gpu=gpu,
                    ranks=1,
                    policy=policy,
                    dtype="bfloat16",
                    alpha=alpha,
                    weights=weights,
                    efficiency=efficiency,
                ),
                terms.context,
            )
            largest = deployment.forecast(1, terms.context, budgets=budgets, gamma=terms.gamma).largest_batch
            count = min(terms.max_rows, max(1, largest)) if rows is None else rows
            found = deployment.forecast(count, terms.context, budgets=budgets, gamma=terms.gamma)
            lines.append(
                TermsLine(
                    shape=shape,
                    rows=count,
                    context=terms.context,
                    policy=policy,
                    tokens_per_round=tokens,
                    plain_tokens_per_second=found.plain_tokens_per_second,
                    tokens_per_second=found.tokens_per_second,
                    t_target_ms=found.t_target_ms,
                    t_draft_ms=found.t_draft_ms,
                    t_verify_ms=found.t_verify_ms,
                    t_choose_ms=found.t_choose_ms,
                )
            )
    return lines


def _stretch(deployment: Deployment, context: int) -> Deployment:
    """Return a deployment whose target, which drafts too, has as many positions as a context."""
    model = deployment.target.model
    model = replace(model, max_position_embeddings=max(context, model.max_position_embeddings))
    target, drafter = (replace(each, model=model) for each in (deployment.target, deployment.drafter))
    return replace(deployment, target=target, drafter=drafter)


def table(lines: Sequence[TermsLine], setting: str = _SHORT) -> str:
    """Format lines as a text table, with published numbers, goals and notes. Each shape and number of rows begins with
    plain decoding. setting: of the published numbers. error: of plain tokens/s, and of gains over them."""
    head = ("shape", "rows", "context", "policy", "tok/round", "T_T ms", "T_D ms", "T_V ms", "choose ms", "tok/s")
    cells: tuple[object, ...]
    text = [_format(*head, "x plain", "theirs", "x theirs", "error", "goal")]
    published, before = read_published(setting), None
    for line in lines:
        theirs = published.get(line.shape, {})
        plain = theirs.get("vllm")
        if (place := (line.shape, line.rows, line.context)) != before:
            goal = None if plain is None else _goal(line.plain_tokens_per_second, plain, ".0f")
            cells = (*place, "plain", "1.00", f"{line.t_target_ms:.2f}", "-", "-", "-")
            error = _error(line.plain_tokens_per_second, plain)
            cells = (*cells, f"{line.plain_tokens_per_second:.0f}", "1.00")
            text.append(_format(*cells, plain, 1.0 if plain else None, error, goal))
            before = place
        speed = theirs.get(_COLUMNS[line.policy])
        ratio = None if speed is None or plain is None else speed / plain
        goal = None if ratio is None or line.policy != "window" else _goal(line.speedup, ratio, ".2f")
        times = (f"{each:.2f}" for each in (line.t_target_ms, line.t_draft_ms, line.t_verify_ms))
        choosing = "-" if line.t_choose_ms is None else f"{line.t_choose_ms:.2f}"
        cells = (*place, line.policy, f"{line.tokens_per_round:.2f}", *times, choosing)
        cells = (*cells, f"{line.tokens_per_second:.0f}", f"{line.speedup:.2f}")
        text.append(_format(*cells, speed, ratio, _error(line.speedup, ratio), goal))
    drawn = {line.policy for line in lines}
    return "\n".join([*text, *(note for policy, note in _NOTES.items() if policy in drawn)])


def _goal(ours: float, theirs: float, digits: str) -> str:
    """Say whether the goal is reached, to as many digits as it is printed with."""
    said = f"{theirs:{digits}}"
    return f">= {said}: {'reached' if float(f'{ours:{digits}}') >= float(said) else 'not reached'}"


def _error(ours: float, theirs: float | None) -> str | None:
    return None if theirs is None else f"{ours / theirs - 1:+.0%}"


def _format(*cells: object) -> str:
    shape, *rest, speed, ratio, error, goal = cells
    shown = [*rest, f"{speed:.0f}" if isinstance(speed, float) else speed or "-"]
    shown += [f"{ratio:.2f}" if isinstance(ratio, float) else ratio or "-", error or "-"]
    return f"{shape:>14}" + "".join(f"{cell:>10}" for cell in shown) + f"  {goal or '-'}"
