"""Contenders that take turns on the same rows: one process, whose requests name the drafter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.peers.compare import run
from bench.peers.compare_plan import Plan
from bench.peers.compare_report import table
from bench.peers.contenders import Peer, choose, largest_share, share_rows, variant
from bench.peers.lineup import Start
from bench.peers.process import PEERS
from bench.peers.programs.driver import load_peer
from tests.support.fake_peers import fake_peers
from tests.support.tiny import write_model

DRAFTERS = "magicdec off,magicdec auto,magicdec ngram,magicdec together"

TELLS = '''
class Peer:
    """Row r's tokens are consecutive numbers, and its log says what was asked."""

    max_batch, about, mode = None, "tells", "nobody"

    def __init__(self, settings):
        self.fatal = settings["options"].get("fatal")
        print("modes", *settings["modes"])

    def prepare(self, rows, row_tokens, temperature):
        pass

    def start(self, prompts, limit, *, together):
        print("start", self.mode)
        self.rows = [0] * len(prompts)

    def again(self, limit, temperature):
        print("again", self.mode)
        self.rows = [0] * len(self.rows)

    def step(self):
        print("step", self.mode)
        if self.mode == self.fatal:
            raise SystemExit(3)
        self.rows = [count + 1 for count in self.rows]
        return [(row, [count]) for row, count in enumerate(self.rows)]

    def stop(self):
        pass
'''


BY_TURNS = Plan(
    [(2, 20)],
    first=0,
    warm_up=1,
    new_tokens=2,
    rounds=2,
    totals=0,
    separately=True,
    temperatures=(0.0, 1.0),
    keep_prompts=True,
    turns=2,
)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with fake_peers(TELLS, tmp_path) as start_one:
        yield start_one


def test_who_shares_rows() -> None:
    """Contenders that differ in the drafter alone share rows; one that drafts in several ways serves the others."""
    int8 = "magicdec int8 KV off,magicdec int8 KV auto"
    other = variant("wide: speculation.gamma=auto speculation.kv.budget=1024 weights=dense")
    draft = variant("draft: speculation.gamma=auto speculation.model=draft weights=dense")
    voting = variant("voting: speculation.gamma=auto speculation.kv.policy=verified weights=dense")
    fixed = variant("three: speculation.gamma=3 speculation.drafter=self weights=dense")
    contenders = choose(f"{DRAFTERS},{int8},vllm", [other, draft, voting, fixed])
    found = {name: (owner.name, list(owner.modes)) for name, owner in share_rows(contenders).items()}
    together = "magicdec together", ["off", "self", "ngram", "together"]
    assert found == {
        **dict.fromkeys(DRAFTERS.split(","), together),
        **dict.fromkeys(int8.split(","), ("magicdec int8 KV auto", ["off", "self"])),
        "wide": ("wide", ["together"]),
    }
    assert largest_share(contenders) == 4
    # Without the one of several ways, only plain decoding is on another's rows.
    fewer = share_rows(choose("magicdec off,magicdec auto,magicdec ngram", []))
    assert {name: owner.name for name, owner in fewer.items()} == {
        "magicdec off": "magicdec auto",
        "magicdec auto": "magicdec auto",
    }
    assert share_rows(choose("magicdec off", [])) == {}


def test_rows_are_prefilled_once_and_decoded_by_turns(start: Start, tmp_path: Path) -> None:
    contenders = choose("magicdec off,magicdec auto,llama.cpp bf16", [])
    settings = {"threads": 1, "row_tokens": 4000}
    report = run(contenders, start, BY_TURNS, lambda n, m, s: [[1] * m] * n, settings, lambda line: None)
    assert sorted(file.stem for file in tmp_path.glob("*.log")) == ["llama.cpp bf16", "magicdec auto"]
    lines = (tmp_path / "magicdec auto.log").read_text().splitlines()
    assert lines[0] == "modes off self"
    lines = lines[lines.index("start self", lines.index("start self") + 1) :]  # after the check
    prefill, warm_up, off, auto = ["step self"], ["step self"], ["step off"] * 2, ["step self"] * 2
    turns = prefill + warm_up + off + auto + auto + off
    assert lines == ["start self", *turns, "again self", *turns]
    assert (tmp_path / "llama.cpp bf16.log").read_text().split()[0] == "modes"
    points = {(point.contender, point.temperature): point for point in report.points}
    assert {len(point.step_ms) for point in points.values()} == {2}
    assert points["magicdec off", 0.0].prefill_s == points["magicdec auto", 0.0].prefill_s
    assert points["magicdec off", 0.0].same == 1
    assert "on the rows of magicdec auto, drafts: off" in table(report)


def test_turns_that_begin_anew(start: Start, tmp_path: Path) -> None:
    """Every turn decodes the same tokens, after those that are not timed."""
    plan = replace(BY_TURNS, anew=True)
    contenders = choose("magicdec off,magicdec auto,llama.cpp bf16", [])
    settings = {"threads": 1, "row_tokens": 4000}
    report = run(contenders, start, plan, lambda n, m, s: [[1] * m] * n, settings, lambda line: None)
    lines = (tmp_path / "magicdec auto.log").read_text().splitlines()
    lines = lines[lines.index("start self", lines.index("start self") + 1) + 3 :]
    turns = [[f"again {mode}", *[f"step {mode}"] * (1 + 1 + 2)] for mode in ("off", "self", "self", "off")]
    expected = [line for turn in turns for line in turn]
    assert lines == [*expected, "again self", "step self", "step self", *expected]
    assert (tmp_path / "llama.cpp bf16.log").read_text().split().count("again") == 2 + 1 + 2
    points = {(point.contender, point.temperature): point for point in report.points}
    assert {len(point.step_ms) for point in points.values()} == {2}
    assert {point.same for (_, temperature), point in points.items() if not temperature} == {1}
    assert replace(plan, rounds=9).row_tokens(2, 20, 4000) == plan.row_tokens(2, 20, 4000)


@pytest.mark.parametrize("fatal", ["off", "self"])
@pytest.mark.parametrize("separately", [False, True])
def test_a_process_that_ends_for_one_of_them(start: Start, separately: bool, fatal: str) -> None:
    """None of those that share it can be measured any more, and the others are."""
    off, auto = choose("magicdec off,magicdec auto", [])
    off, auto = (replace(one, options={**one.options, "fatal": fatal}) for one in (off, auto))
    plan = Plan([(2, 20)], first=0, warm_up=1, new_tokens=3, rounds=2, totals=1, separately=separately, turns=2)
    settings = {"threads": 1, "row_tokens": 4000}
    contenders = [off, auto, Peer("other", "fake")]
    report = run(contenders, start, plan, lambda n, m, s: [[1] * m] * n, settings, lambda line: None)
    assert [len(point.step_ms) for point in report.points if point.contender == "other"] == [2]
    assert all(point.step_ms or point.error for point in report.points)
    assert any(entry.error for entry in report.contenders)


def test_rows_have_room_for_all_turns() -> None:
    plan = Plan([(1, 100)], first=0, warm_up=0, new_tokens=10, rounds=2, totals=0)
    assert replace(plan, turns=3).row_tokens(1, 100, 500) - plan.row_tokens(1, 100, 500) == 2 * 2 * 2 * 10


def test_magicdec_drafts_as_it_is_asked(tmp_path: Path) -> None:
    """The text goes on whoever drafts, and nobody else drafts."""
    modes = ["off", "self", "ngram", "together"]
    settings = {"model": str(write_model(tmp_path)), "threads": 1, "rows": 2, "row_tokens": 400, "seed": 0}
    owner = share_rows(choose(DRAFTERS, []))["magicdec off"]
    settings |= {"options": dict(owner.options), "modes": owner.modes, "keep_prompts": True}
    texts: dict[str, list[int]] = {}
    for order in (["off"], modes):
        peer: Any = load_peer(str(PEERS / "magicdec.py"), settings)
        peer.prepare(1, 300, 0.0)
        peer.start([[5, 6, 7, 8] * 10], 200, together=True)
        text: list[int] = []
        counts = []
        while len(text) < 160:
            peer.mode = order[len(text) // 4 % len(order)]
            before = peer._engine.stats()
            text += [token for _, new in peer.step() for token in new]
            after = peer._engine.stats()
            drafted = after.draft_tokens - before.draft_tokens
            counts.append((peer.mode, drafted > 0, after.text_draft_tokens - before.text_draft_tokens == drafted))
        texts["".join(order)] = text[:160]
        assert not any(drafted for mode, drafted, _ in counts if mode == "off")
        if len(order) > 1:
            assert {from_text for mode, drafted, from_text in counts if mode == "ngram" and drafted} == {True}
            assert not any(from_text for mode, drafted, from_text in counts if mode == "self" and drafted)
            assert {mode for mode, drafted, _ in counts if drafted} >= {"ngram"}
        peer.stop()
    assert len({tuple(text) for text in texts.values()}) == 1
