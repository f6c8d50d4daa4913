"""Small engines for tests, and helpers to run them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import count, cycle
from pathlib import Path
from typing import Any

import torch

from engine.config.deployment import EngineConfig
from engine.core import Engine
from engine.messages import AddRequest, RequestOutput
from engine.ngram.ngram_drafts import NO_PROPOSAL, Proposal
from engine.params import SamplingParams
from engine.plan import RoundPlan, RoundResult
from engine.scheduler.controller import ControllerReport, RowDrafts, Way
from engine.scheduler.request import Request
from kernels.ops import Ops
from kernels.reference_ops import REFERENCE
from models.config import ModelConfig
from models.decoder import DecoderModel
from models.loader import random_model
from parallel.group import Group

TINY = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=2048,
    eos_token_ids=(1,),
)


def tiny_model(
    seed: int = 0, dtype: torch.dtype = torch.float64, config: ModelConfig = TINY, ops: Ops = REFERENCE
) -> DecoderModel:
    return random_model(config, seed=seed, dtype=dtype, device=torch.device("cpu"), group=Group.single(), ops=ops)


def tiny_engine(
    model: DecoderModel,
    *,
    gamma: int,
    budget: int = 16,
    page_size: int = 4,
    directory: Path | None = None,
    **settings: Any,
) -> Engine:
    """Build an engine whose draft KV budget is so small that drafts are often wrong. directory: the tokenizer's, if
    there is one."""
    scheduler = {"max_rows": 8, "max_batch_tokens": 64, **settings.pop("scheduler", {})}
    speculation = {"kv": {"budget": budget, "sink": min(4, page_size)}, **settings.pop("speculation", {})}
    config = EngineConfig.model_validate(
        {
            "model": str(directory or "tiny"),
            "speculation": {"gamma": gamma, **speculation},
            "cache": {"page_size": page_size, "memory_gb": 0.1, **settings.pop("cache", {})},
            "scheduler": scheduler,
            "check_invariants": True,
            **settings,
        }
    )
    return Engine(config, model=model)


class Scripted:
    """Controller that plays scripted rounds: one gamma for all rows, or a gamma per row. Of these drafts none, one or
    all come from the text where that proposes any, by turns."""

    def __init__(self, gammas: Sequence[int | Sequence[int]], ways: Iterable[Way] = (Way(),)) -> None:
        """ways: of the rounds, in cycles."""
        self._gammas = iter([[each] if isinstance(each, int) else each for each in gammas])
        self.gamma_max = max(each if isinstance(each, int) else max(each) for each in gammas)
        self._ways, self.way, self.report = cycle(ways), Way(), ControllerReport()
        self._turns = count()
        self.takes_text = True

    def begin_round(self) -> None:
        pass

    def choose(
        self,
        rows: Sequence[Request],
        shared_tokens: int = 0,
        proposals: Sequence[Proposal] = (),
        share: int | None = None,
    ) -> list[RowDrafts]:
        gammas, turn, self.way = next(self._gammas), next(self._turns), next(self._ways)
        chosen = []
        for i, proposal in enumerate(proposals or [NO_PROPOSAL] * len(rows)):
            gamma = gammas[i % len(gammas)]
            proposed = min(gamma, len(proposal.tokens), (0, 1, gamma)[(turn + i) % 3])
            chosen.append(RowDrafts(proposed, gamma - proposed))
        return chosen

    def observe(self, plan: RoundPlan, requests: Sequence[Request], result: RoundResult) -> None:
        pass


def run(
    engine: Engine,
    requests: Iterable[AddRequest],
    *,
    joins: Mapping[str, int] | None = None,
    leaves: Mapping[str, int] | None = None,
) -> dict[str, list[RequestOutput]]:
    """Run until no work is left. joins: step at which a request arrives (default 0). leaves: step at which it is
    aborted."""
    waiting = {request.id: request for request in requests}
    outputs: dict[str, list[RequestOutput]] = {request_id: [] for request_id in waiting}
    step = 0
    while waiting or engine.has_work():
        for request_id in [r for r in waiting if (joins or {}).get(r, 0) <= step]:
            engine.add(waiting.pop(request_id))
        for request_id, at in (leaves or {}).items():
            if at == step:
                engine.abort([request_id])
                waiting.pop(request_id, None)
        for output in engine.step():
            outputs[output.id].append(output)
        step += 1
    stats = engine.stats()
    assert stats.pages_free + stats.pages_cached == stats.pages_total
    assert stats.running == stats.waiting == 0
    return outputs


def tokens(outputs: Sequence[RequestOutput]) -> list[int]:
    return [token for output in outputs for token in output.tokens]


def complete_all(engine: Engine, requests: Sequence[AddRequest]) -> dict[str, list[int]]:
    """Output tokens by request. On an engine without speculation this is the oracle of the law: test_law shows that
    each gets what it gets alone."""
    return {id: tokens(outputs) for id, outputs in run(engine, requests).items()}


def complete(engine: Engine, prompt: Sequence[int], params: SamplingParams) -> list[int]:
    """Run one request alone and return its output tokens."""
    return tokens(run(engine, [AddRequest("alone", list(prompt), params)])["alone"])
