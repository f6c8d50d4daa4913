"""The HTTP contract: requests that are refused, byte by byte."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support.contract import (
    CHAT,
    COMPLETIONS,
    NOT_SERVED_ON_BOTH,
    NOT_SERVED_ON_CHAT,
    NOT_SERVED_ON_COMPLETIONS,
    USER,
    fault,
)
from tests.support.servers import PATIENCE_S, PLAIN, Server


@pytest.mark.parametrize(("field", "value"), [*NOT_SERVED_ON_BOTH.items(), *NOT_SERVED_ON_COMPLETIONS.items()])
def test_known_fields_not_served_on_completions(tiny: Server, field: str, value: Any) -> None:
    error = fault(tiny.post(COMPLETIONS, {"prompt": "x", field: value}), 400, "not_served")
    assert error["param"] == field
    assert field in error["message"]


@pytest.mark.parametrize(("field", "value"), [*NOT_SERVED_ON_BOTH.items(), *NOT_SERVED_ON_CHAT.items()])
def test_known_fields_not_served_on_chat(tiny: Server, field: str, value: Any) -> None:
    error = fault(tiny.post(CHAT, {"messages": USER, field: value}), 400, "not_served")
    assert error["param"] == field
    assert field in error["message"]


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "prompt", "missing_field"),
        ({"prompt": None}, "prompt", "invalid_value"),
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": []}, "prompt", "invalid_value"),
        ({"prompt": [[]]}, "prompt", "invalid_value"),
        ({"prompt": [1, "a"]}, "prompt", "invalid_value"),
        ({"prompt": {"a": [1] * 1000}}, "prompt", "invalid_value"),
        ({"prompt": [320]}, "prompt", "invalid_value"),
        ({"prompt": [-1]}, "prompt", "invalid_value"),
        ({"prompt": "x", "max_tokens": -1}, "max_tokens", "invalid_value"),
        ({"prompt": "x", "max_tokens": "5"}, "max_tokens", "invalid_value"),
        ({"prompt": "x", "max_tokens": 5000}, "max_tokens", "context_length_exceeded"),
        ({"prompt": [5] * 5000}, "prompt", "context_length_exceeded"),
        ({"prompt": [5] * 4352}, "prompt", "context_length_exceeded"),
        ({"prompt": "x", "temperature": -1}, "temperature", "invalid_value"),
        ({"prompt": "x", "top_p": 1.5}, "top_p", "invalid_value"),
        ({"prompt": "x", "seed": 2**64}, "seed", "invalid_value"),
        ({"prompt": "x", "n": 0}, "n", "invalid_value"),
        ({"prompt": ["x"] * 100, "n": 100}, "n", "invalid_value"),
        ({"prompt": "x", "logprobs": 21}, "logprobs", "invalid_value"),
        ({"prompt": "x", "prompt_logprobs": 21}, "prompt_logprobs", "invalid_value"),
        ({"prompt": "x", "prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "invalid_value"),
        ({"prompt": "x", "logit_bias": {"320": 1}}, "logit_bias", "invalid_value"),
        ({"prompt": "x", "min_tokens": 20}, "min_tokens", "invalid_value"),
        ({"prompt": "x", "stop": ["a"] * 17}, "stop", "invalid_value"),
        ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"prompt": "x", "nonsense": 1}, "nonsense", "unknown_field"),
        ({"prompt": "x", "model": 5}, "model", "invalid_value"),
    ],
)
def test_completions_that_are_refused(tiny: Server, body: dict[str, Any], param: str, code: str) -> None:
    assert fault(tiny.post(COMPLETIONS, body), 400, code)["param"] == param


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "messages", "missing_field"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "hi"}, "messages", "invalid_value"),
        ({"messages": [{"role": "alien", "content": "x"}]}, "messages.0.role", "invalid_value"),
        ({"messages": USER, "max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"messages": USER, "top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"messages": USER, "logprobs": 2}, "logprobs", "invalid_value"),
        ({"messages": USER, "prompt": "x"}, "prompt", "unknown_field"),
        ({"messages": [{"role": "user", "content": "a" * 9000}]}, "messages", "context_length_exceeded"),
        ({"messages": USER, "tools": [{"type": "web_search"}]}, "tools.0.type", "not_served"),
    ],
)
def test_chats_that_are_refused(tiny: Server, body: dict[str, Any], param: str, code: str) -> None:
    assert fault(tiny.post(CHAT, body), 400, code)["param"] == param


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"nonsense", b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}', b"[" * 50_000, b"null", b"[]", b'"x"'],
)
def test_what_is_no_json_object(tiny: Server, content: bytes) -> None:
    fault(httpx.post(tiny.url + COMPLETIONS, content=content, **PLAIN), 400)


def test_input_is_hardly_repeated(tiny: Server) -> None:
    long = "secret\x1b[31m\n" * 1000
    for body in ({"prompt": {"x": long}}, {"prompt": "x", long: 1}, {"prompt": "x", "seed": long}):
        error = fault(tiny.post(COMPLETIONS, body), 400)
        assert error["message"].isprintable()
        assert error["message"].count("secret") < 10
    fault(tiny.post(COMPLETIONS, {"prompt": "x", "model": long}), 404, "model_not_found")


def test_unknown_models_and_routes(tiny: Server) -> None:
    error = fault(tiny.post(COMPLETIONS, {"prompt": "x", "model": "gpt"}), 404, "model_not_found")
    assert error["param"] == "model"
    fault(tiny.post(CHAT, {"messages": USER, "model": "gpt"}), 404, "model_not_found")
    fault(tiny.post("/tokenize", {"prompt": "x", "model": "gpt"}), 404, "model_not_found")
    fault(tiny.get("/v1/models/gpt"), 404, "model_not_found")
    fault(tiny.get("/v1/nothing"), 404, "not_found")
    assert "GET" in fault(tiny.get(COMPLETIONS), 405, "method_not_allowed")["message"]


def body_of(size: int) -> bytes:
    return json.dumps({"prompt": "x", "user": "u" * size}).encode()


def test_body_cap(tiny: Server) -> None:
    limit = 2**18

    def chunks(content: bytes) -> Iterator[bytes]:
        for place in range(0, len(content), 10_000):
            yield content[place : place + 10_000]

    small, large = body_of(limit - 1000), body_of(limit)
    for content, whole in ((small, small), (chunks(small), small), (large, large), (chunks(large), large)):
        answer = httpx.post(tiny.url + COMPLETIONS, content=content, **PLAIN)
        if len(whole) > limit:
            fault(answer, 413, "body_too_large")
        else:
            assert answer.status_code == 200


def test_an_announced_length_is_refused_before_the_body_comes(tiny: Server) -> None:
    host, port = tiny.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9999999999\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_what_is_not_http(tiny: Server) -> None:
    host, port = tiny.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as connection:
        connection.sendall(b"nonsense\r\n\r\n")
        head, _, body = connection.makefile("rb").read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["code"] == "invalid_http"
