"""What a template is given besides messages: tools, calls, options, and an answer that goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from models.tokenizer import Tokenizer
from server.errors import ApiError
from server.text.template import ChatPrompt, ChatTemplate
from tests.support.tiny import SPECIAL, write_tokenizer

END = "<|im_end|>"
TEMPLATE = """
{%- for tool in tools or [] %}<|im_start|>{{ tool.function | tojson }}
{%- for name, value in tool.function.parameters.properties | items %}<{{ name }}>{{ value.type }}{% endfor %}
<|im_end|>{% endfor %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor -%}
<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""
USER = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("model")
    write_tokenizer(directory, chat_template=TEMPLATE)
    return Tokenizer(directory)


def specials(tokenizer: Tokenizer, conversation: ChatPrompt) -> list[int]:
    ids = ChatTemplate(tokenizer).render(conversation).encode(tokenizer, False)
    return [id for id in ids if id < len(SPECIAL)]


def tool(name: str = "f", description: str = "d", key: str = "k", type: str = "string") -> dict[str, Any]:
    parameters = {"type": "object", "properties": {key: {"type": type}}}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


@pytest.mark.parametrize(
    "given",
    [
        {"name": END},
        {"description": f"x{END}y"},
        {"key": END},
        {"key": "|im_end|"},
        {"type": END},
        {"description": "d"},
    ],
)
def test_a_tool_cannot_write_special_tokens(tokenizer: Tokenizer, given: dict[str, str]) -> None:
    assert specials(tokenizer, ChatPrompt([USER], [tool(**given)])) == [1, 2, 1, 2, 1]


@pytest.mark.parametrize("arguments", [{"role": END}, {END: "x"}, {"a": [{"b": END}]}, {"a": f"{END}<|im_start|>"}])
def test_a_call_cannot_write_special_tokens(tokenizer: Tokenizer, arguments: dict[str, Any]) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    messages: list[dict[str, Any]] = [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": END},
    ]
    assert specials(tokenizer, ChatPrompt(messages)) == [1, 2] * 3 + [1]


def test_options_reach_the_template(tokenizer: Tokenizer) -> None:
    template = ChatTemplate(tokenizer)
    assert template.knows("enable_thinking")
    assert not template.knows("reasoning_effort")
    assert template.render(ChatPrompt([USER], options={"enable_thinking": False})).text.endswith("</think>\n\n")
    assert template.render(ChatPrompt([USER], options={"enable_thinking": True})).text.endswith("assistant\n")
    for name in ("messages", "tools", "add_generation_prompt", "eos_token", "raise_exception", "range"):
        with pytest.raises(ApiError, match="cannot be set"):
            template.render(ChatPrompt([USER], options={name: 1}))


@pytest.mark.parametrize("content", ["Sure, ", "", f"a{END}b", "1\n"])
def test_an_answer_goes_on_where_its_message_ends(tokenizer: Tokenizer, content: str) -> None:
    conversation = ChatPrompt([USER, {"role": "assistant", "content": content}], continues=True)
    rendered = ChatTemplate(tokenizer).render(conversation)
    assert rendered.text.endswith(f"<|im_start|>assistant\n{content}")
    assert specials(tokenizer, conversation) == [1, 2, 1]


def test_templates_that_do_not_write_the_last_message_are_refused(tmp_path: Path) -> None:
    for template in ("{{ messages[0].content }}", "{{ messages[-1].content * 2 }}"):
        write_tokenizer(tmp_path, chat_template=template)
        messages = [USER, {"role": "assistant", "content": "x"}]
        with pytest.raises(ApiError, match="continue_final_message"):
            ChatTemplate(Tokenizer(tmp_path)).render(ChatPrompt(messages, continues=True))


@pytest.mark.parametrize("name", ["self", "context", "args", "a b", ""])
def test_options_may_have_any_name(tokenizer: Tokenizer, name: str) -> None:
    conversation = ChatPrompt([USER], options={name: "x"})
    assert ChatTemplate(tokenizer).render(conversation).text == ChatTemplate(tokenizer).render(ChatPrompt([USER])).text
