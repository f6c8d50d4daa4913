"""The default model through OpenAI's own client."""

from __future__ import annotations

import uuid
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.support.profiles import is_all

MODEL = "default"


def test_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="The capital of France is", max_tokens=4, temperature=0, stop="\n"
    )
    (choice,) = answer.choices
    assert choice.text.startswith(" Paris")
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 5
    assert answer.usage.total_tokens == 5 + answer.usage.completion_tokens


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "What is the capital of France? Answer with one word."}],
        temperature=0,
        max_completion_tokens=20,
    )
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert "Paris" in (choice.message.content or "")
    assert "<|im_end|>" not in (choice.message.content or "")


def test_chat_ends_by_itself(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Say hello."}], temperature=0
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "stop"
    assert choice.message.content
    assert not choice.message.content.endswith("<|im_end|>")


def test_streams_join_to_the_same_text(client: openai.OpenAI) -> None:
    for seed in (1, 2) if is_all() else (1,):
        whole = client.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=30, seed=seed)
        stream = client.completions.create(
            model=MODEL,
            prompt="Once upon a time",
            max_tokens=30,
            seed=seed,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
        assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
        assert chunks[-1].choices == []
        assert chunks[-1].usage is not None
        assert whole.usage is not None
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_chat_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "system", "content": "You are terse."}, {"role": "user", "content": "Count to five."}],
        temperature=0,
        max_tokens=24,
        stream=True,
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")


def test_seeds(client: openai.OpenAI) -> None:
    def text(seed: int) -> str:
        answer = client.completions.create(
            model=MODEL, prompt="My favourite", max_tokens=20 if is_all() else 12, seed=seed
        )
        return answer.choices[0].text

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_choices(client: openai.OpenAI) -> None:
    several = client.completions.create(model=MODEL, prompt="My favourite", max_tokens=12, seed=1, n=3)
    texts = [choice.text for choice in several.choices]
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    alone = client.completions.create(model=MODEL, prompt="My favourite", max_tokens=12, seed=1)
    assert alone.choices[0].text == texts[0]


def test_stop(client: openai.OpenAI) -> None:
    prompt = "One, two, three,"
    whole = client.completions.create(model=MODEL, prompt=prompt, max_tokens=20, temperature=0).choices[0].text
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    cut = client.completions.create(model=MODEL, prompt=prompt, max_tokens=20, temperature=0, stop=[stop, "@@"])
    assert cut.choices[0].text == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    assert cut.usage is not None
    assert cut.usage.completion_tokens < 20


def test_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="The capital of France is", max_tokens=6, temperature=0, logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert "".join(logprobs.tokens) == answer.choices[0].text
    assert logprobs.text_offset == [len("".join(logprobs.tokens[:place])) for place in range(6)]
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert len(top) == 3
        assert max(top.values()) == top[token] == logprob <= 0


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Say hello."}],
        temperature=0,
        max_tokens=5,
        logprobs=True,
        top_logprobs=2,
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(entry.token for entry in logprobs.content) == answer.choices[0].message.content
    assert all(len(entry.top_logprobs) == 2 for entry in logprobs.content)
    assert (
        b"".join(bytes(entry.bytes or []) for entry in logprobs.content).decode() == answer.choices[0].message.content
    )


def test_echo(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="The end", max_tokens=0, echo=True)
    assert answer.choices[0].text == "The end"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0


def test_drafts_are_counted(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="1 2 3 4 5 6 7 8", max_tokens=40 if is_all() else 20, temperature=0
    )
    assert answer.usage is not None
    details = answer.usage.completion_tokens_details
    assert details is not None
    assert details.accepted_prediction_tokens
    assert details.accepted_prediction_tokens < 40


def test_cached_tokens(client: openai.OpenAI) -> None:
    """A salt of its own, so that the first request finds nothing."""
    extra = {"cache_salt": uuid.uuid4().hex}
    asked: list[ChatCompletionMessageParam] = [{"role": "user", "content": "one two three four five six " * 10}]
    texts, found, length = [], [], 0
    for key in ("a", "b"):
        answer = client.chat.completions.create(
            model=MODEL,
            messages=asked,
            temperature=0,
            max_tokens=12 if is_all() else 4,
            prompt_cache_key=key,
            extra_body=extra,
        )
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        texts.append(answer.choices[0].message.content)
        found.append(answer.usage.prompt_tokens_details.cached_tokens)
        length = answer.usage.prompt_tokens
    assert texts[0] == texts[1]
    assert found == [0, (length - 1) // 16 * 16]
    assert length > 48


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == MODEL == client.models.retrieve(MODEL).id


def test_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-4", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=MODEL, prompt=[5] * 2048)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as prediction:
        client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "x"}],
            prediction={"type": "content", "content": "x"},
        )
    assert (prediction.value.code, prediction.value.param) == ("not_served", "prediction")


@pytest.mark.parametrize("stream", [True, False])
def test_what_speculation_did(client: openai.OpenAI, stream: bool) -> None:
    """The report gives the origin of each token; requesting it changes nothing else."""
    length = 60 if is_all() else 20

    def ask(**speculation: object) -> tuple[str, list[dict[str, Any]]]:
        """Request a completion. Returns its text, and the reports in order."""
        body = {"speculation": speculation}
        answer: Any = client.completions.create(
            model=MODEL, prompt="1 2 3 4 5 6 7 8", max_tokens=length, temperature=0, stream=stream, extra_body=body
        )
        chunks = list(answer) if stream else [answer]
        choices = [choice for chunk in chunks for choice in chunk.choices]
        reports = [
            choice.model_extra["speculation"] for choice in choices if "speculation" in (choice.model_extra or {})
        ]
        return "".join(choice.text for choice in choices), reports

    text, reports = ask(report=True, max_draft_tokens=4)
    assert reports
    origins = [origin for report in reports for origin in report["origins"]]
    offsets = [offset for report in reports for offset in report["offsets"]]
    total = reports[-1]["total"] if stream else reports[-1]
    assert len(origins) == len(offsets) == length
    assert offsets == sorted(offsets)
    assert offsets[-1] <= len(text)
    assert sum(origins.count(each) for each in ("self", "model", "text")) == total["accepted"]
    assert sum(total["accepted_per_round"]) == total["rounds"] == length - total["accepted"]
    assert 0 <= total["queue_s"] <= total["first_token_s"]
    plain, told = ask(report=True, enabled=False)
    assert plain == text
    assert {origin for report in told for origin in report["origins"]} == {"plain"}
    quiet, nothing = ask(max_draft_tokens=4)
    assert (quiet, nothing) == (text, [])
