"""Prompts for a text between two others."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from models.tokenizer import Tokenizer
from server.text.infilling import find_infilling
from tests.support.app import server
from tests.support.tiny import write_tokenizer
from tests.support.tool_walks import write_tool_tokenizer

QWEN = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")


@pytest.mark.parametrize("names", [QWEN, ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"), ("[PREFIX]", "[SUFFIX]")])
def test_the_tokens_of_a_family(tmp_path: Path, names: tuple[str, ...]) -> None:
    write_tool_tokenizer(tmp_path, names, special=True)
    tokenizer = Tokenizer(tmp_path)
    found = find_infilling(tokenizer)
    assert found is not None
    before, behind, *middle = (tokenizer.id_of(name) for name in names)
    expected = [before, 7, behind, 8, 9, *middle] if middle else [behind, 8, 9, before, 7]
    assert found.prompt([7], [8, 9]) == expected


def test_a_tokenizer_without_them(directory: Path, tmp_path: Path) -> None:
    assert find_infilling(Tokenizer(directory)) is None
    write_tool_tokenizer(tmp_path, QWEN[:2], special=True)
    assert find_infilling(Tokenizer(tmp_path)) is None


def test_the_route(directory: Path, tmp_path: Path) -> None:
    async def ask(model: Path, **fields: Any) -> tuple[int, Any, list[list[int]]]:
        async with server(model) as (http, client, _):
            client.ready = msgspec.structs.replace(client.ready, vocab_size=1000)
            answer = await http.post("/v1/completions", json={"prompt": ["a", "b"], "max_tokens": 2, **fields})
            return answer.status_code, answer.json(), [request.prompt for request in client.requests]

    async def main() -> None:
        status, body, _ = await ask(directory, suffix="c")
        assert (status, body["error"]["param"], body["error"]["code"]) == (400, "suffix", "not_served")
        write_tokenizer(tmp_path)
        write_tool_tokenizer(tmp_path, QWEN, special=True)
        status, body, _ = await ask(tmp_path, suffix="c", echo=True)
        assert (status, body["error"]["param"]) == (400, "suffix")
        status, body, prompts = await ask(tmp_path, suffix="c")
        texts = [Tokenizer(tmp_path).decode(prompt, skip_special_tokens=False) for prompt in prompts]
        assert texts == [f"{QWEN[0]}{text}{QWEN[1]}c{QWEN[2]}" for text in "ab"]
        assert body["usage"]["prompt_tokens"] == sum(map(len, prompts))
        assert (await ask(tmp_path, suffix=""))[2] == (await ask(tmp_path))[2]

    asyncio.run(main())
