"""Chat templates: failures become refusals, and templates written for transformers work."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from models.tokenizer import Tokenizer
from server.errors import ApiError
from server.text import sandbox
from server.text.answer_formats import choose_formats
from server.text.template import ChatPrompt, ChatTemplate
from tests.support.app import server
from tests.support.tiny import write_tokenizer

LOOPS = "{% for i in range(99999) %}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content.nothing.at_all }}", "refuses"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses"),
        ("{{ messages.append(1) }}", "refuses"),
        ("{{ 1 + 'a' }}", "refuses"),
        ("{{ 'x' * (10 ** 30) }}", "refuses"),
        ("{{ '{nothing}'.format(x=1) }}", "refuses"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "refuses"),
        ("{{ 7 ** 10000000 }}", "too large"),
        ("{% for i in range(99999) %}{{ 'a word or two' }}{% endfor %}", "too long"),
        (LOOPS * 3 + "{% endfor %}" * 3, "more than 0.2 seconds"),
        (LOOPS + LOOPS.replace("%}", "if i < 0 %}") + "{% endfor %}" * 2, "more than 0.2 seconds"),
        (
            "{% for i in range(99999) if (range(9999) | list | sort | length) < 0 %}{% endfor %}",
            "more than 0.2 seconds",
        ),
        ("{% set check_clock = 1 %}{% for i in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}", "refuses"),
    ],
)
def test_a_template_that_fails_is_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, reason: str
) -> None:
    if "seconds" in reason:
        monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.2)
    write_tokenizer(tmp_path, chat_template=template)

    async def main() -> None:
        async with server(tmp_path) as (http, _, _):
            body = {"messages": [{"role": "user", "content": "a"}]}
            answer = await http.post("/v1/chat/completions", json=body)
            assert answer.status_code == 400
            assert reason in answer.json()["error"]["message"]

    asyncio.run(main())


def test_no_template(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, chat_template=None)

    async def main() -> None:
        async with server(tmp_path) as (http, _, _):
            body = {"messages": [{"role": "user", "content": "a"}]}
            answer = await http.post("/v1/chat/completions", json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "not_served")

    asyncio.run(main())


@pytest.mark.parametrize("template", ["{% for %}", LOOPS * 40 + "{% endfor %}" * 40], ids=["syntax", "nesting"])
def test_a_broken_template_costs_chat_only(tmp_path: Path, caplog: pytest.LogCaptureFixture, template: str) -> None:
    write_tokenizer(tmp_path, chat_template=template)

    async def main() -> None:
        async with server(tmp_path) as (http, _, _):
            assert "chat template is broken" in caplog.text
            body = {"messages": [{"role": "user", "content": "a"}]}
            answer = await http.post("/v1/chat/completions", json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "not_served")
            assert (await http.post("/v1/completions", json={"prompt": "x"})).status_code == 200

    asyncio.run(main())


def test_templates_written_for_transformers(tmp_path: Path) -> None:
    source = (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
        "{{ {'b': 'é', 'a': 1} | tojson(ensure_ascii=False, separators=(',', ':'), sort_keys=True) }}"
    )
    write_tokenizer(tmp_path, chat_template=source)
    template = ChatTemplate(Tokenizer(tmp_path))
    assert template.render(ChatPrompt([{"role": "user", "content": "x"}])).text == 'x{"a":1,"b":"é"}'


def test_all_special_tokens_reach_the_template(tmp_path: Path) -> None:
    """Those that only special_tokens_map.json names, too."""
    write_tokenizer(tmp_path, chat_template="{{ bos_token }}{{ messages[0].content }}{{ pad_token }}{{ unk_token }}")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["bos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokens = {"bos_token": {"content": "<|im_start|>"}, "pad_token": "<|endoftext|>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(tokens))
    text = ChatTemplate(Tokenizer(tmp_path)).render(ChatPrompt([{"role": "user", "content": "hi"}])).text
    assert text == "<|im_start|>hi<|endoftext|>"


def test_tokens_of_the_models_own_reach_the_template(tmp_path: Path) -> None:
    """By the names that they have; one named like a variable does not replace it."""
    write_tokenizer(tmp_path, chat_template="{{ image_token }}{{ messages[0].content }}{{ audio }}")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"image_token": "<image>", "extra_special_tokens": {"audio": "<audio>", "messages": "<messages>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    text = ChatTemplate(Tokenizer(tmp_path)).render(ChatPrompt([{"role": "user", "content": "hi"}])).text
    assert text == "<image>hi<audio>"


def test_chats_with_tools_have_a_template_of_their_own(tmp_path: Path) -> None:
    plain = "{{ messages[0].content }}"
    with_tools = """{% for tool in tools %}<tool_call>{"arguments": {{ tool.name }}{% endfor %}{{ enable_thinking }}"""
    templates = [{"name": "tool_use", "template": with_tools}, {"name": "default", "template": plain}]
    write_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"chat_template": templates}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = ChatTemplate(Tokenizer(tmp_path))
    messages = [{"role": "user", "content": "hi"}]
    assert template.render(ChatPrompt(messages)).text == "hi"
    assert template.render(ChatPrompt(messages, [{"name": "f"}])).text == '<tool_call>{"arguments": f'
    assert template.knows("enable_thinking")
    assert template.mentions("<tool_call>")
    assert choose_formats("auto", "auto", template.sources)[1].name == "hermes"


def test_a_broken_template_of_tools_costs_these_only(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = {"default": "{{ messages[0].content }}", "tool_use": "{% for %}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template, messages = ChatTemplate(Tokenizer(tmp_path)), [{"role": "user", "content": "hi"}]
    assert template.available
    assert template.render(ChatPrompt(messages)).text == "hi"
    with pytest.raises(ApiError, match="chat template is broken"):
        template.render(ChatPrompt(messages, [{"name": "f"}]))
