"""Terms on which Vegas (arXiv 2602.07223) compared ways to speculate, and its numbers beside ours.

Published: Qwen3 on one H100 with 94 GB, about 10,000 tokens of context, at most 128 rows, temperature 0.6, γ = 6.
`python -m bench.gpu --terms vegas` measures on these terms, `magicdec plan --terms vegas` predicts. Ours differ:

- Published runs are closed loops inside vLLM: requests of different lengths that grow, end, and give way to others,
  whose prefill takes time too. Ours are rounds of equal rows at one context, without scheduling and prefill.
- Acceptance there comes from AIME25. Here drafts are accepted at random, with the published mean of tokens per round,
  since weights are random; that mean is taken for both models.
- As many rows run as fit at the full context; rows that are still short make room for more.
- The budget of sink + window is not stated; ours is that of Vegas, 7 % of the context and at least 256.
- `chosen` reads as many keys as `window`, with the tokens per round that chosen ones brought. Choosing itself is not in
  it: 5.9 % of a published round.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from planner.cost_model import CAPTURED, PUBLISHED, Efficiency, acceptance_for
from planner.forecast import deploy

_FILE = Path(__file__).parent / "published_vegas.csv"
_COLUMNS = {"window": "magicdec_window", "chosen": "vegas"}
"""Column of the published table by the keys that drafts read."""
_PAGE = 16


@dataclass(frozen=True, slots=True)
class Terms:
    """tokens: mean tokens of a row per round, accepted ones and one more, by the keys that drafts read."""

    shapes: tuple[str, ...]
    context: int
    max_rows: int
    gamma: int
    temperature: float
    tokens: Mapping[str, float]


TERMS = {
    "vegas": Terms(
        shapes=("qwen3-8b", "qwen3-4b"),
        context=10_000,
        max_rows=128,
        gamma=6,
        temperature=0.6,
        tokens={"window": 4.92, "chosen": 6.24},
    )
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
    """One way to draft, measured or predicted. keys: those that drafts read, `window` or `chosen`. Times in
    milliseconds."""

    shape: str
    rows: int
    context: int
    keys: str
    tokens_per_round: float
    plain_tokens_per_second: float
    tokens_per_second: float
    t_target_ms: float
    t_draft_ms: float
    t_verify_ms: float

    @property
    def speedup(self) -> float:
        return self.tokens_per_second / self.plain_tokens_per_second


def terms_budget(context: int) -> int:
    """Return the KV tokens that a draft step reads, in whole pages."""
    return _PAGE * math.ceil(max(256, 0.07 * context) / _PAGE)


def read_published() -> dict[str, dict[str, float]]:
    """Read the published tokens/s at about 10,000 tokens of context, by model and column."""
    lines = _FILE.read_text(encoding="utf-8").splitlines()
    rows = csv.DictReader(line for line in lines if not line.startswith("#"))
    return {
        row["model"]: {name: float(row[name]) for name in ("vllm", *_COLUMNS.values())}
        for row in rows
        if row["setting"] == "AIME25"
    }


def predict(terms: Terms, gpu: str, efficiency: Efficiency, rows: int | None = None) -> list[TermsLine]:
    """Predict all lines for one GPU. rows: even if they do not fit; None: as many as fit. Raises UnknownDevice."""
    lines = []
    budgets = (terms_budget(terms.context),)
    for shape in terms.shapes:
        for keys, tokens in terms.tokens.items():
            alpha = acceptance_for(terms.gamma, tokens)
            deployment = deploy(
                model=shape,
                draft="self",
                gpu=gpu,
                ranks=1,
                policy="window",
                dtype="bfloat16",
                alpha=alpha,
                efficiency=efficiency,
            )
            largest = deployment.forecast(1, terms.context, budgets=budgets, gamma=terms.gamma).largest_batch
            count = min(terms.max_rows, max(1, largest)) if rows is None else rows
            found = deployment.forecast(count, terms.context, budgets=budgets, gamma=terms.gamma)
            lines.append(
                TermsLine(
                    shape=shape,
                    rows=count,
                    context=terms.context,
                    keys=keys,
                    tokens_per_round=tokens,
                    plain_tokens_per_second=found.plain_tokens_per_second,
                    tokens_per_second=found.tokens_per_second,
                    t_target_ms=found.t_target_ms,
                    t_draft_ms=found.t_draft_ms,
                    t_verify_ms=found.t_verify_ms,
                )
            )
    return lines


def table(lines: Sequence[TermsLine]) -> str:
    """Format lines as a text table, with published numbers and goals. Each shape begins with plain decoding."""
    head = ("shape", "rows", "context", "keys", "tok/round", "T_T ms", "T_D ms", "T_V ms", "tok/s", "x plain")
    cells: tuple[object, ...]
    text = [_format(*head, "theirs", "x theirs", "goal")]
    published, before = read_published(), None
    for line in lines:
        theirs = published.get(line.shape, {})
        plain = theirs.get("vllm")
        if (place := (line.shape, line.rows, line.context)) != before:
            goal = None if plain is None else _goal(line.plain_tokens_per_second, plain, ".0f")
            cells = (*place, "plain", "1.00", f"{line.t_target_ms:.2f}", "-", "-")
            text.append(
                _format(*cells, f"{line.plain_tokens_per_second:.0f}", "1.00", plain, 1.0 if plain else None, goal)
            )
            before = place
        speed = theirs.get(_COLUMNS[line.keys])
        ratio = None if speed is None or plain is None else speed / plain
        goal = None if ratio is None or line.keys != "window" else _goal(line.speedup, ratio, ".2f")
        times = (f"{each:.2f}" for each in (line.t_target_ms, line.t_draft_ms, line.t_verify_ms))
        cells = (*place, line.keys, f"{line.tokens_per_round:.2f}", *times)
        text.append(_format(*cells, f"{line.tokens_per_second:.0f}", f"{line.speedup:.2f}", speed, ratio, goal))
    return "\n".join(text)


def _goal(ours: float, theirs: float, digits: str) -> str:
    """Say whether the goal is reached, to as many digits as it is printed with."""
    said = f"{theirs:{digits}}"
    return f">= {said}: {'reached' if float(f'{ours:{digits}}') >= float(said) else 'not reached'}"


def _format(*cells: object) -> str:
    *rest, speed, ratio, goal = cells
    shown = [*rest, f"{speed:.0f}" if isinstance(speed, float) else speed or "-"]
    shown.append(f"{ratio:.2f}" if isinstance(ratio, float) else ratio or "-")
    return "".join(f"{cell:>10}" for cell in shown) + f"  {goal or '-'}"
