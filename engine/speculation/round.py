"""MagicDec on one screen (arXiv 2408.11049): draft with sparse KV, verify in one target pass, commit."""

from __future__ import annotations

from engine.batch.rows import Round
from engine.batch.runner import Runner
from engine.sampling.sampler import Sampler
from engine.speculation.drafters import Drafter
from engine.speculation.verify import Verdict, verify


def run_round(rows: Round, target: Runner, drafter: Drafter, sampler: Sampler) -> Verdict:
    """Draft, verify, commit. Prefill chunks ride along in the verify pass; a row with gamma = 0 decodes plainly."""
    drafted = drafter.propose(rows)  # how many tokens it placed behind each row
    logits = target.forward(rows.verify_batch(target.view))  # only positions that decide a token
    verdict = verify(drafted, logits, rows, sampler)
    rows.commit(verdict.rows)  # counters only; rejected slots are simply not counted
    sampler.observe(rows, verdict.chosen, verdict.accepted)
    drafter.observe(rows, verdict)
    return verdict
