"""The chat in turns of the page at GET /, in a browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.browser import CHROMIUM, Page, browser
from tests.support.scripted_chat import PAUSE, ScriptedChat, error, serving
from tests.support.servers import Server

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
MARKUP = "<b>bold</b><script>boom()</script>"
TURNS = "[...document.querySelectorAll('#turns > article')]"
STATE = "document.getElementById('chat-state').textContent"
ERROR = "document.getElementById('chat-error').textContent"
FACTS = "[...document.querySelectorAll('#turns .facts')].map(facts => facts.textContent)"


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    with browser(tmp_path) as opened:
        yield opened


def call(name: str, *arguments: str, index: int = 0) -> list[dict[str, Any]]:
    """Return the deltas of a call whose arguments arrive in parts."""
    head = {"index": index, "id": f"call_{index}", "type": "function", "function": {"name": name, "arguments": ""}}
    parts = [{"index": index, "function": {"arguments": part}} for part in arguments]
    return [{"tool_calls": [part]} for part in (head, *parts)]


def type_into(page: Page, selector: str, text: str) -> None:
    """Type at the end of a field, like a keyboard; \\n is Shift+Enter."""
    page.run(f"document.querySelector({json.dumps(selector)}).focus()")
    for number, line in enumerate(text.split("\n")):
        if number:
            press(page, "Enter", shift=True)
        page.call("Input.insertText", text=line)


def press(page: Page, key: str, *, shift: bool = False) -> None:
    code = {"Enter": 13, "Tab": 9}[key]
    facts = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
    page.call("Input.dispatchKeyEvent", type="keyDown", text="\r" if key == "Enter" else "", **facts)
    page.call("Input.dispatchKeyEvent", type="keyUp", **facts)


def say(page: Page, text: str) -> None:
    type_into(page, "#message", text)
    press(page, "Enter")


def click(page: Page, id: str) -> None:
    page.run(f"document.getElementById('{id}').click()")


def fill(page: Page, id: str, text: str) -> None:
    page.run(f"document.getElementById('{id}').value = {json.dumps(text)}")


def focused(page: Page) -> str:
    found: str = page.run("document.activeElement.id || document.activeElement.tagName")
    return found


def shown(page: Page, selector: str) -> list[str]:
    found: list[str] = page.run(f"[...document.querySelectorAll('{selector}')].map(each => each.textContent)")
    return found


def test_two_turns_send_the_conversation(page: Page) -> None:
    script = ScriptedChat(
        [
            *({"reasoning_content": "They ask "}, PAUSE, {"reasoning_content": MARKUP}),
            *({"content": "Hello "}, PAUSE, {"content": MARKUP}, "stop"),
        ],
        [{"content": "Again"}, "length"],
    )
    with serving(script) as chat:
        page.open(chat.url)
        fill(page, "system", "Be brief.")
        fill(page, "chat-tokens", "50")
        fill(page, "chat-temperature", "0")
        say(page, f"one\ntwo {MARKUP}")
        page.until("document.querySelector('.thinking .text')?.textContent === 'They ask '")
        thinking = "document.querySelector('.thinking').open"
        assert page.run(thinking)
        assert page.run(STATE) == "Answering"
        assert page.run("document.getElementById('turns').getAttribute('aria-busy')") == "true"
        say(page, "too early")  # stays in the field until the answer is complete
        chat.go_on()
        page.until("document.querySelector('.model > .text').textContent === 'Hello '")
        assert not page.run(thinking)
        chat.go_on()
        page.until(f"{STATE} === 'Answered.'")
        assert page.run("document.getElementById('turns').getAttribute('aria-busy')") == "false"
        assert shown(page, ".thinking summary")[0].startswith("Thought for ")
        assert focused(page) == "message"
        assert page.run("document.getElementById('message').value") == "too early"
        press(page, "Enter")
        page.until(f"{TURNS}.length === 4 && {STATE} === 'Answered.'")
        first, second = page.run(FACTS)
        assert first.startswith("12 tokens, the first after ")
        assert first.endswith(" tokens/s · cached 0 of 100 prompt tokens (0 %) · 16 drafted, 8 accepted")
        assert "3 tokens, the first after " in second
        assert "cached 64 of 200 prompt tokens (32 %) · 4 drafted, 2 accepted · cut off at the limit" in second
        assert shown(page, "#turns article > .text") == [f"one\ntwo {MARKUP}", f"Hello {MARKUP}", "too early", "Again"]
        assert page.run("document.querySelectorAll('#turns b, #turns script').length") == 0
        system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": f"one\ntwo {MARKUP}"}
        assistant = {"role": "assistant", "content": f"Hello {MARKUP}", "reasoning_content": f"They ask {MARKUP}"}
        assert chat.bodies[0] == {
            "messages": [system, user],
            "max_completion_tokens": 50,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        assert chat.bodies[1]["messages"] == [system, user, assistant, {"role": "user", "content": "too early"}]
        assert page.errors == []


def test_cards_of_calls_are_answered(page: Page) -> None:
    calls = [*call("get_weather", '{"place":', ' "Oslo"}'), PAUSE, *call("<i>", "{}", index=1), "tool_calls"]
    script = ScriptedChat(calls, (400, "no such call"), [{"content": "Cold."}, "stop"], [{"content": "Yes."}, "stop"])
    with serving(script) as chat:
        page.open(chat.url)
        click(page, "example")
        page.run("document.getElementById('tool-choice').value = 'required'")
        say(page, "weather?")
        page.until("document.querySelector('.call pre')?.textContent.includes('Oslo')")
        chat.go_on()
        page.until(f"{STATE} === 'The model waits for results.'")
        assert shown(page, ".call h4") == ["get_weather", "<i>"]
        assert shown(page, ".call pre") == ['{\n  "place": "Oslo"\n}', "{}"]
        assert page.run("[...document.querySelectorAll('.call')].map(card => card.getAttribute('aria-label'))") == [
            "Call of get_weather",
            "Call of <i>",
        ]
        assert page.run("document.activeElement.labels[0].textContent") == "Result of get_weather"
        type_into(page, "#message", "and now?")
        press(page, "Enter")  # a message has to wait for the results
        assert len(chat.bodies) == 1
        assert page.run(STATE).startswith("First send the results")
        page.call("Input.insertText", text="-3 degrees")
        press(page, "Enter")  # the other result is still missing
        assert len(chat.bodies) == 1
        assert page.run("document.activeElement.labels[0].textContent") == "Result of <i>"
        page.call("Input.insertText", text="nothing")
        press(page, "Enter")
        page.until(f"{ERROR} === 'no such call'")
        assert page.run("[...document.querySelectorAll('.call textarea')].some(field => field.readOnly)") is False
        page.run("document.querySelector('.calls button').click()")  # once more
        page.until(f"{STATE} === 'Answered.'")
        assert page.run(ERROR) == ""
        assert page.run("[...document.querySelectorAll('.call textarea')].every(field => field.readOnly)")
        functions = [
            {"id": "call_0", "type": "function", "function": {"name": "get_weather", "arguments": '{"place": "Oslo"}'}},
            {"id": "call_1", "type": "function", "function": {"name": "<i>", "arguments": "{}"}},
        ]
        history = [
            {"role": "user", "content": "weather?"},
            {"role": "assistant", "content": None, "tool_calls": functions},
            {"role": "tool", "tool_call_id": "call_0", "content": "-3 degrees"},
            {"role": "tool", "tool_call_id": "call_1", "content": "nothing"},
        ]
        assert chat.bodies[2]["messages"] == history
        assert chat.bodies[2]["tool_choice"] == "required"
        (tool,) = chat.bodies[2]["tools"]
        assert tool["function"]["name"] == "get_weather"
        fill(page, "tools", '[{"name": "bare", "parameters": {}}]')
        press(page, "Enter")  # the message that waited
        page.until(f"{TURNS}.length === 5 && {STATE} === 'Answered.'")
        assert chat.bodies[3]["messages"][4:] == [
            {"role": "assistant", "content": "Cold."},
            {"role": "user", "content": "and now?"},
        ]
        assert chat.bodies[3]["tools"] == [{"type": "function", "function": {"name": "bare", "parameters": {}}}]
        assert [each for each in page.errors if "400" not in each] == []


def test_what_fails_is_taken_back(page: Page) -> None:
    script = ScriptedChat(
        (400, "the model's chat template: <b>no</b>"),
        [{"content": "Hello"}, "stop"],
        [{"reasoning_content": "Hm"}, error("the engine has died")],
        [{"content": "Half"}, error("the engine has died")],
        [{"content": "Bye"}, "stop"],
    )
    with serving(script) as chat:
        page.open(chat.url)
        say(page, "hi")
        page.until(f'{ERROR} === "the model\'s chat template: <b>no</b>"')
        assert page.run(f"{TURNS}.length") == 0
        assert page.run("document.getElementById('message').value") == "hi"
        fill(page, "tools", '{"name": "f"}')
        press(page, "Enter")
        page.until(f"{ERROR}.startsWith('Tools: ')")
        assert page.run(f"{TURNS}.length") == 0
        assert len(chat.bodies) == 1
        fill(page, "tools", "")
        press(page, "Enter")
        page.until(f"{STATE} === 'Answered.'")
        assert chat.bodies[1]["messages"] == [{"role": "user", "content": "hi"}]
        say(page, "more")
        page.until(f"{ERROR} === 'the engine has died'")
        assert page.run(f"{TURNS}.length") == 2
        press(page, "Enter")
        page.until(f"{ERROR} === 'the engine has died' && {TURNS}.length === 4")  # what has arrived stays
        say(page, "go on")
        page.until(f"{STATE} === 'Answered.'")
        assert chat.bodies[4]["messages"][2:] == [
            {"role": "user", "content": "more"},
            {"role": "assistant", "content": "Half"},
            {"role": "user", "content": "go on"},
        ]
    say(page, "anyone?")
    page.until(f"{ERROR} === 'The server does not answer.'")
    assert page.run("document.getElementById('message').value") == "anyone?"


def test_stop_and_new_chat(page: Page) -> None:
    unfinished = call("get_weather", '{"place": ')
    script = ScriptedChat(
        [{"content": "Part"}, *unfinished, PAUSE, "stop"],
        [{"reasoning_content": "Hm"}, PAUSE, "stop"],
        [{"content": "Never seen"}, PAUSE, "stop"],
        [{"content": "New"}, "stop"],
    )
    with serving(script) as chat:
        page.open(chat.url)
        say(page, "one")
        page.until("document.querySelectorAll('.call').length === 1")
        click(page, "chat-stop")
        page.until(f"{STATE} === 'Stopped.'")
        assert page.run(f"{TURNS}.length") == 2
        assert "The call is incomplete" in shown(page, ".call")[0]
        say(page, "two")
        page.until("document.querySelectorAll('.thinking .text')[1]?.textContent === 'Hm'")
        click(page, "chat-stop")  # nothing but a thought: the message can be changed
        page.until(f"{STATE} === 'Stopped.'")
        assert page.run("document.getElementById('message').value") == "two"
        assert page.run(f"{TURNS}.length") == 2
        press(page, "Enter")
        page.until(f"{TURNS}.length === 4 && {TURNS}[3].textContent.includes('Never seen')")
        assert chat.bodies[2]["messages"][1:] == [
            {"role": "assistant", "content": "Part"},
            {"role": "user", "content": "two"},
        ]
        click(page, "new-chat")
        assert page.run(f"{TURNS}.length") == 0
        assert focused(page) == "message"
        say(page, "three")
        page.until(f"{STATE} === 'Answered.'")
        assert chat.bodies[3]["messages"] == [{"role": "user", "content": "three"}]
        assert shown(page, "#turns article > .text") == ["three", "New"]
        for _ in range(3):
            chat.go_on()


def test_a_reader_who_scrolls_back_stays_there(page: Page) -> None:
    long = {"content": "line\n" * 200}
    with serving(ScriptedChat([long, PAUSE, long, PAUSE, long, "stop"])) as chat:
        page.open(chat.url)
        say(page, "hi")
        to_end = (
            "(turns => turns.scrollHeight - turns.scrollTop - turns.clientHeight)(document.getElementById('turns'))"
        )
        said = "document.querySelector('.model > .text')?.textContent.length"
        for parts in (1, 2):
            page.until(f"{said} === {parts * 1000}")
            assert page.run(to_end) < 2
            if parts == 2:
                page.run("document.getElementById('turns').scrollTop = 100")
            chat.go_on()
        page.until(f"{STATE} === 'Answered.'")
        assert page.run("document.getElementById('turns').scrollTop") == 100


@pytest.mark.parametrize("dark", [False, True])
def test_narrow_screens(page: Page, *, dark: bool) -> None:
    deltas = [
        {"reasoning_content": "x" * 300},
        {"content": "y" * 300},
        *call("f" * 64, '{"place": "' + "z" * 300 + '"}'),
    ]
    with serving(ScriptedChat([*deltas, "tool_calls"])) as chat:
        page.open(chat.url, width=375, dark=dark)
        page.run("document.getElementById('options').open = true")
        say(page, "w" * 300)
        page.until(f"{STATE} === 'The model waits for results.'")
        page.run("document.querySelector('.thinking').open = true")
        assert page.run("document.documentElement.scrollWidth") <= 375
        assert page.run("document.getElementById('turns').scrollWidth <= document.getElementById('turns').clientWidth")
        assert page.errors == []


def test_a_real_server(page: Page, tiny: Server) -> None:
    page.open(tiny.url)
    fill(page, "chat-tokens", "40")
    fill(page, "chat-seed", "3")
    say(page, "The quick brown fox jumps over the lazy dog, " * 4)
    page.until(f"{STATE} === 'Answered.'")
    say(page, "And then?")
    page.until(f"{TURNS}.length === 4 && {STATE} === 'Answered.'")
    first, second = page.run(FACTS)
    for facts in (first, second):
        assert " drafted, " in facts
    assert "cached 0 of" not in second
    assert page.errors == []


def test_a_real_server_thinks(page: Page, thinker: Server) -> None:
    page.open(thinker.url)
    fill(page, "chat-tokens", "40")
    fill(page, "chat-seed", "3")
    for turn in (1, 2):
        say(page, "Hello")
        page.until(f"{TURNS}.length === {2 * turn} && {STATE} === 'Answered.'")
    assert (
        page.run("[...document.querySelectorAll('.thinking')].map(each => [each.hidden, each.open])")
        == [[False, False]] * 2
    )
    assert all(len(text) > 20 for text in shown(page, ".thinking .text"))
    assert shown(page, ".model > .text") == ["", ""]
    assert page.errors == []


def test_a_real_server_calls(page: Page, tiny: Server) -> None:
    page.open(tiny.url)
    kinds = {"type": "object", "properties": {"of": {"enum": ["fox", "dog"]}}, "required": ["of"]}
    fill(page, "tools", json.dumps([{"name": "count", "parameters": kinds | {"additionalProperties": False}}]))
    page.run("document.getElementById('tool-choice').value = 'required'")
    fill(page, "chat-seed", "3")
    say(page, "How many are there?")
    page.until(f"{STATE} === 'The model waits for results.' || {ERROR}")
    assert page.run(ERROR) == ""
    assert set(shown(page, ".call h4")) == {"count"}
    assert {json.loads(arguments)["of"] for arguments in shown(page, ".call pre")} <= {"fox", "dog"}
    page.run("document.getElementById('tool-choice').value = 'auto'")
    fill(page, "chat-tokens", "20")
    page.run("document.querySelectorAll('.call textarea').forEach(field => { field.value = '2'; })")
    page.run("document.querySelector('.calls button').click()")
    page.until(f"{STATE} === 'Answered.' || {ERROR}")
    assert page.run(ERROR) == ""
    assert "cached 0 of" not in page.run(FACTS)[1]
    assert page.errors == []
