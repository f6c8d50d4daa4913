"""Output with any KV policy, of any settings, equals output without drafts, token for token."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.batch.row_state import RowState
from engine.batch.runner import Runner
from engine.batch.view import View
from engine.config.kv import MAX_PLAIN_TOKENS, POLICIES
from engine.control.step_times import StepSample
from engine.core import Engine
from engine.messages import AddRequest, RequestOutput
from engine.ngram.ngram_drafts import Proposal
from engine.params import SamplingParams
from engine.scheduler.controller import ControllerReport, FixedGamma, RowDrafts, Way
from engine.scheduler.request import Request
from kernels.attention.base import AttentionBatch
from kernels.ragged import Ints
from models.batch import ForwardBatch
from models.decoder import DecoderModel
from tests.support.conversations import Turn, check_answers, check_hits, crowd, play, random_turns
from tests.support.engines import TINY, complete_all, run, tiny_engine, tiny_model, tokens
from tests.support.prefix_engines import model_on_kernels, trouble
from tests.support.profiles import examples, is_all, only_in_all
from tests.support.ranks import DRAFT, write_random_model
from tests.support.tiny import TOKENS
from tests.support.workloads import kv_of, prompt_of

LONGEST = 110
GRAMMARS = ["start: /[a-c]{1,9}/", "start: /(ab|c)+ x/", "start: /[^q]*/"]


@cache
def model() -> DecoderModel:
    return tiny_model(config=replace(TINY, vocab_size=TOKENS, eos_token_ids=(2,)))


@pytest.fixture(scope="module")
def small_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a draft model with the vocabulary of the tokenizer."""
    return write_random_model(tmp_path_factory.mktemp("models") / "small", replace(DRAFT, vocab_size=TOKENS))


class Restless(FixedGamma):
    """Controller under which every round has another budget and drafter, and every row another number of drafts and
    reading."""

    def __init__(self, rng: random.Random, gamma_max: int, ways: Sequence[Way]) -> None:
        super().__init__(gamma_max)
        self._rng, self._ways = rng, ways
        self.report = ControllerReport()
        self._plain = 0

    def choose(
        self,
        rows: Sequence[Request],
        shared_tokens: int = 0,
        proposals: Sequence[Proposal] = (),
        share: int | None = None,
    ) -> list[RowDrafts]:
        """Choose at random, with plain phases that are longer than any policy's patience."""
        self.way = self._rng.choice(self._ways)
        if self._plain == 0 and self._rng.random() < 0.05:
            self._plain = 20
        self._plain = max(0, self._plain - 1)
        if self._plain:
            return [RowDrafts()] * len(rows)
        drafts = [self._rng.choice([0, self.gamma_max, self._rng.randint(0, self.gamma_max)]) for _ in rows]
        return [RowDrafts(0, gamma, latest=self._rng.random() < 0.3) for gamma in drafts]


def settings_of(draw: st.DrawFn, policy: str, page: int, drafter: str) -> dict[str, Any]:
    """Draw settings of a policy: budgets of a page or a few, or larger than any context."""
    least = {"window": 2, "snapkv": 2}.get(policy, 1)
    pages = draw(st.integers(least, 6) | st.just(LONGEST // page + 3))
    kv: dict[str, Any] = {"policy": policy, "budget": pages * page}
    sink = st.integers(1, 2 * page + 1) | st.just(LONGEST + 9)
    if policy == "window":
        kv["sink"] = draw(st.integers(1, (pages - 1) * page))
        kv["positions"] = draw(st.sampled_from(["absolute", "absolute", "relative"]))
    elif policy == "verified":
        kv["sink"] = draw(sink)
    elif policy == "quest":
        kv |= {"sink": draw(sink), "interval": draw(st.integers(1, 7))}
    elif policy == "snapkv":
        kv |= {"recent": draw(st.integers(1, pages - 1)) * page, "queries": draw(st.integers(1, 20))}
        kv |= {"kernel": draw(st.sampled_from([1, 3, 5]))}
        kv["reselect"] = draw(st.sampled_from([None, 0, 1, 7])) if drafter != "model" else None
    elif policy == "topk":
        kv["budget"] = draw(st.integers(1, 40))
    else:
        del kv["budget"]
    return kv


@dataclass(frozen=True)
class Case:
    """Settings of an engine, and the load that it gets.

    drafter: self, model, or both, of which `kv` is that of the target's drafts. controlled: whether a controller
    changes gamma from row to row and round to round. spare: pages of the pool beyond those of one request of maximum
    length; None: there are enough for all. cut: whether rounds end early.
    """

    page: int
    gamma: int | str
    kv: dict[str, Any]
    drafter: str
    controlled: bool
    prefix: bool
    spare: int | None
    batch_tokens: int
    max_rows: int
    cut: bool
    seed: int
    count: int

    def engine(self, target: DecoderModel, directory: Path | None, draft: Path | None) -> Engine:
        """Build the engine. draft: directory of the draft model."""
        speculation: dict[str, Any] = {"kv": self.kv, "gamma_max": 5}
        if self.drafter == "model":
            speculation |= {"drafter": "model", "model": str(draft)}
        elif self.drafter == "both":
            speculation |= {"model": str(draft), "self_kv": self.kv, "kv": {"budget": 2 * self.page, "sink": 1}}
        pages = 900 if self.spare is None else -(-LONGEST // self.page) + self.spare
        with pytest.MonkeyPatch.context() as patch:
            samples = [StepSample(1, 64, gamma, 0.001 * gamma, 0.01) for gamma in (0, 1, 5)]
            patch.setattr("engine.worker.controllers.load_profile", lambda key: samples)
            engine = tiny_engine(
                target,
                gamma=self.gamma,  # type: ignore[arg-type]
                page_size=self.page,
                directory=directory,
                speculation=speculation,
                cache={"prefix": self.prefix, "num_pages": pages},
                scheduler={"max_rows": self.max_rows, "max_batch_tokens": self.batch_tokens},
                max_model_len=LONGEST,
            )
        if self.controlled:
            settings, names = engine._config.speculation, (None, "self")
            ways = [
                Way(budget, name)  # type: ignore[arg-type]
                for name, each in zip(names, settings.by_drafter(self.page).values(), strict=False)
                for budget in each.kv_budgets(self.page) or [0]
            ]
            engine._scheduler.controller = Restless(random.Random(self.seed), settings.max_draft_tokens, ways)
        return engine

    def turns(self) -> list[Turn]:
        """Make the load: a random one, and where pages are few, rows that preempt each other from the start."""
        rng = random.Random(self.seed)
        return (crowd(3, 60) if self.spare is not None else []) + random_turns(rng, self.page, self.count, 70, 30)


@st.composite
def cases(draw: st.DrawFn, policy: str, drafters: Sequence[str] = ("self",)) -> Case:
    page = draw(st.sampled_from([1, 2, 3, 4, 8, 16]))
    drafter = draw(st.sampled_from(drafters))
    gamma = "auto" if drafter == "both" else draw(st.integers(1, 6) | st.just("auto"))
    return Case(
        page=page,
        gamma=gamma,
        kv=settings_of(draw, policy, page, drafter),
        drafter=drafter,
        controlled=gamma == "auto" or draw(st.booleans()),
        prefix=draw(st.booleans()),
        spare=draw(st.sampled_from([None, None, 0, 3, 12])),
        batch_tokens=draw(st.sampled_from([7, 20, 64])),
        max_rows=draw(st.sampled_from([1, 3, 6])),
        cut=draw(st.integers(0, 3)) == 0,
        seed=draw(st.integers(0, 2**32)),
        count=draw(st.integers(1, 9 if is_all() else 5)),
    )


def check(case: Case, engine: Engine, plain: Engine, turns: Sequence[Turn], *, exact: bool = False) -> None:
    if case.cut:
        trouble(engine, random.Random(case.seed))
    played = play(engine, turns, LONGEST)
    check_answers(played, run(plain, played.requests), exact=exact)
    if case.prefix:
        check_hits(engine, played)
    stats = engine.stats()
    assert stats.pages_free + stats.pages_cached == stats.pages_total


def constrained(turns: Sequence[Turn], rng: random.Random) -> list[Turn]:
    """Give some turns a grammar."""
    return [
        replace(turn, params={**turn.params, "grammar": rng.choice(GRAMMARS)})
        if rng.random() < 0.2 and not turn.params.get("ignore_eos")
        else turn
        for turn in turns
    ]


@pytest.mark.parametrize("policy", POLICIES)
@given(data=st.data())
@examples(3, 120)
def test_no_policy_changes_output(tokenizer_dir: Path, small_dir: Path, policy: str, data: st.DataObject) -> None:
    """Ragged batches of conversations that join, share, branch and leave, with chunked prompts, preemption, rounds that
    end early, and every way to sample."""
    case = data.draw(cases(policy, ("self", "both") if policy == "verified" else ("self", "both", "model")))
    engine = case.engine(model(), tokenizer_dir, small_dir)
    settings: dict[str, Any] = {"cache": {"prefix": False}, "scheduler": {"max_rows": 16}, "max_model_len": LONGEST}
    plain = tiny_engine(model(), gamma=0, page_size=16, directory=tokenizer_dir, **settings)
    check(case, engine, plain, constrained(case.turns(), random.Random(case.seed)))


@pytest.mark.parametrize("policy", [only_in_all(each) if each in ("all", "quest") else each for each in POLICIES])
@given(data=st.data())
@examples(2, 60)
def test_no_policy_changes_a_bit_on_cpu_kernels(policy: str, data: st.DataObject) -> None:
    case = data.draw(cases(policy))
    target = model_on_kernels(torch.bfloat16)
    settings: dict[str, Any] = {"cache": {"prefix": False}, "scheduler": {"max_rows": 16}, "max_model_len": LONGEST}
    plain = tiny_engine(target, gamma=0, page_size=16, **settings)
    check(case, case.engine(target, None, None), plain, case.turns(), exact=True)


class Lists:
    """Checks of the page lists of every draft step of an engine: they are pages of the row's own, each listed once, the
    first ones and the newest among them; no more than captured graphs have room for; and about as many tokens as the
    cost model counts."""

    def __init__(self, engine: Engine, patch: pytest.MonkeyPatch) -> None:
        self._engine = engine
        self._page, self._settings = engine._config.cache.page_size, engine._config.speculation
        drafter: Any = engine._worker._drafter
        self._runner, view = drafter._drafter._runner, drafter._drafter._policy.view(0)
        by_row = view.per_layer or view.page_table is not engine._worker._state.page_table
        assert self._settings.drafts_share is not (by_row or self._settings.kv.policy == "topk")
        self._width = self._settings.kv.max_pages(
            self._page, self._settings.max_draft_tokens, engine._worker._state.page_table.shape[1]
        )
        self._made: dict[int, tuple[Ints, View]] = {}
        self.steps = self.selective = 0
        make, forward = RowState.forward_inputs, Runner.forward

        def make_watched(
            state: RowState, rows: Ints, computed: Ints, ahead: Ints, queries: Ints, view: View, logit_index: Ints
        ) -> ForwardBatch:
            batch = make(state, rows, computed, ahead, queries, view, logit_index)
            self._made = {id(batch): (rows, view)}
            return batch

        def forward_watched(runner: Runner, batch: ForwardBatch) -> Tensor:
            logits = forward(runner, batch)
            if runner is self._runner:
                self._check(batch.attention, *self._made[id(batch)])
            return logits

        patch.setattr(RowState, "forward_inputs", make_watched)
        patch.setattr(Runner, "forward", forward_watched)

    def _check(self, batch: AttentionBatch, rows: Ints, view: View) -> None:
        settings, page = self._settings, self._page
        kv = settings.kv
        if budget := self._engine._scheduler.controller.way.budget:
            kv = kv.with_budget(budget)
        assert batch.pages.shape[-1] <= self._width
        # What is newer than a choice: the rest of a page, and the drafts; plain rounds and a whole round, if it is old.
        slack = {"quest": page + 2 + settings.max_draft_tokens}.get(kv.policy, 0)
        if kv.policy == "verified":
            slack = page + MAX_PLAIN_TOKENS + 1 + 2 * settings.max_draft_tokens
        for i, row in enumerate(rows.tolist()):
            read, skipped = batch.kv_lengths[i], batch.skipped[i]
            if batch.query_lengths[i] == 1:
                assert abs(read - kv.tokens_read(read + skipped, page)) <= slack
            count = -(-read // page)
            table = view.page_table[row, : -(-(read + skipped) // page)].tolist()
            lists = (batch.pages[:, i] if batch.per_layer else batch.pages[i]).reshape(-1, batch.pages.shape[-1])
            for listed in lists[:, :count].tolist():
                assert len(set(listed)) == count
                assert set(listed) <= set(table)
                assert (listed[0], listed[-1]) == (table[0], table[-1])
                assert skipped or listed == table
            self.steps += 1
            self.selective += skipped > 0


@pytest.mark.parametrize("policy", [only_in_all(each) if each in ("all", "topk") else each for each in POLICIES])
@given(data=st.data())
@examples(2, 100)
def test_drafts_list_pages_of_their_row(small_dir: Path, policy: str, data: st.DataObject) -> None:
    case = data.draw(cases(policy, ("self",) if policy == "verified" else ("self", "self", "model")))
    target = tiny_model(config=replace(TINY, vocab_size=TOKENS, eos_token_ids=(2,)))
    engine = case.engine(target, None, small_dir)
    if case.cut:
        trouble(engine, random.Random(case.seed))
    with pytest.MonkeyPatch.context() as patch:
        lists = Lists(engine, patch)
        play(engine, [*crowd(1, 80), *case.turns()], LONGEST)
    assert lists.steps > 0 or case.cut


def simple(policy: str) -> dict[str, Any]:
    """Settings of a policy with a small budget."""
    return kv_of(policy, 4, 2)


def three(seed: int) -> list[AddRequest]:
    params = SamplingParams(max_tokens=50, temperature=1.0, seed=seed, ignore_eos=True)
    return [AddRequest(str(i), prompt_of(40 + 9 * i, seed + i), params) for i in range(3)]


@pytest.mark.parametrize(
    "policy", ["snapkv", *(only_in_all(each) for each in ("verified", "window", "quest", "topk", "all"))]
)
def test_a_row_whose_kv_is_no_number_fails_alone(policy: str) -> None:
    """And its pages and its row slot serve the next requests."""
    settings: dict[str, Any] = {"cache": {"prefix": False, "num_pages": 90}, "speculation": {"kv": simple(policy)}}
    engine = tiny_engine(tiny_model(), gamma=3, scheduler={"max_rows": 3}, max_model_len=LONGEST, **settings)
    plain = tiny_engine(tiny_model(), gamma=0)
    expected = complete_all(plain, three(0))
    outputs: dict[str, list[RequestOutput]] = {request.id: [] for request in three(0)}
    for request in three(0):
        engine.add(request)
    for step in range(200):
        if step == 6:
            (victim,) = (each for each in engine._scheduler.running if each.id == "1")
            assert victim.num_output > 0
            engine._worker._target.pool._data[:, :, victim.pages[3:9]] = float("nan")
        for output in engine.step():
            outputs[output.id].append(output)
    assert not engine.has_work()
    assert outputs["1"][-1].error is not None
    for id, found in outputs.items():
        assert tokens(found) == expected[id][: len(tokens(found)) if id == "1" else None]
    assert complete_all(engine, three(5)) == complete_all(plain, three(5))


@pytest.mark.parametrize("policy", ["quest", *(only_in_all(each) for each in ("window", "snapkv", "topk", "all"))])
def test_draft_kv_that_is_no_number_changes_nothing(draft_dir: Path, policy: str) -> None:
    speculation = {"drafter": "model", "model": str(draft_dir), "kv": simple(policy)}
    engine = tiny_engine(tiny_model(), gamma=3, max_model_len=LONGEST, speculation=speculation)
    drafter: Any = engine._worker._drafter
    outputs: dict[str, list[RequestOutput]] = {request.id: [] for request in three(0)}
    for request in three(0):
        engine.add(request)
    for step in range(200):
        if step in (0, 6):
            drafter._drafter._policy.full._data[:, :, 5:20] = float("nan")
            drafter._drafter._policy.pool._data[:, :, 2:5] = float("nan")
        for output in engine.step():
            outputs[output.id].append(output)
    assert not engine.has_work()
    expected = complete_all(tiny_engine(tiny_model(), gamma=0), three(0))
    assert {id: tokens(found) for id, found in outputs.items()} == expected
    assert engine.stats().draft_tokens > 50
