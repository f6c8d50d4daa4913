"""The prefix cache through HTTP, on a real engine: what is found changes no text, and salts and resets hold."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.support.contract import CHAT, COMPLETIONS
from tests.support.servers import Server, eventually

PAGE_SIZE = 16
RESET = "/reset_prefix_cache"
PROMPT = [3 + place * 7 % 300 for place in range(150)]
DRAWN = {"max_tokens": 40, "temperature": 1.0, "seed": 11, "ignore_eos": True}
BODIES = [
    (COMPLETIONS, {"prompt": PROMPT, "logprobs": 2}),
    (CHAT, {"messages": [{"role": "user", "content": "a fox " * 60}], "logprobs": True, "top_logprobs": 2}),
]


def salt() -> dict[str, str]:
    """Return a salt that no other test has used: its requests begin with an empty cache."""
    return {"cache_salt": uuid.uuid4().hex}


def answer(server: Server, path: str, body: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = server.post(path, DRAWN | body).raise_for_status().json()
    return found


def cached(usage: dict[str, Any]) -> int:
    found: int = usage["prompt_tokens_details"]["cached_tokens"]
    return found


def whole_pages(tokens: int) -> int:
    """Number of tokens in the whole pages of a prompt of `tokens`, whose last one is never found."""
    return (tokens - 1) // PAGE_SIZE * PAGE_SIZE


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_a_second_identical_request(tiny: Server, path: str, body: dict[str, Any]) -> None:
    body = body | salt()
    first, second = answer(tiny, path, body), answer(tiny, path, body)
    assert cached(first["usage"]) == 0
    assert cached(second["usage"]) == whole_pages(first["usage"]["prompt_tokens"]) >= 144
    assert second["choices"] == first["choices"]  # text, log-probabilities, finish reason
    plain = answer(tiny, path, body | {"speculation": {"enabled": False}})
    assert cached(plain["usage"]) == cached(second["usage"])
    assert [choice["finish_reason"] for choice in plain["choices"]] == ["length"]
    streamed = body | {"stream": True, "stream_options": {"include_usage": True}}
    lines = tiny.post(path, DRAWN | streamed).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert cached(chunks[-1]["usage"]) == cached(second["usage"])


def test_the_next_turn_finds_prompt_and_answer(tiny: Server) -> None:
    """The answer is forced, so that its token ids are known. Its last token is never computed."""
    own, token = salt(), 100
    answer(tiny, COMPLETIONS, own | {"prompt": PROMPT[:50], "logit_bias": {str(token): 100}, "temperature": 0})
    following = {"prompt": [*PROMPT[:50], *[token] * 40, 7]}
    assert cached(answer(tiny, COMPLETIONS, own | following)["usage"]) == 80
    other = {"prompt": [*PROMPT[:40], 4, *PROMPT[41:]]}  # differs from token 40 on
    assert cached(answer(tiny, COMPLETIONS, own | other)["usage"]) == 32


def test_salts_do_not_mix(tiny: Server) -> None:
    salts = [salt(), salt(), {}]
    tiny.post(RESET, None)
    answers = [answer(tiny, COMPLETIONS, {"prompt": PROMPT} | own) for own in salts * 2]
    assert [cached(each["usage"]) for each in answers] == [0, 0, 0, 144, 144, 144]
    assert all(each["choices"] == answers[0]["choices"] for each in answers)


def test_after_a_reset_nothing_is_found(tiny: Server) -> None:
    body = {"prompt": PROMPT} | salt()
    first, second = answer(tiny, COMPLETIONS, body), answer(tiny, COMPLETIONS, body)
    emptied = tiny.post(RESET, None)
    assert (emptied.status_code, emptied.content) == (200, b"")
    third, fourth = answer(tiny, COMPLETIONS, body), answer(tiny, COMPLETIONS, body)
    assert [cached(each["usage"]) for each in (first, second, third, fourth)] == [0, 144, 0, 144]
    assert first["choices"] == second["choices"] == third["choices"] == fourth["choices"]
    eventually(lambda: tiny.idle())


def test_a_reset_beside_running_requests(tiny: Server) -> None:
    body = {"prompt": PROMPT, "max_tokens": 200} | salt()
    expected = answer(tiny, COMPLETIONS, body)["choices"]
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(answer, tiny, COMPLETIONS, body) for _ in range(8)]
        while not all(each.done() for each in answers):
            assert tiny.post(RESET, None).status_code == 200
    assert all(each.result()["choices"] == expected for each in answers)
    eventually(lambda: tiny.idle())


def test_choices_count_their_prompt_once(tiny: Server) -> None:
    own = salt()
    several = {"prompt": [PROMPT, PROMPT[::-1]], "n": 3} | own
    first, second = answer(tiny, COMPLETIONS, several), answer(tiny, COMPLETIONS, several)
    assert (cached(first["usage"]), cached(second["usage"])) == (0, 288)
    assert first["choices"] == second["choices"]
    alone = answer(tiny, COMPLETIONS, {"prompt": PROMPT, "n": 3} | salt())
    assert alone["choices"] == first["choices"][:3]


def test_metrics_count_tokens_and_cached_pages_are_not_in_use(tiny: Server) -> None:
    def totals() -> tuple[float, float]:
        return tiny.metric("vllm:prefix_cache_queries_total"), tiny.metric("magicdec_prefix_hits_total")

    eventually(lambda: tiny.idle())
    body = {"prompt": PROMPT} | salt()
    before = totals()
    usages = [answer(tiny, COMPLETIONS, body)["usage"] for _ in range(2)]
    assert [cached(usage) for usage in usages] == [0, 144]
    eventually(lambda: totals() == (before[0] + 300, before[1] + 144))
    eventually(lambda: tiny.idle() and tiny.metric("vllm:kv_cache_usage_perc") == 0)
    assert 'magicdec_pages{model_name="tiny",state="owned"} 0.0' in tiny.get("/metrics").text
    assert 'magicdec_pages{model_name="tiny",state="cached"} 0.0' not in tiny.get("/metrics").text


def test_without_a_prefix_cache(launch: Callable[..., Server], tiny: Server) -> None:
    server = launch("--no-prefix-cache")
    answers = [answer(server, COMPLETIONS, {"prompt": PROMPT}) for _ in range(2)]
    assert [cached(each["usage"]) for each in answers] == [0, 0]
    assert answers[0]["choices"] == answers[1]["choices"] == answer(tiny, COMPLETIONS, {"prompt": PROMPT})["choices"]
    assert server.post(RESET, None).status_code == 200
    assert 'state="cached"} 0.0' in server.get("/metrics").text
