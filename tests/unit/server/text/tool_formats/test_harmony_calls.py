"""Calls as messages to functions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.tokenizer import Tokenizer
from server.text.structured import StructuredOutputs
from server.text.template import ChatPrompt, ChatTemplate
from server.text.thinking.harmony_thinking import HarmonyThinking
from server.text.thinking.thinking_format import Stage, behind_thinking
from server.text.tool_formats.harmony_calls import HarmonyFormat
from server.text.tools.functions import Function, ToolUse
from server.text.tools.tool_format import CallPart
from server.text.tools.tool_grammar import checked_grammar_of_tools
from tests.support.harmony_model import write_harmony_tokenizer
from tests.support.tool_walks import Call, Walker, check_parser, parse


def to(name: str, arguments: str) -> str:
    return f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}"


OSLO, NOW = to("get_weather", '{"city": "Oslo"}'), to("now", "{}")
OSLO_CALL, NOW_CALL = ("get_weather", '{"city": "Oslo"}'), ("now", "{}")
NESTED, MARKS = '{"x": [{"y": {"z": "}]"}}, []]}', '{"city": "<|call|><|channel|>"}'

ANSWERS: dict[str, tuple[str, list[str | Call]]] = {
    "nothing": ("", []),
    "text": ("Hello <|you|> <|channel", ["Hello <|you|> <|channel"]),
    "one call": (OSLO, [OSLO_CALL]),
    "one that ends": (f"{OSLO}<|call|>", [OSLO_CALL]),
    "the recipient first": (
        ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Oslo"}',
        [OSLO_CALL],
    ),
    "the other channel": ("<|channel|>analysis to=functions.now<|message|>{}", [NOW_CALL]),
    "text before": (f"Let me see.{NOW}", ["Let me see.", NOW_CALL]),
    "several": (f"{OSLO}<|call|>{NOW}<|call|>", [OSLO_CALL, NOW_CALL]),
    "points in the name": (to("a.b-c_1", NESTED), [("a.b-c_1", NESTED)]),
    "spaces": (to("now", " \n{}"), [NOW_CALL]),
    "marks in strings": (to("get_weather", MARKS), [("get_weather", MARKS)]),
    "text after": (f"{NOW}\n<|call|> b", [NOW_CALL, " b"]),
    "an unknown name": (to("then", '{"a": 1}'), [to("then", '{"a": 1}')]),
    "no function": (to("now", "{}").replace("functions.", ""), [to("now", "{}").replace("functions.", "")]),
    "content": ("<|channel|>final<|message|>42", ["<|channel|>final<|message|>42"]),
    "no JSON": (to("now", "12"), [to("now", "12")]),
    "a string of arguments": (to("now", '"{}"'), [NOW_CALL]),
    "null": (to("now", "null"), [NOW_CALL]),
    "line breaks in the header": ("<|channel|>commentary\nto=functions.now json\n<|message|>{}", [NOW_CALL]),
    "truncated in the header": (OSLO[:40], [OSLO[:40]]),
    "truncated in the arguments": (OSLO[:-4], [("get_weather", '{"city": "Os')]),
    "broken off in the arguments": (to("now", '{"a": [1]}}'), [("now", '{"a": [1]}'), "}"]),
}  # fmt: skip


@pytest.mark.parametrize("answer", ANSWERS)
def test_answers(answer: str, encode: Callable[[str], list[str]]) -> None:
    check_parser(HarmonyFormat(), *ANSWERS[answer], encode)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_harmony_tokenizer(tmp_path_factory.mktemp("harmony"))


def test_what_the_template_gets(directory: Path) -> None:
    def call(id: str, arguments: str) -> dict[str, Any]:
        return {"id": id, "type": "function", "function": {"name": f"f{id}", "arguments": arguments}}

    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "a"},
        {
            "role": "assistant",
            "content": "Let me see.",
            "reasoning_content": "Two calls.",
            "tool_calls": [call("1", '{"x": 1}'), call("2", "")],
        },
        {"role": "tool", "tool_call_id": "2", "content": "two"},
        {"role": "tool", "tool_call_id": "1", "content": "one"},
        {"role": "assistant", "content": None, "tool_calls": [call("3", "{}")]},
        {"role": "tool", "tool_call_id": "3", "content": '"3"'},
        {"role": "assistant", "content": "b", "reasoning_content": "c"},
    ]
    prepared, tools = HarmonyFormat().prepare(messages, [Function("f1", {})])
    template = ChatTemplate(Tokenizer(directory))
    text = template.render(ChatPrompt(prepared, tools, {"reasoning_effort": "low"}, add_generation_prompt=False)).text
    assert text.replace("<|start|>", "\n<|start|>").split("\n")[1:] == [
        "<|start|>system<|message|>Reasoning: low<|end|>",
        "<|start|>developer<|message|>f1<|end|>",
        "<|start|>user<|message|>a<|end|>",
        "<|start|>assistant<|channel|>analysis<|message|>Two calls.",
        "",
        "Let me see.<|end|>",
        '<|start|>assistant to=functions.f1<|channel|>commentary json<|message|>{"x": 1}<|call|>',
        '<|start|>functions.f1 to=assistant<|channel|>commentary<|message|>"one"<|end|>',
        "<|start|>assistant to=functions.f2<|channel|>commentary json<|message|>{}<|call|>",
        '<|start|>functions.f2 to=assistant<|channel|>commentary<|message|>"two"<|end|>',
        "<|start|>assistant to=functions.f3<|channel|>commentary json<|message|>{}<|call|>",
        '<|start|>functions.f3 to=assistant<|channel|>commentary<|message|>"\\"3\\""<|end|>',
        "<|start|>assistant<|channel|>analysis<|message|>c<|end|>",
        "<|start|>assistant<|channel|>final<|message|>b<|end|>",
    ]
    assert messages[1]["content"] == "Let me see."


THOUGHT, FINAL = "<|channel|>analysis<|message|>a<|end|><|start|>assistant", "<|channel|>final<|message|>"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
GET = Function("get_weather", CITY, strict=True)
WRONG = OSLO.replace('"Oslo"', "1")
CONTENT = StructuredOutputs.model_validate({"choice": ["yes"]})


@pytest.mark.parametrize(
    ("mode", "bound", "answers"),
    [
        ("auto", False, {OSLO: True, WRONG: False, f"{FINAL}Hi": True, "Hi": False, f"{FINAL}{{": True, NOW: False}),
        ("required", False, {OSLO: True, WRONG: False, f"{FINAL}Hi": False, "": False}),
        ("required", True, {OSLO: True, f"{FINAL}yes": False}),
        ("auto", True, {OSLO: True, WRONG: False, f"{FINAL}yes": True, "yes": False, f"{FINAL}no": False}),
        ("none", True, {OSLO: False, f"{FINAL}yes": True, "yes": False, f"{FINAL}no": False}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("thought", ["", THOUGHT])
def test_what_grammars_hold(directory: Path, mode: Any, bound: bool, answers: dict[str, bool], thought: str) -> None:
    tokenizer, walker, format = Tokenizer(directory), Walker(directory / "tokenizer.json"), HarmonyThinking()
    content = CONTENT.compiled() if bound else None
    names = tokenizer.names_in_grammars
    use = ToolUse([GET], [GET], mode)
    held = checked_grammar_of_tools(
        use,
        HarmonyFormat(),
        names,
        tokenizer.special_names,
        content,
        lambda write: format.headers(Stage.UNDECIDED, write),
    )
    assert held is not None
    grammar = behind_thinking(held, format, Stage.UNDECIDED, names).text
    for answer, matches in answers.items():
        assert walker.matches(grammar, thought + answer) == matches, answer


@pytest.mark.parametrize(
    "call",
    [
        " to=functions.get_weather<|channel|>commentary json<|message|>",
        " to=functions.get_weather<|channel|>commentary <|constrain|>json<|message|>",
        "<|channel|>commentary to=functions.get_weather json<|message|>",
        "<|channel|>commentary to=functions.get_weather<|message|>",
        "<|channel|>analysis to=functions.get_weather <|constrain|>json<|message|>",
    ],
)
def test_headers_of_calls_may_differ(directory: Path, call: str) -> None:
    """Templates write earlier calls in another order than models are taught."""
    tokenizer, walker, format = Tokenizer(directory), Walker(directory / "tokenizer.json"), HarmonyThinking()
    names, special = tokenizer.names_in_grammars, tokenizer.special_names
    use = ToolUse([GET], [GET], "required")
    held = checked_grammar_of_tools(
        use, HarmonyFormat(), names, special, None, lambda write: format.headers(Stage.UNDECIDED, write)
    )
    assert held is not None
    grammar = behind_thinking(held, format, Stage.UNDECIDED, names).text
    for thought in ("", THOUGHT):
        assert walker.matches(grammar, thought + call + '{"city": "Oslo"}')
        assert not walker.matches(grammar, thought + call + '{"city": 1}')
    assert parse(HarmonyFormat().parser([GET]), [call, '{"city": "Oslo"}']) == [
        CallPart(0, "get_weather", '{"city": "Oslo"}')
    ]


@pytest.mark.parametrize(
    ("mode", "bound", "answers"),
    [
        ("none", True, {"yes": True, "no": False, f"{FINAL}yes": False}),
        ("auto", True, {"yes": True, "no": False, f"<|end|><|start|>assistant{OSLO}": True, OSLO: False}),
        ("auto", False, {"{": True, f"<|end|><|start|>assistant{OSLO}": True, OSLO: False, f"<|end|>{OSLO}": False}),
        ("required", False, {"b": False, f"<|end|><|start|>assistant{OSLO}": True, OSLO: False}),
    ],
)
def test_continued_answers(directory: Path, mode: Any, bound: bool, answers: dict[str, bool]) -> None:
    """The prompt has the header of their text; a call is another message."""
    tokenizer, walker, format = Tokenizer(directory), Walker(directory / "tokenizer.json"), HarmonyThinking()
    names, special = tokenizer.names_in_grammars, tokenizer.special_names
    held = checked_grammar_of_tools(
        ToolUse([GET], [GET], mode),
        HarmonyFormat(),
        names,
        special,
        CONTENT.compiled() if bound else None,
        lambda write: format.headers(Stage.CONTENT, write),
    )
    assert held is not None
    grammar = behind_thinking(held, format, Stage.CONTENT, names).text
    for answer, matches in answers.items():
        assert walker.matches(grammar, answer) == matches, answer
