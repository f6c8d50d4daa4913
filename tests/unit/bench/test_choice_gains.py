"""Replays of recorded texts have the rounds that the engine has."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from bench.replay.choice_gains import WAYS, RoundReplay, compare
from bench.replay.recording import DraftRecorder, RecordedText, record
from engine.config.deployment import EngineConfig
from engine.control.step_times import StepSample, StepTimes
from engine.core import Engine
from engine.messages import AddRequest
from engine.params import SamplingParams
from engine.plan import RoundPlan, RoundResult
from engine.scheduler.controller import FixedGamma
from engine.scheduler.request import Request
from tests.support.engines import TINY, tiny_model

GAMMA = 3
PROMPT = [3 + i * i % 19 for i in range(60)]
SAMPLES = [
    StepSample(rows, context, gamma, gamma * 0.01, 0.03 + 0.002 * rows * gamma)
    for rows in (1, 2)
    for context in (10, 500)
    for gamma in (0, 1, 4, 16)
]


class Counter(FixedGamma):
    """Controller that counts the rounds in which a row decodes."""

    rounds = 0

    def observe(self, plan: RoundPlan, requests: Sequence[Request], result: RoundResult) -> None:
        self.rounds += any(request.num_output > 1 for request in requests)


def config(drafter: str) -> EngineConfig:
    speculation = {"drafter": drafter, "gamma": GAMMA, "kv": {"policy": "window", "budget": 16, "sink": 4}}
    cache = {"page_size": 4, "memory_gb": 0.1}
    return EngineConfig.model_validate({"model": "tiny", "speculation": speculation, "cache": cache})


def texts(temperature: float, prompts: Sequence[Sequence[int]] = (PROMPT,)) -> list[RecordedText]:
    recorder = DraftRecorder(GAMMA)
    engine = Engine(config("self"), model=tiny_model(), controller=recorder, progress=False)
    params = [SamplingParams(max_tokens=80, temperature=temperature, ignore_eos=True, seed=5)] * len(prompts)
    return record(engine, recorder, prompts, params)


def replay() -> RoundReplay:
    return RoundReplay(StepTimes(SAMPLES, lambda context, budget: min(context, budget)), 16, TINY.vocab_size)


@pytest.mark.parametrize("temperature", [0.0, 0.5])
@pytest.mark.parametrize("drafter", ["self", "ngram", "together"])
def test_rounds_are_those_of_the_engine(drafter: str, temperature: float) -> None:
    (text,) = texts(temperature)
    assert len(text.output) == 80
    counter = Counter(GAMMA, model=drafter != "ngram")
    engine = Engine(config(drafter), model=tiny_model(), controller=counter, progress=False)
    engine.add(text.message)
    output = []
    while engine.has_work():
        for each in engine.step():
            output += each.tokens
    assert output == text.output
    gain = replay().run(
        [text], DraftRecorder(GAMMA) if drafter == "self" else FixedGamma(GAMMA, model=drafter != "ngram")
    )
    assert gain.tokens == 79
    # Behind a text's drafts the model may be right where it was not asked before.
    assert gain.rows == counter.rounds if drafter != "together" else 0 <= counter.rounds - gain.rows <= 8


def test_drafts_are_judged_by_the_text() -> None:
    text = RecordedText(AddRequest("a", [1], SamplingParams()), [5, 6, 7, 8, 9], {3})
    assert text.count_accepted(1, [], 2) == 2
    assert text.count_accepted(1, [], 3) == 2  # 8 was drafted wrongly
    assert text.count_accepted(1, [6, 9], 2) == 1  # nothing holds behind a wrong one
    assert text.count_accepted(1, [6, 7, 8], 1) == 4
    assert text.count_accepted(3, [8, 9, 1], 1) == 2  # the text ends
    assert text.count_accepted(3, [], 4) == 0


def test_all_ways_decode_all_texts() -> None:
    found = texts(0.0, [PROMPT, PROMPT[9:]])
    times = StepTimes(SAMPLES, lambda context, budget: min(context, budget))
    gains = compare(replay(), [found, found[:1]], config("together"), times)
    assert list(gains) == list(WAYS)
    assert {gain.tokens for gain in gains.values()} == {3 * 79}
    assert gains["off"].rows == 3 * 79
    assert gains["off"].seconds == pytest.approx(0.03 * 2 * 79)
    for gain in gains.values():
        assert gain.rows + gain.accepted >= 3 * 79 >= gain.rows  # what is accepted behind the end is no token
        assert gain.copied <= gain.accepted <= gain.drafted
    assert gains["ngram"].copied == gains["ngram"].accepted
    assert gains["self"].copied == gains["off"].drafted == 0
