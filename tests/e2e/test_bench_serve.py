"""`magicdec bench serve` against a real server: every request is counted, refused ones included."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT
from tests.support.profiles import is_all
from tests.support.servers import PATIENCE_S, Server, command, environment


def bench(tmp_path: Path, url: str, tokenizer: Path, *flags: str) -> tuple[int, list[dict[str, Any]], str]:
    """Run the benchmark. Returns its exit status, summaries and output."""
    file = tmp_path / "load.json"
    file.unlink(missing_ok=True)
    text = tmp_path / "text"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 100, encoding="utf-8")
    ran = subprocess.run(
        command(
            *("bench", "serve", "--url", url, "--tokenizer", str(tokenizer), "--text", str(text), "--json", str(file)),
            *flags,
        ),
        cwd=ROOT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    return ran.returncode, json.loads(file.read_text()) if file.exists() else [], ran.stdout + ran.stderr


def test_both_loops(tmp_path: Path, tiny: Server, tiny_model: Path) -> None:
    count = 12 if is_all() else 6
    lengths = ("--prompt", "uniform:20:60", "--output", "12", "--shared-prefix", "10", "--requests", str(count))
    drafts = ("--speculation", "on,off", "--slo", "ttft:60000")
    loops = ("--concurrency", "1,6"), ("--rate", "50,90", "--arrivals", "constant"), ("--rate", "50,200")
    for loop in loops if is_all() else loops[:2]:
        status, found, said = bench(tmp_path, f"{tiny.url}/v1", tiny_model, *lengths, *drafts, *loop)
        assert status == 0, said
        assert [each["speculation"] for each in found] == ["on", "off", "on", "off"]
        for each in found:
            assert each["fates"] == {"answered": count}
            assert each["tokens_per_s"] == pytest.approx(12 * each["requests_per_s"])
            assert each["goodput"] == each["requests_per_s"]
            assert 0 < each["ttft_ms"]["p50"] <= each["e2e_ms"]["p99"]
            assert each["tpot_ms"]["p50"] > 0
        assert "tpot95" in said


def test_conversations_and_documents(tmp_path: Path, tiny: Server, tiny_model: Path) -> None:
    """The history grows by each turn and its answer; questions about a document are as long as both."""
    chats = ("--conversations", "4", "--turns", "3", "--think", "0.01", "--shared-prefix", "20", "--prompt", "30")
    for loop in (("--rate", "50"), ("--concurrency", "2")):
        status, (found,), said = bench(tmp_path, tiny.url, tiny_model, *chats, "--output", "8", *loop)
        assert status == 0, said
        assert found["fates"] == {"answered": 12}
        assert [(turn["turn"], turn["requests"]) for turn in found["turns"]] == [(1, 4), (2, 4), (3, 4)]
        first, second, third = (turn["prompt_tokens"] for turn in found["turns"])
        assert 50 < first < second - 30 < third - 60
        assert [line["turn"] for line in found["requests"]] == [1, 2, 3] * 4
        assert all(line["ttft_ms"] > 0 for line in found["requests"])
        assert "ttft90" in said
    about = ("--documents", "2", "--questions", "3", "--document", "200", "--prompt", "10", "--output", "4")
    status, (found,), said = bench(tmp_path, tiny.url, tiny_model, *about, "--rate", "50")
    assert status == 0, said
    assert [line["prompt_tokens"] for line in found["requests"]] == [210] * 6


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--turns", "3"), "only with --conversations"),
        (("--conversations", "3", "--requests", "9"), "not with --requests"),
        (("--conversations", "3", "--documents", "9"), "not with --conversations"),
        (("--document", "500"), "only with --documents"),
        (("--documents", "5", "--shared-prefix", "9"), "documents are what prompts share"),
    ],
)
def test_flags_without_effect_are_refused(tmp_path: Path, tiny_model: Path, flags: tuple[str, ...], words: str) -> None:
    status, _, said = bench(tmp_path, "http://127.0.0.1:9", tiny_model, "--rate", "1", *flags)
    assert status == 2
    assert words in said


def test_refusals_are_counted(tmp_path: Path, launch: Callable[..., Server], tiny_model: Path) -> None:
    small = launch(max_queued_tokens=45)
    flags = ("--prompt", "20", "--output", "100", "--requests", "20", "--rate", "500")
    status, (found,), said = bench(tmp_path, small.url, tiny_model, *flags)
    assert status == 0
    assert found["fates"]["refused"] > 5
    assert found["fates"]["refused"] + found["fates"]["answered"] == 20
    assert "the queue is full: max_queued_tokens is reached" in said


def test_nobody_there(tmp_path: Path, tiny_model: Path) -> None:
    status, _, said = bench(tmp_path, "http://127.0.0.1:9", tiny_model, "--rate", "1")
    assert status == 2
    assert "no model is served there" in said
    assert "Traceback" not in said
