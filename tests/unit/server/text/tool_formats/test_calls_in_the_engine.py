"""Calls that a grammar guarantees are the same with speculation and without, and match their functions."""

from __future__ import annotations

import random
from pathlib import Path

from engine.llm import LLM, Completion
from engine.params import SamplingParams
from models.tokenizer import Tokenizer
from server.text.tool_formats.tool_registry import FORMATS
from server.text.tools.functions import Function, ToolUse
from server.text.tools.tool_grammar import checked_grammar_of_tools
from tests.support.profiles import is_all
from tests.support.schemas import random_schema
from tests.support.tiny import write_model
from tests.support.tool_walks import check_calls, parse

SCHEMAS = 200 if is_all() else 24
NAMES = ("get", "getx", "get.x", "Get_9")
CLOSING = '"}]>'


def test_calls_do_not_depend_on_speculation(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "tiny", max_model_len=1024)
    tokenizer = Tokenizer(directory)
    # Noise hardly ever ends a text by itself.
    bias = {tokenizer.encode(char, add_special_tokens=False)[0]: 6.0 for char in CLOSING}
    uses, params = [], []
    for seed in range(SCHEMAS):
        chance = random.Random(seed)
        names = chance.sample(NAMES, chance.choice([1, 2, 3]))
        offered = [Function(name, random_schema(chance)) for name in names]
        use = ToolUse(offered, offered[:1] if chance.random() < 0.5 else offered, "required", parallel=False)
        form = list(FORMATS.values())[seed % len(FORMATS)]
        grammar = checked_grammar_of_tools(use, form, tokenizer.names_in_grammars, tokenizer.special_names)
        assert grammar is not None
        uses.append((use, form))
        params.append(SamplingParams(max_tokens=600, temperature=1.0, seed=seed, grammar=grammar.text, logit_bias=bias))

    def answers(gamma: int) -> list[Completion]:
        speculation = {"gamma": gamma, "kv": {"policy": "window", "budget": 32}}
        with LLM(str(directory), dtype="float32", cache={"memory_gb": 0.3}, speculation=speculation) as llm:
            return llm.generate([[5, 6, 7]] * len(params), params)

    plain, drafted = answers(0), answers(4)
    ended = 0
    for (use, form), answer, other in zip(uses, plain, drafted, strict=True):
        assert answer.token_ids == other.token_ids
        if answer.finish_reason != "stop":
            continue
        ended += 1
        chance = random.Random(answer.text)
        cuts = sorted(chance.sample(range(len(answer.text)), min(5, len(answer.text))))
        pieces = [answer.text[a:b] for a, b in zip([0, *cuts], [*cuts, len(answer.text)], strict=True)]
        parts = parse(form.parser(use.callable), pieces)
        assert parts == parse(form.parser(use.callable), [answer.text])
        assert len(check_calls(parts, use.callable)) == len(parts) == 1, answer.text
    assert ended > 0.8 * SCHEMAS
