"""Request bodies and their conversion to SamplingParams, prompts and seeds."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from engine.messages import EngineStats, Ready
from engine.params import SamplingParams
from server.bodies.chat_body import ChatRequest
from server.bodies.fields import choice_seed
from server.bodies.schemas import CompletionRequest, DetokenizeRequest, TokenizeRequest
from server.errors import MAX_MESSAGE, ApiError, from_validation, printable

READY = Ready(model="m", max_model_len=100, vocab_size=50, eos_token_ids=[2], stats=EngineStats())


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate_json(json.dumps({"prompt": "x", **fields}))


def chat(**fields: Any) -> ChatRequest:
    messages = [{"role": "user", "content": "x"}]
    return ChatRequest.model_validate_json(json.dumps({"messages": messages, **fields}))


def params(**fields: Any) -> SamplingParams:
    return completion(**fields).sampling(READY, max_tokens=16, logprobs=None)


def refusal(model: type[CompletionRequest] | type[ChatRequest], body: bytes) -> ApiError:
    with pytest.raises(ValidationError) as caught:
        model.model_validate_json(body)
    return from_validation(caught.value)


def test_defaults_are_those_of_the_api() -> None:
    assert params(seed=1) == SamplingParams(seed=1, temperature=1.0, max_tokens=16)


def test_no_seed_is_a_new_one_each_time() -> None:
    assert params().seed != params().seed


def test_every_field_arrives() -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "seed": -5,
        "presence_penalty": 1,
        "frequency_penalty": -1.5,
        "repetition_penalty": 1.2,
        "logit_bias": {"3": -100, "4": 5.5},
        "stop": ["a", "b"],
        "stop_token_ids": [5],
        "min_tokens": 2,
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "speculation": {"max_draft_tokens": 2},
    }
    want = {**fields, "logit_bias": {3: -100.0, 4: 5.5}, "stop": ("a", "b"), "stop_token_ids": (5,)}
    del want["speculation"]
    assert params(**fields) == SamplingParams(max_tokens=16, max_draft_tokens=2, **want)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("speculation", "most"),
    [
        (None, None),
        ({}, None),
        ({"enabled": True}, None),
        ({"enabled": False}, 0),
        ({"enabled": False, "max_draft_tokens": 4}, 0),
        ({"enabled": True, "max_draft_tokens": 4}, 4),
        ({"max_draft_tokens": 0}, 0),
    ],
)
def test_speculation(speculation: dict[str, Any] | None, most: int | None) -> None:
    assert params(speculation=speculation).max_draft_tokens == most


@pytest.mark.parametrize("name", sorted(CompletionRequest.model_fields.keys() - {"prompt"}))
def test_null_is_absent_on_completions(name: str) -> None:
    body = completion(**{name: None})
    body.check()
    assert body == completion()


@pytest.mark.parametrize("name", sorted(ChatRequest.model_fields.keys() - {"messages"}))
def test_null_is_absent_on_chat(name: str) -> None:
    body = chat(**{name: None})
    body.check()
    assert body == chat()


@pytest.mark.parametrize(("top_k", "kept"), [(0, 0), (-1, 0), (3, 3)])
def test_top_k_off(top_k: int, kept: int) -> None:
    assert params(top_k=top_k).top_k == kept


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("", [""]),
        ("ab", ["ab"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        ([[]], [[]]),
    ],
)
def test_prompts(prompt: Any, prompts: list[Any]) -> None:
    assert completion(prompt=prompt).prompt == prompts


@pytest.mark.parametrize("prompt", [None, 1, {}, [], [1, "a"], ["a", [1]], [[1], 2], [[1.5]], [True], [[[1]]], [None]])
def test_a_malformed_prompt_is_one_short_message(prompt: Any) -> None:
    error = refusal(CompletionRequest, json.dumps({"prompt": prompt}).encode())
    assert error.param == "prompt"
    assert error.message.startswith("prompt: expected a string, a list of")
    assert len(error.message) < 150


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 1e31}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"50": 1}}, "logit_bias"),
        ({"stop_token_ids": [50]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": [10**4000]}, "stop_token_ids"),
    ],
)
def test_out_of_range(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        params(**fields)
    assert caught.value.param == param
    assert param in caught.value.message
    assert len(caught.value.message) < 100


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_k": -2}, "top_k"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"stop": 5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ["a", 1]}, "stop"),
        ({"stream": 1}, "stream"),
        ({"stop": ["a" * 1001]}, "stop"),
        ({"stop_token_ids": 5}, "stop_token_ids"),
        ({"stop_token_ids": [5.0]}, "stop_token_ids"),
        ({"stop_token_ids": [True]}, "stop_token_ids"),
        ({"stop_token_ids": [5] * 1025}, "stop_token_ids"),
        ({"stop_token_ids": [""] * 100_000}, "stop_token_ids"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": list(range(2**18 + 1))}, "allowed_token_ids"),
        ({"max_tokens": 2**31}, "max_tokens"),
        ({"logit_bias": {"3": 101}}, "logit_bias"),
        ({"logit_bias": {"3": "1"}}, "logit_bias"),
        ({"logit_bias": {"3": True}}, "logit_bias"),
        ({"logit_bias": []}, "logit_bias"),
        ({"logit_bias": {str(key): 1 for key in range(5000)}}, "logit_bias"),
        *(
            ({"logit_bias": {key: 1}}, "logit_bias")
            for key in ("x", "", " 1", "1.0", "1_0", "01", "-1", "٣", "9" * 5000)
        ),
        ({"request_id": "a b"}, "request_id"),
        ({"request_id": "é"}, "request_id"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"cache_salt": "x" * 1025}, "cache_salt"),
        ({"cache_salt": 5}, "cache_salt"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"suffix": 5}, "suffix"),
        ({"speculation": {"max_draft_tokens": -1}}, "speculation.max_draft_tokens"),
        ({"speculation": {"gamma": 1}}, "speculation.gamma"),
        ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
    ],
)
def test_wrong_types_and_values(fields: dict[str, Any], param: str) -> None:
    error = refusal(CompletionRequest, json.dumps({"prompt": "x", **fields}).encode())
    assert error.param == param
    assert error.message.startswith(f"{param}: ")


def test_a_bad_request_id_is_explained_in_words() -> None:
    error = refusal(CompletionRequest, b'{"prompt": "x", "request_id": "a b"}')
    assert error.message == "request_id: expected 1 to 128 letters, digits and . _ : -"


def test_many_faults_are_not_told_one_by_one() -> None:
    error = refusal(CompletionRequest, json.dumps({"prompt": "x", **{f"k{i}": 1 for i in range(1000)}}).encode())
    assert (error.param, error.message) == (None, "the body has 1000 faults")


@pytest.mark.parametrize("message", [{"role": "user", "content": [{"type": "text", "text": "a"}] * 5000}, None])
def test_conversations_have_an_end(message: Any) -> None:
    messages = [message] if message else [{"role": "user", "content": "a"}] * 5000
    error = refusal(ChatRequest, json.dumps({"messages": messages}).encode())
    assert (error.param or "").startswith("messages")
    assert "at most" in error.message


def test_an_answer_can_be_sent_back() -> None:
    parts = {"refusal": None, "annotations": None, "audio": None, "function_call": None, "tool_calls": None}
    assert chat(messages=[{"role": "assistant", "content": "a", **parts}]).messages[0].content == "a"


@pytest.mark.parametrize("tokens", [None, "a", [-1], [2**31], [10**4000], [1.5], [True], [[1]]])
def test_tokens_that_are_none(tokens: Any) -> None:
    with pytest.raises(ValidationError):
        DetokenizeRequest.model_validate_json(json.dumps({"tokens": tokens}))


def test_nan_is_refused() -> None:
    assert refusal(CompletionRequest, b'{"prompt": "x", "logit_bias": {"1": NaN}}').param == "logit_bias"
    assert refusal(CompletionRequest, b'{"prompt": "x", "temperature": NaN}').param == "temperature"


@pytest.mark.parametrize(
    "body", [b"", b"{", b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}', b"[" * 100_000, b'{"prompt": "x"} x']
)
def test_what_is_not_json(body: bytes) -> None:
    error = refusal(CompletionRequest, body)
    assert (error.code, error.param) == ("invalid_json", None)


def test_unknown_keys_inside_stream_options_and_metadata_pass() -> None:
    completion(stream=True, stream_options={"x": 1, "include_usage": True}, metadata={"a": {"b": 1}}).check()


def test_chat_content_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = chat(messages=[{"role": "user", "content": parts}])
    assert body.messages[0].content == "a\nb"


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user"},
        {"role": "user", "content": None},
        {"role": "user", "content": []},
        {"role": "user", "content": 5},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "user", "content": [{"type": "text"}]},
        {"role": "user", "content": ["a"]},
        {"role": "tool", "content": None},
        {"role": "function", "content": "x"},
        {"role": "user", "content": "x", "tool_call_id": "a"},
        {"role": "assistant", "tool_calls": []},
        {"role": "user", "content": [{"type": "text", "text": "x", "other": 1}]},
        {"role": "user", "content": "x", "tool_calls": [{}]},
        {"role": "user", "content": "x", "other": 1},
        "x",
    ],
)
def test_messages_that_are_refused(message: Any) -> None:
    error = refusal(ChatRequest, json.dumps({"messages": [message]}).encode())
    assert (error.param or "").startswith("messages.0")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 2}, "best_of"),
        ({"best_of": 2, "n": 3}, "best_of"),
        ({"stream_options": {}}, "stream_options"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ],
)
def test_fields_that_contradict_each_other(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        completion(**fields).check()
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"top_logprobs": 1, "logprobs": False}, "top_logprobs"),
    ],
)
def test_chat_fields_that_contradict_each_other(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        chat(**fields).check()
    assert caught.value.param == param


def test_tokenize_takes_one_of_prompt_and_messages() -> None:
    for fields in ({}, {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}):
        with pytest.raises(ApiError):
            TokenizeRequest.model_validate_json(json.dumps(fields)).check()


@given(seed=st.integers(-(2**63), 2**63 - 1))
def test_choices_have_seeds_of_their_own(seed: int) -> None:
    seeds = [choice_seed(seed, index) for index in range(8)]
    assert seeds[0] == seed
    assert len(set(seeds)) == 8
    assert all(-(2**63) <= value < 2**63 for value in seeds)
    assert seeds == [choice_seed(seed, index) for index in range(8)]


@given(text=st.text(), limit=st.integers(1, 50))
def test_messages_are_short_and_printable(text: str, limit: int) -> None:
    shown = printable(text, limit)
    assert shown.isprintable()
    assert len(text) > limit or shown.count("\\x") >= sum(not char.isprintable() for char in text)


def test_a_long_key_is_cut() -> None:
    error = refusal(CompletionRequest, json.dumps({"prompt": "x", "k\n" * 5000: 1}).encode())
    message = error.body()["error"]["message"] or ""
    assert len(message) <= MAX_MESSAGE
    assert "\n" not in message
    assert len(error.param or "") < 300
