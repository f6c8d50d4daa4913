"""What clients of OpenAI's API and of vLLM may send is served."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.messages import EngineStats, Ready
from engine.params import SamplingParams
from server.bodies.chat_body import ChatRequest
from server.bodies.schemas import CompletionRequest

READY = Ready(model="m", max_model_len=100, vocab_size=50, eos_token_ids=[2], stats=EngineStats())
MESSAGE = {"role": "user", "content": "x"}


def completion(fields: dict[str, Any]) -> CompletionRequest:
    body = CompletionRequest.model_validate_json(json.dumps({"prompt": "x", **fields}))
    body.check()
    return body


def chat(fields: dict[str, Any]) -> ChatRequest:
    body = ChatRequest.model_validate_json(json.dumps({"messages": [MESSAGE], **fields}))
    body.check()
    return body


def params(fields: dict[str, Any]) -> SamplingParams:
    return completion({"seed": 1, **fields}).sampling(READY, max_tokens=16, logprobs=None)


@pytest.mark.parametrize(
    ("fields", "params_of_them"),
    [
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"temperature": 2}, {"temperature": 2.0}),
        ({"temperature": 1000}, {"temperature": 1000.0}),
        ({"top_p": 0}, {"top_p": 0.0}),
        ({"top_p": 1}, {"top_p": 1.0}),
        ({"top_k": 10**6}, {"top_k": 10**6}),
        ({"top_k": 10**12}, {"top_k": 2**31 - 1}),
        ({"top_k": -1.0}, {"top_k": 0}),
        ({"min_p": 1}, {"min_p": 1.0}),
        ({"min_tokens": 3.0}, {"min_tokens": 3}),
        ({"seed": -(2**63)}, {"seed": -(2**63)}),
        ({"seed": 2**63 - 1}, {"seed": 2**63 - 1}),
        ({"seed": 42.0}, {"seed": 42}),
        ({"presence_penalty": -2, "frequency_penalty": 2}, {"presence_penalty": -2.0, "frequency_penalty": 2.0}),
        ({"repetition_penalty": 0.001}, {"repetition_penalty": 0.001}),
        ({"repetition_penalty": 1000}, {"repetition_penalty": 1000.0}),
        ({"logit_bias": {"49": -100, "0": 100}}, {"logit_bias": {49: -100.0, 0: 100.0}}),
        ({"logit_bias": {}}, {}),
        ({"stop": []}, {}),
        ({"stop": "a"}, {"stop": ("a",)}),
        ({"stop_token_ids": []}, {}),
        ({"prompt_logprobs": 20.0}, {"prompt_logprobs": 20}),
        ({"speculation": {"max_draft_tokens": 2.0}}, {"max_draft_tokens": 2}),
    ],
)
def test_parameters(fields: dict[str, Any], params_of_them: dict[str, Any]) -> None:
    assert params(fields) == SamplingParams(**{"max_tokens": 16, "seed": 1, **params_of_them})


@pytest.mark.parametrize(
    ("fields", "parsed"),
    [
        ({"n": 2.0, "best_of": 2.0}, {"n": 2, "best_of": 2}),
        ({"best_of": 1}, {"best_of": 1}),
        ({"max_tokens": 0}, {"max_tokens": 0}),
        ({"max_tokens": 7.0}, {"max_tokens": 7}),
        ({"logprobs": 20}, {"logprobs": 20}),
        ({"logprobs": False}, {"logprobs": None}),
        ({"allowed_token_ids": [5, 3, 5, 3, 4]}, {"allowed_token_ids": [5, 3, 4]}),
        ({"allowed_token_ids": [*range(2**18)] * 2}, {"allowed_token_ids": [*range(2**18)]}),
        ({"truncate_prompt_tokens": -1, "suffix": ""}, {"truncate_prompt_tokens": -1}),
        ({"truncate_prompt_tokens": 5.0, "priority": -1.0}, {"truncate_prompt_tokens": 5, "priority": -1}),
        ({"cache_salt": "ü" * 1024}, {"cache_salt": "ü" * 1024}),
    ],
)
def test_fields_of_completions(fields: dict[str, Any], parsed: dict[str, Any]) -> None:
    body = completion(fields)
    assert {name: getattr(body, name) for name in parsed} == parsed
    assert all(type(getattr(body, name)) is type(value) for name, value in parsed.items())


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 5, "max_completion_tokens": 7.0},
        {"logprobs": False, "top_logprobs": 0},
        {"logprobs": True, "top_logprobs": 20.0},
        {"stream": True, "stream_options": {"include_usage": True}},
        *({"tool_choice": choice, "tools": []} for choice in ("none", "auto")),
        {"parallel_tool_calls": True},
        {"functions": [], "function_call": "auto"},
        {"documents": [], "chat_template_kwargs": {}, "mm_processor_kwargs": {}},
    ],
)
def test_fields_of_chats(fields: dict[str, Any]) -> None:
    chat(fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "x", "safety_identifier": "x", "prompt_cache_key": "x"},
        {"metadata": {"a": "b"}, "store": True},
        *({"service_tier": tier} for tier in ("auto", "default", "flex", "priority", "scale")),
        *({"verbosity": verbosity} for verbosity in ("low", "medium", "high")),
        {"logits_processors": [], "kv_transfer_params": {}, "vllm_xargs": {}},
    ],
)
def test_fields_without_effect(fields: dict[str, Any]) -> None:
    chat(fields)
    completion(fields)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": "x", "annotations": [], "refusal": None, "tool_calls": []},
        {"role": "assistant", "content": "x", "annotations": [{"type": "url_citation"}], "refusal": ""},
        {"role": "user", "content": "x", "id": "message-1", "timestamp": "2030-01-01T00:00:00Z"},
        {"role": "user", "content": "x", "id": 5, "timestamp": 1.5},
        {"role": "assistant", "content": "x", "provider_specific_fields": {"reasoning": "y"}, "function_call": None},
        {"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]},
        {"role": "developer", "content": "x", "name": "ann"},
    ],
)
def test_messages(message: dict[str, Any]) -> None:
    (parsed,) = chat({"messages": [message]}).messages
    assert parsed.content == "x"
