"""One round of MagicDec (arXiv 2408.11049): draft with sparse KV, verify in one target pass, commit."""

from __future__ import annotations

from engine.batch.round_batch import RoundBatch
from engine.batch.runner import Runner
from engine.sampling.sampler import Sampler
from engine.speculation.drafters import Drafter
from engine.speculation.verify import Verdict, commit, verify


def run_round(batch: RoundBatch, target: Runner, drafter: Drafter, sampler: Sampler) -> Verdict:
    """Draft, verify, commit. The verify pass includes prefill chunks; a row with gamma = 0 decodes plainly."""
    batch.place_proposals()
    drafted = drafter.propose(batch)  # number of tokens placed after each row
    logits = target.forward(batch.verify_inputs(target.view))  # only where a token is sampled
    verdict = verify(drafted, logits, batch, sampler)
    commit(verdict, batch)  # rejected drafts need no undoing: they are beyond the computed length
    sampler.count_tokens(batch, verdict.target_tokens, verdict.accepted)
    drafter.observe(batch, verdict)
    return verdict
