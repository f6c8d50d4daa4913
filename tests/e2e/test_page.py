"""The page at GET /: its security headers, and its behaviour in a browser."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.browser import CHROMIUM, Page, browser
from tests.support.servers import PLAIN, Server

in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


def test_one_page_that_asks_nobody_else(tiny: Server) -> None:
    answer = tiny.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert "connect-src 'self'" in answer.headers["content-security-policy"]
    assert not re.search(r"""(src|href)=["']""", answer.text)
    assert set(re.findall(r"https?://[^\s\"'`]*", answer.text)) == {"http://www.w3.org/2000/svg"}
    assert "{{" not in answer.text


def test_only_its_own_scripts_run(tiny: Server) -> None:
    answer = tiny.get("/")
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    for tag, count in (("script", 3), ("style", 1)):
        inline = re.findall(rf"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in inline]
        assert policy[f"{tag}-src"].split() == [f"'sha256-{digest}'" for digest in digests]
        assert len(digests) == answer.text.count(f"<{tag}") == count


def test_a_browser_keeps_its_copy(tiny: Server) -> None:
    whole = tiny.get("/")
    tag = whole.headers["etag"]
    for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        answer = httpx.get(tiny.url + "/", headers={"If-None-Match": known}, **PLAIN)
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", tag)
        assert answer.headers["content-security-policy"] == whole.headers["content-security-policy"]
    assert httpx.get(tiny.url + "/", headers={"If-None-Match": '"other"'}, **PLAIN).content == whole.content


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    with browser(tmp_path) as opened:
        yield opened


@in_a_browser
def test_the_playground_compares(page: Page, server: Server) -> None:
    page.open(server.url)
    page.run("document.getElementById('prompt').value = '1 2 3 4 5 6 7 8 9'")
    page.run("document.getElementById('tokens').value = 60")
    page.run("document.getElementById('both').click()")
    page.until("document.getElementById('verdict').textContent !== ''")
    verdict = page.run("document.getElementById('verdict').textContent")
    assert verdict.startswith("The same text; ")
    texts = [page.run(f"document.getElementById('out-{side}').textContent") for side in ("on", "off")]
    assert texts[0] == texts[1]
    assert len(texts[0]) > 20
    kinds = page.run("[...new Set([...document.querySelectorAll('#out-off span')].map(span => span.className))]")
    assert kinds == ["plain"]
    assert page.run("document.querySelectorAll('#out-on span').length") == 60
    assert page.errors == []


@in_a_browser
def test_thinking_is_compared(page: Page, thinker: Server) -> None:
    page.open(thinker.url)
    page.run("document.getElementById('kind').value = 'chat'")
    page.run("document.getElementById('tokens').value = 40")
    page.run("document.getElementById('both').click()")
    page.until("document.getElementById('verdict').textContent !== ''")
    assert page.run("document.getElementById('verdict').textContent").startswith("The same text")
    ask = {"messages": [{"role": "user", "content": page.run("document.getElementById('prompt').value")}]}
    answer = thinker.post("/v1/chat/completions", ask | {"max_tokens": 40, "temperature": 0.7, "seed": 1})
    message = answer.raise_for_status().json()["choices"][0]["message"]
    assert message["content"] == ""
    for side in ("on", "off"):
        assert (
            page.run(f"document.getElementById('out-{side}').textContent").strip()
            == message["reasoning_content"].strip()
        )
    assert page.errors == []


@in_a_browser
def test_charts_follow_and_text_is_no_markup(page: Page, tiny: Server) -> None:
    page.open(tiny.url, width=375)
    assert page.run("document.documentElement.scrollWidth") <= 375
    page.run("document.getElementById('prompt').value = '<b>x</b><script>boom()</script>'")
    page.run("document.getElementById('kind').value = 'chat'")
    page.run("document.getElementById('one').click()")
    page.until("document.getElementById('facts-on').textContent.includes('tokens in')")
    page.until("[...document.querySelectorAll('#charts b')].some(b => parseFloat(b.textContent) > 0)")
    cards = "[...document.querySelectorAll('#charts .card')]"
    names = "[...card.querySelectorAll('small')].map(name => name.textContent)"
    charts = dict(page.run(f"{cards}.map(card => [card.querySelector('h3').textContent, {names}])"))
    assert charts["KV pool, % of pages"] == ["owned", "cached"]
    assert charts["Prompt tokens from the prefix cache, %"] == ["recently", "in total"]
    assert page.run("document.querySelectorAll('.out b, .out script').length") == 0
    assert page.run("document.getElementById('state').textContent") == "ready"
    assert page.errors == []


@in_a_browser
def test_it_says_what_is_wrong(page: Page, tiny: Server) -> None:
    page.open(tiny.url)
    page.run("document.getElementById('tokens').value = 100000")
    page.run("document.getElementById('one').click()")
    page.until("document.getElementById('verdict').textContent.includes('tokens')")
    assert page.run("document.getElementById('verdict').className") == "bad"
