"""Log-probabilities of prompt tokens equal those of a single pass over the prompt, however it is split into chunks."""

from __future__ import annotations

import pytest
import torch

from engine.messages import AddRequest
from engine.params import SamplingParams
from engine.scheduler.validation import RequestError
from parallel import shm
from tests.support.engines import TINY, run, tiny_engine, tiny_model, tokens
from tests.support.ranks import threaded_engine
from tests.support.rig import PagedRows

PROMPTS = {"short": [5], "middle": [2 + 7 * i % 60 for i in range(40)], "long": [3 + 11 * i % 60 for i in range(500)]}


def expected(prompt: list[int]) -> torch.Tensor:
    """Log-probabilities of a single pass over the prompt, [tokens - 1, vocabulary]."""
    rows = PagedRows(tiny_model(), [len(prompt)], page_size=4)
    return rows.forward({0: prompt}, {0: range(len(prompt))}).log_softmax(-1)[:-1]


def requests() -> list[AddRequest]:
    params = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True, prompt_logprobs=3, logprobs=1)
    found = [AddRequest(name, prompt, params) for name, prompt in PROMPTS.items()]
    return [*found, AddRequest("silent", PROMPTS["middle"], SamplingParams(max_tokens=5, temperature=0))]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("gamma", [0, 3])
def test_as_a_plain_pass_has_them(size: int, gamma: int) -> None:
    if size > 1 and not shm.available():
        pytest.skip("needs shared memory between ranks")
    engine, _ = threaded_engine(TINY, size, gamma=gamma, share=size > 1, max_model_len=600)
    outputs = run(engine, requests())
    engine.close()
    assert all(output.prompt_logprobs is None for output in outputs["silent"])
    for name, prompt in PROMPTS.items():
        first, *others = outputs[name]
        assert all(output.prompt_logprobs is None for output in others)
        assert first.prompt_logprobs is not None
        assert [each.token for each in first.prompt_logprobs] == prompt[1:]
        for each, logprobs in zip(first.prompt_logprobs, expected(prompt), strict=True):
            assert each.logprob == pytest.approx(float(logprobs[each.token]))
            assert each.rank == 1 + int((logprobs > logprobs[each.token]).sum())
            top, ids = logprobs.topk(3)
            assert each.top_ids == ids.tolist()
            assert each.top_logprobs == pytest.approx(top.tolist())


def test_text_does_not_change() -> None:
    engine = tiny_engine(tiny_model(), gamma=2)
    with_them = {id: tokens(out) for id, out in run(engine, requests()).items()}
    assert with_them["middle"] == with_them["silent"]


def test_a_preempted_prompt_is_told_once() -> None:
    engine = tiny_engine(tiny_model(), gamma=2, cache={"num_pages": 60}, max_model_len=230)
    prompts = {str(i): [2 + (7 * j + i) % 60 for j in range(60)] for i in range(4)}
    params = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True, prompt_logprobs=0)
    outputs = run(engine, [AddRequest(id, prompt, params) for id, prompt in prompts.items()])
    assert engine.stats().preemptions > 0
    for id, prompt in prompts.items():
        told = [output.prompt_logprobs for output in outputs[id] if output.prompt_logprobs is not None]
        assert len(told) == 1
        assert [each.token for each in told[0]] == prompt[1:]
        assert all(each.top_ids == [] for each in told[0])


@pytest.mark.parametrize("gamma", [0, 3])
def test_a_prompt_can_be_scored_without_a_token(gamma: int) -> None:
    """Also one as long as the longest request."""
    prompt = PROMPTS["long"]
    engine = tiny_engine(tiny_model(), gamma=gamma, max_model_len=len(prompt))
    score = SamplingParams(max_tokens=0, prompt_logprobs=3)
    outputs = run(engine, [AddRequest("score", prompt, score), *requests()[:2], AddRequest("one", [5], score)])
    (output,) = outputs["score"]
    assert (output.tokens, output.finish_reason) == ([], "length")
    assert output.prompt_logprobs is not None
    for each, logprobs in zip(output.prompt_logprobs, expected(prompt), strict=True):
        assert each.logprob == pytest.approx(float(logprobs[each.token]))
    assert outputs["one"][0].prompt_logprobs == []
    assert engine.stats().prompt_tokens == sum(map(len, (prompt, PROMPTS["short"], PROMPTS["middle"], [5])))
    with pytest.raises(RequestError, match="max_tokens must be at least 1, or 0 with prompt_logprobs"):
        engine.add(AddRequest("nothing", [5], SamplingParams(max_tokens=0)))
