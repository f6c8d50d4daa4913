"""The start-up profile of rows that share pages: what is measured, and the price that follows."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config.deployment import EngineConfig
from engine.control.step_times import StepSample, StepTimes
from engine.plan import RoundPlan, RoundResult
from engine.ranks.protocol import WeightBytes
from engine.worker import profiler as module
from engine.worker.profiler import Profiler, blank_rows, load_profile, profile, profile_key, save_profile
from engine.worker.resolve import resolve
from kernels.reference_ops import ReferenceOps
from tests.support.engines import tiny_engine, tiny_model
from tests.support.profiles import only_in_all

PAGE, STRETCH, PRICE = 16, 64, 0.4


@dataclass
class SharingEngine:
    """Rounds whose times follow from their page lists, read as kernels read them: a stretch of pages that an earlier
    row lists in the same place, with the same pages before it, costs its price."""

    slower: float = 1.0
    stretch: int = STRETCH
    now: float = 0.0
    contexts: dict[int, int] = field(default_factory=dict)
    lists: dict[int, list[int]] = field(default_factory=dict)
    plans: int = 0

    def run(self, plan: RoundPlan) -> RoundResult:
        self.plans += 1
        for start in plan.starts:
            self.contexts[start.row] = len(start.tokens)
        for delta in plan.pages:
            self.lists[delta.row] = delta.pages
        gamma = plan.work[0].gamma
        tokens = float(sum(self.contexts[work.row] for work in plan.work))
        seen: set[tuple[int, ...]] = set()
        for work in plan.work:
            for end in range(self.stretch, self.contexts[work.row], self.stretch):
                prefix = tuple(self.lists[work.row][: end // PAGE])
                tokens -= (1 - PRICE) * self.stretch * (prefix in seen)
                seen.add(prefix)
        verify = self.slower * (5e-3 + 1e-4 * len(plan.work) + 1e-6 * tokens)
        self.now += verify * (1 + gamma)
        return RoundResult(0, [], gamma * verify, verify)


def config_of(rows: int = 16) -> EngineConfig:
    settings = {"model": "tiny", "cache": {"page_size": PAGE}, "scheduler": {"max_rows": rows}}
    return EngineConfig.model_validate({**settings, "speculation": {"gamma_max": 3, "drafter": "self"}})


def profiler_of(
    engine: SharingEngine, rows: int = 16, stretch: int = STRETCH, pages: int = 2000, length: int = 8192
) -> Profiler:
    return Profiler(engine.run, config_of(rows), pages, length, stretch)


@given(st.integers(1, 40), st.integers(1, 30), st.integers(1, 200), st.data())
def test_blank_rows_share_what_they_should(rows: int, width: int, pages: int, data: st.DataObject) -> None:
    shared = data.draw(st.integers(0, width - 1))
    starts, deltas = blank_rows(rows, width, width, pages, shared)
    assert [start.row for start in starts] == [delta.row for delta in deltas] == list(range(rows))
    lists = [delta.pages for delta in deltas]
    assert all(len(listed) == width and max(listed) < pages for listed in lists)
    assert {tuple(listed[:shared]) for listed in lists} == {tuple(i % pages for i in range(shared))}
    if rows <= pages and not shared:
        assert len({listed[0] for listed in lists}) == rows
    if shared + rows * (width - shared) <= pages:  # all fit side by side
        assert sorted({page for listed in lists for page in listed}) == list(range(shared + rows * (width - shared)))


@pytest.mark.parametrize("pages", [32, 33, 64, 2000])
def test_rows_of_their_own_share_nothing(pages: int) -> None:
    """Also in a small pool, whose pages rows list several times over."""
    engine = SharingEngine()
    sample = profiler_of(engine, pages=pages, length=pages * PAGE).measure(16, 384, 0)
    assert sample.shared == 0
    assert sample.verify_s == pytest.approx(5e-3 + 16e-4 + 16 * 385e-6)


@pytest.mark.parametrize(("context", "stretches"), [(300, 4), (319, 4), (320, 5), (63, 0)])
def test_rows_that_share(context: int, stretches: int) -> None:
    engine = SharingEngine()
    sample = profiler_of(engine).measure(4, context, 1, sharing=True)
    assert sample.shared == 3 * stretches * STRETCH
    assert sample.verify_s == pytest.approx(5e-3 + 4e-4 + 1e-6 * (4 * (context + 1) - (1 - PRICE) * sample.shared))


def test_pages_of_several_stretches() -> None:
    profiler = Profiler(SharingEngine().run, config_of(), 2000, 8192, 12)  # neither divides the other
    assert [profiler.shareable(context) for context in (11, 16, 31, 32, 48)] == [0, 12, 12, 24, 48]
    assert profiler.shared_context == 4 * 48


def test_the_price_is_measured() -> None:
    engine = SharingEngine()
    samples = profile(profiler_of(engine), config_of())
    assert {sample.gamma for sample in samples if sample.shared} == {0, 1, 3}
    assert {(sample.rows, sample.context) for sample in samples if sample.shared} == {(4, 2048), (16, 512)}
    times = StepTimes(samples, lambda context, budget: context)
    for rows in (2, 4, 9, 16, 40):
        for gamma in (0, 1, 3):
            assert times.shared_price(rows, gamma) == pytest.approx(PRICE, abs=0.01)


def test_many_short_rows_are_measured_at_some_stretches() -> None:
    engine = SharingEngine()
    samples = profile(profiler_of(engine, rows=128), config_of(128))
    assert {(s.rows, s.context) for s in samples if s.shared} == {(4, 2048), (16, 512), (64, 256), (128, 256)}


@pytest.mark.parametrize("rows", [64, 128, 300])
def test_many_rows_show_the_cost_of_a_token(rows: int) -> None:
    samples = profile(profiler_of(SharingEngine(), rows=rows, stretch=0), config_of(rows))
    assert {sample.context for sample in samples if sample.rows == rows} == {64, 128}
    times = StepTimes(samples, lambda context, budget: context)
    short, long = (times.verify(rows, rows * context, [0])[0] for context in (500, 4500))
    assert long - short == pytest.approx(rows * 4000 * 1e-6)


@pytest.mark.parametrize(
    ("rows", "stretch", "length"),
    [(16, 0, 8192), (1, STRETCH, 8192), (16, STRETCH, 100)],  # no sharing; one row; room for less than a stretch
)
def test_nothing_to_share(rows: int, stretch: int, length: int) -> None:
    engine = SharingEngine(stretch=stretch or STRETCH)
    samples = profile(profiler_of(engine, rows, stretch, length=length), config_of(rows))
    assert not any(sample.shared for sample in samples)
    assert StepTimes(samples, lambda context, budget: context).shared_price(4, 0) is None


def test_sharing_takes_none_of_the_time_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a slow engine the profile ends where it did: with two numbers of rows, and no price."""
    engine = SharingEngine(slower=60.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: engine.now))
    samples = profile(profiler_of(engine), config_of())
    assert sorted({sample.rows for sample in samples}) == [1, 4]
    assert not any(sample.shared for sample in samples)


@pytest.mark.parametrize("slower", [1.0, 2.0, 3.0, 6.0, 10.0])
def test_the_limit_of_time_holds(slower: float, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = SharingEngine(slower=slower)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: engine.now))
    samples = profile(profiler_of(engine, rows=256), config_of(256))
    assert engine.now < module._SECONDS * 1.1
    if slower <= 3:
        assert {1, 4, 16} <= {sample.rows for sample in samples}


@pytest.mark.parametrize("length", [4, only_in_all(8), only_in_all(20), only_in_all(128), 140, only_in_all(300)])
def test_any_engine_can_run_rows_that_share(length: int) -> None:
    engine = tiny_engine(tiny_model(), gamma=3, max_model_len=length, cache={"num_pages": -(-length // 4)})
    profiler = Profiler(engine._run, engine._config, -(-length // 4), length, 8)
    samples = profile(profiler, engine._config)
    assert any(sample.shared for sample in samples) == (length > 128)  # else there is one context
    assert all(sample.shared % 8 == 0 and sample.shared < sample.rows * sample.context for sample in samples)


def test_a_kept_profile_keeps_what_was_shared() -> None:
    samples = [StepSample(4, context, gamma, 0.1 * gamma, 0.1) for context in (64, 999) for gamma in (0, 1)]
    samples.append(StepSample(4, 999, 0, 0.0, 0.05, 2880))
    save_profile("shared", samples)
    assert load_profile("shared") == samples


def test_kernels_that_share_are_profiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    config, model = config_of(), tiny_model()
    before = profile_key(config, resolve(config, model), {}, WeightBytes())
    monkeypatch.setattr(ReferenceOps, "shared_stretch", lambda self, head_dim: STRETCH)
    assert profile_key(config, resolve(config, model), {}, WeightBytes()) != before
