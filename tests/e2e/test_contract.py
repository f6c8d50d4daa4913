"""The HTTP contract, byte by byte, with a plain HTTP client."""

from __future__ import annotations

import json
import re
import shlex
from typing import Any

import httpx
import jsonschema

from tests.support.contract import (
    CHAT,
    COMPLETIONS,
    NOT_SERVED_ON_BOTH,
    NOT_SERVED_ON_CHAT,
    NOT_SERVED_ON_COMPLETIONS,
    RESPONSES,
    USER,
    fault,
)
from tests.support.servers import PLAIN, Server

MESSAGES = "/v1/messages"

HARMLESS_ON_BOTH: dict[str, Any] = {
    "response_format": {"type": "text"},
    "priority": 0,
    "cache_salt": "x",
    "use_beam_search": False,
    "length_penalty": 1.0,
    "user": "somebody",
    "metadata": {"any": {"thing": 1}},
    "best_of": 1,
    "temperature": 0,
    "top_k": -1,
    "prompt_cache_key": "x",
    "safety_identifier": "x",
    "service_tier": "flex",
    "store": True,
    "verbosity": "low",
}


def test_values_that_change_nothing_are_taken(tiny: Server) -> None:
    assert tiny.post(COMPLETIONS, {"prompt": "x", "max_tokens": 1, **HARMLESS_ON_BOTH}).status_code == 200
    chat = {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "modalities": ["text"], "echo": False}
    assert tiny.post(CHAT, {"messages": USER, "max_tokens": 1, **HARMLESS_ON_BOTH, **chat}).status_code == 200


def test_the_ready_line_is_a_command_that_works(tiny: Server) -> None:
    arguments = shlex.split(tiny.ready_line.removeprefix("ready: "))
    assert arguments[0] == "curl"
    url, headers, data = arguments[1], arguments[3], arguments[5]
    name, _, value = headers.partition(": ")
    answer = httpx.post(url, headers={name: value}, content=data, **PLAIN)
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["role"] == "assistant"


NULLS = {
    *("model", "n", "best_of", "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop"),
    *("stop_token_ids", "ignore_eos", "include_stop_str_in_output", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "logit_bias", "logprobs", "stream", "stream_options", "skip_special_tokens", "user"),
    *("add_special_tokens", "truncate_prompt_tokens", "request_id", "metadata", "speculation", "response_format"),
    "cache_salt",
    *NOT_SERVED_ON_BOTH,
}


def test_null_is_absent(tiny: Server) -> None:
    body = {"prompt": "x", **dict.fromkeys([*NULLS, *NOT_SERVED_ON_COMPLETIONS, "echo"])}
    assert tiny.post(COMPLETIONS, body).status_code == 200
    names = [*NULLS, *NOT_SERVED_ON_CHAT, "max_completion_tokens", "top_logprobs"]
    assert tiny.post(CHAT, {"messages": USER, **dict.fromkeys(names), "max_tokens": 2}).status_code == 200


def test_sse_framing(tiny: Server) -> None:
    body = {
        "prompt": ["ab", "cd"],
        "n": 2,
        "max_tokens": 40,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True, "some_extension": 1},
        "request_id": "my-id.1",
    }
    answer = tiny.post(COMPLETIONS, body)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-request-id"] == "cmpl-my-id.1"
    assert answer.text.endswith("\n\ndata: [DONE]\n\n")
    blocks = answer.text.removesuffix("\n\n").split("\n\n")
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    chunks = [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]
    assert {chunk["id"] for chunk in chunks} == {"cmpl-my-id.1"}
    *content, usage = chunks
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 160
    assert set(usage["usage"]["prompt_tokens_details"]) == {"cached_tokens"}
    details = usage["usage"]["completion_tokens_details"]
    assert set(details) == {"reasoning_tokens", "accepted_prediction_tokens", "rejected_prediction_tokens"}
    assert all(chunk["usage"] is None for chunk in content)
    reasons: dict[int, list[str | None]] = {}
    for chunk in content:
        (choice,) = chunk["choices"]
        reasons.setdefault(choice["index"], []).append(choice["finish_reason"])
    assert sorted(reasons) == [0, 1, 2, 3]
    assert all(all(reason is None for reason in each[:-1]) and each[-1] == "length" for each in reasons.values())


def test_models(tiny: Server) -> None:
    listed = tiny.get("/v1/models").json()
    assert listed["object"] == "list"
    (card,) = listed["data"]
    assert card == tiny.get("/v1/models/tiny").json()
    assert (card["id"], card["object"], card["max_model_len"]) == ("tiny", "model", 4352)
    assert card["root"].endswith("tiny")
    assert isinstance(card["created"], int)


def test_tokenize_and_detokenize(tiny: Server) -> None:
    text = "größer 日本\n"
    answer = tiny.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 4352
    assert tiny.post("/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": text}
    chat = tiny.post("/tokenize", {"messages": USER}).json()
    rendered = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tiny.post("/detokenize", {"tokens": chat["tokens"]}).json() == {"prompt": rendered}
    bare = tiny.post("/tokenize", {"messages": USER, "add_generation_prompt": False}).json()
    assert bare["count"] < chat["count"]
    fault(tiny.post("/tokenize", {}), 400)
    fault(tiny.post("/detokenize", {"tokens": [-1]}), 400)
    fault(tiny.post("/detokenize", {"tokens": [2**40]}), 400)
    fault(tiny.post("/detokenize", {"tokens": "x"}), 400)


def test_about_the_server(tiny: Server) -> None:
    assert tiny.get("/health").json() == {"status": "ok"}
    assert tiny.get("/ready").status_code == 200
    assert set(tiny.get("/version").json()) == {"version", "commit"}
    assert set(tiny.load()) == {"state", "running", "waiting", "pages_total", "pages_free"}
    metrics = tiny.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    for name in ("vllm:num_requests_running", "vllm:spec_decode_num_drafts_total", "vllm:prefix_cache_hits_total"):
        assert f'\n{name}{{model_name="tiny"}} ' in metrics.text


def test_echo(tiny: Server) -> None:
    with_text = {"prompt": "größer ", "max_tokens": 5, "echo": True, "seed": 1, "ignore_eos": True}
    without = tiny.post(COMPLETIONS, {**with_text, "echo": False}).json()
    answer = tiny.post(COMPLETIONS, with_text).json()
    assert answer["choices"][0]["text"] == "größer " + without["choices"][0]["text"]
    assert answer["usage"] == without["usage"]
    nothing = tiny.post(COMPLETIONS, {**with_text, "max_tokens": 0}).json()
    assert nothing["choices"][0]["text"] == "größer "
    assert nothing["choices"][0]["finish_reason"] == "length"
    assert nothing["usage"]["completion_tokens"] == 0
    ids = tiny.post("/tokenize", {"prompt": "größer "}).json()["tokens"]
    answer = tiny.post(COMPLETIONS, {**with_text, "prompt": ids, "truncate_prompt_tokens": 2, "max_tokens": 0}).json()
    assert answer["choices"][0]["text"] == tiny.post("/detokenize", {"tokens": ids[-2:]}).json()["prompt"]
    assert answer["usage"]["prompt_tokens"] == 2


def test_speculation_changes_no_text(tiny: Server) -> None:
    body = {"prompt": "abc", "max_tokens": 60, "seed": 9, "n": 3, "ignore_eos": True}
    answers = []
    for speculation in (None, {"enabled": False}, {"max_draft_tokens": 1}):
        answers.append(tiny.post(COMPLETIONS, {**body, "speculation": speculation}).json())
    texts = [[choice["text"] for choice in answer["choices"]] for answer in answers]
    assert texts[0] == texts[1] == texts[2]
    plain = answers[1]["usage"]["completion_tokens_details"]
    assert set(plain.values()) == {0}
    drafted = answers[0]["usage"]["completion_tokens_details"]
    assert sum(drafted.values()) > 0


def test_logit_bias_and_stop_tokens(tiny: Server) -> None:
    body = {"prompt": "abc", "max_tokens": 5, "logit_bias": {"100": 100}, "temperature": 0, "logprobs": 0}
    answer = tiny.post(COMPLETIONS, body).json()
    assert len(set(answer["choices"][0]["logprobs"]["tokens"])) == 1
    text = answer["choices"][0]["text"]
    stopped = tiny.post(COMPLETIONS, {**body, "stop_token_ids": [100]}).json()
    (choice,) = stopped["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("", "stop", 100)
    assert stopped["usage"]["completion_tokens"] == 1
    shown = tiny.post(COMPLETIONS, {**body, "stop_token_ids": [100], "include_stop_str_in_output": True}).json()
    assert text.startswith(shown["choices"][0]["text"])
    assert len(shown["choices"][0]["text"]) > 0


def test_log_probabilities_of_prompts(tiny: Server) -> None:
    """Prompt log-probabilities through `echo` and through their own field; streamed or not, with and without new
    tokens."""
    text = "größer → the quick 🙂 fox"
    ids = tiny.post("/tokenize", {"prompt": text}).json()["tokens"]
    body = {"prompt": text, "temperature": 0, "logprobs": 2, "echo": True}
    (whole,) = tiny.post(COMPLETIONS, body | {"max_tokens": 3}).json()["choices"]
    said = whole["logprobs"]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert len(said[name]) == len(ids) + 3
    assert (said["token_logprobs"][0], said["top_logprobs"][0], said["text_offset"][0]) == (None, None, 0)
    assert all(logprob < 0 for logprob in said["token_logprobs"][1:])
    assert said["text_offset"][len(ids)] == len(text)
    assert said["text_offset"] == sorted(said["text_offset"])
    (alone,) = tiny.post(COMPLETIONS, body | {"max_tokens": 0}).json()["choices"]
    assert (alone["text"], alone["finish_reason"]) == (text, "length")
    for name, values in alone["logprobs"].items():
        assert values == said[name][: len(ids)]
    lines = tiny.post(COMPLETIONS, body | {"max_tokens": 3, "stream": True}).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    streamed = [choice["logprobs"] for chunk in chunks for choice in chunk["choices"] if choice["logprobs"]]
    assert [logprob for each in streamed for logprob in each["token_logprobs"]] == said["token_logprobs"]
    asked = {"prompt": text, "temperature": 0, "max_tokens": 0, "prompt_logprobs": 2}
    (own,) = tiny.post(COMPLETIONS, asked).json()["choices"]
    first, *others = own["prompt_logprobs"]
    assert first is None
    for token, each, logprob in zip(ids[1:], others, said["token_logprobs"][1:], strict=False):
        assert each[str(token)]["logprob"] == logprob
        assert each[str(token)]["rank"] >= 1
        assert len(each) in (2, 3)
    chat = tiny.post(CHAT, {"messages": USER, "max_tokens": 1, "prompt_logprobs": 0}).json()
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]


def test_openapi(tiny: Server) -> None:
    """The server accepts bodies that its OpenAPI schemas allow, and every reference resolves."""
    document = tiny.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    references = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert references <= set(schemas)
    for path, name, limit, body in (
        (COMPLETIONS, "CompletionRequest", "max_tokens", {"prompt": [[1, 2], [3]], "logit_bias": {"5": 1.0}}),
        (CHAT, "ChatRequest", "max_tokens", {"messages": USER, "response_format": {"type": "text"}, "stop": "a"}),
        (
            RESPONSES,
            "ResponsesRequest",
            "max_output_tokens",
            {"input": USER, "bad_words": ["x"], "tool_choice": "none"},
        ),
    ):
        validator = jsonschema.Draft202012Validator({"$ref": f"#/components/schemas/{name}", **document})
        validator.validate(body)
        answer = tiny.post(path, body | {limit: 1})
        assert answer.status_code == 200
        declared = document["paths"][path]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
        jsonschema.Draft202012Validator({**declared, **document}).validate(answer.json())
        wrong = body | {"top_k": "many"}
        assert not validator.is_valid(wrong)
        error = fault(tiny.post(path, wrong), 400)
        jsonschema.validate({"error": error}, schemas["Error"])
        assert set(document["paths"][path]["post"]["responses"]) >= {"200", "400", "401", "413", "503"}


def test_messages(server: Server) -> None:
    """A tool that must be called, its result, and the answer to it as a stream."""
    place = {"type": "string", "maxLength": 20}
    schema = {"type": "object", "properties": {"city": place}, "required": ["city"], "additionalProperties": False}
    asked: dict[str, Any] = {
        "model": "default",
        "tools": [{"name": "get_weather", "description": "Current weather of a city.", "input_schema": schema}],
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
    }
    choice = {"type": "any", "disable_parallel_tool_use": True}
    first = server.post(MESSAGES, asked | {"max_tokens": 200, "temperature": 0, "tool_choice": choice})
    assert first.status_code == 200, first.text
    (call,) = first.json()["content"]
    assert (first.json()["stop_reason"], call["type"], call["name"]) == ("tool_use", "tool_use", "get_weather")
    jsonschema.validate(call["input"], schema)
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": "Sunny, 21 degrees"}
    asked["messages"] += [{"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    streamed = server.post(MESSAGES, asked | {"max_tokens": 20, "stream": True})
    data = [line.removeprefix("data: ") for line in streamed.text.splitlines() if line.startswith("data: ")]
    found = [json.loads(each) for each in data]
    assert [found[0]["type"], found[-1]["type"]] == ["message_start", "message_stop"]
    assert any(event["type"] == "content_block_delta" for event in found)
    usage = found[-2]["usage"]
    count = server.post(f"{MESSAGES}/count_tokens", asked).json()["input_tokens"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == count
    assert 0 < usage["output_tokens"] <= 20
