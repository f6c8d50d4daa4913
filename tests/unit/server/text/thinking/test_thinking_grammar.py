"""Grammars hold what follows the thinking."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.tokenizer import Tokenizer
from server.text.structured import Grammar
from server.text.thinking.tagged_thinking import TaggedThinking
from server.text.thinking.thinking_format import Stage, behind_thinking
from tests.support.tool_walks import Walker, write_tool_tokenizer

THINK = TaggedThinking("think", "<think>", "</think>")
SHOUT = TaggedThinking("shout", "[THINK]", "[/THINK]")
DIGITS = Grammar("p", "start: /[0-9]+/")
JSON = Grammar("p", '{"grammars": [{"json_schema": {"type": "integer"}}]}')


@pytest.mark.parametrize("grammar", [DIGITS, JSON])
@pytest.mark.parametrize("format", [THINK, SHOUT])
@pytest.mark.parametrize("kind", ["text", "tokens", "special"])
def test_what_follows_the_thinking_matches(tmp_path: Path, grammar: Grammar, format: TaggedThinking, kind: str) -> None:
    names = [] if kind == "text" else [format.begin, format.end]
    walker = Walker(write_tool_tokenizer(tmp_path, names, special=kind == "special"))
    # The compiler takes names without angle brackets for tokens only if they are special.
    tokens = {name: id for name, id in Tokenizer(tmp_path).names_in_grammars.items() if name in names}

    def matching(stage: Stage, *answers: str) -> list[bool]:
        text = behind_thinking(grammar, format, stage, tokens).text
        return [walker.matches(text, answer) for answer in answers]

    begin, end = format.begin, format.end
    answers = (f"{begin}\na </b {end}\n\n42", f"{begin}a{end}x", "42", f"a</b {end}\n42", f"{begin}{end}7", "x")
    assert matching(Stage.UNDECIDED, *answers) == [True, False, True, False, True, False]
    thinks = (f"a</b {end}\n\n42", f"{end}42", "42", f"a{end}x", f"a{end}")
    assert matching(Stage.THINKING, *thinks) == [True, True, False, False, False]
    assert matching(Stage.CONTENT, "42", f"a{end}42") == [True, False]
