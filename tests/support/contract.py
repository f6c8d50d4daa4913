"""The shape of error answers, and routes that tests of the HTTP contract use."""

from __future__ import annotations

from typing import Any

import httpx

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
RESPONSES = "/v1/responses"
USER = [{"role": "user", "content": "hi"}]


NOT_SERVED_ON_BOTH: dict[str, Any] = {
    "guided_decoding_backend": "x",
    "guided_whitespace_pattern": "x",
    "kv_transfer_params": {"a": 1},
    "length_penalty": 0.5,
    "logits_processors": ["a"],
    "return_tokens_as_token_ids": True,
    "spaces_between_special_tokens": False,
    "structural_tag": "x",
    "use_beam_search": True,
    "vllm_xargs": {"a": 1},
}


NOT_SERVED_ON_COMPLETIONS: dict[str, Any] = {"suffix": "x", "prompt_embeds": "x", "best_of": 2}


NOT_SERVED_ON_CHAT: dict[str, Any] = {
    "audio": {},
    "chat_template": "{{ messages }}",
    "documents": [{}],
    "echo": True,
    "function_call": {"name": "f"},
    "functions": [{}],
    "mm_processor_kwargs": {"a": 1},
    "modalities": ["audio"],
    "prediction": {},
    "prompt_cache_retention": "x",
    "reasoning_effort": "low",
    "web_search_options": {},
}


def fault(answer: httpx.Response, status: int, code: str | None = None) -> dict[str, Any]:
    """Check the shape of an error response and return its error object."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["code"], str)
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    assert len(error["message"]) <= 500
    assert "Traceback" not in error["message"]
    assert ".py" not in error["message"]
    if code is not None:
        assert error["code"] == code
    return error
