"""POST /v1/completions: offsets of tokens in the text of an answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Library
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing

from engine.messages import FINISH_ABORT, AddRequest, RequestOutput
from models.tokenizer import Tokenizer
from tests.support.app import FakeClient, server
from tests.support.tiny import SPECIAL, write_tokenizer

BOS = TemplateProcessing(single=f"{SPECIAL[1]} $A", special_tokens=[(SPECIAL[1], 1)])


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tokenizer that begins each text with a special token, and whose own offsets exclude spaces."""
    directory = tmp_path_factory.mktemp("bos")
    write_tokenizer(directory)
    library = Library.from_file(str(directory / "tokenizer.json"))
    library.post_processor = Sequence([ByteLevel(trim_offsets=True), BOS])
    library.save(str(directory / "tokenizer.json"))
    return directory


def ask(directory: Path, **fields: Any) -> dict[str, Any]:
    """Return the choice of an echoed prompt, with logprobs."""

    async def main() -> dict[str, Any]:
        async with server(directory) as (http, _, _):
            body = {"echo": True, "logprobs": 1, "max_tokens": 3, "seed": 1, **fields}
            answer = await http.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            found: dict[str, Any] = answer.json()["choices"][0]
            return found

    return asyncio.run(main())


def ids(directory: Path, text: str) -> list[int]:
    return Tokenizer(directory).encode(text, add_special_tokens=False)


def check(choice: dict[str, Any], hidden: tuple[str, ...] = SPECIAL) -> None:
    """Check that each token stands in the text at its offset, except the `hidden` ones, which take none of it."""
    logprobs = choice["logprobs"]
    ends = [*logprobs["text_offset"][1:], len(choice["text"])]
    for token, begin, end in zip(logprobs["tokens"], logprobs["text_offset"], ends, strict=True):
        if not token.startswith("bytes:"):
            assert choice["text"][begin:end] == ("" if token in hidden else token)


def test_alternatives_of_an_echoed_prompt(directory: Path) -> None:
    """`logprobs` and `prompt_logprobs` each have their own number."""
    for logprobs, of_prompt in ((3, 1), (1, 3)):
        choice = ask(directory, prompt="fox", logprobs=logprobs, prompt_logprobs=of_prompt)
        length = len(choice["prompt_logprobs"])
        assert {len(each) for each in choice["prompt_logprobs"][1:]} <= {of_prompt, of_prompt + 1}
        assert {len(each) for each in choice["logprobs"]["top_logprobs"][1:length]} <= {logprobs, logprobs + 1}


def test_a_prompt_whose_scoring_is_aborted(directory: Path) -> None:
    class Aborting(FakeClient):
        async def generate(self, request: AddRequest) -> AsyncGenerator[RequestOutput, None]:
            yield RequestOutput(id=request.id, queued=True)
            yield RequestOutput(id=request.id, finish_reason=FINISH_ABORT)

    async def main() -> None:
        async with server(directory, Aborting()) as (http, _, _):
            body = {"prompt": "fox", "echo": True, "logprobs": 1, "max_tokens": 0}
            (choice,) = (await http.post("/v1/completions", json=body)).json()["choices"]
            assert choice["finish_reason"] == "abort"

    asyncio.run(main())


def test_skipped_special_tokens_take_no_text(directory: Path) -> None:
    prompt = [1, *ids(directory, "fox"), 2, *ids(directory, " dog"), 1, *ids(directory, "größer")]
    choice = ask(directory, prompt=prompt)
    assert choice["text"].startswith("fox doggrößer")
    assert choice["logprobs"]["text_offset"][:2] == [0, 0]
    check(choice)


def test_special_tokens_that_are_shown_take_text(directory: Path) -> None:
    choice = ask(directory, prompt=[1, *ids(directory, "fox"), 2], skip_special_tokens=False)
    assert choice["text"].startswith("<|im_start|>fox<|im_end|>")
    check(choice, hidden=())


def test_special_tokens_of_the_output(directory: Path) -> None:
    for skip in (True, False):
        bias = {"logit_bias": {"1": 100}}
        choice = ask(directory, prompt="fox", skip_special_tokens=skip, **bias)
        assert choice["text"] == "fox" + ("" if skip else "<|im_start|>" * 3)
        check(choice, hidden=SPECIAL if skip else ())


@pytest.mark.parametrize("skip", [True, False])
def test_an_added_token_takes_none_of_the_callers_text(with_bos: Path, skip: bool) -> None:
    choice = ask(with_bos, prompt="a", skip_special_tokens=skip)
    assert choice["logprobs"]["text_offset"][:3] == [0, 0, 1]
    choice = ask(with_bos, prompt=" the  fox \n a größer 🙂 ", skip_special_tokens=skip)
    assert choice["text"].startswith(" the  fox")
    check(choice)


def test_special_tokens_in_the_callers_text_take_theirs(with_bos: Path) -> None:
    choice = ask(with_bos, prompt="<|im_start|>a<|im_end|> b", skip_special_tokens=True)
    assert choice["text"].startswith("<|im_start|>a<|im_end|> b")
    tokens = choice["logprobs"]["tokens"]
    assert tokens[:2] == ["<|im_start|>", "<|im_start|>"]
    assert choice["logprobs"]["text_offset"][: tokens.index("<|im_end|>") + 2] == [0, 0, 12, 13, 23]


def test_truncated_prompts(with_bos: Path) -> None:
    length = len(ids(with_bos, " dog a"))
    choice = ask(with_bos, prompt="fox<|im_end|> dog a", truncate_prompt_tokens=length + 1)
    assert choice["text"].startswith(" dog a")
    assert choice["logprobs"]["tokens"][0] == "<|im_end|>"
    check(choice)


def test_a_prompt_that_is_cut_inside_a_character(directory: Path) -> None:
    """The rest of the character is text of its own."""
    assert len(ids(directory, "ж")) == 2
    choice = ask(directory, prompt="aж dog", truncate_prompt_tokens=1 + len(ids(directory, " dog")))
    assert choice["text"].startswith("\ufffd dog")
    assert choice["logprobs"]["text_offset"][:2] == [0, 1]
