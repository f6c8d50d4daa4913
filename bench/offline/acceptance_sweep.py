"""Measure the acceptance of several drafting setups on the same target text.

With coupled sampling the target's tokens do not depend on the drafts. One target text therefore serves any number of
drafters: each proposes gamma tokens after the committed ones, none of the proposals is verified, and the target's next
tokens show how many would have been accepted. Rounds with drafts are gamma + 1 tokens apart, whatever was accepted.
Speculative sampling makes the text depend on the drafts; bench.offline.verification runs the engine for that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import msgspec
import torch
from pydantic import ValidationError
from torch import Tensor

from bench.corpus import BenchError
from bench.offline.interleave import scheduler_for_batch
from engine.batch.round_batch import RoundBatch
from engine.config.deployment import ConfigError, EngineConfig, describe
from engine.params import SamplingParams
from engine.plan import PageDelta, RoundPlan, RowStart, RowWork
from engine.sampling.sampler import Sampler
from engine.speculation.drafters import Drafter
from engine.speculation.round import run_round
from engine.speculation.verify import Verdict
from engine.worker.build import DraftModel, load_draft, make_drafter, make_row_state, make_target
from models.decoder import DecoderModel
from parallel.group import Group
from parallel.vocab_shard import VocabShard


@dataclass(frozen=True, slots=True)
class Setup:
    """A drafting setup.

    draft: `self`, or the directory of a draft model. policy: a KV policy of engine.config, or `relative`: sink + window
    at relative positions. budget: None with policy `all`. recent, reselect: for snapkv only.
    """

    draft: str
    policy: str
    budget: int | None = None
    recent: int | None = None
    reselect: int | None = None

    def config(self, config: EngineConfig, gamma: int) -> EngineConfig:
        """Return `config` with this setup. Raises ConfigError for a budget that the policy does not allow."""
        kv: dict[str, Any] = {"policy": self.policy, "budget": self.budget}
        kv |= {"recent": self.recent, "reselect": self.reselect}
        if self.policy == "relative":
            kv |= {"policy": "window", "positions": "relative"}
        speculation = {
            "gamma": gamma,
            "drafter": "self" if self.draft == "self" else "model",
            "model": None if self.draft == "self" else self.draft,
            "kv": {name: value for name, value in kv.items() if value is not None},
            "weights": config.speculation.weights,
        }
        try:
            return EngineConfig.model_validate(config.model_dump() | {"speculation": speculation})
        except ValidationError as error:
            raise ConfigError(describe(error)) from None


@dataclass(frozen=True, slots=True)
class AcceptanceResult:
    """Acceptance of one setup.

    accepted: number of accepted drafts. rejected: number of rows and rounds with a rejected draft.
    """

    context: int
    draft: str
    policy: str
    budget: int | None
    recent: int | None
    reselect: int | None
    verification: str
    temperature: float
    top_p: float
    gamma: int
    accepted: int
    rejected: int

    @classmethod
    def from_stats(
        cls,
        setup: Setup,
        params: SamplingParams,
        *,
        context: int,
        gamma: int,
        verification: str,
        accepted: int,
        rejected: int,
    ) -> AcceptanceResult:
        """Build the result of a setup. params: sampling parameters of the text."""
        return cls(
            context=context,
            draft=setup.draft,
            policy=setup.policy,
            budget=setup.budget,
            recent=setup.recent,
            reselect=setup.reselect,
            verification=verification,
            temperature=params.temperature,
            top_p=params.top_p,
            gamma=gamma,
            accepted=accepted,
            rejected=rejected,
        )

    @property
    def alpha(self) -> float:
        """Acceptance rate, as in engine.scheduler.stats.acceptance_rate; NaN without drafts."""
        tried = self.accepted + self.rejected
        return self.accepted / tried if tried else float("nan")


def combine_setups(
    drafts: Sequence[str],
    policies: Sequence[str],
    budgets: Sequence[int],
    recents: Sequence[int],
    reselects: Sequence[int] = (0,),
) -> Iterator[Setup]:
    """Yield every valid combination."""
    for draft in drafts:
        for policy in policies:
            if policy == "all":
                yield Setup(draft, policy)
                continue
            for budget in budgets:
                if policy != "snapkv":
                    yield Setup(draft, policy, budget)
                    continue
                for recent, reselect in product(recents, reselects):
                    if recent < budget:
                        yield Setup(draft, policy, budget, recent, reselect)


def seeded(
    prompts: Sequence[Sequence[int]], sampling: Sequence[SamplingParams]
) -> list[tuple[Sequence[int], SamplingParams]]:
    """Pair every prompt with each of `sampling`. A prompt's index is its seed."""
    return [
        (prompt, msgspec.structs.replace(params, seed=i)) for params in sampling for i, prompt in enumerate(prompts)
    ]


class RecordingDrafters:
    """Drafters that all propose after the same tokens. Their proposals are recorded, not verified.

    proposed: [setup][round with drafts] of [rows, gamma] int64.
    """

    def __init__(self, drafters: Sequence[Drafter]) -> None:
        self._drafters = drafters
        self.proposed: list[list[Tensor]] = [[] for _ in drafters]

    def start(self, start: RowStart) -> None:
        for drafter in self._drafters:
            drafter.start(start)

    def propose(self, batch: RoundBatch) -> Tensor:
        for drafter, proposed in zip(self._drafters, self.proposed, strict=True):
            drafter.propose(batch)
            if batch.gamma_max:
                proposed.append(batch.read_drafts())
        return torch.zeros_like(batch.gamma_device)

    def observe(self, batch: RoundBatch, verdict: Verdict) -> None:
        for drafter in self._drafters:
            drafter.observe(batch, verdict)


@torch.inference_mode()
def measure(
    config: EngineConfig,
    target: DecoderModel,
    prompts: Sequence[Sequence[int]],
    setups: Sequence[Setup],
    *,
    gamma: int,
    new_tokens: int,
    sampling: Sequence[SamplingParams],
) -> list[AcceptanceResult]:
    """Measure the acceptance of each setup on the target's text after each prompt, with each of `sampling`.

    config: the deployment; its speculation settings but for weights are ignored. target: its model, on a single rank.
    prompts: all of one length. setups: the setups. new_tokens: smallest number of tokens of a text. Raises BenchError
    if prompt and text do not fit the model, ConfigError for an invalid setup.
    """
    context, stride = len(prompts[0]), gamma + 1
    rounds = -(-new_tokens // stride)
    length = context + rounds * stride + gamma + 1
    if length > target.max_positions:
        raise BenchError(f"{length} tokens of context and text, but the model has {target.max_positions}")
    texts = seeded(prompts, sampling)
    row_width = -(-length // config.cache.page_size)
    group, target = Group.single(), target.keeping_all_kv()
    vocab = VocabShard(target.vocab_start, target.vocab_size, target.config.vocab_size, group)
    # A target with target_kv keeps its choices for passes of so many queries.
    drafting = config.speculation.model_copy(update={"gamma": gamma})
    scheduler = scheduler_for_batch(config.scheduler, len(texts), gamma)
    # Every setup would capture its own graphs.
    config = config.model_copy(update={"cuda_graphs": False, "speculation": drafting, "scheduler": scheduler})
    state = make_row_state(config, target, len(texts) * row_width, length)
    sampler = Sampler(state, vocab, target.ops)
    runner = make_target(config, target, state, len(texts) * row_width, len(texts) * row_width)

    @cache
    def draft_model(directory: str) -> DraftModel:
        draft = load_draft(Setup(directory, "all").config(config, gamma), target, length, group)
        if draft.model and draft.model.config.vocab_size != target.config.vocab_size:
            raise BenchError(
                f"{directory}: a vocabulary of {draft.model.config.vocab_size} tokens, the target has "
                f"{target.config.vocab_size}"
            )
        return draft

    drafters = []
    for setup in setups:
        draft = DraftModel() if setup.draft == "self" else draft_model(setup.draft)
        runner, drafter = make_drafter(setup.config(config, gamma), runner, state, sampler, group, draft)
        drafters.append(drafter)
    panel = RecordingDrafters(drafters)

    def step(work: list[RowWork], start: RowStart | None = None, pages: Sequence[PageDelta] = ()) -> None:
        if start is not None:
            sampler.start(start)
            panel.start(start)
        plan = RoundPlan(0, [start] if start else [], list(pages), work)
        state.apply(plan)
        run_round(RoundBatch(state, plan), runner, panel, sampler)

    chunk = config.scheduler.max_batch_tokens
    for row, (prompt, params) in enumerate(texts):
        own = list(range(row * row_width, (row + 1) * row_width))
        pages = [PageDelta(row, 0, own, sliding) for sliding in (False, True)]
        start = RowStart(row, list(prompt), context, params, [])
        for first in range(0, context, chunk):
            new = min(chunk, context - first)
            step([RowWork(row, first, new, 0, first + new == context)], start if first == 0 else None, pages)
            pages = []
    for computed in range(context, context + rounds * stride + gamma):
        drafts = gamma if computed < context + rounds * stride and (computed - context) % stride == 0 else 0
        # A draft model has to compute the prompt first, and later the tokens since it last drafted.
        lag = computed if computed == context else gamma
        catch_up = lag if drafts and lag > 1 else 0
        step([RowWork(row, computed, 1, drafts, True, catch_up, draft_lag=lag) for row in range(len(texts))])

    # Round i drafted for the positions from context + 1 + i * stride on.
    written = state.tokens[:, context + 1 :].long().unfold(1, gamma, stride)[:, :rounds]  # [texts, rounds, gamma]
    results = []
    for setup, proposed in zip(setups, panel.proposed, strict=True):
        accepted = (torch.stack(proposed, 1) == written).cumprod(-1).sum(-1)
        for i, params in enumerate(sampling):
            mine = accepted[i * len(prompts) : (i + 1) * len(prompts)]
            results.append(
                AcceptanceResult.from_stats(
                    setup,
                    params,
                    context=context,
                    gamma=gamma,
                    verification="coupled",
                    accepted=int(mine.sum()),
                    rejected=int((mine < gamma).sum()),
                )
            )
    return results
