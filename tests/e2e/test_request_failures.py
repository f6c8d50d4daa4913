"""No request can end the engine: what cannot be served ends one request, with the cause, while others run on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.support.profiles import is_all, only_in_all
from tests.support.servers import TINY_SETTINGS, Server, Stream, start

JSON_CHAT = {
    "messages": [{"role": "user", "content": "hi"}],
    "response_format": {"type": "json_object"},
    "max_tokens": 20,
}
BESIDE = {"prompt": [5, 6, 7], "max_tokens": 600 if is_all() else 200, "ignore_eos": True, "temperature": 1, "seed": 4}


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(content | changes), encoding="utf-8")


def no_end(model: Path) -> None:
    edit(model / "config.json", eos_token_id=None)
    edit(model / "tokenizer_config.json", eos_token=None)
    (model / "generation_config.json").unlink(missing_ok=True)


def end_beyond_the_vocabulary(model: Path) -> None:
    no_end(model)
    edit(model / "config.json", eos_token_id=4000)


def other_decoder(model: Path) -> None:
    edit(model / "tokenizer.json", decoder={"type": "WordPiece", "prefix": "##", "cleanup": True})


def not_a_number(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3] = float("nan")
    save_file(weights, model / "model.safetensors")


@contextmanager
def serve(tmp_path: Path, tiny_model: Path, change: Callable[[Path], None]) -> Iterator[Server]:
    model = tmp_path / "m"
    shutil.copytree(tiny_model, model)
    change(model)
    directory = tmp_path / "s"  # the name of its sockets has a maximum length
    directory.mkdir()
    running = start(directory, model, config=TINY_SETTINGS)
    try:
        yield running
    finally:
        running.stop()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        only_in_all(no_end, "grammar: the model has no end-of-sequence token"),
        (end_beyond_the_vocabulary, "grammar: the model has no end-of-sequence token"),
        (other_decoder, "grammar: the model's tokenizer is of a kind that cannot be matched"),
    ],
)
def test_a_model_without_grammars_refuses_them(
    tmp_path: Path, tiny_model: Path, change: Callable[[Path], None], says: str
) -> None:
    with serve(tmp_path, tiny_model, change) as server:
        beside = Stream(server, BESIDE)
        for stream in (False, True):
            answer = server.post("/v1/chat/completions", {**JSON_CHAT, "stream": stream})
            assert answer.status_code == 400
            assert answer.json()["error"]["message"].startswith(says)
        beside.join()
        assert beside.done
        assert beside.events[-1]["choices"][0]["finish_reason"] == "length"
        assert server.get("/health").status_code == 200


def test_a_model_with_weights_that_are_not_numbers_answers_with_errors(tmp_path: Path, tiny_model: Path) -> None:
    with serve(tmp_path, tiny_model, not_a_number) as server:
        assert "model.layers.1.mlp.up_proj.weight holds values that are NaN" in server.log.read_text()
        for path, body in (("/v1/completions", BESIDE), ("/v1/chat/completions", {**JSON_CHAT, "max_tokens": 9})):
            answer = server.post(path, body)
            assert answer.status_code == 500
            assert "not a finite number" in answer.json()["error"]["message"]
            assert answer.json()["error"]["type"] == "server_error"
        assert server.get("/health").status_code == 200
        assert server.idle()


def test_fields_that_contradict_each_other(tiny: Server) -> None:
    """Refused where that can be seen beforehand; else the answer ends with an error, after the text so far."""
    alone = {"prompt": "a", "max_tokens": 9}
    answer = tiny.post("/v1/completions", {**alone, "allowed_token_ids": [2], "min_tokens": 3})
    assert answer.status_code == 400
    assert "min_tokens and allowed_token_ids" in answer.json()["error"]["message"]
    later = {**alone, "structured_outputs": {"regex": "[a-c]{3}"}, "min_tokens": 5}
    answer = tiny.post("/v1/completions", later)
    assert answer.status_code == 400
    says = "no token is left to sample: excluded by min_tokens, the grammar"
    assert answer.json()["error"]["message"] == says
    stream = Stream(tiny, later)
    stream.join()
    assert (stream.status, stream.done) == (200, True)
    *chunks, last = stream.events
    assert len("".join(chunk["choices"][0]["text"] for chunk in chunks)) == 3
    assert last["error"]["message"] == says
    assert tiny.idle()


def test_a_prompt_as_long_as_the_model_can_be_scored(tiny: Server) -> None:
    prompt = [3 + i * 7 % 300 for i in range(4352)]
    body = {"prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 1}
    answer = tiny.post("/v1/completions", body).raise_for_status().json()
    (choice,) = answer["choices"]
    assert len(choice["logprobs"]["token_logprobs"]) == len(prompt)
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0
    answer = tiny.post("/v1/completions", {"prompt": prompt, "max_tokens": 0, "prompt_logprobs": 0}).json()
    assert len(answer["choices"][0]["prompt_logprobs"]) == len(prompt)
    assert tiny.post("/v1/completions", {**body, "prompt": [*prompt, 3]}).status_code == 400
    assert tiny.idle()
